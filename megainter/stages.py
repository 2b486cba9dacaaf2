"""A road of several commands, each the very one that a user types, each in a process of its own; what is finished is not done again.

A finished stage leaves ``stages/NAME.json`` with its seconds, a failed one ``stages/NAME.failed``; a killed road goes on where it was.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megainter.errors import MegainterError
from megainter.files import read_json, write_json
from megainter.process import WATCH_VARIABLE, folder_lock, free_port


@dataclass(frozen=True)
class Stage:
    """One stage: what it is for, and how it is run."""

    name: str
    purpose: str
    run: Callable[[], None]


def run_stages(output: Path, stages: Sequence[Stage]) -> None:
    """Run ``stages`` in order into the folder ``output``; raises ``MegainterError`` with the exit code of the stage that failed."""
    output.mkdir(parents=True, exist_ok=True)
    with folder_lock(output):
        for number, stage in enumerate(stages, start=1):
            _run_stage(output, stage, f"[{number}/{len(stages)}] {stage.purpose}")


def seconds_of(output: Path) -> dict[str, float]:
    """Seconds of each finished stage, by its name, those of its failed starts included; in the order in which they ended."""
    ended = sorted((output / "stages").glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    return {path.stem: float(read_json(path)["seconds"]) for path in ended}


def _run_stage(output: Path, stage: Stage, title: str) -> None:
    record, failed = output / "stages" / f"{stage.name}.json", output / "stages" / f"{stage.name}.failed"
    if record.exists():
        print(f"{title}: done before, in {read_json(record)['seconds']:.0f} s", flush=True)
        return

    print(f"\n{title}", flush=True)
    record.parent.mkdir(exist_ok=True)
    start = time.monotonic() - (read_json(failed)["seconds"] if failed.exists() else 0.0)
    try:
        stage.run()
    except BaseException:
        write_json(failed, {"stage": stage.name, "seconds": round(time.monotonic() - start, 1)})
        raise
    write_json(record, {"stage": stage.name, "seconds": round(time.monotonic() - start, 1)})
    failed.unlink(missing_ok=True)


def megainter(*arguments: object) -> None:
    """Run a verb as its own process, after showing the command."""
    _run("megainter", [sys.executable, "-m", "megainter"], arguments)


def deepspeed(processes: int, *arguments: object) -> None:
    """Run under DeepSpeed's launcher with local processes, after showing the command."""
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner"]
    _run("deepspeed", launcher, ["--num_gpus", processes, "--master_port", free_port(), *arguments])


def verb(name: str, purpose: str, *arguments: object) -> Stage:
    """A stage that is one command of ``megainter``."""
    return Stage(name, purpose, lambda: megainter(*arguments))


def conversion(name: str, purpose: str, folder: Path, *arguments: object) -> Stage:
    """A stage ``megainter convert`` that leaves ``folder``; one of a start that was killed before it was recorded is made anew."""

    def run() -> None:
        if folder.exists():
            shutil.rmtree(folder)
        megainter("convert", *arguments)

    return Stage(name, purpose, run)


def training(name: str, purpose: str, processes: int, *arguments: object) -> Stage:
    """A stage ``megainter pretrain`` or ``finetune`` in so many local processes; it goes on by itself."""

    def run() -> None:
        if processes == 1:
            megainter(*arguments)
        else:
            deepspeed(processes, "--module", f"megainter.{arguments[0]}", *arguments[1:])

    return Stage(name, purpose, run)


def _run(shown: str, program: list[str], arguments: Iterable[object]) -> None:
    words = [str(argument) for argument in arguments]
    print(f"$ {shown} {' '.join(words)}", flush=True)
    environment = os.environ | {WATCH_VARIABLE: str(os.getpid()), "OMP_NUM_THREADS": "1"}
    code = subprocess.run([*program, *words], env=environment, check=False).returncode
    if code:
        raise _failed(shown, words, code)


def _failed(shown: str, words: list[str], code: int) -> MegainterError:
    error = MegainterError(f"`{shown} {words[0]} ...` ended with exit code {code}, see above; the same command goes on where it stopped")
    error.exit_code = code if 0 < code < 128 else 1
    return error
