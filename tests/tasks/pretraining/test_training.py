"""What a run takes from the model it starts from, and what it refuses; and objectives that a run leaves out."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megainter.config.reading import load_config, read_settings
from megainter.config.settings import RunConfig, StartConfig
from megainter.data.feature_store import FeatureStore
from megainter.errors import UsageError
from megainter.model.configuration import InterBertConfig
from megainter.model.interbert import InterBertForPreTraining, InterBertForRetrieval
from megainter.tasks.classification.settings import ClassificationConfig
from megainter.tasks.pretraining.sources import check_store
from megainter.tasks.pretraining.starting import with_start
from megainter.tasks.pretraining.training import _too_few_steps, starting_model
from megainter.tasks.retrieval.settings import RetrievalConfig
from megainter.tasks.starting import open_start
from megainter.tasks.vcr.settings import VcrConfig
from megainter.training.job import trained_on_what_is_validated
from tests.synthetic import TINY, settings, train, write_data
from tests.tasks.retrieval.test_evaluation import write_model

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{number}" for number in range(50))]
SIZES = {"vocab_size": 60, "region_feature_size": 16, "num_region_classes": 8}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start") / "model"
    torch.manual_seed(1)
    InterBertForPreTraining(InterBertConfig(**SIZES, **{**TINY, "num_text_layers": 2}, hidden_dropout_prob=0.3)).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    return folder


def run(start: Path | None, **changes: object) -> RunConfig:
    """A tiny run that starts from ``start`` and states no size of the model but those in ``changes``."""
    given = settings(Path("p"), Path("s"), Path("o"), model__start_from=start, **changes)
    pairs = [(given[i], given[i + 1]) for i in range(0, len(given), 2)]
    kept = [pair for pair in pairs if pair[0].removeprefix("--model.") not in TINY or f"model__{pair[0][8:]}" in changes]
    return load_config(None, [token for pair in kept for token in pair])


def test_architecture_and_weights_are_the_start_s_and_dropouts_the_run_s(start: Path) -> None:
    config = run(start, model__attention_probs_dropout_prob=0.0, data__max_regions=5)
    model = starting_model(config, InterBertConfig(**SIZES, max_regions=5, attention_probs_dropout_prob=0.0))
    assert (model.config.num_text_layers, model.config.hidden_size) == (2, TINY["hidden_size"])
    assert (model.config.hidden_dropout_prob, model.config.attention_probs_dropout_prob, model.config.max_regions) == (0.1, 0.0, 5)
    saved = InterBertForPreTraining.from_pretrained(start)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), saved.parameters(), strict=True))


def test_what_contradicts_the_start_is_refused(start: Path) -> None:
    with pytest.raises(UsageError, match=r"num_text_layers \(2, not 4\); leave them out"):
        with_start(run(start, model__num_text_layers=4))
    with pytest.raises(UsageError, match=r"region_feature_size \(16, not 32\)"):
        with_start(run(start, model__region_feature_size=32))


def test_a_start_brings_its_sizes_its_vocabulary_and_its_casing(start: Path) -> None:
    begun = with_start(run(start))
    assert (begun.model.num_text_layers, begun.model.hidden_size, begun.model.vocab_size) == (2, TINY["hidden_size"], 60)
    assert (begun.data.vocabulary, begun.data.lowercase) == (start / "vocab.txt", False)
    assert begun.model.hidden_dropout_prob == 0.1  # the run's


def test_a_start_on_the_command_line_takes_the_place_of_a_recipes_sizes(start: Path) -> None:
    paths = ["--data.pairs", "p", "--data.store", "s", "--output", "o"]
    recipe = load_config(Path("small"), [*paths, "--model.start_from", str(start)])
    assert with_start(recipe).model.hidden_size == TINY["hidden_size"]
    assert recipe.model.region_hidden_dropout_prob == 0.1  # the recipe's: no size
    stated = load_config(Path("small"), [*paths, "--model.start_from", str(start), "--model.hidden_size", "64"])
    with pytest.raises(UsageError, match=r"hidden_size \(32, not 64\)"):
        with_start(stated)
    assert load_config(Path("small"), [*paths, "--model.start_from", "none"]).model.hidden_size == 256


def test_a_recipes_vectors_give_way_only_to_a_start_that_has_some(start: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        '[model]\nstart_from = "elsewhere"\nitc_pooling = "mean"\nhidden_size = 64\n[training]\nsteps = 1\nitc_weight = 1.0\n'
    )
    words = ["--data.pairs", "p", "--data.store", "s", "--output", "o", "--model.start_from"]
    with_vectors = tmp_path / "with-vectors"
    shutil.copytree(start, with_vectors)
    facts = json.loads((start / "config.json").read_text())
    (with_vectors / "config.json").write_text(json.dumps(facts | {"itc_size": 24, "itc_pooling": "first"}))

    begun = with_start(load_config(recipe, [*words, str(start)])).model
    assert (begun.hidden_size, begun.itc_pooling) == (TINY["hidden_size"], "mean")
    gone_on = with_start(load_config(recipe, [*words, str(with_vectors)])).model
    assert (gone_on.itc_size, gone_on.itc_pooling) == (24, "first")


def test_another_vocabulary_than_the_starts_is_refused(start: Path, tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join([*WORDS[:-1], "other"]) + "\n")
    with pytest.raises(UsageError, match=r"is not that of model.start_from.*convert hf"):
        with_start(run(start, data__vocabulary=tmp_path / "vocab.txt"))
    assert with_start(run(start, data__vocabulary=start / "vocab.txt")).data.lowercase is False


def test_a_start_of_another_detector_is_refused_with_a_remedy(start: Path, tmp_path: Path) -> None:
    _, store = write_data(tmp_path, images=4)
    with FeatureStore(store) as opened:
        check_store(with_start(run(start)), opened)
        wider = InterBertForPreTraining(InterBertConfig(**{**SIZES, "num_region_classes": 9}, **TINY))
        wider.save_pretrained(tmp_path / "wider")
        for name in ("vocab.txt", "tokenizer_config.json"):
            (tmp_path / "wider" / name).write_bytes((start / name).read_bytes())
        with pytest.raises(UsageError, match=r"num_region_classes 9, the features .* have 8: .*convert bert BERT START --store"):
            check_store(with_start(run(tmp_path / "wider")), opened)


def test_vectors_begin_anew_are_kept_or_left_behind(start: Path, tmp_path: Path) -> None:
    contrast, plain = run(start, training__itc_weight=1.0), run(start)
    torch.manual_seed(5)
    assert with_start(contrast).model.itc_size == 256, "a start without vectors says nothing of their width"
    fresh = starting_model(contrast, InterBertConfig(**SIZES, itc_size=256))
    assert fresh.itc_head is not None
    assert fresh.config.itc_size == 256
    assert fresh.itc_head.log_scale.item() == pytest.approx(2.6592, abs=1e-4)
    assert 0.01 < float(fresh.itc_head.text.weight.detach().std()) < 0.03
    assert not fresh.itc_head.text.bias.any()

    own = InterBertForPreTraining(InterBertConfig(**SIZES, **{**TINY, "num_text_layers": 2}, itc_size=12))
    own.save_pretrained(tmp_path / "own")
    for name in ("vocab.txt", "tokenizer_config.json"):
        (tmp_path / "own" / name).write_bytes((start / name).read_bytes())
    contrast, plain = (replace(config, model=replace(config.model, start_from=tmp_path / "own")) for config in (contrast, plain))
    assert with_start(contrast).model.itc_size == 12
    kept = starting_model(contrast, InterBertConfig(**SIZES, itc_size=12))
    assert kept.itc_head is not None
    assert own.itc_head is not None
    assert torch.equal(kept.itc_head.region.weight, own.itc_head.region.weight)
    left = starting_model(plain, InterBertConfig(**SIZES))
    assert (left.itc_head, left.config.itc_size) == (None, 0)
    with pytest.raises(UsageError, match=r"itc_size \(12, not 24\)"):
        with_start(replace(contrast, model=replace(contrast.model, itc_size=24)))
    with pytest.raises(UsageError, match=r"itc_pooling \(first, not mean\)"):
        with_start(replace(contrast, model=replace(contrast.model, itc_pooling="mean")))


def test_fine_tuning_leaves_the_vectors_behind(tmp_path: Path) -> None:
    pairs, _ = write_data(tmp_path, images=4)
    folder = write_model(tmp_path / "model", pairs, itc_size=8)
    opened = open_start(StartConfig(start_from=folder), tmp_path / "run", None, None, None)
    model = opened.build(InterBertForRetrieval, None)
    assert (model.itc_head, model.config.itc_size) == (None, 0)


def test_validation_on_what_is_trained_on_is_told_in_every_task() -> None:
    told = "validation is on what is trained on, split 'val': its figures say nothing of others"
    assert trained_on_what_is_validated(run(None, data__split="val")) == told
    assert trained_on_what_is_validated(run(None)) is None
    assert trained_on_what_is_validated(run(None, data__split="val", validation__pairs="others.parquet")) is None
    for kind, table in ((RetrievalConfig, "pairs"), (VcrConfig, "questions"), (ClassificationConfig, "examples")):
        length = ["--training.steps", "5", "--training.global_batch", "64"]
        given = ["--model.start_from", "m", f"--data.{table}", "t", "--output", "o", *length]
        given += [] if kind is ClassificationConfig else ["--data.store", "s"]
        assert trained_on_what_is_validated(read_settings(kind, None, given)) is None
        assert trained_on_what_is_validated(read_settings(kind, None, [*given, "--data.split", "val"])) == told


def test_epochs_that_are_hardly_any_steps_are_told_and_steps_that_were_asked_for_are_not(start: Path) -> None:
    def told(config: RunConfig, samples: int) -> str:
        return " ".join(_too_few_steps(config, samples))

    few = run(None, training__steps=None, training__epochs=20, training__global_batch=128)
    assert told(few, 82).startswith("13 steps (20 epochs of 82 captions) teach fresh weights next to nothing: give --training.steps 150")
    assert told(few, 640) == ""
    assert told(run(None, training__steps=13), 82) == ""
    assert told(run(start, training__steps=None, training__epochs=20), 82) == "", "a start knows something"


def test_matching_alone_trains_on_two_ranks_and_says_nothing_of_masks(tmp_path: Path) -> None:
    """Heads without a single masked token or region take part in every collective all the same."""
    pairs, store = write_data(tmp_path / "data")
    alone = {
        "training__msm_weight": 0,
        "training__mrm_weight": 0,
        "training__steps": 3,
        "engine__zero_stage": 2,
        "validation__every_steps": 3,
    }
    done = train(settings(pairs, store, tmp_path / "run", **alone), processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {line["kind"] for line in lines} >= {"train", "validation"}
    for line in lines:
        assert {key for key in line if key.endswith(("_loss", "_accuracy"))} in (set(), {"itm_loss", "itm_accuracy"})
    assert all(line["loss"] == pytest.approx(line["itm_loss"]) for line in lines if "loss" in line)
