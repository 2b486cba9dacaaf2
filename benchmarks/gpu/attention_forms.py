"""The forms of attention by name, as `megainter.kernels.attention` has them, and one of PyTorch's own for comparison."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.batches import lengths
from megainter.kernels.attention import SDPA, TRITON, QueryRows, SequenceLayout, attend, attention_forms

HALF = (torch.bfloat16, torch.float16)
ALL = (*HALF, torch.float32)
P = 0.1  # the recipe's dropout
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
    """All that the model may take on the device, and on a GPU some that it does not, for comparison; on a CPU Triton's by its interpreter,
    which multiplies the bits of bfloat16 and not its numbers."""
    offered = {(dtype, drop): attention_forms(device, dtype, drop) for dtype in ALL for drop in (0.0, P)}
    names = dict.fromkeys(name for found in offered.values() for name in found)
    found = [
        Form(
            name,
            _named(name),
            tuple(dtype for dtype in ALL if name in offered[dtype, 0.0]),
            any(name in offered[dtype, P] for dtype in ALL),
        )
        for name in names
    ]
    if device.type != "cuda":
        return [Form(TRITON, _named(TRITON), (torch.float16, torch.float32), drops=True), *found]
    backends = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "memory-efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH}
    return [
        *found,
        *(Form(f"{SDPA}, {name}", _sdpa_by(backend), HALF, drops=True, ours=False) for name, backend in backends.items()),
        Form("PyTorch's private flash with dropout", _private_flash, HALF, drops=True, ours=False),
    ]


def _named(form: str) -> Attend:
    def named(q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout, asking: SequenceLayout | QueryRows, drop: float) -> Tensor:
        return attend(form, q, k, v, layout, drop, None if isinstance(asking, SequenceLayout) else asking)

    return named


def _sdpa_by(backend: SDPBackend) -> Attend:
    named = _named(SDPA)

    def restricted(q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout, asking: SequenceLayout | QueryRows, drop: float) -> Tensor:
        with sdpa_kernel(backend):
            return named(q, k, v, layout, asking, drop)

    return restricted


def _private_flash(q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout, asking: SequenceLayout | QueryRows, drop: float) -> Tensor:
    """The operation below `varlen_attn`, which has a dropout that the public function does not offer."""
    longest = asking.max_length, layout.max_length
    made: Tensor = torch.ops.aten._flash_attention_forward(q, k, v, asking.cu_seqlens, layout.cu_seqlens, *longest, drop, False, False)[0]
    return made


def some_lengths(samples: int, kind: str) -> Tensor:
    """Rows of so many samples' sequences in the interaction layers ("joint"), the text layers or the region layers, int64 [S]."""
    text, regions = lengths(samples, np.random.default_rng(1))
    return {"text": text, "region": regions, "joint": text + regions}[kind]
