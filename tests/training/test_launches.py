"""How many kernels the engine and the optimiser launch around the model in a step, and that no host waits for them."""

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.synthetic import environment
from tests.training.launch_worker import CASES

SOME = 60  # launches a micro-batch that do not grow with the model
# Launches a micro-batch for every parameter: its gradient is copied to where it is reduced, and cast to fp32 or copied back.
COPIES = {"fp32": (0, 2, 3, 1), "bf16": (0, 0, 1, 2), "fp16": (0, 2, 1, 2)}


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """All cases, in one process."""
    command = [sys.executable, "-m", "tests.training.launch_worker"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment())
    assert done.returncode == 0, done.stdout + done.stderr
    cases: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return cases


@pytest.mark.parametrize(("precision", "stage", "times"), CASES)
def test_no_host_waits_for_a_step(precision: str, stage: int, times: int, found: dict[str, Any]) -> None:
    """But once in fp16, whose loss scale the host keeps."""
    waits = found[f"{precision} {stage} {times}"]["waits"]
    assert [place.partition(":")[0] for place in waits] == (["training/zero_speed.py fits"] if precision == "fp16" else [])
    assert sum(waits.values()) == (1 if precision == "fp16" else 0)


@pytest.mark.parametrize(("precision", "stage", "times"), CASES)
def test_launches_around_the_model_are_few(precision: str, stage: int, times: int, found: dict[str, Any]) -> None:
    case = found[f"{precision} {stage} {times}"]
    assert case["launches"] <= times * (SOME + COPIES[precision][stage] * case["parameters"])


@pytest.mark.parametrize(("precision", "stage", "times"), [case for case in CASES if case[1] > 0 and case[2] == 1])
def test_a_step_with_a_gradient_that_is_not_finite_leaves_no_trace(precision: str, stage: int, times: int, found: dict[str, Any]) -> None:
    """Weights, moments, average and counts are those of a run without it; also after the next step, where no loss scale has changed."""
    case = found[f"{precision} {stage} {times}"]
    assert case["differs"] == []
    assert case["updates"] <= 3 if precision == "fp16" else case["updates"] == 4
