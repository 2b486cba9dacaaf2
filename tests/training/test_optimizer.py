"""Parameter groups and the schedule, against what they are said to be."""

import pytest
import torch
from torch import nn

from megainter.config import OptimizerConfig
from megainter.model.interbert import InterBertForPreTraining
from megainter.training.optimizer import build_adamw, learning_rate, parameter_groups
from tests.model.tiny import tiny_config


def test_every_parameter_is_in_one_group_and_only_matrices_decay() -> None:
    model = InterBertForPreTraining(tiny_config())
    decayed, plain = parameter_groups(model, 0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert sorted(id(p) for group in (decayed, plain) for p in group["params"]) == sorted(names)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert all(parameter.ndim == 2 for parameter in decayed["params"])
    assert all(parameter.ndim == 1 for parameter in plain["params"])


def test_adamw_step_is_the_textbook_one() -> None:
    """One update with decoupled decay and bias correction, by hand."""
    layer = nn.Linear(3, 2)
    before = layer.weight.detach().clone()
    settings = OptimizerConfig(learning_rate=0.1, weight_decay=0.5, epsilon=1e-6)
    optimizer = build_adamw(layer, settings, torch.device("cpu"))
    layer(torch.ones(1, 3)).sum().backward()
    gradient = layer.weight.grad
    assert gradient is not None
    optimizer.step()
    expected = before * (1 - 0.1 * 0.5) - 0.1 * gradient / (gradient.abs() + 1e-6)
    assert torch.allclose(layer.weight, expected, atol=1e-6)


@pytest.mark.parametrize("total", [1, 7, 100, 1001])
def test_schedule_rises_to_the_peak_and_falls_to_the_end(total: int) -> None:
    settings = OptimizerConfig(learning_rate=2.0, warmup=0.1, final_fraction=0.25)
    rates = [learning_rate(settings, step, total) for step in range(total)]
    peak = rates.index(max(rates))
    assert max(rates) == 2.0
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert learning_rate(settings, total, total) == pytest.approx(0.5)
    assert min(rates) > 0
