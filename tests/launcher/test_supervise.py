"""Staying with a job: small programs stand in for the engine here, so that every way to end can be tried quickly."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher.supervise import FINAL, SIGNALS, outcome, supervise
from megainter.process import StopRequest
from tests.synthetic import environment
from tests.test_failures import documented_codes

DRIVER = """
import os, sys
from pathlib import Path
from launcher.supervise import SIGNALS, adopt_orphans, run_attempt
from megainter.process import StopRequest
requests = StopRequest(SIGNALS, patient=True); adopt_orphans()
sys.exit(run_attempt([sys.executable, "-c", {engine!r}], dict(os.environ), Path({folder!r}), requests, {grace}, remote=False))
"""
# An engine with one rank: the rank obeys the stop file unless told to be stubborn, and writes its process id first.
ENGINE = """
import subprocess, sys
code = '''
import os, signal, sys, time
stubborn = {stubborn}
if stubborn: signal.signal(signal.SIGTERM, signal.SIG_IGN)
open({pids!r} + f"/rank-{{os.getpid()}}", "w")
launcher = int(os.environ["MEGAINTER_WATCH_PID"])
while True:
    time.sleep(0.02)
    if not stubborn and os.path.exists(os.environ["MEGAINTER_STOP_FILE"]):
        open(os.environ["MEGAINTER_OUTCOME_FOLDER"] + "/rank-00000", "w").write("75"); sys.exit(75)
    if not stubborn and not os.path.exists(f"/proc/{{launcher}}/task/{{launcher}}/children"): sys.exit(143)
'''
sys.exit(subprocess.run([sys.executable, "-c", code]).returncode and 1)
"""


def start(tmp_path: Path, stubborn: bool = False, grace: float = 60) -> tuple[subprocess.Popen[bytes], list[int]]:
    """A supervised job whose rank runs; its process and the ids of all its descendants."""
    engine = ENGINE.format(stubborn=stubborn, pids=str(tmp_path))
    code = DRIVER.format(engine=engine, folder=str(tmp_path / "attempt"), grace=grace)
    child = subprocess.Popen([sys.executable, "-c", code], env=environment())
    wait_until(lambda: list(tmp_path.glob("rank-*")) != [])
    return child, [int(path.name[5:]) for path in tmp_path.glob("rank-*")]


def wait_until(condition: object, seconds: float = 60) -> None:
    """Poll until ``condition()`` holds."""
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    """Whether the process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_asks_and_waits(number: int, tmp_path: Path) -> None:
    child, ranks = start(tmp_path)
    os.kill(child.pid, number)
    assert child.wait(30) == 75
    assert not any(map(alive, ranks))


def test_a_second_signal_kills(tmp_path: Path) -> None:
    child, ranks = start(tmp_path, stubborn=True)
    child.terminate()
    wait_until((tmp_path / "attempt" / "stop").exists)
    child.send_signal(signal.SIGINT)
    assert child.wait(30) == 128 + signal.SIGINT
    assert not any(map(alive, ranks))


def test_the_end_of_the_grace_kills(tmp_path: Path) -> None:
    child, ranks = start(tmp_path, stubborn=True, grace=0.5)
    child.terminate()
    assert child.wait(30) == 128 + signal.SIGTERM
    assert not any(map(alive, ranks))


def test_a_killed_launcher_takes_its_ranks_along(tmp_path: Path) -> None:
    child, ranks = start(tmp_path)
    child.kill()
    child.wait()
    wait_until(lambda: not any(map(alive, ranks)), 10)


def test_ranks_of_a_killed_engine_are_found(tmp_path: Path) -> None:
    """The rank here never notices by itself: the launcher has become its parent and ends it."""
    child, ranks = start(tmp_path, stubborn=True)
    engine = int(Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()[0])
    os.kill(engine, signal.SIGKILL)
    assert child.wait(30) == 1
    assert not any(map(alive, ranks))


def test_what_the_launcher_adopts_and_ends_does_not_stay_as_a_zombie(tmp_path: Path) -> None:
    """DeepSpeed's helper waits 30 s for a rank's loader that is dead and not reaped."""
    engine = """
import os, subprocess, sys, time
code = "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1)']).pid)"
orphan = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout)
deadline = time.monotonic() + 20
while os.path.exists(f"/proc/{orphan}"):
    time.sleep(0.05)
    if time.monotonic() > deadline: sys.exit(3)
open(os.environ["MEGAINTER_OUTCOME_FOLDER"] + "/rank-00000", "w").write("0")
"""
    code = DRIVER.format(engine=engine, folder=str(tmp_path / "attempt"), grace=60)
    assert subprocess.run([sys.executable, "-c", code], env=environment(), timeout=60, check=False).returncode == 0


@pytest.mark.parametrize(
    ("codes", "engine", "stopped", "expected"),
    [
        ({0: 0}, 0, False, 0),
        ({}, 0, False, 1),  # DeepSpeed's launcher says 0 where its helper was killed
        ({0: 0}, 1, False, 1),
        ({1: 0}, 0, False, 1),
        ({}, -9, False, 1),
        ({}, -15, True, 75),
        ({0: 75, 1: 75}, 1, False, 75),
        ({0: 75, 3: 5}, 1, True, 5),
        ({2: 7}, 1, False, 7),
        ({0: 1, 1: 8, 2: 1}, 1, False, 8),
        ({0: 8, 1: 1}, 1, False, 8),
    ],
)
def test_one_code_from_many(codes: dict[int, int], engine: int, stopped: bool, expected: int, tmp_path: Path) -> None:
    for rank, code in codes.items():
        (tmp_path / f"rank-{rank:05d}").write_text(f"{code}\n")
    assert outcome(tmp_path, engine, stopped) == expected


@pytest.mark.parametrize(
    ("codes", "restarts", "expected"), [([1, 1, 0], 5, 0), ([1, 1, 1], 1, 1), ([2], 5, 2), ([1, 75], 5, 75), ([1], 0, 1)]
)
def test_restarts(codes: list[int], restarts: int, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)}
    try:
        ends = iter(codes)
        assert supervise(lambda number: next(ends), restarts, StopRequest(SIGNALS, patient=True), tmp_path / "attempts.jsonl") == expected
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    records = [json.loads(line) for line in (tmp_path / "attempts.jsonl").read_text().splitlines()]
    assert [record["code"] for record in records] == codes[: len(records)]
    assert len(records) <= restarts + 1


def test_documented_codes_are_final() -> None:
    assert set(FINAL) <= documented_codes()
