"""What every part of the run has in common: its settings, its figures, and its way to fail.

A part is a module of its own with a function ``check(setting, report)``; ``python -m benchmarks.gpu.NAME`` runs it alone.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PARTS = "parts"  # folder of figures and logs, one of each for a part
WORK = "work"  # folder of what a part writes for itself
NO_GPU = (
    "no GPU that PyTorch can use here; to run the same parts at toy sizes on the CPU, type: python -m benchmarks.gpu --device cpu --toy"
)


class Wrong(Exception):
    """A part found something that is not as it should be; the message says what."""


@dataclass(frozen=True)
class Setting:
    """Where and how large: ``toy`` takes sizes that a CPU does in seconds and whose speeds mean nothing. ``apex``: its source, if any."""

    output: Path
    device: str
    toy: bool
    apex: Path | None = None

    def work(self, name: str) -> Path:
        """A folder for a part's own files."""
        folder = self.output / WORK / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def words(self) -> list[str]:
        """The same settings as options of a part."""
        words = ["--output", str(self.output), "--device", self.device]
        return [*words, *["--toy"] * self.toy, *(["--apex", str(self.apex)] if self.apex is not None else [])]


class Report:
    """A part's figures, on the disk as soon as they are known, so that they count also where the part is ended early."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
        self.path = path

    def tell(self, **figures: Any) -> None:
        """Record figures by name; a later one of the same name replaces the earlier."""
        line = json.dumps(figures, default=str)
        print(line, flush=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(line + "\n")

    def row(self, what: str, found: str) -> None:
        """A line of the table at the end."""
        self.tell(rows=[[what, found]])

    def tried(self, what: str, action: Callable[[], Any]) -> Any:
        """What ``action`` gives; where it fails that is recorded and in the table, and the part goes on (and fails at its end)."""
        try:
            return action()
        except Exception as error:
            traceback.print_exc()
            self.tell(failures=[f"{what}: {told(error)}"])
            return None


def tidy(name: str, setting: Setting) -> None:
    """Take away a part's own files, but for the logs of what it has started, which go to ``parts``."""
    folder = setting.output / WORK / name
    for log in sorted(folder.rglob("*.log")):
        log.replace(setting.output / PARTS / f"{name}-{log.parent.name}-{log.name}".replace(" ", "-").replace(",", ""))
    shutil.rmtree(folder, ignore_errors=True)


def figures_of(path: Path) -> dict[str, Any]:
    """All that a part has recorded: lists are joined, of other figures the last holds."""
    found: dict[str, Any] = {}
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for line in lines:
        try:
            figures = json.loads(line)
        except json.JSONDecodeError:  # cut off where the part was ended
            continue
        for name, value in figures.items():
            found[name] = [*found.get(name, []), *value] if isinstance(value, list) else value
    return found


def told(error: BaseException) -> str:
    """An error in one line."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def add_options(options: argparse.ArgumentParser) -> None:
    """The options that the whole run and each part have."""
    options.add_argument("--output", type=Path, default=Path("gpu-run"), help="folder for results.jsonl, table and logs (default: gpu-run)")
    options.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="where the parts run (default: cuda)")
    options.add_argument("--toy", action="store_true", help="sizes that a CPU does in seconds; their speeds mean nothing")
    options.add_argument(
        "--apex", type=Path, default=None, help="source of NVIDIA apex, to build its optimisers and compare ours with them"
    )


def check_options(options: argparse.ArgumentParser, given: argparse.Namespace) -> None:
    """End with one line and exit code 2 where a path that was given cannot be what it is for."""
    if given.output.exists() and not given.output.is_dir():
        options.error(f"--output {given.output} is a file; give a folder")
    if given.apex is not None and not (given.apex / "setup.py").is_file():
        options.error(f"--apex {given.apex} holds no source of NVIDIA apex (setup.py); give the folder of a checkout")


def has_gpu() -> bool:
    """Whether PyTorch finds a GPU; asked in another process, as this one is to hold no memory there."""
    asked = subprocess.run([sys.executable, "-c", "import sys, torch; sys.exit(not torch.cuda.is_available())"], capture_output=True)
    return asked.returncode == 0


def setting_of(given: argparse.Namespace) -> Setting:
    """The settings that the options make."""
    return Setting(given.output.resolve(), given.device, given.toy, given.apex.resolve() if given.apex is not None else None)


def environment(device: str) -> dict[str, str]:
    """What a process must have been started with on ``device``: on a CPU no GPU to be seen, which the trainer would take, and Triton's
    interpreter, which Triton looks for when it is imported."""
    return {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"} if device == "cpu" else {}


def run_part(name: str, check: Callable[[Setting, Report], None]) -> None:
    """Run one part in this process; exit code 1 where it failed, its figures in ``parts/NAME.jsonl``."""
    options = argparse.ArgumentParser(description=check.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(options)
    given = options.parse_args()
    check_options(options, given)
    if given.device == "cuda" and not has_gpu():
        print(NO_GPU, file=sys.stderr)
        sys.exit(2)
    setting = setting_of(given)
    if not environment(setting.device).items() <= os.environ.items():
        os.execve(sys.executable, sys.orig_argv, os.environ | environment(setting.device))
    report = Report(setting.output / PARTS / f"{name}.jsonl")
    tidy(name, setting)  # what an earlier run has left would be gone on with
    try:
        check(setting, report)
    except Wrong as error:
        report.tell(failures=[str(error)])
    except Exception as error:
        traceback.print_exc()
        report.tell(failures=[told(error)])
    tidy(name, setting)
    sys.exit(1 if figures_of(report.path).get("failures") else 0)
