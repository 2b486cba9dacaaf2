"""Comparing an operation on the device with the same one in float64: values and gradients under one random direction."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Operation = Callable[..., Tensor]
# Relative, in the norm of the whole tensor: some roundings of each dtype's last place; Triton's interpreter cuts bfloat16 off, and so
# errs by twice as much as a GPU, which rounds.
LIMITS = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def relative_error(ours: Tensor, right: Tensor) -> float:
    """Norm of the difference over the norm of what is right; infinite where shapes differ, 0 for two that are empty."""
    if ours.shape != right.shape:
        return math.inf
    if not right.numel():
        return 0.0
    ours, right = ours.detach().double(), right.detach().double()
    return float((ours - right).norm() / right.norm().clamp(min=1e-30))


def value_and_gradients(
    operation: Operation, inputs: Sequence[Tensor], direction: Tensor, dtype: torch.dtype | None = None
) -> list[Tensor]:
    """What ``operation`` gives of ``inputs``, as ``dtype`` where one is given, and the gradient of each input under ``direction``."""
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
    value = operation(*leaves)
    return [value.detach(), *torch.autograd.grad((value.double() * direction).sum(), leaves)]


class Errors:
    """The largest error under every name, and which of them are beyond their limits."""

    def __init__(self) -> None:
        self.worst: dict[str, float] = {}
        self.beyond: list[str] = []

    def add(self, name: str, error: float, limit: float, where: str = "") -> None:
        """Note ``error``; not a number is beyond every limit."""
        known = self.worst.get(name, 0.0)
        self.worst[name] = error if math.isnan(error) or math.isnan(known) else max(known, error)
        if not error <= limit:
            self.beyond.append(f"{name} {where}: off by {error:.2e}, at most {limit:g} allowed")

    def compare(self, name: str, fused: Operation, plain: Operation, inputs: Sequence[Tensor], limit: float) -> None:
        """``fused`` in the inputs' own dtype against ``plain`` in float64."""
        with torch.no_grad():
            shape = plain(*(x.double() for x in inputs)).shape
        direction = torch.randn(shape, device=inputs[0].device, dtype=torch.float64)
        ours = value_and_gradients(fused, inputs, direction)
        right = value_and_gradients(plain, inputs, direction, torch.float64)
        where = f"{[list(x.shape) for x in inputs]}"
        for place, (a, b) in enumerate(zip(ours, right, strict=True)):
            self.add(f"{name}, {f'gradient {place}' if place else 'value'}", relative_error(a, b), limit, where)
