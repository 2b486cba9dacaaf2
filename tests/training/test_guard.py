"""Losses and gradients that are not finite: all ranks leave the update out, it is told and counted, and nothing of it is saved."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megainter.training.guard import StepGuard, poisoned
from tests.synthetic import settings, train, write_data

CPU = torch.device("cpu")


def test_a_finite_loss_keeps_its_gradients_to_the_bit_and_another_makes_all_nan() -> None:
    weights = torch.randn(50, requires_grad=True)
    (plain,) = torch.autograd.grad((weights.sin().sum()) * 6, weights)
    (guarded,) = torch.autograd.grad(poisoned(weights.sin().sum(), 6), weights)
    assert torch.equal(plain, guarded)
    for loss in (float("inf"), float("nan"), -float("inf")):
        (gradient,) = torch.autograd.grad(poisoned(weights.sum() * 0 + loss, 6), weights)
        assert gradient.isnan().all()


def test_a_row_of_left_out_updates_is_counted_and_ends_with_one_that_is_made() -> None:
    guard = StepGuard(CPU, searching=False)
    rows = []
    for step, left_out in enumerate([0, 1, 1, 0, 1, 1, 1], start=1):
        assert [verdict.step for verdict in guard.note(step, known(left_out))] == [step] * left_out
        assert guard.sound == (not left_out)
        rows.append(guard.in_a_row)
    assert (rows, guard.total, guard.settle()) == ([0, 1, 2, 0, 1, 2, 3], 5, [])


def test_a_spike_is_told_and_one_that_is_left_out_is_counted_and_may_be_saved_over() -> None:
    guard = StepGuard(CPU, searching=True)
    rows = []
    for step, (left_out, spike) in enumerate([(0, 1), (1, 1), (1, 0), (1, 1), (0, 0)], start=1):
        (*verdicts,) = guard.note(step, known(left_out, spike))
        assert [(verdict.step, verdict.spike) for verdict in verdicts] == ([(step, bool(spike))] if left_out or spike else [])
        rows.append((guard.in_a_row, guard.sound))
    assert rows == [(0, True), (1, True), (2, False), (3, True), (0, True)]
    assert all(type(in_a_row) is int for in_a_row, _ in rows), "it becomes the step of a command"


def known(left_out: float, spike: float = 0.0) -> torch.Tensor:
    """What the engine says of a step."""
    return torch.tensor([left_out, spike, 2.0, 1.0, 1.5, 3.0], dtype=torch.float64)


def test_the_first_search_for_a_loss_scale_does_not_count() -> None:
    guard = StepGuard(CPU, searching=True)
    rows = []
    for step, left_out in enumerate([1.0, 1.0, 0.0, 1.0], start=1):
        guard.note(step, known(left_out))
        rows.append(guard.in_a_row)
    assert (rows, guard.total) == ([0, 0, 0, 1], 3)


@pytest.mark.parametrize(
    ("processes", "precision", "stage"),
    [
        (1, "fp32", 0),  # the stage at which DeepSpeed itself leaves no update out
        *(
            pytest.param(processes, precision, stage, marks=pytest.mark.slow)
            for processes in (1, 2) for precision in ("fp32", "bf16") for stage in range(4)
            if (processes, precision, stage) != (1, "fp32", 0)
        ),
    ],
)  # fmt: skip
def test_a_run_that_blows_up_ends_and_its_good_checkpoints_stay(processes: int, precision: str, stage: int, tmp_path: Path) -> None:
    pairs, store = write_data(tmp_path)

    def run(rate: float, steps: int) -> int:
        given = {"engine__precision": precision, "engine__zero_stage": stage, "optimizer__learning_rate": rate, "training__steps": steps}
        words = settings(
            pairs, store, tmp_path / "run", **given, checkpoint__every_steps=5, training__max_skipped=6, training__log_every=1000
        )
        return train(words, processes=processes).returncode

    assert run(1e-4, 20) == 0
    assert run(1e20, 60) == (7 if processes == 1 else 1)  # torchrun has a code of its own for all
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    left_out = [record for record in records if record["kind"] == "skipped"]
    assert [record["step"] for record in left_out] == list(range(left_out[0]["step"], left_out[0]["step"] + 6))
    assert all(len(record["samples"]) == 16 for record in left_out), left_out[0]
    kept = sorted((tmp_path / "run/checkpoints").glob("step_*"))
    assert kept[-1].name == "step_0000020"
    for folder in kept:
        for file in folder.rglob("*.safetensors"):
            assert all(tensor.isfinite().all() for tensor in load_file(file).values()), file
    assert run(1e-4, 30) == 0
    last = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()][-1]
    assert last["step"] == 30


@pytest.mark.slow
def test_a_checkpoint_that_nothing_finite_follows_is_named_and_the_one_before_goes_on(tmp_path: Path) -> None:
    pairs, store = write_data(tmp_path)
    run = tmp_path / "a run"

    def outcome(rate: float, steps: int) -> tuple[int, str]:
        given = {"optimizer__learning_rate": rate, "optimizer__clip_norm": 0, "training__steps": steps, "checkpoint__every_steps": 2}
        done = train(settings(pairs, store, run, **given, training__max_skipped=3))
        return done.returncode, done.stderr

    assert outcome(1e-3, 2)[0] == 0
    code, said = outcome(1e4, 40)
    blown_up = sorted((run / "checkpoints").glob("step_*"))[-1]
    first = int(blown_up.name.removeprefix("step_")) + 1
    assert (code, f"megainter replay '{run}' --step {first};" in said) == (7, True), said
    assert f"{blown_up} stands; go on with a lower" in said

    code, said = outcome(1e-3, 8)
    assert (code, f"straight from {blown_up}, whose weights may be too far gone: move it away" in said) == (7, True), said
    blown_up.rename(tmp_path / blown_up.name)
    assert outcome(1e-3, 8)[0] == 0


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_loss_that_one_rank_alone_loses_is_left_out_by_both(precision: str, stage: int, tmp_path: Path) -> None:
    pairs, store = write_data(tmp_path)

    def run(name: str, faults: str) -> list[dict[str, Any]]:
        words = settings(pairs, store, tmp_path / name, engine__precision=precision, engine__zero_stage=stage, training__steps=8)
        done = train(words, processes=2, faults=faults)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]

    struck, calm = run("struck", "nan:1:3"), run("calm", "")
    assert [record["step"] for record in struck if record["kind"] == "skipped"] == [4]
    lost, kept = ({record["step"]: record["loss"] for record in records if record["kind"] == "train"} for records in (struck, calm))
    assert [lost[step] for step in (1, 2, 3)] == [kept[step] for step in (1, 2, 3)]
    assert all(math.isfinite(lost[step]) and lost[step] != kept[step] for step in (5, 6, 7, 8)), "trained on, without one update"
    for file in (tmp_path / "struck/checkpoints").rglob("*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(file).values()), file
