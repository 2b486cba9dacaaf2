"""Micro-batches by real tokens: the same samples in every step, ranks alike, none too large, and what does not fit is told."""

from pathlib import Path

import numpy as np
import pytest

from megainter.config.reading import load_config
from megainter.data.stream.order import share_out, share_out_tokens
from megainter.data.stream.portions import Portions, accumulation, forwards, shares
from megainter.errors import UsageError


def lengths_of(step: int, count: int = 512) -> np.ndarray:
    return np.random.default_rng(step).integers(12, 74, count)


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("micro_tokens", [600, 2_000, 4_096, 50_000])
def test_micro_batches_hold_no_more_tokens_than_they_may_and_ranks_are_alike(world_size: int, micro_tokens: int) -> None:
    portions = Portions(1, 512, 64, micro_tokens)
    runs = accumulation(portions, world_size, lengths_of)
    for step in range(100, 140):  # steps that were not looked at
        lengths = lengths_of(step)
        by_rank = shares(portions, lengths, world_size, runs)
        tokens = np.array([[lengths[share].sum() for share in micro] for micro in by_rank])
        assert sorted(np.concatenate([share for micro in by_rank for share in micro])) == list(range(512))
        assert tokens.shape == (world_size, runs)
        assert tokens.min() > 0
        assert tokens.max() <= micro_tokens
        assert np.ptp(tokens, axis=0).max() <= lengths.max()  # ranks of one micro-batch differ by less than a sample


def test_as_few_micro_batches_are_run_as_hold_a_step() -> None:
    for micro_tokens in (2_000, 4_096, 8_192):
        runs = accumulation(Portions(1, 512, 64, micro_tokens), 2, lengths_of)
        longest = 73
        needed = lengths_of(0).sum() / (2 * micro_tokens)
        assert needed <= runs <= np.ceil(1.08 * needed * micro_tokens / (micro_tokens - 2 * longest))


def test_one_run_of_tokens_is_one_run_of_samples_and_equal_lengths_are_cut_alike() -> None:
    for world_size in (1, 2, 4):
        for lengths, runs in ((lengths_of(3), 1), (np.full(96, 40), 4)):
            by_tokens, by_samples = share_out_tokens(lengths, world_size, runs), share_out(lengths, world_size, runs)
            assert all(np.array_equal(a, b) for x, y in zip(by_tokens, by_samples, strict=True) for a, b in zip(x, y, strict=True))


def test_every_run_has_a_sample_for_every_rank_whatever_the_lengths() -> None:
    for seed in range(200):
        rng = np.random.default_rng(seed)
        world_size, runs = int(rng.integers(1, 5)), int(rng.integers(1, 6))
        lengths = np.maximum(1, (rng.pareto(1.0, world_size * runs + int(rng.integers(0, 20))) * 10).astype(np.int64))
        found = share_out_tokens(lengths, world_size, runs)
        assert sorted(np.concatenate([share for micro in found for share in micro])) == list(range(len(lengths)))
        assert all(len(share) for micro in found for share in micro)


def test_fixed_samples_are_cut_into_as_many_forwards_on_every_rank() -> None:
    lengths = lengths_of(7, 300)
    for micro_tokens in (700, 3_000, 100_000):
        portions = Portions(1, 512, 64, micro_tokens)
        turns = forwards(portions, lengths, 2)
        assert max(lengths[share].sum() for micro in shares(portions, lengths, 2, turns) for share in micro) <= micro_tokens
    assert forwards(Portions(1, 512, 64), lengths, 2) == 3


def test_portions_that_do_not_fit_are_one_line() -> None:
    with pytest.raises(UsageError, match=r"micro_tokens 200 is too few for samples of up to 73 tokens; give at least 219"):
        accumulation(Portions(1, 512, 64, 200), 1, lengths_of)
    with pytest.raises(UsageError, match=r"global_batch 4 has no sample for each of 5 processes"):
        accumulation(Portions(1, 4, 4, 9_000), 5, lengths_of)


def test_tokens_or_samples_replace_each_other_from_the_command_line_and_contradict_in_one_place(tmp_path: Path) -> None:
    assert load_config(None, [*needed(), "--training.micro_tokens", "9000"]).training.micro_tokens == 9000
    recipe = tmp_path / "own.toml"
    recipe.write_text('output = "run"\n[data]\npairs = "p"\nstore = "s"\n[training]\nsteps = 5\nmicro_tokens = 9000\n')
    taken = load_config(recipe, ["--training.micro_batch", "8"]).training
    assert (taken.micro_batch, taken.micro_tokens) == (8, None)
    with pytest.raises(
        UsageError, match=r"micro_batch counts samples and training\.micro_tokens real tokens; give one and leave the other out"
    ):
        load_config(recipe, ["--training.micro_batch", "8", "--training.micro_tokens", "90"])
    recipe.write_text(recipe.read_text() + "micro_batch = 8\n")
    with pytest.raises(UsageError, match="give one and leave the other out"):
        load_config(recipe)
    assert load_config(recipe, ["--training.micro_tokens", "700"]).training.micro_tokens == 700


def needed() -> list[str]:
    return ["--output", "run", "--data.pairs", "p", "--data.store", "s", "--training.steps", "5"]
