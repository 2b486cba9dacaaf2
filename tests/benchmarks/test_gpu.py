"""The run of `make gpu` at toy sizes on the CPU: every part is green, and none can hide another."""

import json
import os
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.against_peers import measured
from benchmarks.contenders import OURS, PEERS, Contender, Way
from benchmarks.gpu.breakdown import Span, busy_and_gaps
from benchmarks.gpu.part import Setting
from benchmarks.gpu.plan import PARTS
from benchmarks.gpu.runner import FAILED, NOT_RUN, OK, OVER, Part, Result, _groups, _run_beside, run_parts, write_line
from benchmarks.gpu.table import markdown, plain, rows_of
from benchmarks.gpu.waits import watched
from launcher.planning.calibration import _steps, _tables

FAILING = Part("failing", "", 60, alone=True, module="tests.benchmarks.failing_part")
HANGING = Part("hanging", "", 4, alone=True, module="tests.benchmarks.hanging_part")
GOOD = Part("environment", "", 100, alone=True)


def runs(pid: int) -> bool:
    """Whether the process is more than an entry that nobody has asked for its exit code."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def setting(folder: Path) -> Setting:
    return Setting(folder, "cpu", toy=True)


# Those whose toy run takes longer than some seconds; most start several processes. "throughput" has a test of its own below.
LONG = ("throughput", "trainer", "attention", "zero", "resume", "scenes", "pointwise", "breakdown", "extraction", "waits")


@pytest.mark.parametrize("name", [pytest.param(part.name, marks=[pytest.mark.slow] * (part.name in LONG)) for part in PARTS])
def test_every_part_is_green_at_toy_sizes(name: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--toy", "--parts", name, "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    (line,) = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert (done.returncode, line["outcome"]) == (0, OK), done.stdout + "\n".join(line["tail"])
    assert line["figures"]["rows"], "a part that says nothing could as well not run"
    for what, found in line["figures"]["rows"]:
        assert what in done.stdout
        assert found in (tmp_path / "table.txt").read_text()


@pytest.mark.slow
def test_every_contender_takes_its_steps() -> None:
    names = (*OURS, *PEERS)
    command = [sys.executable, "-m", "benchmarks.against_peers", "--toy", "--samples", "4", "6", "--rounds", "1", "--only", *names]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    start = json.JSONDecoder().raw_decode
    first, end = start(done.stdout)
    second, _ = start(done.stdout[end:].lstrip())
    assert [table["samples_per_step"] for table in (first, second)] == [4, 6]
    for table in (first, second):
        assert set(table["samples_per_second"]) == set(names)
        assert table["lost"] == {}


@pytest.mark.slow
def test_throughput_leaves_what_a_row_of_the_plan_is_made_of(tmp_path: Path) -> None:
    (result,) = run_parts([part for part in PARTS if part.name == "throughput"], setting(tmp_path), 300)
    assert result.outcome == OK, result.tail
    write_line(result, tmp_path)
    (table,) = _tables(tmp_path / "results.jsonl")
    (step,) = _steps(table)
    assert (step.load.samples, step.stage) == (4, 1)
    assert step.seconds == table["seconds_per_step"]["ours-bf16"]


@pytest.mark.slow
def test_a_contender_that_is_lost_is_named_and_the_others_go_on() -> None:
    way = Way(toy=True)
    contenders = [Contender(name, way) for name in ("released-fp32", "released-tf32")]
    for one in contenders:
        one.wait_until_built()
    gone, kept = contenders
    gone.process.kill()
    lost: dict[str, str] = {}
    taken = measured(contenders, 2, 1, 1, way, lost)
    kept.close()
    assert list(lost) == ["released-fp32"]
    assert "exit code -9" in lost["released-fp32"]
    assert [turn.seconds > 0 for turn in taken["released-tf32"]] == [True, True]


def test_a_part_that_fails_hides_neither_its_figures_nor_the_next_part(tmp_path: Path) -> None:
    failed, good = run_parts([FAILING, GOOD], setting(tmp_path), 200)
    assert (failed.outcome, good.outcome) == (FAILED, OK)
    assert failed.figures == {"rows": [["found before", "1"]], "failures": ["two and two are five here"]}
    text = plain(rows_of([failed, good]))
    assert "two and two are five here" in text
    assert "found before" in text
    assert text.count("\n") == 1 + len(rows_of([failed, good]))


def test_a_part_over_its_time_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    (result,) = run_parts([HANGING], setting(tmp_path), 200)
    assert result.outcome == OVER
    assert result.seconds == pytest.approx(HANGING.seconds, abs=2)
    assert result.figures == {"rows": [["found before", "1"]]}, "what it had found by then counts"
    grandchild = int((tmp_path / "pid").read_text())
    time.sleep(0.2)
    assert not runs(grandchild)


def test_parts_that_are_not_timed_run_beside_each_other(tmp_path: Path) -> None:
    untimed = [replace(HANGING, name=name, alone=False) for name in ("first", "second")]
    groups = _groups([GOOD, *untimed, FAILING], together=True)
    assert [[part.name for part in group] for group in groups] == [["environment"], ["first", "second"], ["failing"]]
    assert all(len(group) == 1 for group in _groups([GOOD, *untimed], together=False))
    began = time.monotonic()
    results = list(_run_beside(untimed, setting(tmp_path), 60))
    assert time.monotonic() - began < 1.8 * HANGING.seconds
    assert {(result.part, result.outcome) for result in results} == {("first", OVER), ("second", OVER)}


def test_parts_for_which_no_time_is_left_are_named(tmp_path: Path) -> None:
    results = list(run_parts([HANGING, GOOD, FAILING], setting(tmp_path), HANGING.seconds + 2))
    assert [(result.part, result.outcome) for result in results] == [("hanging", OVER), ("environment", NOT_RUN), ("failing", NOT_RUN)]
    assert "not run: no time left" in plain(rows_of(results))


@pytest.mark.parametrize("module", ["benchmarks.gpu", "benchmarks.gpu.environment"])
def test_without_a_gpu_one_line_names_the_toy_run(module: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", module, "--output", str(tmp_path / "run")]
    done = subprocess.run(command, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "--device cpu --toy" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--output", __file__], "is a file; give a folder"),
        (["--apex", "/nonexistent"], "holds no source of NVIDIA apex"),
        (["--seconds", "0"], "leaves no time"),
    ],
)
def test_an_option_that_cannot_be_is_refused_before_anything_runs(words: list[str], said: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--toy", "--output", str(tmp_path / "run"), *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert said in done.stderr.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_a_cell_with_a_bar_stays_one_cell_in_markdown() -> None:
    (line,) = markdown([("a", "b | c", "d")]).splitlines()[2:]
    assert line == "| a | b \\| c | d |"
    result = Result("x", FAILED, 1.0, 2.0, {}, ["what", "the reason"])
    assert "the reason" in markdown(rows_of([result]))


def test_pauses_of_a_device_are_those_in_which_no_stream_works() -> None:
    spans = [Span("a", 0, 4), Span("b", 2, 6), Span("c", 3, 5), Span("d", 9, 10), Span("e", 10, 11)]
    assert busy_and_gaps(spans) == (8.0, [3.0])
    assert busy_and_gaps([]) == (0.0, [])


def test_waits_are_counted_by_the_place_that_asked() -> None:
    with watched() as places:
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation (Triggered internally at ...)", stacklevel=1)
    ((place, count),) = places.items()
    assert place.startswith("test_gpu.py test_waits_are_counted")
    assert count == 3
