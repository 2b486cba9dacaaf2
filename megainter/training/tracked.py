"""Trackers beside a run: a process for each, which a run neither waits for nor ends with."""

import logging
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from megainter.tracking import Tracker

PATIENCE = 30.0  # seconds at the end of a run for what was not sent yet
log = logging.getLogger("megainter")


@contextmanager
def tracked(run: Path, names: Sequence[Tracker]) -> Iterator[None]:
    """Have metrics.jsonl sent to these trackers while the body runs; a tracker's failure is told, and nothing else comes of it."""
    started = {name: _start(run, name) for name in names}
    for name, process in started.items():
        threading.Thread(target=_tell_end, args=(run, name, process), daemon=True, name=f"tracker-{name}").start()
    try:
        yield
    finally:
        for process in started.values():
            assert process.stdin is not None
            process.stdin.close()
        deadline = time.monotonic() + PATIENCE
        for name, process in started.items():
            _await(run, name, process, deadline)


def _start(run: Path, name: Tracker) -> "subprocess.Popen[bytes]":
    """The process that follows, in a session of its own: a signal to the run's processes does not cut off its last records."""
    (run / "logs" / "tracking").mkdir(parents=True, exist_ok=True)
    with open(_log(run, name), "ab") as file:
        command = [sys.executable, "-m", "megainter.training.following", str(run), name]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=file, stderr=file, start_new_session=True)


def _log(run: Path, name: Tracker) -> Path:
    return run / "logs" / "tracking" / f"{name}.log"


def _tell_end(run: Path, name: Tracker, process: "subprocess.Popen[bytes]") -> None:
    if (code := process.wait()) != 0:
        log.warning(
            "tracking to %s ended with %d; the run goes on. See %s; `%s` sends the rest", name, code, _log(run, name), _rest(run, name)
        )


def _await(run: Path, name: Tracker, process: "subprocess.Popen[bytes]", deadline: float) -> None:
    try:
        process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        log.warning(
            "%s did not take all records in %.0f s; it goes on by itself, and `%s` sends what is missing", name, PATIENCE, _rest(run, name)
        )


def _rest(run: Path, name: Tracker) -> str:
    return f"megainter track {run} --to {name}"
