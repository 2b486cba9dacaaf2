"""Self-attention over sequences of different lengths that lie end to end in one tensor.

Shape letters: N rows (tokens of all sequences), S sequences, L length of the longest, h heads, d width of a head.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn

from megainter.kernels.choice import KernelChoice, has_triton
from megainter.kernels.dropout import dropout

# Added to the scores of keys that are padding. exp(-3e4) is exactly 0 in every dtype, the number itself fits float16, and a
# sequence of length 0 gives a uniform softmax (whose rows nobody reads) instead of NaN.
MASKED_SCORE = -30000.0

# The forms `varlen_attention` has. The first two pad nothing.
FLASH, TRITON = "variable-length flash attention", "Triton variable-length attention"
SDPA, MATMUL = "padded SDPA", "padded matmul, softmax, matmul"


@dataclass(frozen=True)
class SequenceLayout:
    """Where S sequences lie in N packed rows: everything attention needs, derived once per batch.

    ``cu_seqlens`` int32 [S + 1] first row of each sequence; ``sequence`` and ``position`` int64 [N] tell a row's sequence and its
    place in it. ``lengths`` stays on the CPU (int64 [S]), so that nothing here waits for the device.
    """

    lengths: torch.Tensor
    max_length: int
    cu_seqlens: torch.Tensor
    sequence: torch.Tensor
    position: torch.Tensor

    @classmethod
    def of(cls, lengths: torch.Tensor, device: torch.device) -> "SequenceLayout":
        """Layout for CPU int64 ``lengths`` [S], its tensors on ``device``."""
        ends = lengths.cumsum(0)
        max_length = int(lengths.max()) if len(lengths) else 0
        sequence = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        position = torch.arange(len(sequence)) - (ends - lengths)[sequence]
        return cls(lengths, max_length, F.pad(ends, (1, 0)).to(torch.int32), sequence, position).to(device)

    def to(self, device: torch.device) -> "SequenceLayout":
        """The same layout with its tensors on ``device``. Several layouts go in fewer copies by `model.packing`."""
        if self.cu_seqlens.device == device:
            return self
        moved = (tensor.to(device, non_blocking=True) for tensor in (self.cu_seqlens, self.sequence, self.position))
        return SequenceLayout(self.lengths, self.max_length, *moved)

    @property
    def sequences(self) -> int:
        return len(self.lengths)

    @cached_property
    def key_bias(self) -> torch.Tensor | None:
        """Float32 [S, L], 0 at real keys and MASKED_SCORE at padding; None when all lengths are equal. Made where the layout is, when a
        padded form first asks for it: the packed forms neither build nor copy it."""
        if bool((self.lengths == self.max_length).all()):
            return None
        real = torch.arange(self.max_length, device=self.cu_seqlens.device) < self.cu_seqlens.diff()[:, None]
        return torch.where(real, 0.0, MASKED_SCORE)

    def attention(
        self,
        q_Mhd: torch.Tensor,
        k_Nhd: torch.Tensor,
        v_Nhd: torch.Tensor,
        dropout_p: float,
        training: bool,
        queries: "QueryRows | None" = None,
    ) -> torch.Tensor:
        """`varlen_attention` over these sequences."""
        return varlen_attention(q_Mhd, k_Nhd, v_Nhd, self, dropout_p, training, queries)


@dataclass(frozen=True)
class QueryRows:
    """Some rows of packed sequences, the only ones whose outcome is asked for: they look at all rows, nobody computes the others.

    ``rows`` int64 [M], ascending; ``cu_seqlens`` int32 [S + 1] first of each sequence among them; ``sequence`` and ``position`` int64 [M]:
    a row's sequence and its place among the sequence's M_s. ``max_length``: the largest M_s, or on a GPU a bound that needs no waiting.
    """

    rows: torch.Tensor
    cu_seqlens: torch.Tensor
    sequence: torch.Tensor
    position: torch.Tensor
    max_length: int

    @classmethod
    def of(cls, rows: torch.Tensor, layout: SequenceLayout) -> "QueryRows":
        """``rows`` int64 [M], ascending, none more than twice (a first row may also be asked for by itself), on the layout's device."""
        sequence = layout.sequence.index_select(0, rows)
        firsts = torch.searchsorted(sequence, torch.arange(layout.sequences + 1, device=rows.device))
        position = torch.arange(len(rows), device=rows.device) - firsts.index_select(0, sequence)
        longest = min(2 * layout.max_length, len(rows)) if rows.is_cuda or not len(rows) else int(position.max()) + 1
        return cls(rows, firsts.to(torch.int32), sequence, position, longest)


@dataclass(frozen=True)
class PaddedLayout:
    """Which columns of B sequences side by side are real, bool [B, L]: what ``SequenceLayout`` is to packed rows. In plain PyTorch with
    shapes that depend on no value, so that it can be exported."""

    real: torch.Tensor

    def attention(
        self,
        q_BLhd: torch.Tensor,
        k_BLhd: torch.Tensor,
        v_BLhd: torch.Tensor,
        dropout_p: float,
        training: bool,
        queries: QueryRows | None = None,
    ) -> torch.Tensor:
        """softmax(q k^T / sqrt(d)) v within each sequence, no row seeing padding: [B, L, h, d]. ``queries`` are of packed rows: None."""
        assert queries is None
        q, k, v = (x.transpose(1, 2) for x in (q_BLhd, k_BLhd, v_BLhd))
        hidden = torch.where(self.real, 0.0, MASKED_SCORE).to(q.dtype)[:, None, None, :]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=hidden, dropout_p=dropout_p if training else 0.0).transpose(1, 2)


def varlen_attention(
    q_Mhd: torch.Tensor,
    k_Nhd: torch.Tensor,
    v_Nhd: torch.Tensor,
    layout: SequenceLayout,
    dropout_p: float,
    training: bool,
    queries: QueryRows | None = None,
) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) v within each sequence; dropout on the probabilities when ``training``. Returns [M, h, d].

    ``queries`` None: every row asks (M = N). No row sees another sequence or padding. No rows at all is allowed: the result is empty,
    with a gradient path to q, k and v (a rank whose batch lacks one modality must still take part in that modality's gradient reduction).
    """
    if not len(k_Nhd):
        return q_Mhd + k_Nhd + v_Nhd
    drop = dropout_p if training else 0.0
    return attend(attention_choice(q_Mhd.device, q_Mhd.dtype, drop).form, q_Mhd, k_Nhd, v_Nhd, layout, drop, queries)


def attend(
    form: str,
    q_Mhd: torch.Tensor,
    k_Nhd: torch.Tensor,
    v_Nhd: torch.Tensor,
    layout: SequenceLayout,
    drop: float,
    queries: QueryRows | None = None,
) -> torch.Tensor:
    """`varlen_attention` by this one of the `attention_forms`, probabilities dropped with ``drop``; there must be rows."""
    asking = layout if queries is None else queries
    if form == FLASH:
        return _flash(q_Mhd, k_Nhd, v_Nhd, layout, asking)
    if form == TRITON:
        from megainter.kernels.triton import attention

        return attention.varlen_attention(q_Mhd, k_Nhd, v_Nhd, asking.cu_seqlens, layout.cu_seqlens, layout.max_length, drop)
    padded = _padded_sdpa if form == SDPA else _padded_matmul
    return padded(q_Mhd, k_Nhd, v_Nhd, layout, asking, drop)


def attention_forms(device: torch.device, dtype: torch.dtype, dropout_p: float) -> list[str]:
    """The forms that can compute attention on ``device`` for inputs of this dtype, dropping with ``dropout_p``."""
    recent = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    flash = recent and dtype in (torch.bfloat16, torch.float16) and dropout_p == 0
    triton = recent and has_triton(device) and dtype in (torch.bfloat16, torch.float16, torch.float32)
    return [form for form, runs in ((FLASH, flash), (TRITON, triton), (SDPA, True), (MATMUL, True)) if runs]


def attention_choice(device: torch.device, dtype: torch.dtype, dropout_p: float) -> KernelChoice:
    """Which form `varlen_attention` takes for inputs of this device and dtype, dropping with ``dropout_p``, and why.

    On CUDA those that pad nothing first: flash attention where it can, ours where there is dropout or float32.
    """
    if device.type != "cuda":
        return KernelChoice("attention", MATMUL, "2 to 4 times faster than SDPA on CPU at these lengths")
    form = attention_forms(device, dtype, dropout_p)[0]
    if form == FLASH:
        return KernelChoice("attention", FLASH, "no padding is computed")
    lacks = f"has no dropout, and {dropout_p:g} is asked for" if dropout_p > 0 else f"does not take {str(dtype).removeprefix('torch.')}"
    if form == TRITON:
        return KernelChoice("attention", TRITON, f"no padding is computed; PyTorch's variable-length flash attention {lacks}")
    if torch.cuda.get_device_capability(device) < (8, 0):
        return KernelChoice("attention", SDPA, "the forms without padding need compute capability 8.0")
    no_triton = "no Triton is installed" if not has_triton(device) else f"ours does not take {str(dtype).removeprefix('torch.')}"
    return KernelChoice("attention", SDPA, f"PyTorch's variable-length flash attention {lacks}, and {no_triton}")


def _flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: SequenceLayout, asking: SequenceLayout | QueryRows) -> torch.Tensor:
    out = varlen_attn(q, k, v, asking.cu_seqlens, layout.cu_seqlens, asking.max_length, layout.max_length)
    assert isinstance(out, torch.Tensor)  # a tuple only when auxiliary outputs are asked for
    return out


def _padded_sdpa(
    q_Mhd: torch.Tensor, k_Nhd: torch.Tensor, v_Nhd: torch.Tensor, layout: SequenceLayout, asking: SequenceLayout | QueryRows, drop: float
) -> torch.Tensor:
    heads = q_Mhd.shape[1]
    key_rows, query_rows = _both_places(layout, asking, heads)
    q = _pad(q_Mhd, query_rows, layout.sequences, asking.max_length).unflatten(0, (-1, heads))
    k, v = (_pad(x, key_rows, layout.sequences, layout.max_length).unflatten(0, (-1, heads)) for x in (k_Nhd, v_Nhd))
    bias = None if layout.key_bias is None else layout.key_bias[:, None, None, :].to(q.dtype).expand(-1, heads, asking.max_length, -1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=drop)
    return _Unpad.apply(out.flatten(0, 2), query_rows).view(q_Mhd.shape)


def _padded_matmul(
    q_Mhd: torch.Tensor, k_Nhd: torch.Tensor, v_Nhd: torch.Tensor, layout: SequenceLayout, asking: SequenceLayout | QueryRows, drop: float
) -> torch.Tensor:
    heads, width = q_Mhd.shape[1:]
    key_rows, query_rows = _both_places(layout, asking, heads)
    q = _pad(q_Mhd, query_rows, layout.sequences, asking.max_length)
    k, v = (_pad(x, key_rows, layout.sequences, layout.max_length) for x in (k_Nhd, v_Nhd))
    scale = width**-0.5
    if layout.key_bias is None:
        scores = torch.bmm(q * scale, k.mT)
    else:
        bias = layout.key_bias.to(q.dtype).repeat_interleave(heads, 0)[:, None, :]
        scores = torch.baddbmm(bias, q, k.mT, alpha=scale)
    probs = dropout(scores.softmax(-1), drop, training=True)
    out = torch.bmm(probs.to(v.dtype), v)
    return _Unpad.apply(out.flatten(0, 1), query_rows).view(q_Mhd.shape)


def _both_places(layout: SequenceLayout, asking: SequenceLayout | QueryRows, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Padded places of the keys and of the queries; one tensor where every row asks."""
    keys = _padded_places(layout, heads)
    return keys, keys if asking is layout else _padded_places(asking, heads)


def _padded_places(rows: SequenceLayout | QueryRows, heads: int) -> torch.Tensor:
    """Row of token n, head j in a padded [S * h * L, d] tensor: int64 [N * h], in the order of the packed tensor."""
    head = torch.arange(heads, device=rows.sequence.device)
    return ((rows.sequence[:, None] * heads + head) * rows.max_length + rows.position[:, None]).flatten()


def _pad(x_Nhd: torch.Tensor, places: torch.Tensor, sequences: int, length: int) -> torch.Tensor:
    """[N, h, d] -> [S * h, L, d] with zeros at padding; the head axis moves out in the same copy."""
    heads, width = x_Nhd.shape[1:]
    padded = _Pad.apply(x_Nhd.reshape(-1, width), places, sequences * heads * length)
    return padded.view(sequences * heads, length, width)


class _Pad(torch.autograd.Function):
    """Rows [M, d] to the given distinct rows of zeros [total, d]. Its gradient is `_Unpad`: PyTorch's own gradients of row
    selection accumulate row by row, which costs more than the attention itself on CPU."""

    @staticmethod
    def forward(ctx: Any, packed: torch.Tensor, rows: torch.Tensor, total: int) -> torch.Tensor:
        ctx.save_for_backward(rows)
        return packed.new_zeros(total, packed.shape[1]).index_copy_(0, rows, packed)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        return _Unpad.apply(grad, *ctx.saved_tensors), None, None


class _Unpad(torch.autograd.Function):
    """The given distinct rows [M, d] of a padded tensor [total, d]; its gradient is `_Pad`."""

    @staticmethod
    def forward(ctx: Any, padded: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(rows)
        ctx.total = len(padded)
        return padded.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return _Pad.apply(grad, *ctx.saved_tensors, ctx.total), None
