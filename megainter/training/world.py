"""The processes that train together."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class World:
    """This rank among all: ``device`` is where its model and batches live."""

    rank: int
    size: int
    device: torch.device
