"""Agreement between ranks: what one does for all, and sums over all."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from megainter.errors import MegainterError

Result = TypeVar("Result")


def on_first_rank(action: Callable[[], Result]) -> Result:
    """Run ``action`` on rank 0 and give its result (picklable by us, sent to our own ranks only) to all. Collective.

    A ``MegainterError`` is raised on every rank alike, so that all stop; only rank 0 is left to tell the user.
    """
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = action()
        except MegainterError as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def summed(values: Tensor) -> Tensor:
    """Element-wise sum over all ranks. Collective."""
    total = values.clone()
    dist.all_reduce(total)
    return total


def gathered(value: Result) -> list[Result]:
    """Every rank's ``value`` (picklable by us), by rank. Collective."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def collectives_entered() -> int:
    """How many collectives this rank has entered, in groups of all; with NCCL, how many its host has asked for. Not collective itself."""
    with suppress(RuntimeError):  # of a backend that does not count
        groups: list[Any] = list(dist.distributed_c10d._world.pg_map)
        return sum(group._get_sequence_number_for_group() for group in groups if group.size() == dist.get_world_size())
    return 0


def first_said(message: str | None) -> str | None:
    """What the lowest rank that has a message says, on all ranks; None where none has one. Collective."""
    return next((said for said in gathered(message) if said is not None), None)
