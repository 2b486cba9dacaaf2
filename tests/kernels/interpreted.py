"""The Triton forms, run by Triton's interpreter on CPU, against the plain forms in float64: values and gradients, many shapes.

Run by test_triton.py in a process of its own, since Triton reads TRITON_INTERPRET when it is imported.
"""

import random
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from megainter import kernels
from megainter.kernels.triton import gelu, layer_norm, losses

SHAPES = 200
Operation = Callable[..., Tensor]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def shapes(widest: int) -> list[tuple[int, int]]:
    """(rows, width): none, one, and whatever comes; widths around powers of two are the ones that go wrong."""
    draw = random.Random(widest)
    widths = [1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65]
    fixed = [(0, 5), (1, 1), (1, 64), (2, 1)]
    return fixed + [(draw.randint(1, 6), draw.choice([*widths, draw.randint(1, widest)])) for _ in range(SHAPES - len(fixed))]


def relative_error(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)) if b.numel() else 0.0


def compare(fused: Operation, plain: Operation, inputs: list[Tensor], limit: float) -> None:
    """Values, and the gradients under one random direction, of ``fused`` in the inputs' dtype and ``plain`` in float64."""
    results = []
    direction = None
    for operation, dtype in ((fused, None), (plain, torch.float64)):
        leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
        value = operation(*leaves)
        direction = torch.randn(value.shape, dtype=torch.float64) if direction is None else direction
        gradients = torch.autograd.grad((value * direction.to(value.dtype)).sum(), leaves)
        results.append([value.detach(), *gradients])
    for ours, theirs in zip(*results, strict=True):
        assert ours.shape == theirs.shape
        assert relative_error(ours, theirs) <= limit or float((ours.double() - theirs).abs().max()) <= limit * 1e-2


def test_dropout_add_layer_norm_over_many_shapes() -> None:
    for rows, width in shapes(100):
        inputs = [torch.randn(*size) for size in ((rows, width), (rows, width), (width,), (width,))]
        compare(
            lambda x, r, w, b: layer_norm.dropout_add_layer_norm(x, r, w, b, 1e-5, 0.0),
            lambda x, r, w, b: kernels.dropout_add_layer_norm(x, r, w, b, 1e-5, 0.0, training=False),
            inputs,
            1e-5 if width > 2 else 1e-3,  # a normalised pair is always +1 and -1: its gradient cancels out
        )


def test_linear_gelu_over_many_shapes() -> None:
    for rows, width in shapes(300):
        inner = 1 + width % 7
        inputs = [torch.randn(*size) for size in ((rows, inner), (width, inner), (width,))]
        compare(gelu.linear_gelu, kernels.linear_gelu, inputs, 1e-5)


def test_soft_label_kl_over_many_shapes() -> None:
    for rows, width in shapes(300):
        targets = torch.rand(rows, width).mul(6).softmax(-1) * (torch.rand(rows, width) > 0.3)
        fused, plain = partial(losses.soft_label_kl_rows, targets=targets, gradient=True), partial(plain_kl, t=targets.double())
        value_and_slope(fused, torch.randn(rows, width) * 3, plain)


def test_cross_entropy_over_many_shapes() -> None:
    for rows, width in shapes(300):
        labels, logits = torch.randint(0, width, (rows,)), torch.randn(rows, width) * 3

        def fused(z: Tensor, labels: Tensor = labels) -> tuple[Tensor, Tensor]:
            slopes = z.clone()
            return losses.cross_entropy_rows_(slopes, labels, True)[0], slopes

        value_and_slope(fused, logits, lambda z, y=labels: torch.nn.functional.cross_entropy(z, y, reduction="none"))


def plain_kl(z: Tensor, t: Tensor) -> Tensor:
    return torch.nn.functional.kl_div(z.log_softmax(-1), t, reduction="none").sum(-1)


def value_and_slope(fused: Callable[[Tensor], tuple[Tensor, Tensor]], logits: Tensor, plain: Callable[[Tensor], Tensor]) -> None:
    value, slope = fused(logits)
    leaf = logits.double().requires_grad_()
    expected = plain(leaf)
    (wanted,) = torch.autograd.grad(expected.sum(), leaf)
    torch.testing.assert_close(value.double(), expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(slope.double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("width", [5000, 2048, 4097])
def test_rows_longer_than_a_block(width: int) -> None:
    logits, labels, targets = torch.randn(3, width) * 5, torch.tensor([0, width - 1, 2047]), torch.randn(3, width).softmax(-1)
    loss, right = losses.cross_entropy_rows_(logits.clone(), labels, False)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, labels, reduction="none"))
    assert right.tolist() == (logits.argmax(1) == labels).float().tolist()
    torch.testing.assert_close(losses.soft_label_kl_rows(logits, targets, False)[0], plain_kl(logits, targets))


def test_bfloat16_stays_within_its_rounding() -> None:
    # the interpreter truncates where a GPU rounds to nearest: a whole unit in the last place, 2^-7
    inputs = [torch.randn(*size).bfloat16() for size in ((7, 33), (7, 33), (33,), (33,))]
    compare(
        lambda x, r, w, b: layer_norm.dropout_add_layer_norm(x, r, w, b, 1e-5, 0.0),
        lambda x, r, w, b: kernels.dropout_add_layer_norm(x, r, w, b, 1e-5, 0.0, training=False),
        inputs,
        2e-2,
    )
    compare(gelu.linear_gelu, kernels.linear_gelu, [torch.randn(*s).bfloat16() for s in ((7, 5), (33, 5), (33,))], 2e-2)


def test_dropout_keeps_the_share_and_its_gradient_uses_the_same_mask() -> None:
    p, rows, width = 0.3, 40, 64
    x = torch.full((rows, width), 2.0, requires_grad=True)
    ones, zeros = torch.ones(width), torch.zeros(width)
    layer_norm.dropout_add_layer_norm(x, torch.zeros(rows, width), ones, zeros, 1e-5, p)[:, 0].sum().backward()
    assert x.grad is not None
    dropped = (x.grad == 0).double().mean()
    assert abs(float(dropped) - p) < 4 * (p * (1 - p) / (rows * width)) ** 0.5
    torch.manual_seed(5)
    first = layer_norm.dropout_add_layer_norm(x, x, ones, zeros, 1e-5, p)
    torch.manual_seed(5)
    assert torch.equal(first, layer_norm.dropout_add_layer_norm(x, x, ones, zeros, 1e-5, p))
    assert not torch.equal(first, layer_norm.dropout_add_layer_norm(x, x, ones, zeros, 1e-5, p))


def test_dropout_gradient_by_finite_differences() -> None:
    x, residual, weight, bias = (torch.randn(*size) for size in ((3, 9), (3, 9), (9,), (9,)))
    direction = torch.randn(3, 9)

    def value(x: Tensor) -> Tensor:
        torch.manual_seed(1)  # the same mask every time
        return (layer_norm.dropout_add_layer_norm(x, residual, weight, bias, 1e-5, 0.4) * direction).sum()

    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(value(leaf), leaf)
    step = 1e-2
    for i in range(3):
        for j in range(9):
            moved = torch.zeros_like(x)
            moved[i, j] = step
            slope = (value(x + moved) - value(x - moved)) / (2 * step)
            assert float(slope) == pytest.approx(float(gradient[i, j]), abs=2e-3)
