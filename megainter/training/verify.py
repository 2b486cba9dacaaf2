"""A step done twice: the same numbers to the bit, or this machine computes wrong. The cheapest test for silently corrupt hardware.

The first time the update is held back, as one whose gradient is not finite would be: nothing changes. Compared are each micro-batch's loss
sums, the bits of each gradient as this rank made it, and the norm of the gradient as all ranks together made it.
"""

import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from megainter.errors import HardwareError, UsageError
from megainter.training.collective import gathered
from megainter.training.world import World

Item = TypeVar("Item")
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


class Repetition:
    """Does every ``every``-th step twice (0: none) and compares. ``held``: whether the micro-batch in hand is of the first time."""

    def __init__(self, engine: Any, every: int, world: World) -> None:
        if every and isinstance(engine.updates, str):
            raise UsageError(
                f"training.verify_every needs updates that are not left to DeepSpeed, and here they are: {engine.updates}; give 0"
            )
        self.engine, self.every, self.world, self.held = engine, every, world, False
        self._losses: list[Tensor] = []
        self._names = [name for name, _ in engine.module.named_parameters()]
        self._gradients: Tensor | None = None  # int64 [parameters]: sums of the gradients' bits, of one time

    def each(self, step: int, batches: Callable[[], Iterable[Item]]) -> Iterator[tuple[int, Item]]:
        """The micro-batches of ``step`` and their numbers, once or twice; collective. ``HardwareError`` on all ranks where they differ."""
        if not self.every or (step + 1) % self.every:
            yield from enumerate(batches())
            return
        times = []
        with self._watched():
            for held in (True, False):
                self.held = self.engine.updates.hold = held
                self._losses, self._gradients = [], torch.zeros(len(self._names), dtype=torch.int64, device=self.world.device)
                yield from enumerate(batches())
                times.append((self._losses, self._gradients, self.engine.updates.norm_seen))
        self._compare(step, *times)

    def note(self, tallies: Tensor) -> None:
        """Take the loss sums of the micro-batch in hand."""
        if self._gradients is not None:
            self._losses.append(tallies.detach().clone())

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """A block in which the bits of each gradient are added up as it is made, before ranks share it."""
        with ExitStack() as stack, _deterministic(self.world.device):
            for number, parameter in enumerate(self.engine.module.parameters()):
                stack.callback(parameter.register_hook(lambda gradient, number=number: self._add(number, gradient)).remove)
            try:
                yield
            finally:
                self.held = self.engine.updates.hold = False
                self._gradients = None

    def _add(self, number: int, gradient: Tensor) -> None:
        assert self._gradients is not None  # while hooks are there
        self._gradients[number] += bits(gradient)

    def _compare(self, step: int, first: tuple[list[Tensor], Tensor, Tensor], second: tuple[list[Tensor], Tensor, Tensor]) -> None:
        found = [f"the losses of micro-batch {i + 1}" for i, pair in enumerate(zip(first[0], second[0], strict=True)) if not same(*pair)]
        if other := (first[1] != second[1]).nonzero().flatten().tolist():
            found.append(f"{len(other)} of {len(self._names)} gradients, first that of {self._names[other[0]]}")
        told = f"rank {self.world.rank} ({socket.gethostname()}, {self.world.device}): {found[0]}" if found else None
        norm = None if same(first[2], second[2]) else f"the norm of the gradient over all ranks, as rank {self.world.rank} has it"

        # A wrong gradient of one rank changes the norm that every rank has: it names nobody where a rank's own numbers differ.
        said = gathered((told, norm))
        if wrong := [own for own, _ in said if own is not None] or [shared for _, shared in said if shared is not None]:
            raise HardwareError(
                f"step {step + 1:,} was done twice and came out differently (training.verify_every): {'; '.join(wrong[:4])}; "
                "nothing was saved of it: take the machine out, and go on from the last checkpoint"
            )


def bits(tensor: Tensor) -> Tensor:
    """The sum of the bits of all elements, taken as integers: int64 []. Any order of summation gives the same."""
    return tensor.detach().contiguous().view(INTEGERS[tensor.element_size()]).sum(dtype=torch.int64)


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal to the bit, NaN included. Waits for the device."""
    integers = INTEGERS[one.element_size()]
    return torch.equal(one.contiguous().view(integers), other.contiguous().view(integers))


@contextmanager
def _deterministic(device: torch.device) -> Iterator[None]:
    """On a GPU, PyTorch's forms whose order of summation is fixed, where it has such; on the CPU it is."""
    before, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    if device.type == "cuda":
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)
