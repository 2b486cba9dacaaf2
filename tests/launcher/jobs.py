"""Real launched jobs for tests: started, watched through their metrics, struck by signals, and looked after."""

import contextlib
import json
import os
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

from launcher.options import Placement, SlurmOptions, Supervision
from megainter.training.checkpoint import damage
from tests.synthetic import environment


def start_launch(
    options: list[str], arguments: list[str], log: Path, extra: dict[str, str] | None = None, trained: tuple[str, ...] = ("pretrain",)
) -> subprocess.Popen[bytes]:
    """``megainter launch OPTIONS -- pretrain ARGUMENTS`` in a session of its own, its output appended to ``log``."""
    command = [sys.executable, "-m", "megainter", "launch", *options, "--", *trained, *arguments]
    ends_with_the_test = {"MEGAINTER_WATCH_PID": str(os.getpid())}
    with open(log, "ab") as file:
        return subprocess.Popen(
            command, env=environment() | ends_with_the_test | (extra or {}), stdout=file, stderr=file, start_new_session=True
        )


def last_step(run: Path) -> int:
    """The newest logged step; 0 before the first."""
    with contextlib.suppress(OSError, json.JSONDecodeError):
        newest = map(json.loads, reversed((run / "metrics.jsonl").read_text().splitlines()))
        return next((record["step"] for record in newest if record["kind"] == "train"), 0)  # a save is told some steps later
    return 0


def wait_for_step(run: Path, step: int, child: subprocess.Popen[bytes], seconds: float = 300) -> None:
    """Wait until ``step`` is logged; the job must live as long."""
    deadline = time.monotonic() + seconds
    while last_step(run) < step:
        assert child.poll() is None, f"the job ended with {child.returncode}"
        assert time.monotonic() < deadline, f"no step {step} after {seconds} s"
        time.sleep(0.05)


def processes_of(run: Path) -> dict[int, str]:
    """Living processes that have the run folder among their words, or a folder in it in their environment: {pid: command line}."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = entry.read_bytes().decode(errors="replace").split("\0")
            state = (entry.parent / "stat").read_text().rpartition(")")[2].split()[0]
            ours = str(run) in words or f"={run}/".encode() in (entry.parent / "environ").read_bytes()
            if ours and state not in "ZX" and int(entry.parent.name) != os.getpid():
                found[int(entry.parent.name)] = " ".join(words)
    return found


def ranks_of(run: Path) -> list[int]:
    """Process ids of the ranks."""
    found = []
    for pid, words in processes_of(run).items():
        parts = words.split()
        engine = "launch" in parts or any(part.startswith(("deepspeed.", "torch.")) for part in parts)
        if {"megainter.pretrain", "megainter.finetune"} & set(parts) and not engine:
            found.append(pid)
    return found


def agents_of(run: Path) -> list[int]:
    """Process ids of what stands between our launcher and the ranks: torchrun's agent, DeepSpeed's runner and helper."""
    names = ("torch.distributed.run", "deepspeed.launcher.", "mpirun")
    return [pid for pid, words in processes_of(run).items() if any(name in words for name in names)]


def assert_no_orphan(run: Path, seconds: float = 10) -> None:
    """Nothing of the job is left after ``seconds``."""
    deadline = time.monotonic() + seconds
    while left := processes_of(run):
        assert time.monotonic() < deadline, f"left over: {left}"
        time.sleep(0.1)


def whole_checkpoints(run: Path) -> list[int]:
    """Steps of the checkpoints whose every file matches its digest."""
    return sorted(int(folder.name[5:]) for folder in (run / "checkpoints").glob("step_*") if damage(folder) is None)


def asked(**options: Any) -> dict[str, Any]:
    """Options of `megainter launch` as its function takes them: in their groups."""
    groups = {"placement": Placement, "supervision": Supervision, "batch": SlurmOptions}
    taken = {name: {each.name for each in fields(kind)} for name, kind in groups.items()}
    made = {name: groups[name](**{key: options[key] for key in options if key in taken[name]}) for name in groups}
    return made | {key: options[key] for key in options if not any(key in names for names in taken.values())}
