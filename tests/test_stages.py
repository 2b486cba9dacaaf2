"""Roads of several commands: finished stages are not redone, a failed one gives its exit code, and its time is not forgotten."""

import time
from pathlib import Path

import pytest

from megainter.errors import MegainterError
from megainter.stages import Stage, megainter, run_stages, seconds_of


def test_finished_stages_are_not_run_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ran = []
    stages = [Stage("one", "count", lambda: ran.append(1))]
    run_stages(tmp_path, stages)
    run_stages(tmp_path, stages)
    assert ran == [1]
    assert "[1/1] count: done before" in capsys.readouterr().out


def test_a_failed_stage_is_not_recorded_and_gives_its_exit_code(tmp_path: Path) -> None:
    missing = tmp_path / "missing.jsonl"
    stage = Stage("prepare", "fail", lambda: megainter("prepare", "jsonl", missing, "--output", tmp_path / "p.parquet"))
    with pytest.raises(MegainterError) as caught:
        run_stages(tmp_path, [stage])
    assert caught.value.exit_code == 2
    assert seconds_of(tmp_path) == {}


def test_the_time_of_a_failed_start_counts_for_the_stage(tmp_path: Path) -> None:
    tries = []

    def work() -> None:
        tries.append(1)
        time.sleep(0.3)
        if len(tries) < 3:
            raise MegainterError("not yet")

    for _ in range(2):
        with pytest.raises(MegainterError, match="not yet"):
            run_stages(tmp_path, [Stage("work", "try", work)])
    run_stages(tmp_path, [Stage("work", "try", work)])
    assert 0.9 <= seconds_of(tmp_path)["work"] < 3
