"""Checkpoints: published whole or not at all, verified when read, the same at every world size and ZeRO stage.

A checkpoint is a folder ``checkpoints/step_0000100``: ``weights-*``, ``exp_avg-*`` and ``exp_avg_sq-*`` safetensors, and ``ema-*``
where the run averages its weights, with fp32 tensors by parameter name, shared out over the ranks that wrote them;
``trainer.json``; ``config.json`` and ``vocab.txt`` of the model; and ``manifest.json`` with size and SHA-256 of each file,
written last. The folder is made aside, fsynced and renamed; then ``latest`` names it (``training/saving.py``, ``training/writing.py``).
"""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from megainter.errors import DamagedError, MegainterError
from megainter.files import read_json, remove, sha256_of
from megainter.training.writing import MANIFEST as MANIFEST

PARTIAL = ".partial-"


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint folder and its ``trainer.json``."""

    folder: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """Finished optimiser steps."""
        return int(self.state["step"])


def step_name(step: int) -> str:
    """Folder name of a step: ``step_0000100``."""
    return f"step_{step:07d}"


def remove_unfinished(root: Path) -> None:
    """Remove what a killed run had begun to write in ``root`` and did not publish."""
    for stale in (*root.glob(PARTIAL + "*"), *root.glob(".step_*.old")):
        remove(stale)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None where every file has the size and SHA-256 of its manifest."""
    if not (folder / MANIFEST).is_file():
        return f"{MANIFEST} is missing"
    try:
        entries = [(str(entry["file"]), int(entry["bytes"]), str(entry["sha256"])) for entry in read_json(folder / MANIFEST)["files"]]
    except Exception as error:  # any malformed manifest is damage, whatever it raises
        return f"{MANIFEST} cannot be read: {error}"
    for name, size, digest in entries:
        path = folder / Path(name).name
        if not os.path.isfile(path):  # false for what can be no name, too
            return f"{name[:200]} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        if sha256_of(path) != digest:
            return f"{name} does not match its SHA-256"
    return None if _says_a_step(folder / "trainer.json") else "trainer.json says no step"


def _says_a_step(path: Path) -> bool:
    try:
        state = read_json(path)
    except MegainterError:
        return False
    return isinstance(state, dict) and isinstance(state.get("step"), int)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Verify and open one checkpoint; ``DamagedError`` says which file is wrong."""
    wrong = damage(folder)
    if wrong is not None:
        raise DamagedError(f"checkpoint {folder} is damaged: {wrong}")
    return Checkpoint(folder, read_json(folder / "trainer.json"))


def newest(root: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest whole checkpoint: the one ``latest`` names, else the next older that verifies, said through ``warn``.

    None where no checkpoint was ever published; ``DamagedError`` where some are there and none is whole.
    """
    candidates = sorted((path for path in root.glob("step_*") if path.is_dir()), reverse=True)
    if not candidates:
        return None
    latest = root / "latest"
    named = latest.read_text(encoding="utf-8", errors="replace").strip() if latest.is_file() else ""
    if named != candidates[0].name:
        warn(f"{latest} names {named or 'nothing'}, the newest checkpoint is {candidates[0].name}: trying that first")
    for folder in candidates:
        wrong = damage(folder)
        if wrong is None:
            return Checkpoint(folder, read_json(folder / "trainer.json"))
        warn(f"checkpoint {folder} is damaged ({wrong}): falling back to the one before")
    raise DamagedError(f"none of the {len(candidates)} checkpoints in {root} is whole; restore one, or start in another output folder")


@contextmanager
def reader(checkpoint: Checkpoint) -> Iterator[Callable[[str, str], Tensor]]:
    """A function ``read(kind, name)`` that gives one fp32 tensor of the checkpoint from memory-mapped files."""
    with ExitStack() as stack:
        places = {}
        for path in sorted(checkpoint.folder.glob("*.safetensors")):
            file = stack.enter_context(safe_open(path, framework="pt"))
            kind = path.name.partition("-")[0]
            places.update({(kind, name): file for name in file.keys()})  # noqa: SIM118 - not a dict

        def read(kind: str, name: str) -> Tensor:
            if (kind, name) not in places:
                raise DamagedError(f"checkpoint {checkpoint.folder} has no {kind} of {name}")
            return places[kind, name].get_tensor(name)

        yield read


def weight_names(checkpoint: Checkpoint, kind: str = "weights") -> list[str]:
    """Names of all parameters in the checkpoint, or of those it holds something of another ``kind`` of ("ema"; none: an empty list)."""
    names: list[str] = []
    for path in sorted(checkpoint.folder.glob(f"{kind}-*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names += file.keys()
    return names
