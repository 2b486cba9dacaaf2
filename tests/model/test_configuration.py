"""Defaults, validation and the size of the official model."""

import subprocess
import sys

import pytest
import torch

import megainter
from megainter import InterBertConfig, InterBertForPreTraining, InterBertModel
from megainter.conversion.official_names import official_names
from megainter.errors import UsageError


def test_the_default_is_the_official_base_model() -> None:
    with torch.device("meta"):
        model = InterBertForPreTraining(InterBertConfig())
    assert sum(p.numel() for p in model.parameters()) == 157_021_565
    assert sum(p.numel() for p in model.interbert.parameters()) == 154_573_568
    assert len(model.state_dict()) == 317
    assert len(set(official_names(list(model.state_dict()), model.config).values())) == 317


def test_predicting_features_instead_of_classes_has_the_official_size() -> None:
    with torch.device("meta"):
        model = InterBertForPreTraining(InterBertConfig(region_objective="feature"))
    assert sum(p.numel() for p in model.parameters()) == 157_365_308


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 100}, "num_attention_heads"),
        ({"num_region_attention_heads": 7}, "num_region_attention_heads"),
        ({"fusion": "concat"}, "'mul', 'sum'"),
        ({"region_objective": "pixels"}, "region_objective"),
        ({"hidden_dropout_prob": 1.0}, "hidden_dropout_prob"),
        ({"num_text_layers": -1}, "num_text_layers"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"pooler_size": 12.5}, "whole number"),
        ({"max_regions": 0}, "max_regions"),
    ],
)
def test_contradictions_are_one_clear_line(changes: dict, words: str) -> None:
    with pytest.raises(UsageError) as error:
        InterBertConfig(**changes)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_import_of_megainter_is_light() -> None:
    code = "import sys, megainter; print([m for m in ('torch', 'transformers', 'deepspeed', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_public_names() -> None:
    assert megainter.InterBertModel is InterBertModel
    assert set(megainter.__all__) <= set(dir(megainter))
    with pytest.raises(AttributeError, match="InterBerd"):
        megainter.InterBerd  # noqa: B018
