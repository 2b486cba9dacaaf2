"""Runs parts as processes of their own, each with its own time limit, within one deadline for all."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.part import PARTS, Setting, environment, figures_of, tidy

OK, FAILED, OVER, NOT_RUN = "ok", "failed", "ended at its time limit", "not run: no time left"
LEAST = 15.0  # seconds; with less left a part would only be begun to be ended
TAIL = 8  # lines of a failed part's log in its result


@dataclass(frozen=True)
class Part:
    """``python -m MODULE``: what it is for, its time limit in seconds, and whether it is timed and so must run alone."""

    name: str
    purpose: str
    seconds: float
    alone: bool
    module: str = ""

    def command(self, setting: Setting) -> list[str]:
        """How it is run."""
        return [sys.executable, "-m", self.module or f"benchmarks.gpu.{self.name}", *setting.words()]


@dataclass(frozen=True)
class Result:
    """How a part ended after ``seconds``; ``figures`` are those it had recorded by then, ``tail`` the end of its log where it is not ok."""

    part: str
    outcome: str
    seconds: float
    limit: float
    figures: dict[str, Any]
    tail: list[str]


def run_parts(parts: Sequence[Part], setting: Setting, seconds: float) -> Iterator[Result]:
    """Run ``parts`` in their order, those that are not timed beside each other, and give each one's result as it ends.

    No part runs longer than its limit or beyond ``seconds`` after the beginning of all; those that no longer fit are given as not run.
    """
    end = time.monotonic() + seconds
    for group in _groups(parts, together=setting.device == "cuda"):
        left = end - time.monotonic()
        if left < min(LEAST, *(part.seconds for part in group)):
            yield from (Result(part=part.name, outcome=NOT_RUN, seconds=0.0, limit=part.seconds, figures={}, tail=[]) for part in group)
            continue
        yield from _run_beside(group, setting, left)


def _groups(parts: Sequence[Part], together: bool) -> list[list[Part]]:
    """Neighbours that need not be alone in one group; on a CPU, which they would fight for, everyone is alone."""
    groups: list[list[Part]] = []
    for part in parts:
        if together and not part.alone and groups and not groups[-1][0].alone:
            groups[-1].append(part)
        else:
            groups.append([part])
    return groups


def _run_beside(group: list[Part], setting: Setting, left: float) -> Iterator[Result]:
    began = time.monotonic()
    running = {part.name: (part, _start(part, setting), min(part.seconds, left)) for part in group}
    try:
        while running:
            for name, (part, process, limit) in list(running.items()):
                spent = time.monotonic() - began
                if process.poll() is None and spent < limit:
                    continue
                del running[name]
                over = process.poll() is None
                end_with_children(process)
                tidy(name, setting)
                yield _result(part, process.returncode, over, spent, limit, setting)
            time.sleep(0.05)
    finally:
        for _, process, _ in running.values():
            end_with_children(process)


def _start(part: Part, setting: Setting) -> subprocess.Popen[bytes]:
    path = _log(part.name, setting)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".jsonl").unlink(missing_ok=True)  # of an earlier run
    with open(path, "wb") as log:
        return subprocess.Popen(
            part.command(setting), env=os.environ | environment(setting.device), stdin=subprocess.DEVNULL, stdout=log,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip


def _log(name: str, setting: Setting) -> Path:
    return setting.output / PARTS / f"{name}.log"


def _result(part: Part, code: int, over: bool, seconds: float, limit: float, setting: Setting) -> Result:
    path = _log(part.name, setting)
    outcome = OVER if over else FAILED if code else OK
    tail = [] if outcome == OK else path.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL:]
    return Result(
        part=part.name,
        outcome=outcome,
        seconds=round(seconds, 1),
        limit=round(limit, 1),
        figures=figures_of(path.with_suffix(".jsonl")),
        tail=tail,
    )


def end_with_children(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started: its group, and those below it that have made a group of their own."""
    below = descendants(process.pid)
    for end in (lambda: os.killpg(process.pid, signal.SIGKILL), *(lambda pid=pid: os.kill(pid, signal.SIGKILL) for pid in below)):
        with contextlib.suppress(ProcessLookupError):
            end()
    process.wait()


def descendants(pid: int) -> list[int]:
    """Children of a process, their children, and so on."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += [int(word) for word in (task / "children").read_text().split()]
    return found + [below for child in found for below in descendants(child)]


def write_line(result: Result, output: Path) -> None:
    """Append a result to ``results.jsonl``."""
    with open(output / "results.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(vars(result)) + "\n")
