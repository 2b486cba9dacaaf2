"""Micro-batches by real tokens train what micro-batches of samples train: the stream is the same, and so are the losses."""

import re
from pathlib import Path

import pytest

from tests.synthetic import NO_DROPOUT, losses, settings, train, write_data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_data(tmp_path_factory.mktemp("data"))


def run(data: tuple[Path, Path], output: Path, processes: int, **changes: object) -> tuple[list[float], str]:
    words = settings(*data, output, training__steps=12, **changes)
    if "training__micro_tokens" in changes:
        at = words.index("--training.micro_batch")
        del words[at : at + 2]
    done = train(words, processes=processes)
    assert done.returncode == 0, done.stdout + done.stderr
    return losses(output), done.stdout + done.stderr


@pytest.mark.slow  # the next has other cuts too
def test_a_step_in_one_micro_batch_has_the_same_losses_to_the_bit(data: tuple[Path, Path], tmp_path: Path) -> None:
    by_samples, _ = run(data, tmp_path / "samples", 1, training__micro_batch=16)
    by_tokens, told = run(data, tmp_path / "tokens", 1, training__micro_tokens=4096)
    assert by_tokens == by_samples
    assert "1 micro-batch(es) of about 16 samples and at most 4,096 tokens on each rank" in told


def test_any_cut_has_the_same_losses_up_to_the_order_of_sums_and_a_run_goes_on_with_another(
    data: tuple[Path, Path], tmp_path: Path
) -> None:
    reference, _ = run(data, tmp_path / "samples", 1, **NO_DROPOUT)
    by_tokens, told = run(data, tmp_path / "tokens", 2, training__micro_tokens=120, **NO_DROPOUT)
    micro_batches = int(re.findall(r"(\d+) micro-batch\(es\) of about", told)[0])
    assert micro_batches > 1
    assert by_tokens == pytest.approx(reference, abs=1e-4)
    words = settings(*data, tmp_path / "tokens", **NO_DROPOUT)  # 20 steps, and micro-batches of 4 samples again
    done = train(words, processes=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resuming from" in done.stdout + done.stderr
    assert losses(tmp_path / "tokens")[:12] == by_tokens
