"""The process that writes one rank's part of every checkpoint, while the rank trains on.

It knows neither torch nor the other ranks. Files of tensors lie in memory that it shares with its rank, byte by byte as they are to lie on
the disk. It does one order at a time, an object of JSON, and answers each with another. It hears no signal that asks the run to stop, since
the rank will wait for it, and dies with the rank.
"""

import base64
import json
import mmap
import os
import shutil
import signal
from collections.abc import Iterator
from hashlib import sha256
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from megainter.errors import MegainterError
from megainter.files import replace, write_atomically, write_json
from megainter.process import STOP_SIGNALS, end_with_parent

MANIFEST = "manifest.json"
BLOCK = 1 << 22  # bytes hashed, looked at and written at a time: they stay in the processor's cache


class NotFiniteError(Exception):
    """A tensor holds NaN or infinity; the text names it."""


def main(orders: int, answers: int, memory: int, rank_process: int) -> None:
    """Do what comes in on descriptor ``orders`` until it closes; ``memory`` is the descriptor of the shared memory."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    end_with_parent(rank_process)
    coming, going = Connection(orders, writable=False), Connection(answers, readable=False)
    while True:
        try:
            order = json.loads(coming.recv_bytes())
        except EOFError:
            return
        going.send_bytes(json.dumps(done(order, memory)).encode())


def done(order: dict[str, Any], memory: int) -> dict[str, Any]:
    """Do one order. The answer has ``failure`` or ``not_finite`` where that is why it was not done, else what it gave."""
    act = {"reserve": _reserve, "write": _write, "publish": _publish, "abandon": _abandon}[order["do"]]
    try:
        return act(order, memory)
    except NotFiniteError as error:
        return {"not_finite": str(error)}
    except (OSError, ValueError, MegainterError) as error:
        return {"failure": f"{type(error).__name__}: {error}"}


def _reserve(order: dict[str, Any], memory: int) -> dict[str, Any]:
    """Have the system find the memory now, and not while training waits for the first copy."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(memory, 0, order["bytes"])
    return {}


def _write(order: dict[str, Any], memory: int) -> dict[str, Any]:
    """Write files of tensors from the memory, and small files from the order, into ``folder``; gives their entries for the manifest."""
    folder, entries = Path(order["folder"]), []
    folder.mkdir(parents=True, exist_ok=True)
    everything = memoryview(mmap.mmap(memory, 0, access=mmap.ACCESS_READ))
    for name, start, size in order["tensors"]:
        entries.append(_written(folder / name, _finite_blocks(everything[start : start + size], name)))
    for name, content in order["small"].items():
        entries.append(_written(folder / name, iter([base64.b64decode(content)])))
    return {"entries": entries}


def _written(path: Path, blocks: Iterator[bytes | memoryview]) -> dict[str, Any]:
    """Write ``blocks`` durably; gives name, size and SHA-256, taken on the way."""
    digest, size = sha256(), 0
    with open(path, "wb", buffering=0) as file:
        for block in blocks:
            digest.update(block)
            size += len(block)
            _write_all(file.fileno(), block)
        os.fsync(file.fileno())
    return {"file": path.name, "bytes": size, "sha256": digest.hexdigest()}


def _write_all(descriptor: int, content: bytes | memoryview) -> None:
    written = 0
    while written < len(content):
        written += os.write(descriptor, content[written:])


def _finite_blocks(content: memoryview, name: str) -> Iterator[memoryview]:
    """A safetensors file of float32 in blocks, each looked at before it is given; ``NotFiniteError`` names a tensor that is not finite."""
    data = 8 + int.from_bytes(content[:8], "little")
    yield content[:data]
    for start in range(data, len(content), BLOCK):
        block = content[start : start + BLOCK]
        numbers = np.frombuffer(block, dtype="<f4")
        with np.errstate(over="ignore", invalid="ignore"):
            finite = bool(np.isfinite(numbers.sum()))  # a finite sum has finite terms; another may just be too large
        if not finite and not (single := np.isfinite(numbers)).all():
            raise NotFiniteError(_tensor_at(content, start - data + 4 * int(single.argmin()), name))
        yield block


def _tensor_at(content: memoryview, position: int, name: str) -> str:
    """The tensor with byte ``position`` of the data, as "kind of name"."""
    header = json.loads(bytes(content[8 : 8 + int.from_bytes(content[:8], "little")]))
    found = next(tensor for tensor, place in header.items() if place["data_offsets"][0] <= position < place["data_offsets"][1])
    return f"{name.partition('-')[0]} of {found}"


def _publish(order: dict[str, Any], memory: int) -> dict[str, Any]:
    """Give the ``folder`` that all ranks have written its manifest and its name, and remove what need not be kept any more."""
    partial, final = Path(order["folder"]), Path(order["final"])
    write_json(partial / MANIFEST, {"format": 1, "files": order["entries"]})
    replace(partial, final)
    write_atomically(final.parent / "latest", final.name + "\n")
    return {"left": _prune(final, order["keep"], order["keep_every"])}


def _prune(newest: Path, keep: int, keep_every: int) -> str | None:
    """Remove all checkpoints but the last ``keep`` and each ``keep_every``-th step (0: none); gives what could not be removed."""
    left = None
    for old in sorted(newest.parent.glob("step_*"))[:-keep]:
        step = int(old.name[5:]) if old.name[5:].isdigit() else 0
        if old == newest or (keep_every and step % keep_every == 0):
            continue
        try:
            shutil.rmtree(old)
        except OSError as error:
            left = f"{old.name} could not be removed: {error}"
    return left


def _abandon(order: dict[str, Any], memory: int) -> dict[str, Any]:
    shutil.rmtree(order["folder"], ignore_errors=True)
    return {}
