"""A release of DeepSpeed that nobody has read does its own work around a step: said in the log, and the same training."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.synthetic import NO_DROPOUT, environment, losses, settings, train, write_data

START = """
import sys
from megainter.cli import main
from megainter.training import zero_speed
zero_speed.READ = ("0.19.0",)
main(sys.argv[1:])
"""
OTHERS = [pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 1, 3)]  # the default stage is enough for every day


@pytest.mark.parametrize("stage", [2, *OTHERS])
def test_deepspeeds_own_steps_train_the_same(stage: int, tmp_path: Path) -> None:
    data = write_data(tmp_path)
    ours = train(settings(*data, tmp_path / "ours", training__steps=8, engine__zero_stage=stage, **NO_DROPOUT))
    assert ours.returncode == 0, ours.stdout + ours.stderr
    words = settings(*data, tmp_path / "theirs", training__steps=8, engine__zero_stage=stage, **NO_DROPOUT)
    theirs = subprocess.run([sys.executable, "-c", START, "pretrain", *words], capture_output=True, text=True, env=environment())
    assert theirs.returncode == 0, theirs.stdout + theirs.stderr
    assert "does its own work around a step, launch by launch: what takes its place is written for 0.19.0" in theirs.stderr + theirs.stdout
    assert losses(tmp_path / "theirs") == pytest.approx(losses(tmp_path / "ours"), abs=1e-4)
