"""Mean and deviation of region features: what they are, and where they go with a model."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from megainter.config.reading import load_config
from megainter.data.feature_store import FeatureStore
from megainter.data.feature_store.record import RegionRecord, StoreSchema
from megainter.data.feature_store.writer import FeatureStoreWriter, seal_store
from megainter.errors import UsageError
from megainter.model.configuration import InterBertConfig
from megainter.model.interbert import InterBertForPreTraining
from megainter.tasks.pretraining.scaling import feature_statistics
from megainter.tasks.pretraining.starting import with_start
from tests.synthetic import TINY, settings, train, write_data
from tests.tasks.retrieval.test_evaluation import write_model


def test_mean_and_deviation_are_those_of_all_regions_in_bfloat16(tmp_path: Path) -> None:
    _, store_path = write_data(tmp_path, images=7)
    with FeatureStore(store_path) as store:
        mean, deviation = (torch.tensor(values) for values in feature_statistics(store, most=3))
        values = torch.from_numpy(np.concatenate([store[image_id].features[:3] for image_id in store.ids])).double()
    assert torch.equal(mean, values.mean(0).bfloat16().float())
    assert torch.equal(deviation, values.std(0, correction=0).bfloat16().float())


def test_numbers_that_do_not_vary_are_not_blown_up(tmp_path: Path) -> None:
    features = np.array([[3, 1, 0, 0], [3, 2, 0, 4], [3, 3, 0, 8], [3.001, 2, 0, 4]], dtype=np.float16)
    with FeatureStoreWriter(tmp_path / "s.store", StoreSchema(4, 2, ("__background__", "thing"), "d")) as writer:
        boxes, probs = np.array([[0, 0, 9, 9]] * 4, dtype=np.float32), np.full((4, 2), 0.5, np.float32)
        writer.add("image", RegionRecord(boxes=boxes, features=features, class_probs=probs, width=9, height=9))
    seal_store(tmp_path / "s.store")
    with FeatureStore(tmp_path / "s.store") as store:
        mean, deviation = feature_statistics(store, most=9)
    assert mean == [3.0, 2.0, 0.0, 4.0]
    varying = deviation[1]
    assert varying == pytest.approx(np.std([1, 2, 3, 2]), rel=0.01)
    assert deviation[3] == pytest.approx(4 * varying, rel=0.01)
    assert deviation[0] == deviation[2] == pytest.approx(np.median([0, varying, 0, 4 * varying]), rel=0.01)


def test_a_run_keeps_what_it_began_with_and_a_start_brings_its_own(tmp_path: Path) -> None:
    """Of another store too: the weights were trained behind these numbers."""
    pairs, store = write_data(tmp_path, images=24)
    given = {"model__standardize_regions": True, "model__region_feature_dropout_prob": 0.5, "training__steps": 2}
    begun = train(settings(pairs, store, tmp_path / "run", **given))
    assert begun.returncode == 0, begun.stderr
    saved = _architecture(tmp_path / "run")
    with FeatureStore(store) as opened:
        right = feature_statistics(opened, 36)
    assert (saved["region_mean"], saved["region_deviation"]) == right

    own = InterBertConfig(**{**saved, "region_mean": [1.0] * 16, "detector": None})
    start = tmp_path / "start"
    InterBertForPreTraining(own).save_pretrained(start)
    (start / "vocab.txt").write_bytes((tmp_path / "run" / "vocab.txt").read_bytes())
    (start / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    more = train(settings(pairs, store, tmp_path / "more", **given, model__start_from=start))
    assert more.returncode == 0, more.stderr
    assert _architecture(tmp_path / "more")["region_mean"] == [1.0] * 16


def test_a_start_that_was_trained_on_features_as_they_are_is_refused(tmp_path: Path) -> None:
    pairs, store = write_data(tmp_path, images=4)
    start = write_model(tmp_path / "start", pairs)
    facts = json.loads((start / "config.json").read_text())
    (start / "config.json").write_text(json.dumps(facts | {"detector": "some-detector"}))
    words = [*settings(pairs, store, tmp_path / "run"), "--model.start_from", str(start), "--model.standardize_regions", "true"]
    sizes = [f"--model.{name}" for name in TINY]
    stated = [token for i, token in enumerate(words) if token not in sizes and (not i or words[i - 1] not in sizes)]
    with pytest.raises(UsageError, match=r"trained on features of some-detector as they are: give --model\.standardize_regions false"):
        with_start(load_config(None, stated))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"region_mean": [0.0] * 4}, "belong together"),
        ({"region_mean": [0.0] * 3, "region_deviation": [1.0] * 4}, "region_mean is .* give a list of 4 numbers"),
        ({"region_mean": [0.0] * 4, "region_deviation": [1.0, 1.0, float("nan"), 1.0]}, "region_deviation is .* give a list of 4"),
        ({"region_mean": [0.0] * 4, "region_deviation": [1.0, 1.0, 0.0, 1.0]}, "give numbers above 0"),
        ({"region_feature_dropout_prob": 1.0}, "region_feature_dropout_prob is 1.0"),
    ],
)
def test_contradicting_numbers_are_refused(changes: dict, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        InterBertConfig(region_feature_size=4, **changes)


def _architecture(run: Path) -> dict:
    (folder,) = sorted((run / "checkpoints").glob("step_*"))[-1:]
    facts: dict = json.loads((folder / "config.json").read_text())
    return facts
