"""Global steps of an endless stream and what each rank runs of them: one rule for every task.

Step s takes samples ``s * global_batch ..`` of the endless sequence epoch 0, epoch 1, ...; every epoch shows each sample once, and a step
may cross into the next epoch. What the samples are depends on neither rank nor world size; who runs them does.
"""

from collections.abc import Callable

import numpy as np

from megainter.config.portions import Portioned
from megainter.data.integers import Int64s
from megainter.data.stream.order import permuted
from megainter.data.stream.portions import accumulation, shares


class GlobalSteps:
    """The steps of a stream of ``size`` samples an epoch, for one rank.

    ``lengths_of(epochs, numbers)``, int64 [S] each, gives the real tokens of samples, int64 [S]: ranks share a step by them.
    ``accumulation``: micro-batches that each rank runs per step. ``UsageError`` where the portions do not fit.
    """

    def __init__(
        self, portions: Portioned, size: int, lengths_of: Callable[[Int64s, Int64s], Int64s], rank: int = 0, world_size: int = 1
    ) -> None:
        self.portions, self.size, self.rank, self.world_size = portions, size, rank, world_size
        self.accumulation = accumulation(portions, world_size, lambda step: lengths_of(*self.samples(step)))

    def samples(self, step: int) -> tuple[Int64s, Int64s]:
        """Epochs and numbers within them of a step's samples, int64 [global_batch] each, in the order of the sequence."""
        sequence = step * self.portions.global_batch + np.arange(self.portions.global_batch, dtype=np.int64)
        return sequence // self.size, sequence % self.size

    def shares(self, lengths: Int64s) -> list[list[Int64s]]:
        """``[rank][micro-batch]`` places within the step, for its samples' ``lengths`` int64 [global_batch]."""
        return shares(self.portions, lengths, self.world_size, self.accumulation)

    def mine(self, lengths: Int64s) -> list[Int64s]:
        """This rank's micro-batches, as ``shares``."""
        return self.shares(lengths)[self.rank]


def shuffled(seed: int, epochs: Int64s, numbers: Int64s, size: int) -> Int64s:
    """Which of ``size`` rows samples ``numbers`` int64 [S] of ``epochs`` int64 [S] (in rising order) show: a permutation for each epoch."""
    return np.concatenate([permuted(seed, int(epoch), numbers[epochs == epoch], size) for epoch in np.unique(epochs)])
