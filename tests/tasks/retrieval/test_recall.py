"""Recall while a model is trained: against scores one by one, over ranks and stages, and against `megainter evaluate retrieval`."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megainter.config.reading import load_config, read_settings
from megainter.data.feature_store import FeatureStore
from megainter.errors import UsageError
from megainter.files import renew_checksums
from megainter.model.folder import read_config, read_vocabulary
from megainter.model.interbert import InterBertForRetrieval
from megainter.tasks.retrieval import evaluation
from megainter.tasks.retrieval.learning import learn_both
from megainter.tasks.retrieval.options import RetrievalEvaluation
from megainter.tasks.retrieval.recall import HeldOut, open_held_out, recall_figures
from megainter.tasks.retrieval.settings import RetrievalConfig
from megainter.training.loop import log
from megainter.training.metrics import read_metrics
from megainter.training.world import World
from tests.synthetic import NO_DROPOUT, settings, train, write_data
from tests.tasks.retrieval.test_evaluation import write_model
from tests.tasks.retrieval.test_ranking import brute_force
from tests.tasks.retrieval.tuning import Data, arguments, finetune

ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """A model with vectors; 15 images of the split val with three captions each."""
    folder = tmp_path_factory.mktemp("recall")
    pairs, store = write_data(folder, images=60, captions=3)
    return write_model(folder / "model", pairs, itc_size=8), pairs, store


@pytest.fixture
def group() -> Iterator[None]:
    """A group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def engine_of(model: InterBertForRetrieval) -> Any:
    return SimpleNamespace(module=SimpleNamespace(model=model), device=ALONE.device)


def held_out(data: Data, images: int = 100) -> HeldOut:
    vocabulary = read_vocabulary(data[0], read_config(data[0]))
    return open_held_out(data[1], FeatureStore(data[2]), "val", images, 2, vocabulary, 20, 5, 0.0)


def test_a_gallery_too_small_to_say_much_says_so(data: Data) -> None:
    told = held_out(data).told("val")
    images = len(held_out(data).gallery.image_ids)
    assert told.endswith(f"images of split 'val'; so few say little: by chance R@1 is {1 / images:.3f}")
    many = dataclasses.replace(held_out(data).gallery, image_ids=[str(number) for number in range(50)])
    assert dataclasses.replace(held_out(data), gallery=many).told("val").endswith("against 50 images of split 'val'")


def recalls(ranks: list[int]) -> list[float]:
    return [float(np.mean(np.array(ranks) <= k)) for k in (1, 5, 10)]


def figures_of(found: dict[str, float], name: str) -> list[float]:
    return [found[f"{name}_r_at_{k}"] for k in (1, 5, 10)]


@pytest.mark.parametrize("keep", [None, 10])
def test_recalls_are_those_of_scores_one_by_one(keep: int | None, data: Data, group: None) -> None:
    """Of a gallery that is cut to 13 images, so that 10 candidates are not all."""
    gallery, model = held_out(data, 13), InterBertForRetrieval.from_pretrained(data[0]).eval()
    found = recall_figures(engine_of(model), gallery, keep, ALONE)
    texts, own = gallery.gallery.texts(), gallery.gallery.image_of_caption
    records = [gallery.store[image_id] for image_id in gallery.gallery.image_ids]
    processor_of = {"max_text_tokens": 20, "max_regions": 5}
    processor = evaluation_processor(data, **processor_of)
    log_odds = np.stack([model.score(texts, record, processor).numpy() for record in records])
    logits = (model.encode_images(records, processor) @ model.encode_texts(texts, processor).T).numpy() / 0.07

    def among(scores: np.ndarray, axis: int) -> np.ndarray:
        """The scores of the nearest by vectors along an axis; the rest is worse than all."""
        near = np.argsort(np.argsort(-logits, axis=axis, kind="stable"), axis=axis) < (keep or 10**6)
        return np.where(near, scores, -1e9)

    assert figures_of(found, "vectors_text_to_image") == recalls(brute_force(logits, own)[0])
    assert figures_of(found, "vectors_image_to_text") == recalls(brute_force(logits, own)[1])
    for prefix, scores in (("", log_odds), ("both_", log_odds + logits)):
        assert figures_of(found, f"{prefix}text_to_image") == recalls(brute_force(among(scores, 0), own)[0])
        assert figures_of(found, f"{prefix}image_to_text") == recalls(brute_force(among(scores, 1), own)[1])


def evaluation_processor(data: Data, **lengths: int) -> Any:
    from megainter.model.processor import InterBertProcessor

    config = read_config(data[0])
    return InterBertProcessor(read_vocabulary(data[0], config), config.region_feature_size, **lengths)


def test_a_model_without_vectors_is_measured_by_matching_alone(data: Data, group: None) -> None:
    config = read_config(data[0])
    config.itc_size = 0
    model = InterBertForRetrieval.from_pretrained(data[0], config=config).eval()
    found = recall_figures(engine_of(model), held_out(data), None, ALONE)
    assert set(found) == {f"{way}_r_at_{k}" for way in ("text_to_image", "image_to_text") for k in (1, 5, 10)}


GALLERY = {"validation__images": 12, "validation__captions_per_image": 2, "validation__every_steps": 8, "training__log_every": 8}
CONTRAST = {"training__itc_weight": 1, "model__itc_size": 12, "validation__candidates": 10, "training__steps": 24}


@pytest.mark.slow
def test_pretraining_measures_recall_and_keeps_the_best(tmp_path: Path) -> None:
    """Alike on one process and on two at ZeRO stage 3; and what stands in the metrics is what evaluation finds of the best checkpoint."""
    pairs, store = write_data(tmp_path, images=56)
    given = GALLERY | CONTRAST | NO_DROPOUT | {"validation__best_by": "both_text_to_image_r_at_1"}
    for name, processes, stage in (("one", 1, 1), ("two", 2, 3)):
        done = train(settings(pairs, store, tmp_path / name, engine__zero_stage=stage, **given), processes)
        assert done.returncode == 0, done.stderr
    one, two = (read_metrics(tmp_path / name / "metrics.jsonl", "validation") for name in ("one", "two"))
    assert [record["step"] for record in one] == [8, 16, 24]
    for name in (name for name in one[0] if "r_at_" in name):
        assert [record[name] for record in one] == pytest.approx([record[name] for record in two], abs=1.5 / 12), name

    best = max(one, key=lambda record: record["both_text_to_image_r_at_1"])
    checkpoint = tmp_path / "one" / "best" / f"step_{best['step']:07d}"
    command = [sys.executable, "-m", "megainter", "convert", "zero", checkpoint, tmp_path / "model"]
    assert subprocess.run(command, check=False).returncode == 0
    options = {"split": "val", "images": 12, "captions_per_image": 2, "prefilter": 10, "precision": "fp32", "processes": 1}
    report = evaluation.evaluate(
        tmp_path / "model", RetrievalEvaluation(pairs=pairs, store=store, output=tmp_path / "scores.json", **options)
    )
    assert report.prefilter is not None
    assert report.both_stages is not None
    for prefix, of in (("", report), ("both_", report.both_stages)):
        for way in ("text_to_image", "image_to_text"):
            for k in (1, 5, 10):
                assert best[f"{prefix}{way}_r_at_{k}"] == getattr(getattr(of, way), f"r_at_{k}"), (prefix, way, k)


@pytest.mark.slow
def test_fine_tuning_measures_both_stages_and_learns_their_weight(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pairs, store = write_data(tmp_path, images=108)
    done = train(settings(pairs, store, tmp_path / "run", **CONTRAST))
    assert done.returncode == 0, done.stderr
    command = [sys.executable, "-m", "megainter", "convert", "zero", tmp_path / "run", tmp_path / "model"]
    assert subprocess.run(command, check=False).returncode == 0
    changes = {"validation__best_by": "vectors_text_to_image_r_at_1", "validation__captions_per_image": 2, "validation__candidates": 10}
    done = finetune(arguments((tmp_path / "model", pairs, store), tmp_path / "tuned", **changes))
    assert done.returncode == 0, done.stderr
    records = read_metrics(tmp_path / "tuned" / "metrics.jsonl", "validation")
    state = json.loads(next((tmp_path / "tuned" / "best").glob("step_*/trainer.json")).read_text())
    name = "vectors_text_to_image_r_at_1"
    assert state["validation"][name] == max(record[name] for record in records)

    learned = json.loads((tmp_path / "tuned" / "model" / "both_stages.json").read_text())
    assert (learned["images"], learned["captions"], learned["split"]) == (27, 54, "val")
    assert "both_stages.json" in json.loads((tmp_path / "tuned" / "model" / "checksums.json").read_text())
    options = {"split": "val", "prefilter": 10, "processes": 1}
    report = evaluation.evaluate(
        tmp_path / "tuned" / "model", RetrievalEvaluation(pairs=pairs, store=store, output=tmp_path / "scores.json", **options)
    )
    assert report.both_stages is not None
    assert (report.both_stages.weight, report.both_stages.temperature) == (learned["weight"], learned["temperature"])

    (tmp_path / "tuned" / "model" / "both_stages.json").unlink()
    renew_checksums(tmp_path / "tuned" / "model")
    few = arguments((tmp_path / "model", pairs, store), tmp_path / "tuned", **changes | {"validation__images": 5})
    with caplog.at_level("WARNING", log.name):
        learn_both(tmp_path / "tuned" / "model", read_settings(RetrievalConfig, None, [*map(str, few)]))
    assert "10 validation captions are too few to learn how much each stage counts by" in caplog.text
    assert not (tmp_path / "tuned" / "model" / "both_stages.json").exists()


def test_what_recall_cannot_be_is_refused(tmp_path: Path) -> None:
    for changes, words in (
        ({"validation__best_by": "text_to_image_r_at_1"}, r"give validation\.images"),
        ({"validation__images": 5, "validation__best_by": "both_text_to_image_r_at_1"}, r"training\.itc_weight above 0"),
        ({"validation__images": 5, "validation__candidates": 10}, r"validation\.candidates are chosen by vectors"),
    ):
        with pytest.raises(UsageError, match=words):
            load_config(None, settings(tmp_path, tmp_path, tmp_path / "run", **changes))
