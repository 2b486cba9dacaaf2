"""Clipping each parameter's gradient for itself, as BertAdam does, also where ranks hold pieces of the gradients."""

import torch
import torch.distributed as dist
from torch import Tensor

_EPSILON = 1e-6  # torch's clip_grad_norm_, which the official code calls for each parameter


def clip_each(pieces: dict[int, Tensor], parameters: int, max_norm: float, device: torch.device, sharded: bool) -> None:
    """Scale, in place, every parameter's gradient whose norm exceeds ``max_norm`` down to it.

    ``pieces`` are this rank's views of gradients by the parameter's number below ``parameters`` (some may be missing or empty). Where
    ``sharded``, a parameter's pieces lie on several ranks: their squares are summed over all. Then collective; ``device`` is that
    of the process group.
    """
    squares = torch.zeros(parameters, dtype=torch.float32, device=device)
    numbers, gradients = torch.tensor(list(pieces), dtype=torch.long, device=device), list(pieces.values())
    if gradients:
        squares[numbers] = torch.stack(torch._foreach_norm(gradients)).to(device, torch.float32).square()
    if sharded:
        dist.all_reduce(squares)
    factors = (max_norm / (squares.sqrt() + _EPSILON)).clamp(max=1.0)
    if gradients:
        torch._foreach_mul_(gradients, list(factors[numbers].to(gradients[0]).unbind()))
