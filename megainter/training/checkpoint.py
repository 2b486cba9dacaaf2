"""Checkpoints: published whole or not at all, verified when read, the same at every world size and ZeRO stage.

A checkpoint is a folder ``checkpoints/step_0000100``: ``weights-*``, ``exp_avg-*`` and ``exp_avg_sq-*`` safetensors, and ``ema-*``
where the run averages its weights, with fp32 tensors by parameter name, shared out over the ranks that wrote them;
``trainer.json``; ``config.json`` and ``vocab.txt`` of the model; and ``manifest.json`` with size and SHA-256 of each file,
written last. The folder is made aside, fsynced and renamed; then ``latest`` names it.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megainter.errors import DamagedError, MegainterError
from megainter.files import apply_umask, fsync_folder, read_json, sha256_of, write_atomically, write_json

MANIFEST = "manifest.json"
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


def publish(root: Path, state: dict[str, Any], share: dict[str, dict[str, Tensor]], files: dict[str, bytes], keep: int) -> str | None:
    """Write one checkpoint; collective over all ranks, each with its ``share`` of the state. Rank 0 adds ``files``.

    Returns None, or what went wrong on some rank: then nothing was published, the partial folder is gone, older checkpoints stand.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    name = step_name(state["step"])
    partial = root / (PARTIAL + name)
    failure = _attempt(lambda: _start(partial)) if rank == 0 else None
    dist.barrier()
    entries: list[dict[str, Any]] = []
    failure = failure or _attempt(lambda: entries.extend(_write_share(partial, share, rank, size)))
    if rank == 0 and failure is None:
        failure = _attempt(lambda: entries.extend(_write_files(partial, files, state)))
    gathered: list[Any] = [None] * size
    dist.all_gather_object(gathered, (failure, entries))
    failure = next((f"rank {number}: {text}" for number, (text, _) in enumerate(gathered) if text), None)
    outcome = [failure]
    if rank == 0:
        if failure is None:
            outcome[0] = _attempt(lambda: _finish(root, name, [entry for _, part in gathered for entry in part], keep))
        if outcome[0] is not None:
            shutil.rmtree(partial, ignore_errors=True)
    dist.broadcast_object_list(outcome, src=0)
    return outcome[0]


def _attempt(action: Callable[[], None]) -> str | None:
    """Run ``action``; the text of an I/O failure instead of the exception, so that ranks can agree on it."""
    try:
        action()
    except (OSError, SafetensorError, MegainterError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _start(partial: Path) -> None:
    for stale in partial.parent.glob(PARTIAL + "*"):
        shutil.rmtree(stale)
    partial.mkdir(parents=True)


def _write_share(partial: Path, share: dict[str, dict[str, Tensor]], rank: int, size: int) -> list[dict[str, Any]]:
    entries = []
    for kind, tensors in share.items():
        path = partial / f"{kind}-{rank:05d}-of-{size:05d}.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
        apply_umask(path)
        entries.append(_entry(path))
    return entries


def _write_files(partial: Path, files: dict[str, bytes], state: dict[str, Any]) -> list[dict[str, Any]]:
    for name, content in files.items():
        write_atomically(partial / name, content)
    write_json(partial / "trainer.json", state)
    return [_entry(partial / name) for name in (*files, "trainer.json")]


def _entry(path: Path) -> dict[str, Any]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)}


def _finish(root: Path, name: str, entries: list[dict[str, Any]], keep: int) -> None:
    partial, final = root / (PARTIAL + name), root / name
    write_json(partial / MANIFEST, {"format": 1, "files": entries})
    if final.exists():
        shutil.rmtree(final)
    os.rename(partial, final)
    fsync_folder(root)
    write_atomically(root / "latest", name + "\n")
    for old in sorted(root.glob("step_*"))[:-keep]:
        if old.name != name:
            shutil.rmtree(old)


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
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        if sha256_of(path) != digest:
            return f"{name} does not match its SHA-256"
    return None


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
