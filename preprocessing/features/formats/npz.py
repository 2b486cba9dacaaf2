"""Folders of .npz files and the arrays inside one: no pickle but a restricted one, and no array larger than the bytes it came with."""

import io
import zipfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from preprocessing.features.formats.entry import BadEntryError, Entry, ForeignRegions, Source, from_bytes
from preprocessing.features.formats.vilbert_lmdb import unpickled

MAX_BYTES = 1 << 30  # of one array; ten thousand regions with everything are a tenth of it


def npz_source(folder: Path, decode: Callable[[BinaryIO], ForeignRegions]) -> Source:
    """All .npz files below ``folder``; ids are their paths in it, without the suffix."""
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.npz"))
    return Source(len(files), "images", partial(_entries, folder, files, decode))


def _entries(folder: Path, files: list[str], decode: Callable[[BinaryIO], ForeignRegions]) -> Iterator[Entry]:
    for name in files:
        image_id = name.removesuffix(".npz").encode(errors="surrogateescape").decode(errors="surrogateescape")
        yield Entry(name.encode(errors="backslashreplace").decode(), image_id, 1, partial(_load, folder / name, decode))


def _load(path: Path, decode: Callable[[BinaryIO], ForeignRegions]) -> ForeignRegions:
    try:
        with open(path, "rb") as file:
            return decode(file)
    except OSError as error:
        raise BadEntryError(f"it cannot be read: {error.strerror}") from None


def read_npz(file: BinaryIO | bytes, wanted: Sequence[str]) -> dict[str, Any]:
    """Those of the ``wanted`` arrays that an .npz has; arrays of objects through the restricted unpickler. ``BadEntryError``."""
    stream = io.BytesIO(file) if isinstance(file, bytes) else file
    try:
        with zipfile.ZipFile(stream) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            return {name: _read(archive, members[name], name) for name in wanted if name in members}
    except BadEntryError:
        raise
    except Exception as error:  # a parser fed with hostile bytes may raise anything
        raise BadEntryError(f"it is not a whole .npz: {error or type(error).__name__}") from None


def _read(archive: zipfile.ZipFile, info: zipfile.ZipInfo, name: str) -> Any:
    if info.file_size > MAX_BYTES:
        raise BadEntryError(f"{name} would have {info.file_size:,} bytes")
    return _array(io.BytesIO(archive.read(info)), name)


def read_npy(file: BinaryIO, name: str) -> Any:
    """The array of an .npy, or the object that stands in one; ``BadEntryError``."""
    content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise BadEntryError(f"{name} has more than {MAX_BYTES:,} bytes")
    try:
        return _array(io.BytesIO(content), name)
    except BadEntryError:
        raise
    except Exception as error:  # a parser fed with hostile bytes may raise anything
        raise BadEntryError(f"{name} is not a whole .npy: {str(error)[:200] or type(error).__name__}") from None


def _array(content: io.BytesIO, name: str) -> Any:
    version = np.lib.format.read_magic(content)
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = header(content)
    if dtype.hasobject:
        value = unpickled(content.read(), stand_in=True)
        return value.item() if isinstance(value, np.ndarray) and value.ndim == 0 else value
    return from_bytes(content.read(), dtype.str, shape, name, fortran)
