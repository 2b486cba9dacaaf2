"""Gradient checkpointing under every transformers that pyproject.toml allows: version 5.23 renamed the method."""

from typing import Any

import pytest
import torch

from megainter import InterBertConfig, InterBertForPreTraining
from megainter.training.loop import _recompute_activations
from tests.synthetic import TINY


class Renamed:
    """A model as transformers 5.17 and 5.23 have it: the same switch under the older or the newer name alone."""

    def __init__(self, model: Any, name: str) -> None:
        switch = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        setattr(self, name, switch)


@pytest.mark.parametrize("name", ["gradient_checkpointing_enable", "activation_checkpointing_enable"])
def test_layers_recompute_under_either_name(name: str) -> None:
    torch.manual_seed(0)
    model = InterBertForPreTraining(InterBertConfig(vocab_size=60, region_feature_size=16, num_region_classes=8, **TINY))
    _recompute_activations(Renamed(model, name))  # type: ignore[arg-type]
    assert model.is_gradient_checkpointing
    assert all(layer.gradient_checkpointing for layer in model.interbert.encoder.interaction)
