"""What training a detector takes, tried with one image before it begins: seconds, and memory."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megainter.memory import available_memory
from megainter.progress import shown_seconds, shown_time

STATES = 8  # of each weight in float32: itself, its gradient, AdamW's two moments, and as much again while a checkpoint is written
PROCESS = 800 << 20  # bytes of Python, PyTorch and its libraries


class Held(torch.autograd.graph.saved_tensors_hooks):
    """Counts the ``bytes`` that autograd holds for the backward pass, each storage once, ``weights`` apart."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self.bytes, self.seen = 0, {value.untyped_storage().data_ptr() for value in weights}
        super().__init__(self._pack, lambda value: value)

    def _pack(self, value: Tensor) -> Any:
        storage = value.untyped_storage()
        if storage.data_ptr() not in self.seen:
            self.seen.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return value


@dataclass(frozen=True)
class Needs:
    """Of one image through the network and back: ``seconds``, and ``held`` bytes for the way back; and the network's ``weights``."""

    seconds: float
    held: int
    weights: int

    def memory(self, images_at_once: int) -> int:
        """Bytes of a process that trains with so many images at once, about."""
        return PROCESS + 4 * STATES * self.weights + self.held * images_at_once


def tell_needs(needs: Needs, backbone: str, device: str, batch_size: int, images_at_once: int, steps: int) -> None:
    """Say what ``steps`` steps take, and warn where the memory is not there."""
    step = needs.seconds * batch_size
    memory = needs.memory(min(images_at_once, batch_size))
    print(
        f"train detector: {backbone} on {device}, {steps:,} steps of {batch_size} images; one image took {shown_seconds(needs.seconds)}, "
        f"so a step takes about {shown_seconds(step)} and all {shown_time(steps * step)}; memory about {memory / 1e9:.1f} GB",
        flush=True,
    )
    free = available_memory()
    if device == "cpu" and memory > free:
        print(
            f"warning: {free / 1e9:.1f} GB of memory are free, too little: lower --images-at-once ({images_at_once} now) or --max-size",
            file=sys.stderr,
            flush=True,
        )
