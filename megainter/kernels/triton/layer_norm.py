"""Dropout, residual addition and layer norm in one pass over memory, and their gradient in another.

With t = dropout(x) + residual, n = (t - mean) / std and y = w n + b:
dt = (w dy - mean(w dy) - n mean(n w dy)) / std, d residual = dt, dx = dt where kept / (1 - p), dw = sum dy n, db = sum dy.
The dropout mask is not stored: it is drawn again from the seed (Philox, one number per element).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_PROGRAMS = 512  # partial sums of the weight gradient; a few per multiprocessor of the largest GPUs


@triton.jit(do_not_specialize=["seed"])  # else one seed in sixteen is compiled for, in the middle of a run
def _norm_forward(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, total_ptr, mean_ptr, scale_ptr, seed, p, eps, width,
    BLOCK: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    at = row * width + columns
    total = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if DROP:
        total = tl.where(tl.rand(seed, at) >= p, total / (1.0 - p), 0.0)
    total += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(total, 0) / width
    centred = tl.where(inside, total - mean, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / width + eps)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, (centred * scale * weight + bias).to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(total_ptr + at, total.to(total_ptr.dtype.element_ty), mask=inside)
    tl.store(mean_ptr + row, mean)
    tl.store(scale_ptr + row, scale)


@triton.jit(do_not_specialize=["seed", "rows"])
def _norm_backward(
    dy_ptr, total_ptr, weight_ptr, mean_ptr, scale_ptr, dx_ptr, dresidual_ptr, dweight_ptr, dbias_ptr, seed, p, rows, width,
    BLOCK: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)  # and so is the row it counts up to
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK], tl.float32)
    dbias = tl.zeros([BLOCK], tl.float32)
    for row in range(program, rows, tl.num_programs(0)):
        at = row * width + columns
        dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
        total = tl.load(total_ptr + at, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(scale_ptr + row)
        normal = tl.where(inside, (total - tl.load(mean_ptr + row)) * scale, 0.0)
        weighted = weight * dy
        dtotal = (weighted - tl.sum(weighted, 0) / width - normal * (tl.sum(normal * weighted, 0) / width)) * scale
        tl.store(dresidual_ptr + at, dtotal.to(dresidual_ptr.dtype.element_ty), mask=inside)
        if DROP:
            dx = tl.where(tl.rand(seed, at) >= p, dtotal / (1.0 - p), 0.0)
            tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        dweight += dy * normal
        dbias += dy
    tl.store(dweight_ptr + program * width + columns, dweight, mask=inside)
    tl.store(dbias_ptr + program * width + columns, dbias, mask=inside)


class DropoutAddLayerNorm(torch.autograd.Function):
    """The fused operation; call `dropout_add_layer_norm`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, p: float, seed: int) -> Tensor:
        x, residual = x.contiguous(), residual.contiguous()
        rows, width = x.shape
        total = torch.empty_like(x, dtype=torch.promote_types(x.dtype, residual.dtype))
        y = torch.empty_like(total)
        mean, scale = (torch.empty(rows, dtype=torch.float32, device=x.device) for _ in range(2))
        if rows:
            _norm_forward[(rows,)](
                x, residual, weight, bias, y, total, mean, scale, seed, p, eps, width,
                BLOCK=triton.next_power_of_2(width), DROP=p > 0, num_warps=_warps(width),
            )  # fmt: skip
        ctx.save_for_backward(total, weight, bias, mean, scale)
        ctx.p, ctx.seed, ctx.dtypes = p, seed, (x.dtype, residual.dtype)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        total, weight, bias, mean, scale = ctx.saved_tensors
        dy = dy.contiguous()
        rows, width = total.shape
        dresidual = torch.empty_like(total, dtype=ctx.dtypes[1])
        dx = torch.empty_like(total, dtype=ctx.dtypes[0]) if ctx.p > 0 else dresidual
        programs = min(rows, MAX_PROGRAMS)
        parts = torch.empty(2, programs, width, dtype=torch.float32, device=dy.device)  # of dweight and dbias: summed in one launch
        if rows:
            _norm_backward[(programs,)](
                dy, total, weight, mean, scale, dx, dresidual, parts[0], parts[1], ctx.seed, ctx.p, rows, width,
                BLOCK=triton.next_power_of_2(width), DROP=ctx.p > 0, num_warps=_warps(width),
            )  # fmt: skip
        dweight, dbias = parts.sum(1)
        return dx.to(ctx.dtypes[0]), dresidual, dweight.to(weight.dtype), dbias.to(bias.dtype), None, None, None


def dropout_add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, p: float) -> Tensor:
    """LayerNorm(dropout(x) + residual), [N, H], sums in float32; the result has the wider dtype of ``x`` and ``residual``."""
    seed = int(torch.randint(0, 1 << 31, (1,))) if p > 0 else 0  # from the CPU's generator: nothing waits for the device
    return DropoutAddLayerNorm.apply(x, residual, weight, bias, eps, p, seed)


def _warps(width: int) -> int:
    return max(1, min(32, triton.next_power_of_2(width) // 128))
