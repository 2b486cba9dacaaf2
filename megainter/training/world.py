"""The processes that train together."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class World:
    """This rank among all: ``device`` is where its model and batches live."""

    rank: int
    size: int
    device: torch.device


@contextmanager
def alone() -> Iterator[World]:
    """A world of this process alone, on the CPU, in which what is collective runs without an engine."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield World(0, 1, torch.device("cpu"))
    finally:
        dist.destroy_process_group()
