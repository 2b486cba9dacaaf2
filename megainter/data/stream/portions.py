"""How a global batch is cut into the micro-batches of all ranks: by samples, or by the real tokens that a micro-batch may hold.

What a step's samples are is the stream's affair, and the same either way; the losses are sums over the global batch, so that the cut
changes them by no more than the order of additions.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megainter.config.portions import Portioned, accumulation_steps, check_portions
from megainter.data.integers import Int64s
from megainter.data.stream.order import share_out, share_out_tokens
from megainter.errors import UsageError

LOOKED_AT = 16_384  # samples whose lengths say how many tokens a step has: their mean is known to 0.3 %
DEVIATIONS = 6.0  # a step of independent samples that is so far above the mean comes once in a billion


@dataclass(frozen=True)
class Portions:
    """The order and the portions of a run, in whatever its samples are."""

    seed: int
    global_batch: int
    micro_batch: int
    micro_tokens: int | None = None


def accumulation(portions: Portioned, world_size: int, lengths_of: Callable[[int], Int64s]) -> int:
    """Micro-batches that each rank runs per step, the same in all steps: a pure function of the stream, so that all ranks agree.

    ``lengths_of(step)`` int64 [global_batch] are the tokens of a step's samples; asked for where ``micro_tokens`` counts. Then as many
    are taken as hold the largest step that is to be expected. ``UsageError`` where the portions do not fit.
    """
    check_portions(portions, world_size)
    if portions.micro_tokens is None:
        return accumulation_steps(portions, world_size)
    steps = [lengths_of(step) for step in range(max(1, LOOKED_AT // portions.global_batch))]
    lengths = np.concatenate(steps)
    unlucky = portions.global_batch * lengths.mean() + DEVIATIONS * np.sqrt(portions.global_batch) * lengths.std()
    largest = max(float(unlucky), *(float(step.sum()) for step in steps))  # by blocks or by epoch, samples are not independent
    return min(_cuts(largest, int(lengths.max()), portions.micro_tokens, world_size), portions.global_batch // world_size)


def shares(portions: Portioned, lengths: Int64s, world_size: int, accumulation: int) -> list[list[Int64s]]:
    """``[rank][micro-batch]`` int64 arrays of indexes into ``lengths`` [G]: disjoint, together all of them, ranks alike in tokens."""
    cut = share_out if portions.micro_tokens is None else share_out_tokens
    return cut(lengths, world_size, accumulation)


def forwards(portions: Portioned, lengths: Int64s, world_size: int) -> int:
    """Micro-batches that each rank runs for a fixed set of samples of ``lengths`` [n], none larger than the portions say."""
    if portions.micro_tokens is None or len(lengths) < world_size:
        return -(-len(lengths) // (world_size * portions.micro_batch))
    cuts = _cuts(float(lengths.sum()), int(lengths.max()), portions.micro_tokens, world_size)
    return min(cuts, len(lengths) // world_size)


def _cuts(tokens: float, longest: int, micro_tokens: int, world_size: int) -> int:
    """Cuts of a step's ``tokens`` after which no micro-batch exceeds ``micro_tokens``: a cut and a deal may each be off by a sample."""
    room = micro_tokens - 2 * longest
    if room < longest:
        raise UsageError(
            f"training.micro_tokens {micro_tokens} is too few for samples of up to {longest} tokens; give at least {3 * longest}"
        )
    return max(1, int(np.ceil(tokens / (world_size * room))))
