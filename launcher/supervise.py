"""Running a job and staying with it: stops that save, ends that leave nothing behind, restarts from the newest checkpoint."""

import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from megainter.errors import STOPPED_EARLY
from megainter.process import OUTCOME_VARIABLE, PULSE_VARIABLE, STOP_VARIABLE, WATCH_VARIABLE, StopRequest, end_with_parent

PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
FINAL = (2, 3, 4, 5, 6, 7, STOPPED_EARLY)  # the same command would end the same way, or was asked to stop
LEFT_OVER = 5.0  # seconds that ranks get to notice the end of their launcher
TICK = 0.1


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent dies, so that none can be lost (Linux; elsewhere nothing happens)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def run_attempt(command: list[str], environment: Mapping[str, str], folder: Path, requests: StopRequest, grace: float, remote: bool) -> int:
    """Start ``command`` in a session of its own and stay until nothing of it is left; returns the exit code of the attempt.

    0 only where rank 0 left its 0 and the engine ended with 0. The first signal asks all ranks to save and end within ``grace``
    seconds; the second, or the end of the grace, kills: 128 + its number. ``folder`` is emptied and holds what ranks leave.
    """
    shutil.rmtree(folder / "outcome", ignore_errors=True)
    (folder / "outcome").mkdir(parents=True)
    (folder / "stop").unlink(missing_ok=True)
    child = _start(command, {**environment, **control_variables(folder, remote)})
    deadline = None
    pulse = 0.0
    while child.poll() is None:
        if remote and time.monotonic() - pulse > 2:
            pulse = time.monotonic()
            (folder / "pulse").write_text(f"{pulse}\n")
        if requests.count and deadline is None:
            deadline = time.monotonic() + grace
            print(f"launch: {signal.Signals(requests.number).name}: asking all ranks to save and end, within {grace:.0f} s", flush=True)
            (folder / "stop").touch()
        if deadline is not None and (requests.count > 1 or time.monotonic() > deadline):
            _end_all(child)
            return 128 + requests.number
        _reap_adopted(child.pid)
        time.sleep(TICK)
    _clear_descendants(LEFT_OVER)
    return outcome(folder / "outcome", child.returncode, stopped=requests.count > 0)


def control_variables(folder: Path, remote: bool) -> dict[str, str]:
    """How ranks hear from this launcher: by its process where they share the machine, by files where they do not."""
    shared = {STOP_VARIABLE: str(folder / "stop"), OUTCOME_VARIABLE: str(folder / "outcome")}
    return shared | ({PULSE_VARIABLE: str(folder / "pulse")} if remote else {WATCH_VARIABLE: str(os.getpid())})


def _start(command: list[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    die_with_parent = partial(end_with_parent, os.getpid(), signal.SIGTERM)
    return subprocess.Popen(
        command, env=dict(environment), stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=die_with_parent
    )  # one thread runs here: the hazards of preexec_fn do not arise


def outcome(folder: Path, engine_code: int, stopped: bool) -> int:
    """One exit code from those that ranks left and the engine's own: a named failure first, then a stop, then success by all."""
    codes = {path.name: int(path.read_text()) for path in folder.glob("rank-*")}
    failures = [code for code in codes.values() if code not in (0, STOPPED_EARLY)]
    if failures:
        return min(failures, key=lambda code: code == 1)  # a rank whose peer has ended says 1
    if STOPPED_EARLY in codes.values():
        return STOPPED_EARLY
    if codes.get("rank-00000") == 0 and engine_code == 0:
        return 0
    return STOPPED_EARLY if stopped else 1


def descendants(root: int) -> list[int]:
    """Process ids of all living descendants of ``root``, zombies not counted (from /proc; empty where there is none)."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            state, parent = entry.read_text().rpartition(")")[2].split()[:2]
            if state not in "ZX":
                children.setdefault(int(parent), []).append(int(entry.parent.name))
    found: list[int] = []
    waiting = list(children.get(root, []))
    while waiting:
        pid = waiting.pop()
        found.append(pid)
        waiting += children.get(pid, [])
    return found


def _reap_adopted(engine: int) -> None:
    """Let go of adopted processes that have ended: the engine, which takes a dead one that nobody reaps for alive, waits 30 s for it."""
    with contextlib.suppress(ChildProcessError, AttributeError):
        while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None and ended.si_pid != engine:
            os.waitpid(ended.si_pid, 0)


def _clear_descendants(patience: float) -> None:
    """Wait until no descendant is left, kill those that remain after ``patience`` seconds, and reap all."""
    deadline = time.monotonic() + patience
    while left := descendants(os.getpid()):
        if time.monotonic() > deadline:
            for pid in left:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(TICK)
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _end_all(child: subprocess.Popen[bytes]) -> None:
    """SIGTERM to the engine, which ends ranks on other hosts; after a moment SIGKILL to everything here."""
    child.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(timeout=LEFT_OVER)
    child.kill()
    child.wait()
    _clear_descendants(0.0)


def supervise(
    attempt: Callable[[int], int], restarts: int, requests: StopRequest, record: Path, reached: Callable[[], object] = lambda: None
) -> int:
    """Run ``attempt(1)``, and after a failure that another start may mend ``attempt(2)`` and so on, ``restarts`` times at most.

    The wait before a start doubles, up to half a minute, with each failure in a row that left ``reached()`` as it was. Returns the last
    exit code; each attempt is one line of ``record`` (JSON Lines).
    """
    in_vain = 0
    for number in range(1, restarts + 2):
        began, before = time.time(), reached()
        code = attempt(number)
        with open(record, "a", encoding="utf-8") as file:
            file.write(
                json.dumps({"attempt": number, "began": round(began, 1), "seconds": round(time.time() - began, 1), "code": code}) + "\n"
            )
        if code == 0 or code in FINAL or requests.count or number > restarts:
            return code
        print(f"launch: attempt {number} ended with {code}; starting again from the newest whole checkpoint "
              f"({restarts + 1 - number} restarts left)", file=sys.stderr, flush=True)  # fmt: skip
        in_vain = in_vain + 1 if reached() == before else 0
        time.sleep(min(2.0**in_vain, 30.0))
    return 1  # unreachable: the loop returns
