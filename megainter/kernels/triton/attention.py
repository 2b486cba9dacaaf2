"""Attention over sequences of different lengths that lie end to end, with dropout on the probabilities; forward, and its gradient.

With s = q k^T / sqrt(d), P = softmax(s), z = 0 or 1 / (1 - p) the dropout of each probability, o = (P z) v:
dv = (P z)^T do, dP = (do v^T) z, ds = P (dP - sum(o do)), dq = ds k / sqrt(d), dk = ds^T q / sqrt(d).
No matrix of scores is ever in memory: a block of them is made where it is used, from the rows and the saved logarithm of the softmax's
denominator, in base 2 (online softmax and recomputation: Dao et al., FlashAttention, arXiv 2205.14135). Nothing is padded in memory.

One program owns one head of one sequence, whatever its length: sequences are short and many (14, 37 and 50 rows on average), so there are
programs enough, most need one block, and every gradient has one writer, which adds in a fixed order: runs agree to the bit.

The dropout mask is not stored: 16 bits of Philox, numbered by head, row of the query and position of the key, are compared with p. It
depends on the seed and not on block sizes.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

STEPS = 1 << 16  # p is rounded to a multiple of 1 / STEPS, and the scale of what is kept goes by the rounded p


@triton.jit
def _kept(seed, head, row, key, dropped, QUERIES: tl.constexpr, KEYS: tl.constexpr):
    """Which probabilities stay, [QUERIES, KEYS], for queries ``row`` [QUERIES] and keys from position ``key``, a multiple of 8.

    One draw of Philox is 128 bits: those of eight keys.
    """
    zero = tl.zeros([QUERIES, KEYS // 8], tl.int32)
    group = zero + (key // 8 + tl.arange(0, KEYS // 8))[None, :]
    a, b, c, d = tl.philox(seed, group, zero + row[:, None], zero + head, zero)
    words = tl.join(tl.join(a, c), tl.join(b, d))
    return tl.reshape(tl.join(words & 0xFFFF, words >> 16), [QUERIES, KEYS]) >= dropped


@triton.jit
def _rows(ptr, first, end, stride, ROWS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """ROWS rows of one head from ``first`` on, [ROWS, COLUMNS]: zeros from ``end`` on, and beyond WIDTH."""
    row, column = (first + tl.arange(0, ROWS))[:, None], tl.arange(0, COLUMNS)[None, :]
    return tl.load(ptr + (row * stride + column), mask=(row < end) & (column < WIDTH), other=0.0)


@triton.jit
def _store_rows(ptr, values, first, end, stride, ROWS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    row, column = (first + tl.arange(0, ROWS))[:, None], tl.arange(0, COLUMNS)[None, :]
    tl.store(ptr + (row * stride + column), values.to(ptr.dtype.element_ty), mask=(row < end) & (column < WIDTH))


@triton.jit
def _own(query_starts_ptr, key_starts_ptr, heads):
    """What this program owns: its head, and of its sequence the first query row, the queries, the first key row and the keys."""
    sequence = tl.program_id(0) // heads
    first_query = tl.load(query_starts_ptr + sequence)
    first_key = tl.load(key_starts_ptr + sequence)
    asked = tl.load(query_starts_ptr + sequence + 1) - first_query
    length = tl.load(key_starts_ptr + sequence + 1) - first_key
    return tl.program_id(0) % heads, first_query, asked, first_key, length


@triton.jit(do_not_specialize=["seed", "queries"])
def _attention_forward(
    q_ptr, k_ptr, v_ptr, out_ptr, log_sum_ptr, query_starts_ptr, key_starts_ptr,
    q_stride, k_stride, v_stride, queries, heads, seed, dropped, scale,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    head, first_query, asked, first_key, length = _own(query_starts_ptr, key_starts_ptr, heads)
    q_ptr += first_query.to(tl.int64) * q_stride + head * WIDTH
    k_ptr += first_key.to(tl.int64) * k_stride + head * WIDTH
    v_ptr += first_key.to(tl.int64) * v_stride + head * WIDTH
    out_ptr += (first_query.to(tl.int64) * heads + head) * WIDTH
    log_sum_ptr += head.to(tl.int64) * queries + first_query
    for query in range(0, asked, QUERIES):
        row = query + tl.arange(0, QUERIES)
        q = _rows(q_ptr, query, asked, q_stride, QUERIES, WIDTH, COLUMNS)
        highest = tl.full([QUERIES], float("-inf"), tl.float32)
        total = tl.zeros([QUERIES], tl.float32)
        out = tl.zeros([QUERIES, COLUMNS], tl.float32)
        for key in range(0, length, KEYS):
            k = _rows(k_ptr, key, length, k_stride, KEYS, WIDTH, COLUMNS)
            v = _rows(v_ptr, key, length, v_stride, KEYS, WIDTH, COLUMNS)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * 1.4426950408889634)
            scores = tl.where((key + tl.arange(0, KEYS) < length)[None, :], scores, float("-inf"))
            higher = tl.maximum(highest, tl.max(scores, 1))
            probs = tl.exp2(scores - higher[:, None])
            shrink = tl.exp2(highest - higher)
            total = total * shrink + tl.sum(probs, 1)
            if DROP:
                probs = tl.where(_kept(seed, head, first_query + row, key, dropped, QUERIES, KEYS), probs, 0.0)
            out = out * shrink[:, None] + tl.dot(probs.to(v.dtype), v, input_precision="ieee")
            highest = higher
        if DROP:
            out *= 65536.0 / (65536 - dropped)
        _store_rows(out_ptr, out / total[:, None], query, asked, heads * WIDTH, QUERIES, WIDTH, COLUMNS)
        tl.store(log_sum_ptr + row, highest + tl.log2(total), mask=row < asked)


@triton.jit
def _slopes(
    q, k, v, dout, log_sum, delta, length, seed, head, row, key, dropped, scale,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    """Probabilities after dropout and the gradient of the scores before their scale, transposed: [KEYS, QUERIES] each, float32."""
    scores = tl.dot(k, tl.trans(q), input_precision="ieee") * (scale * 1.4426950408889634)
    probs = tl.where((key + tl.arange(0, KEYS) < length)[:, None], tl.exp2(scores - log_sum[None, :]), 0.0)
    dprobs = tl.dot(v, tl.trans(dout), input_precision="ieee")
    if DROP:
        kept = tl.trans(_kept(seed, head, row, key, dropped, QUERIES, KEYS))
        dprobs = tl.where(kept, dprobs * (65536.0 / (65536 - dropped)), 0.0)
        return tl.where(kept, probs * (65536.0 / (65536 - dropped)), 0.0), probs * (dprobs - delta[None, :])
    return probs, probs * (dprobs - delta[None, :])


@triton.jit(do_not_specialize=["seed", "queries"])
def _attention_backward(
    q_ptr, k_ptr, v_ptr, out_ptr, dout_ptr, log_sum_ptr, dq_ptr, dk_ptr, dv_ptr, query_starts_ptr, key_starts_ptr,
    q_stride, k_stride, v_stride, queries, heads, seed, dropped, scale,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    head, first_query, asked, first_key, length = _own(query_starts_ptr, key_starts_ptr, heads)
    stride = heads * WIDTH
    q_ptr += first_query.to(tl.int64) * q_stride + head * WIDTH
    k_ptr += first_key.to(tl.int64) * k_stride + head * WIDTH
    v_ptr += first_key.to(tl.int64) * v_stride + head * WIDTH
    mine = first_query.to(tl.int64) * stride + head * WIDTH
    out_ptr += mine
    dout_ptr += mine
    dq_ptr += mine
    dk_ptr += first_key.to(tl.int64) * stride + head * WIDTH
    dv_ptr += first_key.to(tl.int64) * stride + head * WIDTH
    log_sum_ptr += head.to(tl.int64) * queries + first_query
    for key in range(0, length, KEYS):
        k = _rows(k_ptr, key, length, k_stride, KEYS, WIDTH, COLUMNS)
        v = _rows(v_ptr, key, length, v_stride, KEYS, WIDTH, COLUMNS)
        dk = tl.zeros([KEYS, COLUMNS], tl.float32)
        dv = tl.zeros([KEYS, COLUMNS], tl.float32)
        for query in range(0, asked, QUERIES):
            row = query + tl.arange(0, QUERIES)
            dout = _rows(dout_ptr, query, asked, stride, QUERIES, WIDTH, COLUMNS)
            delta = tl.sum(_rows(out_ptr, query, asked, stride, QUERIES, WIDTH, COLUMNS).to(tl.float32) * dout.to(tl.float32), 1)
            log_sum = tl.load(log_sum_ptr + row, mask=row < asked, other=0.0)
            q = _rows(q_ptr, query, asked, q_stride, QUERIES, WIDTH, COLUMNS)
            probs, dscores = _slopes(
                q, k, v, dout, log_sum, delta, length, seed, head, first_query + row, key, dropped, scale, QUERIES, KEYS, DROP
            )
            dv += tl.dot(probs.to(q.dtype), dout, input_precision="ieee")
            dk += tl.dot(dscores.to(q.dtype), q, input_precision="ieee")
            if length <= KEYS:
                dq = tl.dot(tl.trans(dscores.to(q.dtype)), k, input_precision="ieee") * scale
                _store_rows(dq_ptr, dq, query, asked, stride, QUERIES, WIDTH, COLUMNS)
        _store_rows(dk_ptr, dk * scale, key, length, stride, KEYS, WIDTH, COLUMNS)
        _store_rows(dv_ptr, dv, key, length, stride, KEYS, WIDTH, COLUMNS)


@triton.jit(do_not_specialize=["seed", "queries"])
def _attention_backward_queries(
    q_ptr, k_ptr, v_ptr, out_ptr, dout_ptr, log_sum_ptr, dq_ptr, query_starts_ptr, key_starts_ptr,
    q_stride, k_stride, v_stride, queries, heads, seed, dropped, scale,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    """dq of sequences whose keys take several blocks; `_attention_backward` writes the others."""
    head, first_query, asked, first_key, length = _own(query_starts_ptr, key_starts_ptr, heads)
    stride = heads * WIDTH
    q_ptr += first_query.to(tl.int64) * q_stride + head * WIDTH
    k_ptr += first_key.to(tl.int64) * k_stride + head * WIDTH
    v_ptr += first_key.to(tl.int64) * v_stride + head * WIDTH
    mine = first_query.to(tl.int64) * stride + head * WIDTH
    out_ptr += mine
    dout_ptr += mine
    dq_ptr += mine
    log_sum_ptr += head.to(tl.int64) * queries + first_query
    if length > KEYS:
        for query in range(0, asked, QUERIES):
            row = query + tl.arange(0, QUERIES)
            dout = _rows(dout_ptr, query, asked, stride, QUERIES, WIDTH, COLUMNS)
            delta = tl.sum(_rows(out_ptr, query, asked, stride, QUERIES, WIDTH, COLUMNS).to(tl.float32) * dout.to(tl.float32), 1)
            log_sum = tl.load(log_sum_ptr + row, mask=row < asked, other=0.0)
            q = _rows(q_ptr, query, asked, q_stride, QUERIES, WIDTH, COLUMNS)
            dq = tl.zeros([QUERIES, COLUMNS], tl.float32)
            for key in range(0, length, KEYS):
                k = _rows(k_ptr, key, length, k_stride, KEYS, WIDTH, COLUMNS)
                v = _rows(v_ptr, key, length, v_stride, KEYS, WIDTH, COLUMNS)
                _, dscores = _slopes(
                    q, k, v, dout, log_sum, delta, length, seed, head, first_query + row, key, dropped, scale, QUERIES, KEYS, DROP
                )
                dq += tl.dot(tl.trans(dscores.to(q.dtype)), k, input_precision="ieee")
            _store_rows(dq_ptr, dq * scale, query, asked, stride, QUERIES, WIDTH, COLUMNS)


class VarlenAttention(torch.autograd.Function):
    """The fused operation; call `varlen_attention`."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, query_starts: Tensor, key_starts: Tensor, longest: int, p: float, seed: int
    ) -> Tensor:
        q, k, v = (_heads_together(x) for x in (q, k, v))
        queries, heads, _ = q.shape
        ctx.longest, ctx.dropped, ctx.seed, sequences = longest, round(p * STEPS), seed, len(key_starts) - 1
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        log_sum = torch.empty(heads, queries, dtype=torch.float32, device=q.device)
        if queries:
            _attention_forward[(sequences * heads,)](
                q, k, v, out, log_sum, query_starts, key_starts, *_numbers(q, k, v, seed, ctx.dropped),
                DROP=ctx.dropped > 0, **blocks(q, k, sequences, backward=False),
            )  # fmt: skip
        ctx.save_for_backward(q, k, v, out, log_sum, query_starts, key_starts)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, log_sum, *starts = ctx.saved_tensors
        sequences, dout = len(starts[1]) - 1, dout.contiguous()
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        if len(k):
            grid, numbers = (sequences * q.shape[1],), _numbers(q, k, v, ctx.seed, ctx.dropped)
            constants = {"DROP": ctx.dropped > 0} | blocks(q, k, sequences, backward=True)
            _attention_backward[grid](q, k, v, out, dout, log_sum, dq, dk, dv, *starts, *numbers, **constants)
            if ctx.longest > constants["KEYS"]:
                _attention_backward_queries[grid](q, k, v, out, dout, log_sum, dq, *starts, *numbers, **constants)
        return dq, dk, dv, None, None, None, None, None


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, query_starts: Tensor, key_starts: Tensor, longest: int, p: float) -> Tensor:
    """softmax(q k^T / sqrt(d)) v within each sequence, [M, h, d], its probabilities dropped with ``p``.

    ``q`` [M, h, d], ``k``, ``v`` [N, h, d], all bfloat16, float16 or float32; sums in float32, products of float32 exact.
    ``query_starts`` and ``key_starts`` int32 [S + 1]: the first rows of each sequence, whose queries and keys may differ in number, and
    be none; ``longest`` keys at most. Can be differentiated once.
    """
    seed = int(torch.randint(0, 1 << 31, (1,))) if p > 0 else 0  # from the CPU's generator: nothing waits for the device
    return VarlenAttention.apply(q, k, v, query_starts, key_starts, longest, p, seed)


def _heads_together(x: Tensor) -> Tensor:
    """``x`` itself where only its rows may lie apart, as those of one product for queries, keys and values do."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()


def _numbers(q: Tensor, k: Tensor, v: Tensor, seed: int, dropped: int) -> tuple[int | float, ...]:
    queries, heads, width = q.shape
    return q.stride(0), k.stride(0), v.stride(0), queries, heads, seed, dropped, width**-0.5


def blocks(q: Tensor, k: Tensor, sequences: int, backward: bool) -> dict[str, int]:
    """Block sizes and warps for ``q`` [M, h, d] and ``k`` [N, h, d] of so many sequences.

    A block holds a sequence of one and a half times the average, at most 64 rows: longer ones take several. Float32, whose products do
    not run on tensor cores, has one size. With these, no variable of a program leaves its registers (tests/kernels/compile_ahead.py).
    """
    width = q.shape[2]
    if q.element_size() > 2:
        queries, warps = (32, 8) if width <= 64 else (16, 4)
        keys = queries
    else:
        keys = _block(len(k) / sequences, 64)
        queries = min(keys, _block(len(q) / sequences, 32 if backward else 64))
        few = queries == 16 and not (backward and keys > 16)
        warps = max(4, keys // 8) if width > 64 else 2 if few else 4
    columns = max(16, triton.next_power_of_2(width))
    return {"WIDTH": width, "COLUMNS": columns, "QUERIES": queries, "KEYS": keys, "num_warps": warps, "num_stages": 1}


def _block(rows: float, most: int) -> int:
    return max(16, min(most, triton.next_power_of_2(int(rows * 1.5))))
