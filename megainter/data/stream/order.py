"""One deterministic stream: which caption is sample ``n`` of epoch ``e``, its random numbers, and how ranks share a global batch.

Everything here is a pure function of its arguments. Random numbers are counter-based: a hash of (seed, epoch, n, purpose), so that no
worker, rank or earlier sample has a say in them, and any sample can be made again alone.
"""

from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megainter.data.integers import Int64s, UInt64s, mixed

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # splitmix64's increment: 2^64 / golden ratio, odd
_MASK64 = (1 << 64) - 1
_FEISTEL_ROUNDS = 8


class Purpose(IntEnum):
    """What a random number is for. The values are part of the stream: changing one changes every run's data order."""

    ORDER = 1
    MISMATCH = 2
    TEXT_MASK = 3
    REGION_MASK = 4
    HARD_NEGATIVE = 5
    HARD_CHOICE = 6
    CONDITION = 7
    BLOCKS = 8
    BATCH_NEGATIVE = 9
    BATCH_CHOICE = 10
    CONTRAST_TEXT = 11
    CONTRAST_REGION = 12
    NEGATIVE = 16  # the j-th attempt at a negative caption uses NEGATIVE + j


def stream_key(seed: int, epoch: int, stream: int) -> int:
    """A 64-bit key for (seed, epoch, stream), mixed in turn so that neighbouring seeds or epochs have unrelated keys.

    Python integers and the rounds of ``mixed``: for one value this is ten times faster than numpy.
    """
    key = 0
    for part in (seed, epoch, stream):
        x = (key + int(_GOLDEN) * (part + 1)) & _MASK64
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
        key = x ^ (x >> 31)
    return key


def hashed(seed: int, epoch: int, n: Int64s, stream: int) -> UInt64s:
    """64 random bits for each sample number in ``n``: uint64, the shape of ``n``."""
    with np.errstate(over="ignore"):
        counters = np.uint64(stream_key(seed, epoch, stream)) + np.asarray(n).astype(np.uint64) * _GOLDEN
    return mixed(mixed(counters))


def uniform(seed: int, epoch: int, n: Int64s, stream: int) -> NDArray[np.float64]:
    """A uniform number in [0, 1) for each sample number in ``n``: float64, the shape of ``n``, multiples of 2^-53."""
    return (hashed(seed, epoch, n, stream) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def sample_generator(seed: int, epoch: int, n: int, purpose: Purpose) -> np.random.Generator:
    """A generator of its own for one purpose of one sample: Philox keyed by (seed, purpose) and (epoch, n) in the high counter words."""
    key = np.array([stream_key(seed, 0, int(purpose)), 0], dtype=np.uint64)
    counter = np.array([0, 0, n, epoch], dtype=np.uint64)  # draws advance the lowest word: streams of 2^128 blocks cannot meet
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


class SampleGenerators:
    """``at(epoch, n)`` draws what ``sample_generator`` of this seed and purpose draws, without a new generator for every sample.

    There is one generator, which the next call moves to another sample: draw before asking again, and not from two threads.
    """

    def __init__(self, seed: int, purpose: Purpose) -> None:
        self._generator = sample_generator(seed, 0, 0, purpose)
        start = self._generator.bit_generator.state
        self._counter: list[int] = [0, 0, 0, 0]
        numbers = {"counter": self._counter, "key": start["state"]["key"].tolist()}  # lists: read several times as fast as arrays
        self._start: dict[str, Any] = {**start, "state": numbers, "buffer": start["buffer"].tolist()}

    def at(self, epoch: int, n: int) -> np.random.Generator:
        """The generator at the start of what sample ``n`` of ``epoch`` draws."""
        self._counter[2:] = n, epoch
        self._generator.bit_generator.state = self._start
        return self._generator


def permuted(seed: int, epoch: int, n: Int64s, size: int) -> Int64s:
    """The places of sample numbers ``n`` in a keyed shuffle of ``range(size)``: int64, the shape of ``n``, each in [0, size).

    A bijection for every (seed, epoch, size), computed without a table: an alternating Feistel network over ``Z_a x Z_b`` with
    ``a * b`` just above ``size`` (Black and Rogaway 2002), walked again where it leaves the range.
    """
    n = np.asarray(n, dtype=np.int64)
    if n.size and (n.min() < 0 or n.max() >= size):
        raise ValueError(f"sample numbers must be in [0, {size}), got [{n.min()}, {n.max()}]")
    left = int(np.ceil(np.sqrt(size)))
    right = -(-size // left)
    keys = [np.uint64(stream_key(seed, epoch, (int(Purpose.ORDER) << 32) + i)) for i in range(_FEISTEL_ROUNDS)]
    places = _feistel(n.astype(np.uint64), left, right, keys)
    outside = places >= size
    while outside.any():
        places[outside] = _feistel(places[outside], left, right, keys)
        outside = places >= size
    return places.astype(np.int64)


def permuted_by_blocks(seed: int, epoch: int, n: Int64s, size: int, block: int) -> Int64s:
    """As ``permuted``, but in blocks of ``block`` neighbouring places: blocks in random order, and places in random order within each.

    Where blocks begin is another draw of every epoch, the last block goes on at place 0, and what is left over (``size % block``
    places, others in every epoch) comes last. A bijection for every (seed, epoch, size, block), computed without a table.
    """
    n = np.asarray(n, dtype=np.int64)
    if n.size and (n.min() < 0 or n.max() >= size):
        raise ValueError(f"sample numbers must be in [0, {size}), got [{n.min()}, {n.max()}]")
    blocks = size // block
    if blocks < 2:
        return permuted(seed, epoch, n, size)
    number, inside = n // block, n % block
    whole = number < blocks
    places = n.copy()  # of what is left over: it stays at the end
    places[whole] = permuted(seed, epoch, number[whole], blocks) * block
    places[whole] += _permuted_inside(seed, epoch, number[whole], inside[whole], block)
    begin = stream_key(seed, epoch, int(Purpose.BLOCKS)) % size
    return (places + begin) % size


def _permuted_inside(seed: int, epoch: int, blocks: Int64s, inside: Int64s, block: int) -> Int64s:
    """Places within their blocks, each block with a shuffle of its own: int64 [n], each in [0, block)."""
    found = np.empty_like(inside)
    for number in np.unique(blocks).tolist():
        of_block = blocks == number
        found[of_block] = permuted(stream_key(seed, number, int(Purpose.BLOCKS)), epoch, inside[of_block], block)
    return found


def _feistel(values: UInt64s, left: int, right: int, keys: list[np.uint64]) -> UInt64s:
    """One pass over ``Z_left x Z_right``: the halves take turns at adding a hash of the other."""
    a, b = values % np.uint64(left), values // np.uint64(left)
    with np.errstate(over="ignore"):
        for even, odd in zip(keys[::2], keys[1::2], strict=True):
            a = (a + mixed(b * _GOLDEN + even) % np.uint64(left)) % np.uint64(left)
            b = (b + mixed(a * _GOLDEN + odd) % np.uint64(right)) % np.uint64(right)
    return a + b * np.uint64(left)


def share_out(lengths: Int64s, world_size: int, accumulation_steps: int) -> list[list[Int64s]]:
    """Share a global batch over ranks and micro-batches so that no rank waits for another.

    ``lengths`` [G] are tokens per sample. Sorted by length, the samples are cut into ``accumulation_steps`` runs of similar length, and
    each run is dealt to the ranks in snake order (0 1 2, 2 1 0, ...), which gives equal counts and nearly equal token totals.
    Returns ``[rank][micro-batch]`` int64 arrays of indexes into ``lengths``: disjoint, together all of them. Counts are equal over ranks
    when G is a multiple of ``world_size * accumulation_steps``; the caller validates that.
    """
    return _dealt(np.array_split(_longest_first(lengths), accumulation_steps), world_size)


def share_out_tokens(lengths: Int64s, world_size: int, accumulation_steps: int) -> list[list[Int64s]]:
    """As ``share_out``, but in runs of equally many tokens instead of samples, each of at least ``world_size`` samples.

    G must be at least ``world_size * accumulation_steps``. A run is off by one sample at most, except where it would have fewer samples
    than there are ranks. With one run it is ``share_out``.
    """
    order = _longest_first(lengths)
    before = np.cumsum(lengths[order]) - lengths[order]  # tokens of the samples before each
    cuts = [0]
    for run in range(1, accumulation_steps):
        wanted = int(np.searchsorted(before, lengths.sum() * run / accumulation_steps))
        most = len(order) - (accumulation_steps - run) * world_size
        cuts.append(min(max(wanted, cuts[-1] + world_size), most))
    return _dealt(np.split(order, cuts[1:]), world_size)


def _longest_first(lengths: Int64s) -> Int64s:
    return np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")


def _dealt(runs: list[Int64s], world_size: int) -> list[list[Int64s]]:
    """Each run dealt to the ranks in snake order: ``[rank][run]``."""
    shares: list[list[Int64s]] = [[] for _ in range(world_size)]
    for run in runs:
        places = np.arange(len(run))
        turn, place = places // world_size, places % world_size
        ranks = np.where(turn % 2 == 0, place, world_size - 1 - place)
        for rank in range(world_size):
            shares[rank].append(run[ranks == rank])
    return shares
