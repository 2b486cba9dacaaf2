"""Dropout, layer norm, GELU and the losses against formulas written out in float64."""

import math

import pytest
import torch

from megainter.kernels import (
    cross_entropy,
    cross_entropy_sum,
    dropout,
    dropout_add_layer_norm,
    linear_cross_entropy_sum,
    linear_gelu,
    soft_label_kl_sum,
    squared_error_sum,
)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("p", [0.1, 0.2, 0.5, 0.9])
def test_dropout_zeroes_with_its_probability_and_keeps_the_mean(p: float) -> None:
    n = 400_001  # not a multiple of four: the last draw is used in part
    y = dropout(torch.ones(n, dtype=torch.float64), p, training=True)
    share = float((y == 0).double().mean())
    assert abs(share - p) < 5 * math.sqrt(p * (1 - p) / n)
    assert y[y != 0].unique().numel() == 1
    assert float(y.max()) == pytest.approx(1 / (1 - p), rel=2e-4)


def test_dropout_draws_are_independent_between_neighbours_and_calls() -> None:
    first, second = (dropout(torch.ones(200_000), 0.5, training=True) == 0 for _ in range(2))
    for a, b in ((first[:-1], first[1:]), (first[:-3], first[3:]), (first, second)):
        assert abs(float((a & b).double().mean()) - 0.25) < 0.006


def test_dropout_is_identity_in_evaluation_and_at_zero() -> None:
    x = torch.randn(5, 3)
    assert dropout(x, 0.5, training=False) is x
    assert dropout(x, 0.0, training=True) is x


def test_dropout_gradient_uses_the_same_mask_and_the_seed_decides_it() -> None:
    x = torch.randn(50, 7, requires_grad=True)
    torch.manual_seed(3)
    y = dropout(x, 0.4, training=True)
    y.sum().backward()
    torch.testing.assert_close(y, x * x.grad)
    torch.manual_seed(3)
    assert torch.equal(y, dropout(x, 0.4, training=True))


def test_layer_norm_by_the_formula() -> None:
    x, residual = torch.randn(6, 8, dtype=torch.float64), torch.randn(6, 8, dtype=torch.float64)
    weight, bias = torch.randn(8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    total = x + residual
    centred = total - total.mean(1, keepdim=True)
    expected = centred / (centred.square().mean(1, keepdim=True) + 1e-3).sqrt() * weight + bias
    torch.testing.assert_close(dropout_add_layer_norm(x, residual, weight, bias, 1e-3, 0.3, training=False), expected)


def test_layer_norm_drops_the_branch_and_never_the_residual() -> None:
    residual = torch.randn(4, 64, dtype=torch.float64)
    branch = torch.full_like(residual, 1e9)
    one, zero = torch.ones(64, dtype=torch.float64), torch.zeros(64, dtype=torch.float64)
    out = dropout_add_layer_norm(branch, residual, one, zero, 1e-12, 0.5, training=True)
    # where the branch was dropped only the (tiny) residual is left: two clusters per row
    assert all(len((row > row.mean()).unique()) == 2 for row in out)


def test_layer_norm_gradients() -> None:
    args = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((3, 5), (3, 5), (5,), (5,))]
    assert torch.autograd.gradcheck(lambda x, r, w, b: dropout_add_layer_norm(x, r, w, b, 1e-12, 0.1, training=False), args)


def test_linear_gelu_by_the_error_function() -> None:
    x, weight, bias = (torch.randn(*s, dtype=torch.float64) for s in ((4, 3), (5, 3), (5,)))
    z = x @ weight.T + bias
    expected = z.clone().apply_(lambda value: value * 0.5 * (1 + math.erf(value / math.sqrt(2))))
    torch.testing.assert_close(linear_gelu(x, weight, bias), expected)


def test_cross_entropy_sum_by_hand() -> None:
    logits, labels = torch.randn(7, 9, dtype=torch.float64), torch.randint(0, 9, (7,))
    expected = sum(math.log(sum(math.exp(z) for z in row)) - row[label] for row, label in zip(logits.tolist(), labels.tolist()))
    assert float(cross_entropy_sum(logits, labels)) == pytest.approx(expected, rel=1e-6)


def test_soft_label_kl_sum_by_hand_with_certain_targets() -> None:
    logits, targets = torch.randn(3, 4), torch.tensor([[0.0, 1.0, 0.0, 0.0], [0.25] * 4, [0.5, 0.5, 0.0, 0.0]])
    expected = 0.0
    for row, target in zip(logits.double().tolist(), targets.tolist()):
        log_sum = math.log(sum(map(math.exp, row)))
        expected += sum(t * (math.log(t) - (z - log_sum)) for z, t in zip(row, target) if t > 0)
    assert float(soft_label_kl_sum(logits, targets)) == pytest.approx(expected, rel=1e-5)


def test_squared_error_sum_by_hand() -> None:
    a, b = torch.randn(3, 4), torch.randn(3, 4)
    assert float(squared_error_sum(a, b)) == pytest.approx(float(((a.double() - b.double()) ** 2).sum()), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_losses_over_no_rows_are_zero_with_a_zero_gradient(dtype: torch.dtype) -> None:
    weight = torch.randn(5, 3, dtype=dtype, requires_grad=True)
    logits = torch.zeros(0, 3, dtype=dtype) @ weight.T
    losses = [
        cross_entropy_sum(logits, torch.zeros(0, dtype=torch.int64)),
        soft_label_kl_sum(logits, torch.zeros(0, 5)),
        squared_error_sum(logits, torch.zeros(0, 5)),
    ]
    torch.stack(losses).sum().backward()
    assert all(loss.dtype == torch.float32 and float(loss.detach()) == 0 for loss in losses)
    assert weight.grad is not None
    assert not weight.grad.any()


@pytest.mark.parametrize("rows", [0, 1, 5, 11])
def test_linear_cross_entropy_in_chunks_equals_the_loss_over_all_logits(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_ROWS", 4)
    leaves = [torch.randn(*size, dtype=torch.float64, requires_grad=True) for size in ((rows, 6), (9, 6), (9,))]
    labels = torch.randint(0, 9, (rows,))
    loss, right = linear_cross_entropy_sum(*leaves, labels)
    logits = torch.nn.functional.linear(*leaves)
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    assert float(right) == float((logits.argmax(1) == labels).sum()) if rows else float(right) == 0
    for ours, theirs in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)


def test_linear_cross_entropy_refuses_a_second_derivation() -> None:
    x, weight, bias = (torch.randn(*size, requires_grad=True) for size in ((3, 6), (9, 6), (9,)))
    loss, _ = linear_cross_entropy_sum(x, weight, bias, torch.tensor([1, 2, 3]))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once only"):
        loss.backward()
