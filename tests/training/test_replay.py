"""A step done again has the losses that the run recorded, sample by sample, and leaves the run folder as it is."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megainter.errors import UsageError
from megainter.tasks.replaying import _told
from megainter.training.replay import Replayed, Sample, _reached, against_metrics, nearest_checkpoint
from tests.synthetic import environment, settings, train, write_data

CONTRAST = {"training__itc_weight": 1.0, "data__batch_negatives": 0.5}  # a comparison over the whole step, and captions drawn by it


def megainter(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megainter", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment())


def contents(folder: Path) -> dict[str, str]:
    """Digest and time of every file."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path): f"{path.stat().st_mtime_ns} {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in files}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "precision", "stage", "changes"),
    [(1, "fp32", 0, {}), (1, "bf16", 1, {}), (2, "fp32", 2, {}), (2, "bf16", 3, {}), (2, "fp32", 1, CONTRAST)],
)
def test_one_process_does_a_step_of_a_run_again(
    processes: int, precision: str, stage: int, changes: dict[str, float], tmp_path: Path
) -> None:
    pairs, store = write_data(tmp_path)
    run = tmp_path / "run"
    given = {"engine__precision": precision, "engine__zero_stage": stage, "training__steps": 8, "checkpoint__every_steps": 3} | changes
    done = train(settings(pairs, store, run, **given), processes=processes)
    assert done.returncode == 0, done.stdout + done.stderr
    before = contents(run)

    # Step 7 follows a checkpoint: there also what several ranks compute is the same to the bit, as two numbers have one sum.
    answer = megainter("replay", str(run), "--step", "7", "--against", "metrics", "--json")
    assert answer.returncode == 0, answer.stderr
    found = json.loads(answer.stdout)
    assert found["against_metrics"] == "the losses are the recorded ones, to the bit"
    assert (found["begun_at"], found["ranks"]) == (6, processes)
    assert contents(run) == before

    # The samples' losses add up to the recorded ones.
    record = next(record for record in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if record["step"] == 7)
    for name in ("itm", "itc") if changes else ("itm",):
        assert sum(sample["losses"][name] for sample in found["samples"]) / 16 == pytest.approx(record[f"{name}_loss"], rel=1e-2)
    assert len(found["samples"]) == 16
    assert {sample["rank"] for sample in found["samples"]} == set(range(processes))
    for name in ("msm", "mrm"):
        total = sum(sample["losses"][name] for sample in found["samples"])
        counted = total / record[f"{name}_loss"]
        assert counted == pytest.approx(round(counted), abs=0.02 * counted)
    assert all(sample["shown"].startswith(sample["sample"].partition("#")[0]) for sample in found["samples"])


def record(folder: Path, *steps: int, **values: float) -> Path:
    fixed = {"kind": "train", "step_seconds": 2.0, "learning_rate": 1e-3}
    lines = [json.dumps({**fixed, "step": step, **values}) for step in steps]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def done_again(**values: float) -> Replayed:
    return Replayed(5, 5, 4, 1, 1e-3, values, [Sample("a", 0, {"msm": 1.0})])


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (2.5, "the losses are the recorded ones, to the bit"),
        (2.5 + 1e-9, "equal but for rounding: loss"),
        (2.6, "NOT THE RECORDED ONES: loss differ by at most 3.8e-02"),
        (0.0, "NOT THE RECORDED ONES: loss differ by at most 1.0e+00"),
    ],
)
def test_losses_are_compared_to_the_bit_and_then_by_rounding(loss: float, said: str, tmp_path: Path) -> None:
    assert against_metrics(done_again(loss=loss), record(tmp_path, 4, 5, loss=2.5)).startswith(said)


def test_a_mean_over_several_steps_is_not_compared(tmp_path: Path) -> None:
    assert "is a mean over steps 3 to 5" in against_metrics(done_again(loss=2.5), record(tmp_path, 2, 5, loss=2.5))
    assert "no record at step 5" in against_metrics(done_again(loss=2.5), record(tmp_path, 4, 6, loss=2.5))


def test_a_step_of_another_learning_rate_is_not_compared(tmp_path: Path) -> None:
    said = against_metrics(done_again(loss=2.5), record(tmp_path, 4, 5, loss=2.5, learning_rate=2e-3))
    assert "its learning rate was 0.002 then, and is 0.001 by config.json" in said


@pytest.mark.parametrize(("kind", "values"), [("skipped", {}), ("spike", {"left_out": True})])
def test_an_update_that_was_left_out_has_no_losses_to_compare_with(kind: str, values: dict[str, bool], tmp_path: Path) -> None:
    with (record(tmp_path, 4, loss=2.5) / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": kind, "step": 5, **values}) + "\n")
    assert "no losses of step 5, as its update was left out" in against_metrics(done_again(loss=2.5), tmp_path)


def test_a_record_after_steps_that_were_left_out_is_of_its_step_alone(tmp_path: Path) -> None:
    record(tmp_path, 2, 5, loss=2.5)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "skipped", "step": 4}) + "\n")
    assert "is a mean over steps 3 to 5" in against_metrics(done_again(loss=2.5), tmp_path)
    (tmp_path / "left_out.json").write_text(json.dumps({"steps": [{"step": 3}]}))
    assert against_metrics(done_again(loss=2.5), tmp_path) == "the losses are the recorded ones, to the bit"


def test_a_step_that_the_run_has_not_come_to_is_not_called_done_again(tmp_path: Path) -> None:
    assert _reached(tmp_path) == 0
    record(tmp_path, 2, 5, loss=2.5)
    assert _reached(tmp_path) == 5
    for name in ("step_0000008", "step_note"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert _reached(tmp_path) == 8
    assert _told(Replayed(8, 8, 5, 1, 1e-3, {}, []), None).startswith("step 8 again, from step 5 on")
    later = _told(Replayed(9, 8, 5, 1, 1e-3, {}, []), None)
    assert later.startswith("step 9 as it would be (the run's folder knows of 8 steps), from step 5 on")


def test_losses_of_a_run_gone_wrong_stay_in_their_columns() -> None:
    samples = [
        Sample("an id longer than the heading of the column", 0, {"msm": 9.1e36, "itm": float("nan")}),
        Sample("b", 0, {"msm": 1.0, "itm": 2.0}),
    ]
    heading, *rows = _told(Replayed(5, 5, 4, 1, 1e-3, {}, samples), None).splitlines()[-3:]
    assert len({len(line) for line in (heading, *rows)}) == 1
    assert [line.split()[-2:] for line in (heading, *rows)] == [["msm", "itm"], ["9.1000e+36", "nan"], ["1.0000", "2.0000"]]


def test_a_step_far_from_a_checkpoint_names_those_that_are_near_and_its_time(tmp_path: Path) -> None:
    portions: dict[str, Any] = {"train_batch_size": 32, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 4}
    (tmp_path / "ds_config.json").write_text(json.dumps(portions))
    record(tmp_path, 100, loss=1.0)
    assert nearest_checkpoint(tmp_path, 11, most=10) is None
    with pytest.raises(UsageError, match=r"lies 299 steps after .* about 20 min; give --at-most 299, or one of the steps 1 to 11"):
        nearest_checkpoint(tmp_path, 300, most=10)
