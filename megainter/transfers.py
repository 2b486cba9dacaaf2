"""Small tensors between host and device, so that neither waits for the other: what a step sends lies in page-locked memory, what it
reads is read at once."""

from collections.abc import Sequence

import torch
from torch import Tensor


def sent(values: Tensor, device: torch.device) -> Tensor:
    """A small CPU tensor on ``device``; the host goes on while it is copied."""
    return sent_together([values], device)[0]


def sent_together(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """CPU tensors on ``device``, in one copy for all of a dtype: a copy costs the host more than these tensors have bytes.

    On the CPU they are returned as they are.
    """
    if device.type == "cpu":
        return list(tensors)
    arrived: dict[int, Tensor] = {}
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        numbers = [number for number, tensor in enumerate(tensors) if tensor.dtype == dtype]
        together = torch.cat([tensors[number].flatten() for number in numbers])
        if torch.cuda.is_available():
            together = together.pin_memory()
        parts = together.to(device, non_blocking=True).split([tensors[number].numel() for number in numbers])
        arrived |= {number: part.view(tensors[number].shape) for number, part in zip(numbers, parts, strict=True)}
    return [arrived[number] for number in range(len(tensors))]


def read(*values: Tensor) -> list[Tensor]:
    """The values of tensors on one device, as CPU tensors of the same shapes and dtypes; the host waits for the device once."""
    together = torch.cat([value.detach().double().flatten() for value in values]).cpu()  # float64 holds float32 as it is
    parts = together.split([value.numel() for value in values])
    return [part.to(value.dtype).view(value.shape) for part, value in zip(parts, values, strict=True)]


class Constants:
    """A few numbers beside a module, sent to its device once and not at every step; no buffer, which an engine would round to bf16."""

    def __init__(self, values: Sequence[float]) -> None:
        self.values = torch.tensor(values, dtype=torch.float32)

    def on(self, device: torch.device) -> Tensor:
        """float32 [len(values)] on ``device``."""
        if self.values.device != device:
            self.values = sent(self.values.cpu(), device)
        return self.values
