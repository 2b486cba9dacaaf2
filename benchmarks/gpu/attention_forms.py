"""The forms of attention by name, as `megainter.kernels.attention` has them, and one of PyTorch's own for comparison."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.batches import lengths
from megainter.kernels import attention
from megainter.kernels.attention import QueryRows, SequenceLayout

HALF = (torch.bfloat16, torch.float16)
ALL = (*HALF, torch.float32)
Attend = Callable[[Tensor, Tensor, Tensor, SequenceLayout, SequenceLayout | QueryRows, float], Tensor]


@dataclass(frozen=True)
class Form:
    """One way to compute attention. ``ours``: whether `varlen_attention` may take it, so that it has to be right."""

    name: str
    attend: Attend
    dtypes: tuple[torch.dtype, ...]
    drops: bool
    ours: bool = True


def forms(device: torch.device) -> list[Form]:
    """Those that can run on the device."""
    compiled = device.type == "cuda"  # Triton's interpreter multiplies the bits of bfloat16, not its numbers
    found = [
        Form("Triton", _triton, ALL if compiled else (torch.float16, torch.float32), drops=True),
        Form(attention.SDPA, attention._padded_sdpa, ALL, drops=True),
        Form(attention.MATMUL, attention._padded_matmul, ALL, drops=True),
    ]
    if device.type != "cuda":
        return found
    backends = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "memory-efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH}
    return [
        Form(attention.FLASH, _flash, HALF, drops=False),
        *found,
        *(Form(f"{attention.SDPA}, {name}", _sdpa_by(backend), HALF, drops=True, ours=False) for name, backend in backends.items()),
        Form("PyTorch's private flash with dropout", _private_flash, HALF, drops=True, ours=False),
    ]


def _triton(q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout, asking: SequenceLayout | QueryRows, drop: float) -> Tensor:
    from megainter.kernels.triton.attention import varlen_attention

    return varlen_attention(q, k, v, asking.cu_seqlens, layout.cu_seqlens, layout.max_length, drop)


def _flash(q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout, asking: SequenceLayout | QueryRows, drop: float) -> Tensor:
    return attention._flash(q, k, v, layout, asking)


def _sdpa_by(backend: SDPBackend) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout, asking: SequenceLayout | QueryRows, drop: float) -> Tensor:
        with sdpa_kernel(backend):
            return attention._padded_sdpa(q, k, v, layout, asking, drop)

    return attend


def _private_flash(q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout, asking: SequenceLayout | QueryRows, drop: float) -> Tensor:
    """The operation below `varlen_attn`, which has a dropout that the public function does not offer."""
    longest = asking.max_length, layout.max_length
    made: Tensor = torch.ops.aten._flash_attention_forward(q, k, v, asking.cu_seqlens, layout.cu_seqlens, *longest, drop, False, False)[0]
    return made


def some_lengths(samples: int, kind: str) -> Tensor:
    """Rows of so many samples' sequences in the interaction layers ("joint"), the text layers or the region layers, int64 [S]."""
    text, regions = lengths(samples, np.random.default_rng(1))
    return {"text": text, "region": regions, "joint": text + regions}[kind]
