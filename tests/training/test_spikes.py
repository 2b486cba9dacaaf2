"""Spikes are judged as numpy judges them, from a window that a checkpoint keeps to the bit."""

import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from megainter.training.spikes import SpikeWindow
from tests.fake_gpu import GPU, fake_gpu
from tests.synthetic import environment

CPU = torch.device("cpu")


def series(steps: int, seed: int) -> np.ndarray:
    """Losses and norms [steps, 2], some of them far above the others and some not finite."""
    rng = np.random.default_rng(seed)
    values = rng.normal([3.0, 1.0], [0.2, 0.1], (steps, 2))
    values[rng.choice(steps, steps // 50, replace=False), rng.integers(0, 2)] *= 4.0
    values[rng.choice(steps, 3, replace=False), 1] = [np.nan, np.inf, -np.inf]
    return values


def judged(window: SpikeWindow, values: np.ndarray) -> list[list[float]]:
    return [window.judge(*torch.from_numpy(row)).tolist() for row in values]


@pytest.mark.parametrize(("width", "sigma"), [(4, 2.0), (16, 3.0), (128, 6.0)])
def test_a_spike_is_what_numpy_finds_far_above_the_window(width: int, sigma: float) -> None:
    values = series(300, seed=width)
    window, kept, spikes = SpikeWindow(width, sigma, CPU), np.zeros((0, 2)), 0
    for row, found in zip(values, judged(window, values), strict=True):
        limits = np.full(2, np.inf)
        if len(kept) >= width // 2:
            recent = kept[-width:]
            limits = recent.mean(axis=0) + sigma * recent.std(axis=0)
        np.testing.assert_allclose(found[3:], limits, rtol=1e-12)
        np.testing.assert_array_equal(found[1:3], row)
        assert found[0] == (np.isfinite(row).all() and (row > limits).any())
        kept = np.concatenate([kept, row[None]]) if np.isfinite(row).all() else kept
        spikes += int(found[0])
    assert spikes >= 1


def test_what_hardly_varies_has_no_spike_below_a_share_of_its_mean() -> None:
    window = SpikeWindow(8, 6.0, CPU)
    judged(window, np.full((8, 2), 2.0))
    (small,) = judged(window, np.array([[2.01, 2.0]]))
    (large,) = judged(window, np.array([[2.2, 2.0]]))
    assert (small[0], large[0]) == (0.0, 1.0)


@pytest.mark.parametrize("steps", [0, 3, 8, 13, 40])
def test_a_window_goes_on_to_the_bit_from_what_json_kept_of_it(steps: int) -> None:
    values = series(80, seed=1)
    window = SpikeWindow(8, 2.0, CPU)
    judged(window, values[:steps])
    again = SpikeWindow(8, 2.0, CPU)
    again.restore(json.loads(json.dumps(window.state())))
    np.testing.assert_array_equal(judged(again, values[steps:]), judged(window, values[steps:]))
    assert again.state() == window.state()


def test_a_narrower_window_takes_the_last_steps_of_a_wider_one() -> None:
    values = np.random.default_rng(0).normal(3.0, 1.0, (30, 2))
    wide, narrow, direct = SpikeWindow(16, 2.0, CPU), SpikeWindow(5, 2.0, CPU), SpikeWindow(5, 2.0, CPU)
    judged(wide, values)
    judged(direct, values)
    narrow.restore(wide.state())
    np.testing.assert_allclose(judged(narrow, values), judged(direct, values), rtol=1e-12)


def test_a_wider_window_takes_all_steps_of_a_narrower_one() -> None:
    narrow, wide = SpikeWindow(5, 2.0, CPU), SpikeWindow(16, 2.0, CPU)
    judged(narrow, np.random.default_rng(0).normal(3.0, 1.0, (30, 2)))
    wide.restore(narrow.state())
    assert wide.state()["count"] == 5
    assert sorted(wide.state()["losses"][:5]) == sorted(narrow.state()["losses"])


def test_no_host_waits_for_the_window() -> None:
    with fake_gpu():
        window = SpikeWindow(8, 2.0, GPU)
        for _ in range(3):
            window.judge(torch.zeros((), device=GPU), torch.zeros((), device=GPU))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All runs, in one process."""
    command = [sys.executable, "-m", "tests.training.resumed_runs", "spikes", str(tmp_path_factory.mktemp("spikes"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment())
    assert done.returncode == 0, done.stdout + done.stderr
    runs: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return runs


def of_kind(records: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [record for record in records if record["kind"] == kind]


@pytest.mark.slow
def test_a_run_leaves_out_the_steps_that_numpy_finds_to_be_spikes(found: dict[str, Any]) -> None:
    kept: list[list[float]] = []
    spikes = []
    by_step = {record["step"]: record for record in found["skip"]}
    for step in range(1, 25):
        row = [by_step[step]["loss"], by_step[step]["gradient_norm"]]
        recent = np.array(kept[-8:])
        if len(kept) >= 4 and (row > recent.mean(axis=0) + 0.9 * recent.std(axis=0)).any():
            spikes.append(step)
        kept.append(row)
    told = of_kind(found["skip"], "spike")
    assert [record["step"] for record in told] == spikes
    assert len(spikes) >= 2
    assert all(record["left_out"] and len(record["samples"]) == 8 for record in told)


@pytest.mark.slow
def test_a_resumed_run_leaves_out_the_same_steps_to_the_bit(found: dict[str, Any]) -> None:
    assert found["resumed"] == found["skip"]


@pytest.mark.slow
def test_a_finished_run_started_again_says_so_and_does_nothing(found: dict[str, Any]) -> None:
    said = found["again"].strip().splitlines()[-1]
    assert "already finished: " in said
    assert "step_0000024, 24 of 24 steps; a larger training.steps goes on" in said


@pytest.mark.slow
def test_a_run_goes_back_for_a_spike_as_if_its_batch_had_never_been(found: dict[str, Any]) -> None:
    passed_over = [(entry["step"], entry["rolled_back_to"]) for entry in found["left_out"]]
    assert len(passed_over) >= 2
    assert [back for _, back in passed_over] == [(step - 1) // 5 * 5 for step, _ in passed_over]
    assert of_kind(found["roll_back"], "train") == of_kind(found["anew"], "train")
    assert len(of_kind(found["anew"], "train")) == 24 - len(passed_over)
    assert [record["spike"]["step"] for record in of_kind(found["roll_back"], "rolled_back")] == [step for step, _ in passed_over]


@pytest.mark.slow
def test_a_run_goes_back_only_so_often(found: dict[str, Any]) -> None:
    assert found["ended"].startswith(f"step {found['left_out'][0]['step']} is a spike: ")
    assert "after 0 returns to a checkpoint (training.max_roll_backs)" in found["ended"]
