"""LAMB in one process: against loops in float64, over whole tensors and over flat ones, and what is refused beside it."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from megainter.config.reading import load_config
from megainter.config.settings import OptimizerConfig
from megainter.errors import UsageError
from megainter.model.interbert import InterBertForPreTraining
from megainter.training.clipping import chunk_owners, clip_each, squared_norms
from megainter.training.lamb import Lamb, Place, layout_of
from megainter.training.optimizer import build_optimizer, describe, parameter_groups
from tests.model.tiny import tiny_config

GOOD = ["--output", "run", "--data.pairs", "p.parquet", "--data.store", "s", "--training.steps", "10"]
LR, BETAS, EPS, DECAY = 0.02, (0.8, 0.95), 1e-6, 0.1
SHAPES = ((7, 5), (70_000,), (3,), (1, 1), (11, 2))  # the second has several chunks
DECAYING = (0, 1, 4)


def start() -> list[Tensor]:
    """Weights of very different norms, one of them zero: there the ratio is 1."""
    generator = torch.Generator().manual_seed(1)
    scales = (3.0, 1e-3, 1.0, 0.5, 0.0)
    return [torch.randn(shape, generator=generator) * scale for shape, scale in zip(SHAPES, scales, strict=True)]


def gradients_of(step: int) -> list[Tensor]:
    """The gradients of a step, a parameter's ten times those of the one before it."""
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(shape, generator=generator) * 10.0 ** (number - 3) for number, shape in enumerate(SHAPES)]


def textbook(steps: int, corrected: bool = True) -> list[Tensor]:
    """Algorithm 2 of the paper in float64, a tensor at a time."""
    weights = [tensor.double() for tensor in start()]
    m, v = [torch.zeros_like(w) for w in weights], [torch.zeros_like(w) for w in weights]
    for step in range(steps):
        for i, gradient in enumerate(gradients_of(step)):
            g = gradient.double()
            m[i] = BETAS[0] * m[i] + (1 - BETAS[0]) * g
            v[i] = BETAS[1] * v[i] + (1 - BETAS[1]) * g * g
            of_m, of_v = (1 - BETAS[0] ** (step + 1), 1 - BETAS[1] ** (step + 1)) if corrected else (1.0, 1.0)
            r = (m[i] / of_m) / ((v[i] / of_v).sqrt() + EPS)
            if i in DECAYING:
                r = r + DECAY * weights[i]
                if float(weights[i].norm()) > 0 and float(r.norm()) > 0:
                    r = r * float(weights[i].norm()) / float(r.norm())
            weights[i] = weights[i] - LR * r
    return weights


def assert_near(ours: list[Tensor], exact: list[Tensor]) -> None:
    for tensor, reference in zip(ours, exact, strict=True):
        error = float((tensor.detach().double().reshape(reference.shape) - reference).norm() / reference.norm())
        assert error < 1e-6


@pytest.mark.parametrize("corrected", [True, False])
def test_it_is_algorithm_2(corrected: bool) -> None:
    parameters = [nn.Parameter(tensor) for tensor in start()]
    decaying, others = [parameters[i] for i in DECAYING], [p for i, p in enumerate(parameters) if i not in DECAYING]
    lamb = Lamb([{"params": decaying, "weight_decay": DECAY}, {"params": others}], LR, BETAS, EPS)
    if not corrected:
        for parameter in parameters:
            moments = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
            lamb.state[parameter] = {"step": torch.tensor(math.inf), **moments}
    for step in range(6):
        for parameter, gradient in zip(parameters, gradients_of(step), strict=True):
            parameter.grad = gradient
        lamb.step()
    assert_near([parameter.detach() for parameter in parameters], textbook(6, corrected))


def test_over_flat_tensors_norms_are_those_of_the_parameters() -> None:
    """Parameters that decay lie in two flat tensors, one of them across both; between and behind them is padding, which stays."""
    shapes = [SHAPES[i] for i in DECAYING]
    sizes = [math.prod(shape) for shape in shapes]
    cut = 50_000
    first, second = nn.Parameter(torch.full((sizes[0] + 4 + cut,), 9.0)), nn.Parameter(torch.full((sizes[1] - cut + sizes[2] + 6,), 9.0))
    places = {
        id(first): [Place(0, 0, sizes[0]), Place(1, sizes[0] + 4, cut)],
        id(second): [Place(1, 0, sizes[1] - cut), Place(2, sizes[1] - cut, sizes[2])],
    }

    def spread(tensors: list[Tensor], padding: float) -> tuple[Tensor, Tensor]:
        a, b, c = (tensors[i].flatten() for i in DECAYING)
        return torch.cat([a, torch.full((4,), padding), b[:cut]]), torch.cat([b[cut:], c, torch.full((6,), padding)])

    lamb = Lamb([{"params": [first, second], "weight_decay": DECAY}], LR, BETAS, EPS)
    lamb.lay_out(layout_of(places, 3, torch.device("cpu"), sharded=False))
    with torch.no_grad():
        for flat, values in zip((first, second), spread(start(), 0.0), strict=True):
            flat.copy_(values)
    for step in range(4):
        first.grad, second.grad = spread(gradients_of(step), 0.0)
        lamb.step()
    exact = textbook(4)
    for flat, values in zip((first, second), spread(exact, 0.0), strict=True):
        torch.testing.assert_close(flat.detach().double(), values.double(), atol=1e-6, rtol=1e-5)


def test_what_decays_moves_by_the_rate_times_its_norm_whatever_the_gradient() -> None:
    weights = [nn.Parameter(torch.randn(40, 30) * scale) for scale in (0.02, 5.0)]
    before = [weight.detach().clone() for weight in weights]
    lamb = Lamb([{"params": weights, "weight_decay": 0.01}], 0.003, (0.9, 0.999), 1e-6)
    for weight, size in zip(weights, (1e-4, 1e3), strict=True):
        weight.grad = torch.randn(40, 30) * size
    lamb.step()
    for weight, old in zip(weights, before, strict=True):
        assert float((weight.detach() - old).norm() / old.norm()) == pytest.approx(0.003, rel=1e-5)


def test_the_settings_reach_it() -> None:
    """Decaying matrices in groups of their own, the rates of depth kept, and a line that says so."""
    settings = OptimizerConfig(name="lamb", learning_rate=0.01, weight_decay=0.2, beta1=0.8, beta2=0.9, epsilon=1e-5, layer_decay=0.5)
    model = InterBertForPreTraining(tiny_config())
    lamb = build_optimizer(model, settings, torch.device("cpu"))
    assert isinstance(lamb, Lamb)
    assert {(group["lr"], group["betas"], group["eps"]) for group in lamb.param_groups} == {(0.01, (0.8, 0.9), 1e-5)}
    assert {group["weight_decay"] for group in lamb.param_groups} == {0.2, 0.0}
    said = describe(settings, parameter_groups(model, settings))
    assert said.startswith("LAMB, decay 0.2 on matrices, rates x ")


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (["--optimizer.compat", "official"], 'stands for BertAdam, and optimizer.name is "lamb"'),
        (["--optimizer.weight_decay", "0"], "give optimizer.weight_decay above 0"),
        (["--optimizer.decay_groups", "swapped"], "leave out optimizer.decay_groups"),
    ],
)
def test_what_it_cannot_do_is_refused(tokens: list[str], words: str) -> None:
    load_config(None, [*GOOD, "--optimizer.name", "lamb"])
    with pytest.raises(UsageError) as caught:
        load_config(None, [*GOOD, "--optimizer.name", "lamb", *tokens])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_compat_in_a_recipe_is_refused_too(tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text('[optimizer]\ncompat = "official"\n')
    with pytest.raises(UsageError, match="leave one of them out"):
        load_config(recipe, [*GOOD, "--optimizer.name", "lamb"])


def test_norms_of_large_tensors_are_right_where_torchs_are_not() -> None:
    """Equal squares that fp32 adds up one by one stop counting: torch is a percent off, and so would be the ratio."""
    large = torch.full((20_000_000,), 0.013)
    exact = 0.013 * math.sqrt(20_000_000)
    assert abs(float(torch._foreach_norm([large])[0]) / exact - 1) > 1e-4, "torch has become exact: chunks are not needed any more"
    squares = squared_norms([large], chunk_owners([(1, large.numel())]), 3)
    assert float(squares[1].sqrt()) == pytest.approx(exact, rel=5e-6)
    assert squares[[0, 2]].tolist() == [0.0, 0.0]
    clip_each({0: large}, 1, 0.5, torch.device("cpu"), sharded=False)
    assert float(large[0]) == pytest.approx(0.5 / math.sqrt(20_000_000), rel=1e-5)
