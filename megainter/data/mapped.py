"""Named arrays in a folder, each a plain file that is mapped into memory: opened in no time, and shared by all processes of a machine.

    index.json    what the arrays were made from (their key), facts about them, dtype, length and SHA-256 of each, and its own checksum
    NAME          the bytes of one array, little-endian

Pages of mapped files belong to the system's cache: it keeps them once for all processes, and gives them back where memory is short.
"""

import hashlib
import os
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from megainter.errors import DamagedError, UsageError
from megainter.files import checksum_of, partial_name, read_json, refusal, replace, sha256_of, write_json

VERSION = 2
DESCRIPTION = "index.json"


@dataclass(frozen=True, eq=False)
class MappedArrays:
    """Read-only arrays by name, and the facts that were noted with them."""

    arrays: Mapping[str, NDArray[Any]]
    facts: dict[str, Any]

    def strings(self, name: str) -> pa.LargeStringArray:
        """Strings that ``ArrayWriter.append_strings`` wrote, without a copy."""
        offsets, content = self.arrays[f"{name}.offsets"], self.arrays[f"{name}.bytes"]
        return pa.LargeStringArray.from_buffers(len(offsets) - 1, pa.py_buffer(offsets), pa.py_buffer(content))


class ArrayWriter:
    """Writes arrays piece by piece into a folder beside ``folder``; ``publish`` puts it in its place, leaving the block drops it.

    ``dtypes``: name -> dtype. A name of ``strings`` stands for two arrays: its bytes, and its offsets int64 [n + 1].
    """

    def __init__(self, folder: Path, dtypes: Mapping[str, str], strings: tuple[str, ...] = ()) -> None:
        self.folder, self.aside = folder, partial_name(folder)
        parts = {f"{name}.{part}": dtype for name in strings for part, dtype in (("offsets", "int64"), ("bytes", "uint8"))}
        self.dtypes = {**dtypes, **parts}
        self._string_bytes = dict.fromkeys(strings, 0)
        self._files: dict[str, BinaryIO] = {}
        self._digests = {name: hashlib.sha256() for name in self.dtypes}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        shutil.rmtree(self.aside, ignore_errors=True)
        self.aside.mkdir(parents=True)
        for name in self.dtypes:
            self._files[name] = self._stack.enter_context(open(self.aside / name, "wb"))
        for name in self._string_bytes:
            self.append(f"{name}.offsets", np.zeros(1, np.int64))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()
        shutil.rmtree(self.aside, ignore_errors=True)

    def append(self, name: str, values: NDArray[Any]) -> None:
        """Add values [n] to an array. ``NoSpaceError`` where the disk is full."""
        content = np.ascontiguousarray(values, _little(self.dtypes[name])).data.cast("B") if len(values) else b""
        self._digests[name].update(content)
        try:
            self._files[name].write(content)
        except OSError as error:
            raise refusal(self.folder, error) from None

    def append_strings(self, name: str, values: pa.StringArray) -> None:
        """Add strings [n]."""
        offsets, content = string_buffers(values)
        self.append(f"{name}.offsets", offsets[1:] - offsets[0] + self._string_bytes[name])
        self.append(f"{name}.bytes", content)
        self._string_bytes[name] += len(content)

    def publish(self, key: str, facts: dict[str, Any]) -> None:
        """Put the folder in its place, whole; one that was there before goes."""
        try:
            lengths = {name: self._finished(name) for name in self.dtypes}
            digests = {name: digest.hexdigest() for name, digest in self._digests.items()}
            arrays = {name: {"dtype": self.dtypes[name], "length": lengths[name], "sha256": digests[name]} for name in self.dtypes}
            _describe(self.aside, {"version": VERSION, "key": key, "arrays": arrays, "facts": facts})
            replace(self.aside, self.folder)
        except OSError as error:
            raise refusal(self.folder, error) from None

    def _finished(self, name: str) -> int:
        file = self._files[name]
        file.flush()
        os.fsync(file.fileno())
        return file.tell() // np.dtype(self.dtypes[name]).itemsize


def open_arrays(folder: Path, key: str, verify: bool = False) -> MappedArrays:
    """Map the arrays of a folder; with ``verify`` each is read once and its SHA-256 compared.

    ``UsageError`` where there are none or they were made from something else than ``key`` says, ``DamagedError`` where files are missing
    or are not as they were written, as far as they were looked into.
    """
    description = read_json(folder / DESCRIPTION)
    told = description.pop("checksum", None) if isinstance(description, dict) else None
    if told != checksum_of(description):
        raise DamagedError(f"{folder / DESCRIPTION} is not as it was written: delete its folder, it is made again")
    if description.get("version") != VERSION or description.get("key") != key:
        raise UsageError(f"{folder} was made from other data: delete it, or run the command that makes it again")
    for name, entry in description["arrays"].items() if verify else ():
        if (folder / name).is_file() and sha256_of(folder / name) != entry["sha256"]:
            raise DamagedError(f"{folder / name} is not as it was written: delete its folder, it is made again")
    arrays = {name: _map(folder / name, entry["dtype"], entry["length"]) for name, entry in description["arrays"].items()}
    return MappedArrays(arrays, description["facts"])


def note_facts(folder: Path, facts: dict[str, Any]) -> None:
    """Note other facts with the arrays of a folder that ``open_arrays`` has opened."""
    description = {name: value for name, value in read_json(folder / DESCRIPTION).items() if name != "checksum"}
    _describe(folder, description | {"facts": facts})


def _describe(folder: Path, description: dict[str, Any]) -> None:
    write_json(folder / DESCRIPTION, description | {"checksum": checksum_of(description)})


def _map(path: Path, dtype: str, length: int) -> NDArray[Any]:
    kind = _little(dtype)
    if not path.is_file() or path.stat().st_size != length * kind.itemsize:
        raise DamagedError(f"{path} is missing or is not as it was written: delete its folder, it is made again")
    return np.memmap(path, kind, "r", shape=(length,)).view(np.ndarray) if length else np.zeros(0, kind)


def string_buffers(values: pa.Array) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Strings without nulls as offsets int64 [n + 1] and their bytes uint8 [offsets[n] - offsets[0]]: string i starts at
    ``offsets[i] - offsets[0]``. Takes ``pa.string`` and ``pa.large_string``."""
    if not len(values):
        return np.zeros(1, np.int64), np.zeros(0, np.uint8)
    kind = np.dtype(np.int64 if pa.types.is_large_string(values.type) else np.int32)
    _, places, content = values.buffers()
    offsets = np.frombuffer(places, kind, len(values) + 1, values.offset * kind.itemsize).astype(np.int64)
    size = int(offsets[-1] - offsets[0])
    return offsets, np.frombuffer(content, np.uint8, size, int(offsets[0])) if size else np.zeros(0, np.uint8)


def _little(dtype: str) -> np.dtype[Any]:
    return np.dtype(dtype).newbyteorder("<")
