"""Ranks that hang in real training: named on every log with the stacks of all, ended with 8, and gone on from the last checkpoint."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megainter.training.metrics import read_metrics
from tests.launcher.jobs import assert_no_orphan, processes_of, wait_for_step
from tests.synthetic import environment, losses, settings, train, write_data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny data set, shared by the module."""
    return write_data(tmp_path_factory.mktemp("data"))


def start(arguments: list[str], log: Path, faults: str = "", launch: bool = False) -> subprocess.Popen[bytes]:
    """Two ranks of the faulty worker: under torchrun or under our own launcher with a restart."""
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--module", "tests.faulty", "pretrain"]
    words = ["tests.faulty", "launch", "--processes", "2", "--restarts", "1", "--", "pretrain"] if launch else torchrun
    with open(log, "ab") as file:
        return subprocess.Popen(
            [sys.executable, "-m", *words, *arguments],
            env=environment() | {"MEGAINTER_TEST_FAULTS": faults, "MEGAINTER_WATCH_PID": str(os.getpid())},
            stdout=file, stderr=file, start_new_session=True,
        )  # fmt: skip


def rank_of(run: Path, number: int) -> list[int]:
    """Process ids of a rank and the loaders' processes that it forked, the rank first."""
    found = []
    for pid, words in processes_of(run).items():
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        if "tests.faulty" in words and "launch" not in words and f"RANK={number}".encode() in variables:
            found.append(pid)
    return sorted(found)


def evidence_of(run: Path, log: Path, pid: int, how: str) -> str:
    """The file with the stacks, once both ranks' logs have named rank 1 as ``how``."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if "hang: rank 1" in line]
    assert len(lines) == 2, log.read_text()
    assert all(f"process {pid})" in line and how in line and "1 other rank(s) wait" in line and len(line) < 400 for line in lines), lines
    assert lines[0].startswith("megainter: rank 1: ") != lines[1].startswith("megainter: rank 1: "), "each rank says it"
    (evidence,) = (run / "logs").glob("hang-*.txt")
    text = evidence.read_text()
    assert re.search(r"== rank 0 .*?in (all_reduce|broadcast|reduce)", text, re.DOTALL), "where the one that waits does"
    assert evidence.with_name(f"{evidence.stem}-flight-0").stat().st_size > 1000, "its last collectives"
    return text


def test_a_rank_in_an_endless_loop_is_named_with_its_stack(data: tuple[Path, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = start(settings(*data, run, training__steps=100000, hangs__least=3), tmp_path / "log", "loop:1:8")
    wait_for_step(run, 6, job)
    (pid,) = rank_of(run, 1)
    assert job.wait(120)
    text = evidence_of(run, tmp_path / "log", pid, "has made no progress for")
    assert re.search(r"== rank 1 .*?in endless_loop.*?== rank 0", text, re.DOTALL)
    assert "exitcode  : 8" in (tmp_path / "log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "said"), [("stop", "is stopped by a signal"), ("loader", "has waited for data"), ("hold", "lets no other thread run")]
)
def test_a_rank_that_hangs_is_named_and_the_run_goes_on_to_the_same_end(
    how: str, said: str, data: tuple[Path, Path], tmp_path: Path
) -> None:
    """Under the launcher, with one restart: the second attempt ends with the losses of a run that nobody disturbed."""
    changes = {"training__steps": 60, "checkpoint__every_steps": 10, "hangs__least": 5, "data__workers": 1}
    run = tmp_path / "run"
    job = start(settings(*data, run, **changes), tmp_path / "log", "hold:1:25" if how == "hold" else "", launch=True)
    wait_for_step(run, 20, job)
    pid, *loaders = rank_of(run, 1)
    if how != "hold":
        os.kill(pid if how == "stop" else loaders[0], signal.SIGSTOP)
    code = job.wait(300)
    codes = [json.loads(line)["code"] for line in (run / "launch" / "attempts.jsonl").read_text().splitlines()]
    assert_no_orphan(run)
    if how == "hold":
        assert (code, codes) == (8, [8, 8]), "it holds again at the same step"
        assert said in (tmp_path / "log").read_text()
        return
    evidence_of(run, tmp_path / "log", pid, said)
    assert (code, codes) == (0, [8, 0]), (tmp_path / "log").read_text()
    undisturbed = train(settings(*data, tmp_path / "other", **changes), processes=2)
    assert undisturbed.returncode == 0
    assert losses(run) == losses(tmp_path / "other")


@pytest.mark.slow
def test_with_the_settings_as_they_come_a_stopped_rank_is_named_within_a_minute(data: tuple[Path, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = start(settings(*data, run, training__steps=100000), tmp_path / "log")
    wait_for_step(run, 20, job)
    (pid,) = rank_of(run, 1)
    os.kill(pid, signal.SIGSTOP)
    began = time.monotonic()
    while "hang: " not in (tmp_path / "log").read_text(errors="replace"):
        assert time.monotonic() - began < 60
        time.sleep(0.2)
    assert job.wait(60)
    evidence_of(run, tmp_path / "log", pid, "is stopped by a signal")


@pytest.mark.slow
def test_a_slow_rank_is_named_and_nothing_is_ended(data: tuple[Path, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = start(settings(*data, run, training__steps=40, training__log_every=5, hangs__least=3), tmp_path / "log", "slow:1:15")
    assert job.wait(200) == 0, (tmp_path / "log").read_text()
    records = {record["step"]: record for record in read_metrics(run / "metrics.jsonl", "train")}
    assert all(records[step]["slowest_rank"] == 1 and records[step]["slowest_share"] > 0.4 for step in (20, 25, 30, 35))
    assert "rank 1 keeps the others waiting" in (tmp_path / "log").read_text()
    assert not list((run / "logs").glob("hang-*"))
    assert not (run / "watch").exists()
