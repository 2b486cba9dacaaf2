"""Launched for real on this machine: engines, kills, restarts; the losses of an uninterrupted run come out."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.launcher.jobs import agents_of, assert_no_orphan, last_step, ranks_of, start_launch, wait_for_step, whole_checkpoints
from tests.synthetic import NO_DROPOUT, environment, losses, settings, train, write_data

TURNS = int(os.environ.get("MEGAINTER_TEST_KILLS", "60"))
LOCAL = ["--processes", "2", "--engine", "torchrun"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny data set, shared by the module."""
    return write_data(tmp_path_factory.mktemp("data"))


def test_a_rank_killed_is_restarted_and_sigterm_saves(data: tuple[Path, Path], tmp_path: Path) -> None:
    """One job, three blows: SIGKILL to a rank, SIGKILL to the agent, SIGTERM to the launcher."""
    run = tmp_path / "run"
    arguments = settings(*data, run, training__steps=100000, checkpoint__every_steps=5)
    job = start_launch([*LOCAL, "--restarts", "5"], arguments, tmp_path / "log")
    for victims in (ranks_of, agents_of):
        before = last_step(run)
        wait_for_step(run, before + 6, job)
        os.kill(victims(run)[-1], signal.SIGKILL)
    wait_for_step(run, last_step(run) + 6, job)
    job.terminate()
    assert job.wait(120) == 75, (tmp_path / "log").read_text()
    assert_no_orphan(run, 1)
    assert whole_checkpoints(run)[-1] >= 5
    assert (run / "launch" / "attempts.jsonl").read_text().count("\n") == 3


def test_a_mistake_is_not_tried_again(tmp_path: Path) -> None:
    arguments = settings(tmp_path / "no.parquet", tmp_path / "no.store", tmp_path / "run")
    job = start_launch(["--processes", "1", "--restarts", "5"], arguments, tmp_path / "log")
    assert job.wait(300) == 2
    assert (tmp_path / "run" / "launch" / "attempts.jsonl").read_text().count("\n") == 1


def test_a_batch_that_does_not_divide_is_refused_before_anything_starts(tmp_path: Path) -> None:
    arguments = settings(tmp_path / "p", tmp_path / "s", tmp_path / "run")
    job = start_launch(["--processes", "3"], arguments, tmp_path / "log")
    assert job.wait(60) == 2
    assert "not a multiple" in (tmp_path / "log").read_text()
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_mpirun_alone_trains(data: tuple[Path, Path], tmp_path: Path) -> None:
    require("mpirun")
    words = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable, "-m", "megainter", "pretrain"]
    done = subprocess.run([*words, *settings(*data, tmp_path / "run", **NO_DROPOUT)], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    one = train(settings(*data, tmp_path / "one", **NO_DROPOUT))
    assert one.returncode == 0
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "one"), abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["deepspeed", "torchrun", "mpirun"])
def test_engines_give_equal_losses(engine: str, data: tuple[Path, Path], tmp_path: Path) -> None:
    require("mpirun") if engine == "mpirun" else None
    arguments = settings(*data, tmp_path / "run")
    job = start_launch(["--processes", "2", "--engine", engine], arguments, tmp_path / "log")
    assert job.wait(300) == 0, (tmp_path / "log").read_text()
    plain = train(settings(*data, tmp_path / "plain"), processes=2)
    assert plain.returncode == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "plain")


@pytest.mark.slow
def test_sixty_random_kills(data: tuple[Path, Path], tmp_path: Path) -> None:
    """SIGTERM, SIGINT and SIGKILL to the launcher, the agent, one rank, at random times: no orphan, never 0, always resumable."""
    random.seed(0)
    run = tmp_path / "run"
    arguments = settings(*data, run, training__steps=100000, checkpoint__every_steps=3)
    blows = [(number, target) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL) for target in ("launcher", "agent", "rank")]
    for turn in range(TURNS):
        number, target = blows[turn % len(blows)]
        engine = ("deepspeed", "torchrun")[turn // len(blows) % 2]
        job = start_launch(["--processes", "2", "--engine", engine], arguments, tmp_path / "log")
        time.sleep(random.uniform(0, 25))
        victims = {"launcher": [job.pid], "agent": agents_of(run), "rank": ranks_of(run)}[target] or [job.pid]
        os.kill(victims[-1], number)
        code = job.wait(120)
        assert code != 0, f"turn {turn}: {number} to {target}"
        assert_no_orphan(run)
        steps = whole_checkpoints(run)
        if (run / "checkpoints").exists() and any((run / "checkpoints").glob("step_*")):
            assert steps, f"turn {turn}: nothing to resume from"
    done = start_launch(["--processes", "2"], [*arguments, "--training.steps", str(max(whole_checkpoints(run)) + 3)], tmp_path / "log")
    assert done.wait(300) == 0


def require(program: str) -> None:
    """Skip where a program is not installed."""
    import shutil

    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed (apt: openmpi-bin, pdsh, openssh-server)")
