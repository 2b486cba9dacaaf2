"""``python -m benchmarks.imbalance``: how long ranks wait for the fullest one, from real lengths, as the trainer shares out a global batch.

For every number of ranks and samples per rank: real tokens, and operations of the base model, of the fullest rank over the mean of all
(means over global batches, and the worst batch), beside those of samples dealt out as they come. No model runs: this is counting.
"""

import argparse
import json
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.batches import lengths
from megainter.data.stream.order import share_out
from megainter.model.configuration import InterBertConfig
from megainter.model.flops import BatchCounts, forward_flops

Int64s = NDArray[np.int64]
Share = Callable[[Int64s, int], list[Int64s]]
MASKED_TEXT, MASKED_REGIONS = 1 / 3, 1 / 8  # of the real ones, as in `benchmarks.batches`


def main() -> None:
    """Print one JSON object."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--ranks", type=int, nargs="*", default=[8, 64, 512])
    options.add_argument("--samples", type=int, nargs="*", default=[8, 32, 64], help="samples of a rank")
    options.add_argument("--batches", type=int, default=50, help="global batches that are drawn")
    given = options.parse_args()
    ways: dict[str, Share] = {"as the trainer": snake, "as they come": in_turn}
    rows = [
        {"ranks": ranks, "samples_per_rank": samples, "way": name, **imbalance(ranks, samples, given.batches, share)}
        for ranks in given.ranks
        for samples in given.samples
        for name, share in ways.items()
    ]
    print(json.dumps(rows, indent=2))


def imbalance(ranks: int, samples: int, batches: int, share: Share) -> dict[str, float]:
    """Fullest rank over the mean of ranks, in tokens and in operations: the mean over ``batches`` global batches, and the worst one."""
    rng, tokens, operations = np.random.default_rng(0), [], []
    for _ in range(batches):
        text, regions = lengths(ranks * samples, rng)
        shares = share((text + regions).numpy(), ranks)
        tokens.append(_over_mean([float((text + regions)[own].sum()) for own in shares]))
        operations.append(_over_mean([_operations(text[own], regions[own]) for own in shares]))
    return {
        "tokens": round(float(np.mean(tokens)), 4),
        "tokens_worst": round(float(np.max(tokens)), 4),
        "operations": round(float(np.mean(operations)), 4),
        "operations_worst": round(float(np.max(operations)), 4),
    }


def snake(tokens: Int64s, ranks: int) -> list[Int64s]:
    """The trainer's way, without accumulation."""
    return [micro[0] for micro in share_out(tokens, ranks, 1)]


def in_turn(tokens: Int64s, ranks: int) -> list[Int64s]:
    """Every rank takes the next samples of the epoch, whatever their lengths."""
    return list(np.arange(len(tokens)).reshape(ranks, -1))


def _over_mean(loads: list[float]) -> float:
    return max(loads) / (sum(loads) / len(loads))


def _operations(text: torch.Tensor, regions: torch.Tensor) -> float:
    masked = round(int(text.sum()) * MASKED_TEXT), round(int(regions.sum()) * MASKED_REGIONS)
    return float(forward_flops(InterBertConfig(), BatchCounts.of(text, regions, *masked)))


if __name__ == "__main__":
    main()
