"""What a run takes from the model it starts from, and what it refuses."""

from pathlib import Path

import pytest
import torch

from megainter.config.reading import load_config
from megainter.config.settings import RunConfig
from megainter.errors import UsageError
from megainter.model.configuration import InterBertConfig
from megainter.model.interbert import InterBertForPreTraining
from megainter.tasks.pretraining.training import starting_model
from tests.synthetic import TINY, settings

SIZES = {"vocab_size": 60, "region_feature_size": 16, "num_region_classes": 8}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start") / "model"
    torch.manual_seed(1)
    InterBertForPreTraining(InterBertConfig(**SIZES, **{**TINY, "num_text_layers": 2}, hidden_dropout_prob=0.3)).save_pretrained(folder)
    return folder


def run(start: Path, **changes: object) -> RunConfig:
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
    stated = run(start, **{"model__num_text_layers": 4})
    with pytest.raises(UsageError, match=r"num_text_layers \(2, not 4\)"):
        starting_model(stated, InterBertConfig(**SIZES, num_text_layers=4))
    with pytest.raises(UsageError, match=r"region_feature_size \(16, not 32\)"):
        starting_model(run(start), InterBertConfig(**{**SIZES, "region_feature_size": 32}))
