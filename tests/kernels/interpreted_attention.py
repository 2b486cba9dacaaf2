"""Triton's variable-length attention, run by Triton's interpreter on CPU, against float64: values, gradients and the dropout mask.

Run by test_triton.py in a process of its own, since Triton reads TRITON_INTERPRET when it is imported. bfloat16 is not here: the
interpreter multiplies its bits, not its numbers.
"""

import random
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from megainter.kernels.triton import attention

SHAPES = 200
LIMIT = 1e-5  # of the norm of the difference to float64, relative to the norm


class Case(NamedTuple):
    """Sequences of ``lengths`` rows, of which ``asked`` are queries each; ``p`` of the dropout."""

    lengths: list[int]
    asked: list[int]
    heads: int
    width: int
    p: float = 0.0

    @property
    def starts(self) -> tuple[Tensor, Tensor]:
        return tuple(torch.tensor([0, *accumulate(counts)], dtype=torch.int32) for counts in (self.asked, self.lengths))  # type: ignore[return-value]

    def tensors(self, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        rows = (sum(self.asked), sum(self.lengths), sum(self.lengths))
        return [torch.randn(count, self.heads, self.width, dtype=dtype).requires_grad_() for count in rows]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, seed: int = 0) -> Tensor:
        torch.manual_seed(seed)
        return attention.varlen_attention(q, k, v, *self.starts, max(self.lengths), self.p)

    def kept(self, seed: int = 0) -> np.ndarray:
        """[M, h, longest] of what Philox keeps after ``torch.manual_seed(seed)``."""
        torch.manual_seed(seed)
        drawn = int(torch.randint(0, 1 << 31, (1,)))
        row, head, key = np.meshgrid(*(np.arange(n) for n in (sum(self.asked), self.heads, max(self.lengths))), indexing="ij")
        return philox_halves(drawn, key, row, head) >= round(self.p * 65536)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def philox_halves(seed: int, key: np.ndarray, row: np.ndarray, head: np.ndarray) -> np.ndarray:
    """16 bits for each: Philox4x32-10 (Salmon et al., Parallel random numbers: as easy as 1, 2, 3; 2011) of the counter
    (key // 8, row, head, 0) gives those of eight keys."""
    low = np.uint64(0xFFFFFFFF)
    c = [x.astype(np.uint64) for x in (key // 8, row, head, np.zeros_like(key))]
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(10):
        first, second = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [(second >> np.uint64(32)) ^ c[1] ^ np.uint64(k0), second & low, (first >> np.uint64(32)) ^ c[3] ^ np.uint64(k1), first & low]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    word = np.choose(key % 8 // 2, c)
    return np.where(key % 2 == 1, word >> np.uint64(16), word & np.uint64(0xFFFF))


def by_sequence(case: Case, q: Tensor, k: Tensor, v: Tensor, kept: np.ndarray | None) -> Tensor:
    """The formula, sequence by sequence."""
    outs, row, first = [q.new_empty(0, case.heads, case.width)], 0, 0
    for asked, length in zip(case.asked, case.lengths, strict=True):
        scores = torch.einsum("qhd,khd->qhk", q[row : row + asked], k[first : first + length]) * case.width**-0.5
        probs = scores.softmax(-1)
        if kept is not None:
            probs = probs * torch.from_numpy(kept[row : row + asked, :, :length]) / (1 - round(case.p * 65536) / 65536)
        outs.append(torch.einsum("qhk,khd->qhd", probs, v[first : first + length]))
        row, first = row + asked, first + length
    return torch.cat(outs)


def compare(
    case: Case,
    limit: float = LIMIT,
    scales: Sequence[float] = (1.0, 1.0, 1.0),
    shifts: Sequence[float] = (0.0, 0.0, 0.0),
    dtype: torch.dtype = torch.float32,
    quarters: bool = False,
) -> None:
    """Values, and gradients along one random direction; ``scales`` and ``shifts`` of q, k and v, of which ``quarters`` keeps
    multiples of 1/4: a score is then exact in float32, in whatever order a CPU adds its products."""
    changed = [x.detach() * scale + shift for x, scale, shift in zip(case.tensors(dtype), scales, shifts, strict=True)]
    leaves = [((x * 4).round() / 4 if quarters else x).requires_grad_() for x in changed]
    direction = torch.randn(leaves[0].shape, dtype=dtype)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    ours, theirs = case.attend(*leaves), by_sequence(case, *exact, case.kept() if case.p else None)
    ours_all = [ours.detach(), *torch.autograd.grad(ours, leaves, direction)]
    theirs_all = [theirs.detach(), *torch.autograd.grad(theirs, exact, direction.double(), materialize_grads=True)]
    for name, a, b in zip(("values", "dq", "dk", "dv"), ours_all, theirs_all, strict=True):
        assert a.shape == b.shape
        assert a.dtype == dtype
        error = float((a.double() - b).norm())
        # Where sequences have one key, dq and dk are 0 but for the rounding of a difference as large as the gradient that comes in.
        size = max(float(b.norm()), 0.1 * float(direction.double().norm()))
        assert error <= limit * size, f"{name} of {case}: {error:.1e} of {size:.1e}"


LONG = [0, 1, 2, 63, 64, 65, 130]
CASES = {
    "every length, every row asks": Case(LONG, LONG, 1, 64),
    "every length, some rows ask, dropping": Case(LONG, [0, 1, 0, 5, 64, 17, 66], 1, 96, 0.1),
    "one long among short ones, dropping": Case([1] * 9 + [130], [1] * 9 + [130], 1, 32, 0.3),
    "several heads": Case([5, 3], [5, 3], 3, 16, 0.5),
    "a width that no block has": Case([7, 2], [4, 2], 2, 5, 0.2),
    "the widest": Case([9], [3], 1, 128),
    "wider than that": Case([40], [40], 1, 160),
    "nobody asks": Case([3, 4], [0, 0], 2, 8),
    "nothing": Case([0, 0], [0, 0], 2, 8),
    "more ask than there are rows": Case([2, 3], [4, 0], 1, 8),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_values_and_gradients(case: Case) -> None:
    compare(case)


def any_case(draw: random.Random) -> Case:
    around = [1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33]
    lengths = [draw.choice([0, *around, draw.randint(1, 70)]) for _ in range(draw.randint(1, 3))]
    asked = [draw.choice([length, draw.randint(0, length)]) for length in lengths]
    return Case(lengths, asked, draw.randint(1, 2), draw.choice([64, 96, 32, draw.randint(1, 128)]), draw.choice([0.0, 0.1, 0.5]))


@pytest.mark.parametrize("part", [pytest.param(part, marks=[pytest.mark.slow] if part else []) for part in range(10)])
def test_many_shapes(part: int) -> None:
    draw = random.Random(part)
    for _ in range(SHAPES // 10):
        compare(any_case(draw))


def test_half_precision_stays_within_its_rounding() -> None:
    for case in (Case([40, 7], [40, 7], 1, 64, 0.1), Case([70, 90], [3, 2], 1, 32)):
        compare(case, 3e-3, dtype=torch.float16)


def test_scores_in_the_thousands_are_as_exact_as_their_rounding() -> None:
    compare(Case([3, 20], [3, 20], 1, 16), 2e-3, [30.0, 30.0, 1.0])


def test_keys_beyond_the_end_take_no_part_where_every_score_is_far_below_zero() -> None:
    # Scores of -200: a key of zeros would weigh exp(200), and float32's own rounding of a score is 1e-5 of a probability.
    compare(Case([3, 20], [3, 20], 1, 64), 1e-4, shifts=[5.0, -5.0, 0.0], quarters=True)


@pytest.mark.parametrize(
    ("lengths", "dtype", "block"),
    [([60, 90], torch.float16, 64), ([20], torch.float16, 32), ([5, 20, 1, 1], torch.float16, 16), ([40], torch.float32, 32)],
    ids=str,
)
def test_the_mask_is_philox_of_head_row_and_key_whatever_the_blocks(lengths: list[int], dtype: torch.dtype, block: int) -> None:
    case = Case(lengths, lengths, 2, max(lengths), 0.4)
    q = torch.zeros(sum(lengths), 2, case.width, dtype=dtype)
    assert attention.blocks(q, q, len(lengths), False)["KEYS"] == block
    v = torch.cat([torch.eye(length, case.width, dtype=dtype) for length in lengths])[:, None].expand(-1, 2, -1)
    found = case.attend(q, q, v, seed=3) != 0  # every probability of a row is the same: what is zero was dropped
    kept, row = torch.from_numpy(case.kept(seed=3)), 0
    for length in lengths:
        assert torch.equal(found[row : row + length, :, :length], kept[row : row + length, :, :length])
        row += length


def test_the_mask_keeps_its_share_independently() -> None:
    kept = Case([128], [400], 4, 8, 0.1).kept(seed=1)
    share = 1 - 6554 / 65536
    assert abs(kept.mean() - share) < 4 * (share * (1 - share) / kept.size) ** 0.5
    for axis in range(3):
        first, second = (np.take(kept, range(start, kept.shape[axis] - 1 + start), axis) for start in (0, 1))
        assert abs((first & second).mean() - share**2) < 4 * (share**2 * (1 - share**2) / first.size) ** 0.5


def test_dropping_is_repeated_to_the_bit_by_its_seed_alone() -> None:
    case = Case([20, 33], [20, 2], 1, 32, 0.2)
    leaves = case.tensors()
    runs = []
    for seed in (1, 1, 2):
        out = case.attend(*leaves, seed)
        runs.append([out.detach(), *torch.autograd.grad(out.square().sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[1], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(runs[0], runs[2], strict=True))


def test_nothing_is_drawn_without_dropout() -> None:
    case = Case([4], [4], 1, 8)
    case.attend(*case.tensors(), seed=7)
    drawn = torch.rand(3)
    torch.manual_seed(7)
    assert torch.equal(drawn, torch.rand(3))


def test_sequences_do_not_see_each_other_nor_what_lies_beyond() -> None:
    lengths = [3, 20, 2]
    case = Case(lengths, lengths, 1, 16, 0.1)
    clean, dirty = case.tensors(), []
    for x in clean:
        other = x.detach().clone()
        other[3:23] = float("nan")
        dirty.append(other.requires_grad_())
    results = []
    for leaves in (clean, dirty):
        out = case.attend(*leaves)
        results.append([out.detach(), *torch.autograd.grad(out[[0, 1, 2, 23, 24]].sum(), leaves)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a[:3], b[:3])
        assert torch.equal(a[23:], b[23:])


def test_rows_of_one_product_for_queries_keys_and_values_are_read_where_they_lie() -> None:
    case = Case([5, 9], [5, 9], 2, 16, 0.1)
    together = torch.randn(14, 3, 2, 16, requires_grad=True)
    apart = [x.detach().contiguous().requires_grad_() for x in together.unbind(1)]
    views = case.attend(*together.unbind(1))
    copies = case.attend(*apart)
    assert torch.equal(views, copies)
    (gradient,) = torch.autograd.grad(views.square().sum(), together)
    for ours, theirs in zip(gradient.unbind(1), torch.autograd.grad(copies.square().sum(), apart), strict=True):
        assert torch.equal(ours, theirs)


def test_a_second_derivative_is_refused() -> None:
    case = Case([4], [4], 1, 8)
    leaves = case.tensors()
    slopes = torch.autograd.grad(case.attend(*leaves).square().sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        slopes[0].sum().backward()
