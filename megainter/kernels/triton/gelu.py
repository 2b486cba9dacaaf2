"""Bias and exact GELU in one pass, and their gradient in another.

With z = x + b: y = z Phi(z), dz = dy (Phi(z) + z phi(z)), where Phi and phi are the normal distribution's function and density.
The matrix product before it leaves its bias out, so that z never travels through memory.
"""

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS = 16, 128  # elements of a tile
MAX_ROW_PROGRAMS = 64  # partial sums of the bias gradient


@triton.jit(do_not_specialize=["rows"])  # else a batch in sixteen is compiled for, in the middle of a run
def _gelu_forward(x_ptr, bias_ptr, y_ptr, rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    at = row[:, None] * width + column[None, :]
    inside = (row[:, None] < rows) & (column[None, :] < width)
    bias = tl.load(bias_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    z = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32) + bias[None, :]
    y = z * 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _gelu_backward(dy_ptr, x_ptr, bias_ptr, dx_ptr, dbias_ptr, rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    program = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    bias = tl.load(bias_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    dbias = tl.zeros([COLUMNS], tl.float32)
    for first in range(program * ROWS, rows, tl.num_programs(0) * ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)
        at = row[:, None] * width + column[None, :]
        inside = (row[:, None] < rows) & (column[None, :] < width)
        z = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32) + bias[None, :]
        dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
        density = 0.3989422804014327 * tl.exp(-0.5 * z * z)
        dz = dy * (0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * density)
        tl.store(dx_ptr + at, dz.to(dx_ptr.dtype.element_ty), mask=inside)
        dbias += tl.sum(dz, 0)
    tl.store(dbias_ptr + program * width + column, dbias, mask=column < width)


class BiasGelu(torch.autograd.Function):
    """GELU(x + b) for ``x`` [N, O] and ``b`` [O], in the dtype of ``x``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x, bias)
        y = torch.empty_like(x)
        rows, width = x.shape
        if rows:
            _gelu_forward[(triton.cdiv(rows, ROWS), triton.cdiv(width, COLUMNS))](x, bias, y, rows, width, ROWS=ROWS, COLUMNS=COLUMNS)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, bias = ctx.saved_tensors
        dy, dx = dy.contiguous(), torch.empty_like(x)
        rows, width = x.shape
        programs = min(triton.cdiv(rows, ROWS), MAX_ROW_PROGRAMS)
        dbias = torch.empty(programs, width, dtype=torch.float32, device=x.device)
        if rows:
            _gelu_backward[(programs, triton.cdiv(width, COLUMNS))](dy, x, bias, dx, dbias, rows, width, ROWS=ROWS, COLUMNS=COLUMNS)
        return dx, dbias.sum(0).to(bias.dtype)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GELU(x W^T + b) for ``x`` [N, I]: the product by the vendor's library, the rest fused."""
    return BiasGelu.apply(F.linear(x, weight), bias)
