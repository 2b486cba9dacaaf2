"""The data order: shuffles are bijections, random numbers are uniform and independent, sharing out is fair."""

import numpy as np
import pytest

from megainter.data.integers import mixed
from megainter.data.stream.order import (
    Purpose,
    SampleGenerators,
    permuted,
    permuted_by_blocks,
    sample_generator,
    share_out,
    stream_key,
    uniform,
)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 10, 64, 99, 1000, 4097])
def test_shuffle_is_a_bijection(size: int) -> None:
    for seed, epoch in ((0, 0), (0, 1), (42, 7)):
        places = permuted(seed, epoch, np.arange(size), size)
        assert sorted(places.tolist()) == list(range(size))


def test_shuffle_of_a_part_is_part_of_the_shuffle() -> None:
    whole = permuted(3, 5, np.arange(1000), 1000)
    some = np.array([999, 0, 500, 500])
    assert (permuted(3, 5, some, 1000) == whole[some]).all()


def test_shuffles_differ_between_epochs_and_seeds_and_look_random() -> None:
    size = 5000
    shuffles = [permuted(seed, epoch, np.arange(size), size) for seed in (0, 1) for epoch in (0, 1, 2)]
    for i, one in enumerate(shuffles):
        assert abs(np.corrcoef(one, np.arange(size))[0, 1]) < 0.06  # 4 standard deviations of an independent order
        for other in shuffles[:i]:
            assert (one == other).mean() < 0.005  # two random orders agree at one place in 5000 on average


def test_every_permutation_of_four_occurs_equally_often() -> None:
    draws = 9_600
    counts = {}
    for seed in range(draws):
        order = tuple(permuted(seed, 0, np.arange(4), 4).tolist())
        counts[order] = counts.get(order, 0) + 1
    chi2 = sum((count - draws / 24) ** 2 / (draws / 24) for count in counts.values())
    assert len(counts) == 24
    assert chi2 < 60


def test_shuffle_of_hundreds_of_millions_needs_no_table() -> None:
    size = 3_000_000_019
    places = permuted(1, 2, np.arange(10_000), size)
    assert len(set(places.tolist())) == 10_000
    assert places.min() >= 0
    assert places.max() < size
    assert abs(places.mean() / size - 0.5) < 0.02


def test_shuffle_refuses_numbers_outside() -> None:
    with pytest.raises(ValueError, match="must be in"):
        permuted(0, 0, np.array([5]), 5)


def test_splitmix_reference_values() -> None:
    state, outputs = 0, []  # the published test vector of splitmix64 seeded with 0
    for _ in range(3):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        outputs.append(int(mixed(np.array([state], dtype=np.uint64))[0]))
    assert outputs == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_stream_key_is_the_vectorised_mix() -> None:
    key = 0
    for part in (7, 11, 13):
        key = int(mixed(np.array([(key + 0x9E3779B97F4A7C15 * (part + 1)) % 2**64], dtype=np.uint64))[0])
    assert stream_key(7, 11, 13) == key


def test_uniform_is_uniform_and_independent() -> None:
    n = np.arange(100_000)
    base = uniform(1, 0, n, 2)
    assert base.min() >= 0
    assert base.max() < 1
    counts = np.histogram(base, bins=100, range=(0, 1))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < 165  # 99 degrees of freedom: P < 5e-5
    for other in (uniform(2, 0, n, 2), uniform(1, 1, n, 2), uniform(1, 0, n, 3), np.roll(base, 1)):
        assert abs(np.corrcoef(base, other)[0, 1]) < 0.0135


def test_sample_generators_are_their_own() -> None:
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 2**40)]
    draws = [sample_generator(*key, purpose).random(4).tolist() for key in keys for purpose in (Purpose.TEXT_MASK, Purpose.REGION_MASK)]
    assert len({tuple(d) for d in draws}) == len(draws)
    one, again = (sample_generator(5, 6, 7, Purpose.TEXT_MASK).random(3).tolist() for _ in range(2))
    assert one == again


@pytest.mark.parametrize(("world_size", "steps"), [(1, 1), (2, 3), (4, 2), (8, 4), (3, 1)])
def test_share_out_is_a_fair_disjoint_cover(world_size: int, steps: int) -> None:
    lengths = np.random.default_rng(0).integers(10, 74, size=world_size * steps * 16)
    shares = share_out(lengths, world_size, steps)
    assert sorted(np.concatenate([np.concatenate(rank) for rank in shares]).tolist()) == list(range(len(lengths)))
    assert {len(micro) for rank in shares for micro in rank} == {16}
    totals = np.array([[lengths[micro].sum() for micro in rank] for rank in shares])
    assert (totals.max(axis=0) - totals.min(axis=0) <= 64).all()  # per micro-batch: no more than one long sample apart
    assert np.ptp(totals.sum(axis=1)) / totals.sum(axis=1).mean() < 0.02


def test_share_out_of_a_remainder_leaves_nothing_out() -> None:
    shares = share_out(np.arange(11), 3, 2)
    assert sorted(np.concatenate([np.concatenate(rank) for rank in shares]).tolist()) == list(range(11))


def test_a_generator_that_is_moved_draws_what_a_new_one_draws() -> None:
    moved = SampleGenerators(11, Purpose.TEXT_MASK)
    for epoch, n, count in ((0, 0, 3), (0, 1, 50), (5, 10**11, 1), (0, 0, 7), (2**40, 3, 5)):
        fresh = sample_generator(11, epoch, n, Purpose.TEXT_MASK)
        assert (moved.at(epoch, n).random(count) == fresh.random(count)).all()


@pytest.mark.parametrize(("size", "block"), [(1, 1), (7, 3), (64, 8), (1000, 33), (1000, 999), (1000, 1000), (1000, 5000), (1001, 1)])
def test_an_order_by_blocks_shows_everything_once(size: int, block: int) -> None:
    for seed, epoch in ((0, 0), (0, 1), (42, 7)):
        places = permuted_by_blocks(seed, epoch, np.arange(size), size, block)
        assert sorted(places.tolist()) == list(range(size))
        some = np.array([size - 1, 0, size // 2])
        assert (permuted_by_blocks(seed, epoch, some, size, block) == places[some]).all()


def test_samples_of_a_block_are_neighbours_and_blocks_are_not() -> None:
    size, block = 10_007, 100
    starts = []
    for epoch in range(3):
        places = permuted_by_blocks(5, epoch, np.arange(size), size, block)
        blocks = places[: size // block * block].reshape(-1, block)
        first = np.array([min(row, key=lambda place: (place - row[0] + block) % size) for row in blocks])  # it may go on at place 0
        assert all(sorted((row - start) % size) == list(range(block)) for row, start in zip(blocks, first, strict=True))
        assert abs(np.corrcoef(first[1:], first[:-1])[0, 1]) < 0.4  # 4 standard deviations of an independent order
        inside = (blocks - first[:, None]) % size
        assert len({tuple(row) for row in inside}) == len(blocks)  # every block has a shuffle of its own
        starts.append(set(first.tolist()))
    assert not (starts[0] & starts[1] and starts[0] & starts[2])  # and begins elsewhere in every epoch


def test_an_order_by_blocks_of_billions_needs_no_table() -> None:
    places = permuted_by_blocks(1, 2, np.arange(4096, 3 * 4096), 3_000_000_019, 4096)
    assert len(set(places.tolist())) == 8192
    assert np.ptp(places[:4096]) == np.ptp(places[4096:]) == 4095
    with pytest.raises(ValueError, match="must be in"):
        permuted_by_blocks(0, 0, np.array([5]), 5, 2)
