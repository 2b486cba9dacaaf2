"""How batches reach the device, and numbers the host, without either waiting for the other."""

from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from megainter.training.job import Batch


class Arrivals:
    """Brings micro-batches to the device on a stream of its own: the copy of the next runs beside the computing of the last."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def each(self, batches: Sequence[Batch]) -> Iterator[tuple[Batch, Any]]:
        """Each micro-batch as it is on the host and as it is on the device, the next one sent before the last is given."""
        coming = self._send(batches[0])
        for number, batch in enumerate(batches):
            here = coming
            if self.stream is not None:
                self._receive(here)
            if number + 1 < len(batches):
                coming = self._send(batches[number + 1])
            yield batch, here

    def _send(self, batch: Batch) -> Any:
        if self.stream is None:
            return batch.to(self.device)
        with torch.cuda.stream(self.stream):
            return batch.to(self.device)

    def _receive(self, batch: Any) -> None:
        """Let the computing stream wait for the copy, and the memory be used again only when both streams are done with it."""
        assert self.stream is not None  # on a CPU nothing is under way
        computing = torch.cuda.current_stream(self.device)
        computing.wait_stream(self.stream)
        for tensor in _tensors(batch):
            tensor.record_stream(computing)


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors of a batch that lie on a GPU, also those of its parts."""
    if isinstance(value, Tensor):
        if value.is_cuda:
            yield value
    elif is_dataclass(value):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name))


class Landing:
    """A few numbers of each step on their way to the host: at once on a CPU (``at_once``), on a GPU those of the call before."""

    def __init__(self, device: torch.device) -> None:
        self.at_once = device.type != "cuda"
        self._pending: tuple[Tensor, Any] | None = None

    def swap(self, value: Tensor) -> Tensor | None:
        """Send ``value`` (of any shape and dtype); gives the one that has arrived, None for the first on a GPU."""
        if self.at_once:
            return value
        arrived = self.take()
        self._pending = _on_its_way(value)
        return arrived

    def take(self) -> Tensor | None:
        """The numbers that are on their way, waited for; None where there are none."""
        pending, self._pending = self._pending, None
        if pending is None:
            return None
        pending[1].synchronize()
        return pending[0]


def _on_its_way(value: Tensor) -> tuple[Tensor, Any]:
    landing = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
    landing.copy_(value, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return landing, arrived
