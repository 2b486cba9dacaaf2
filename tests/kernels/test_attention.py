"""Packed attention against a loop over sequences and heads in float64."""

import math
import pickle

import pytest
import torch

from megainter.kernels import QueryRows, SequenceLayout, attend, attention_choice, attention_forms, choices, varlen_attention
from megainter.kernels import attention as attention_module

CPU = torch.device("cpu")
LENGTHS = {
    "ragged": [3, 1, 7, 2],
    "equal": [4, 4, 4],
    "one sequence": [5],
    "one row": [1],
    "length one each": [1, 1, 1],
    "an empty sequence between": [2, 0, 3],
}


def rows(lengths: list[int], heads: int, width: int, seed: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(sum(lengths), heads, width, generator=generator, dtype=dtype) for _ in range(3)]


def layout_of(lengths: list[int]) -> SequenceLayout:
    return SequenceLayout.of(torch.tensor(lengths), CPU)


def by_hand(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    out, start = torch.zeros_like(q), 0
    for length in lengths:
        for i in range(start, start + length):
            for head in range(q.shape[1]):
                weights = [math.exp(float(q[i, head] @ k[j, head]) / math.sqrt(q.shape[2])) for j in range(start, start + length)]
                out[i, head] = sum(w * v[start + n, head] for n, w in enumerate(weights)) / sum(weights)
        start += length
    return out


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_equals_a_loop_over_sequences(lengths: list[int]) -> None:
    q, k, v = rows(lengths, heads=3, width=4, seed=1)
    torch.testing.assert_close(varlen_attention(q, k, v, layout_of(lengths), 0.5, training=False), by_hand(q, k, v, lengths))


@pytest.mark.parametrize("lengths", [[3, 1, 2], [2, 2]], ids=["ragged", "equal"])
def test_gradients_and_their_gradients(lengths: list[int]) -> None:
    inputs = [x.requires_grad_() for x in rows(lengths, heads=2, width=3, seed=2)]
    layout = layout_of(lengths)
    packed = lambda q, k, v: varlen_attention(q, k, v, layout, 0.0, training=True)  # noqa: E731
    assert torch.autograd.gradcheck(packed, inputs)
    assert torch.autograd.gradgradcheck(packed, inputs)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_the_sdpa_form_agrees(lengths: list[int]) -> None:
    q, k, v = rows(lengths, heads=3, width=4, seed=3)
    layout = layout_of(lengths)
    sdpa = attend(attention_module.SDPA, q, k, v, layout, 0.0)
    torch.testing.assert_close(sdpa, by_hand(q, k, v, lengths))


ASKED = {
    "some of each": ([3, 1, 7, 2], [0, 2, 3, 5, 6, 10, 12]),
    "none of a sequence": ([3, 1, 7, 2], [1, 12]),
    "the first of each": ([3, 1, 7, 2], [0, 3, 4, 11]),
    "a row twice": ([3, 2], [0, 0, 4]),
    "none": ([3, 2], []),
    "an empty sequence between": ([2, 0, 3], [1, 2, 4]),
    "equal": ([4, 4], [0, 3, 5]),
}


@pytest.mark.parametrize(("lengths", "asked"), ASKED.values(), ids=ASKED)
def test_rows_that_ask_get_what_all_rows_would_get(lengths: list[int], asked: list[int]) -> None:
    q, k, v = (x.requires_grad_() for x in rows(lengths, heads=3, width=4, seed=5))
    layout, wanted = layout_of(lengths), torch.tensor(asked, dtype=torch.int64)
    queries = QueryRows.of(wanted, layout)
    expected = by_hand(q, k, v, lengths)[wanted]
    some = varlen_attention(q[wanted], k, v, layout, 0.5, training=False, queries=queries)
    torch.testing.assert_close(some, expected)
    torch.testing.assert_close(attend(attention_module.SDPA, q[wanted], k, v, layout, 0.0, queries), expected)
    if asked:
        packed = lambda q, k, v: varlen_attention(q, k, v, layout, 0.0, True, queries)  # noqa: E731
        assert torch.autograd.gradcheck(packed, [q[wanted].detach().requires_grad_(), k, v])


def test_sequences_do_not_see_each_other() -> None:
    lengths = [3, 6, 2]
    q, k, v = rows(lengths, heads=2, width=4, seed=4)
    before = varlen_attention(q, k, v, layout_of(lengths), 0.0, training=False)
    for x in (q, k, v):
        x[3:9] = 1e4
    after = varlen_attention(q, k, v, layout_of(lengths), 0.0, training=False)
    assert torch.equal(before[:3], after[:3])
    assert torch.equal(before[9:], after[9:])


def test_no_rows_give_no_rows_and_zero_gradients() -> None:
    q, k, v = (torch.zeros(0, 2, 4, requires_grad=True) for _ in range(3))
    out = varlen_attention(q, k, v, layout_of([0, 0]), 0.1, training=True)
    out.sum().backward()
    assert out.shape == (0, 2, 4)
    assert all(x.grad is not None for x in (q, k, v))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_stays_close(dtype: torch.dtype) -> None:
    lengths = [5, 1, 9]
    q, k, v = rows(lengths, heads=2, width=8, seed=5)
    out = varlen_attention(*(x.to(dtype) for x in (q, k, v)), layout_of(lengths), 0.0, training=False)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), by_hand(q, k, v, lengths), atol=0.03, rtol=0.03)


def test_dropout_is_unbiased_repeatable_and_off_in_evaluation() -> None:
    lengths = [6, 4]
    q, k, v = rows(lengths, heads=2, width=4, seed=6)
    layout = layout_of(lengths)
    exact = varlen_attention(q, k, v, layout, 0.3, training=False)
    torch.manual_seed(0)
    draws = torch.stack([varlen_attention(q, k, v, layout, 0.3, training=True) for _ in range(3000)])
    torch.manual_seed(0)
    assert torch.equal(draws[0], varlen_attention(q, k, v, layout, 0.3, training=True))
    assert not torch.equal(draws[0], draws[1])
    error = draws.std(0) / 3000**0.5
    assert ((draws.mean(0) - exact).abs() < 6 * error).all()


def test_layout_places() -> None:
    layout = layout_of([2, 0, 3])
    assert layout.max_length == 3
    assert layout.cu_seqlens.dtype == torch.int32
    assert layout.cu_seqlens.tolist() == [0, 2, 2, 5]
    assert layout.sequence.tolist() == [0, 0, 2, 2, 2]
    assert layout.position.tolist() == [0, 1, 0, 1, 2]
    assert attention_module._padded_places(layout, 1).tolist() == [0, 1, 6, 7, 8]
    assert attention_module._padded_places(layout, 2).tolist() == [0, 3, 1, 4, 12, 15, 13, 16, 14, 17]
    assert layout_of([2, 2]).key_bias is None


def test_key_bias_is_zero_at_keys_and_masks_padding() -> None:
    bias = layout_of([2, 0, 3]).key_bias
    assert bias is not None
    assert bias.tolist() == [[0.0, 0.0, -30000.0], [-30000.0] * 3, [0.0] * 3]


def test_a_layout_moves_between_devices_and_processes_without_its_padded_bias() -> None:
    layout = layout_of([2, 0, 3])
    assert layout.to(CPU) is layout
    assert layout.key_bias is layout.key_bias
    moved = layout.to(torch.device("meta"))
    assert {tensor.device.type for tensor in (moved.cu_seqlens, moved.sequence, moved.position)} == {"meta"}
    assert moved.lengths.tolist() == [2, 0, 3]  # stays on the CPU
    assert "key_bias" not in vars(moved)
    sent = pickle.loads(pickle.dumps(layout_of([2, 0, 3])))
    assert "key_bias" not in vars(sent)
    assert torch.equal(sent.position, layout.position)


def test_choice_and_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda", 0)
    assert "SDPA on CPU" in attention_choice(CPU, torch.float32, 0.1).why
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    assert attention_choice(cuda, torch.float16, 0.0).form == attention_module.SDPA
    assert "capability" in attention_choice(cuda, torch.float16, 0.0).why
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert attention_choice(cuda, torch.bfloat16, 0.0).form == attention_module.FLASH
    dropping, single, double = (
        attention_choice(cuda, *case) for case in ((torch.bfloat16, 0.1), (torch.float32, 0.0), (torch.float64, 0.1))
    )
    assert (dropping.form, single.form, double.form) == (attention_module.TRITON, attention_module.TRITON, attention_module.SDPA)
    assert "0.1 is asked for" in dropping.why
    assert "does not take float32" in single.why
    assert "ours does not take float64" in double.why
    monkeypatch.setattr(attention_module, "has_triton", lambda device: False)
    without = attention_choice(cuda, torch.bfloat16, 0.1)
    assert without.form == attention_module.SDPA
    assert "0.1 is asked for, and no Triton" in without.why


def test_the_chosen_form_is_the_first_that_can_compute_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    flash, triton, sdpa, matmul = (getattr(attention_module, name) for name in ("FLASH", "TRITON", "SDPA", "MATMUL"))
    assert attention_forms(cuda, torch.bfloat16, 0.0) == [flash, triton, sdpa, matmul]
    assert attention_forms(cuda, torch.float16, 0.1) == [triton, sdpa, matmul]
    assert attention_forms(cuda, torch.float64, 0.0) == [sdpa, matmul]
    assert attention_forms(CPU, torch.float32, 0.1) == [sdpa, matmul]


def test_every_operation_is_reported() -> None:
    lines = [str(choice) for choice in choices(CPU, torch.float32, 0.1)]
    assert len(lines) == len(set(lines)) >= 5
    assert lines[0].startswith("attention: ")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the forms without padding need a CUDA device")
@pytest.mark.parametrize("form", [attention_module.FLASH, attention_module.TRITON])
@pytest.mark.parametrize("lengths", [[3, 1, 7, 2], [4, 4, 4], [5], [130, 0, 64]], ids=["ragged", "equal", "one", "long"])
def test_the_forms_without_padding_agree_with_a_padded_one(form: str, lengths: list[int]) -> None:
    cuda = torch.device("cuda", 0)
    layout = SequenceLayout.of(torch.tensor(lengths), cuda)
    q, k, v = (x.to(cuda, torch.bfloat16).requires_grad_() for x in rows(lengths, heads=2, width=64, seed=7))
    out = attend(form, q, k, v, layout, 0.0)
    reference = attend(attention_module.MATMUL, *(x.double() for x in (q, k, v)), layout, 0.0)
    torch.testing.assert_close(out.double(), reference, atol=0.02, rtol=0.02)
    grads = torch.autograd.grad(out.double().square().sum(), (q, k, v))
    expected = torch.autograd.grad(reference.square().sum(), (q, k, v))
    for grad, want in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, want.to(grad.dtype), atol=0.05, rtol=0.05)
