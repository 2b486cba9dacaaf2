"""How a global batch is divided among ranks and micro-batches: the rule, and what is said where it does not divide."""

from typing import Protocol

from megainter.errors import UsageError


class Portioned(Protocol):
    """Whatever says in which portions a step runs: ``TrainingConfig``, and the settings of the streams."""

    @property
    def global_batch(self) -> int: ...
    @property
    def micro_batch(self) -> int: ...
    @property
    def micro_tokens(self) -> int | None: ...


def check_portions(training: Portioned, world_size: int) -> None:
    """A ``UsageError`` where ``world_size`` ranks cannot share the global batch out; what needs no data to know."""
    if training.micro_tokens is None:
        accumulation_steps(training, world_size)
    elif training.global_batch < world_size:
        raise UsageError(f"training.global_batch {training.global_batch} has no sample for each of {world_size} processes; raise it")


def accumulation_steps(training: Portioned, world_size: int) -> int:
    """Micro-batches of ``micro_batch`` samples that each rank runs per optimiser step; a ``UsageError`` where the batch does not divide.

    With ``micro_tokens`` the data decide: ``data.stream.portions.accumulation``.
    """
    portion = training.micro_batch * world_size
    if training.global_batch % portion:
        raise UsageError(
            f"training.global_batch {training.global_batch} is not a multiple of training.micro_batch {training.micro_batch} "
            f"x {world_size} processes = {portion}: {_remedy(training, world_size)}"
        )
    return training.global_batch // portion


def _remedy(training: Portioned, world_size: int) -> str:
    """A micro-batch that divides what each process gets; where none does, the nearest global batches that divide."""
    share, rest = divmod(training.global_batch, world_size)
    if rest or not share:
        batches = multiples_around(training.global_batch, training.micro_batch * world_size)
        return f"give --training.global_batch {' or '.join(map(str, batches))}"
    return f"give --training.micro_batch {next(size for size in range(min(training.micro_batch, share), 0, -1) if share % size == 0)}"


def multiples_around(number: int, part: int) -> list[int]:
    """The nearest multiples of ``part`` below and above ``number``, without 0."""
    below = number // part * part
    return [each for each in (below, below + part) if each]
