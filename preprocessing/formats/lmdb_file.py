"""LMDB files of other programs: opened read-only after a look at their length, and written so that no batch is lost when the map grows."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import lmdb

from megainter.data.shard import needed_bytes
from megainter.errors import DamagedError, NoSpaceError, UsageError
from preprocessing.formats.entry import BadEntryError, Entry, Regions, Source

MAX_KEY_BYTES = 511  # LMDB's limit as it is usually built
BATCH_BYTES = 64 << 20


def data_file(path: Path) -> Path:
    """The LMDB file of ``path``, which may be the folder it stands in."""
    return path / "data.mdb" if path.is_dir() else path


@contextmanager
def opened(path: Path) -> Iterator[lmdb.Transaction]:
    """A read transaction on a foreign LMDB. ``DamagedError`` where it is truncated or unreadable."""
    file = data_file(path)
    try:
        environment = lmdb.open(str(file), subdir=False, readonly=True, lock=False, create=False)
    except lmdb.Error as error:
        raise DamagedError(f"{file} is not a readable LMDB file ({error}); fetch or copy it again") from None
    with environment:
        needed, there = needed_bytes(environment), file.stat().st_size
        if needed > there:
            raise DamagedError(f"{file} is truncated: it has {there:,} bytes of {needed:,}; fetch or copy it again")
        with environment.begin() as transaction:
            yield transaction


def lmdb_source(path: Path, index_key: bytes, decode: Callable[[bytes], Regions]) -> Source:
    """All entries of an LMDB whose keys are the image ids, but the one that lists the others."""
    with opened(path) as transaction:
        total = transaction.stat()["entries"] - (transaction.get(index_key) is not None)
    return Source(total, "images", partial(_entries, path, index_key, decode))


def _entries(path: Path, index_key: bytes, decode: Callable[[bytes], Regions]) -> Iterator[Entry]:
    for transaction, key in keys(path):
        if key != index_key:
            load = partial(_load, transaction, key, decode)
            yield Entry(f"key {key.decode(errors='backslashreplace')!r}", key.decode(errors="surrogateescape"), 1, load)


def keys(path: Path) -> Iterator[tuple[lmdb.Transaction, bytes]]:
    """Every key in order, with the transaction to read its value from. ``DamagedError`` where the file's tree is damaged."""
    with opened(path) as transaction:
        cursor = transaction.cursor().iternext(keys=True, values=False)
        while True:
            try:
                key = next(cursor)
            except StopIteration:
                return
            except lmdb.Error as error:
                raise DamagedError(f"{data_file(path)} is damaged ({error}); fetch or copy it again") from None
            yield transaction, bytes(key)


def value_of(transaction: lmdb.Transaction, key: bytes) -> bytes:
    """The value of ``key``; ``BadEntryError`` where it cannot be read."""
    try:
        return bytes(transaction.get(key, b""))
    except lmdb.Error as error:
        raise BadEntryError(f"LMDB cannot read it: {error}") from None


def _load(transaction: lmdb.Transaction, key: bytes, decode: Callable[[bytes], Regions]) -> Regions:
    return decode(value_of(transaction, key))


def id_problem(image_id: str, suffix: str = "", reserved: str = "keys") -> str:
    """Why an id cannot be a key beside the ``reserved`` one; "" where it can."""
    key = f"{image_id}{suffix}"
    if key == reserved:
        return "is the key of the list of all ids"
    return f"has {len(key.encode())} bytes as a key, more than {MAX_KEY_BYTES}" if len(key.encode()) > MAX_KEY_BYTES else ""


def write_lmdb(folder: Path, items: Iterator[tuple[bytes, bytes]]) -> None:
    """A new LMDB environment in ``folder`` with these keys and values, in transactions of some tens of MB. ``NoSpaceError``."""
    folder.mkdir()
    try:
        with lmdb.open(str(folder), map_size=4 * BATCH_BYTES) as environment:
            batch: list[tuple[bytes, bytes]] = []
            size = 0
            for key, value in items:
                batch.append((key, value))
                size += len(value)
                if size >= BATCH_BYTES:
                    _put(environment, batch, size)
                    batch, size = [], 0
            _put(environment, batch, size)
    except lmdb.Error as error:  # LMDB reports a full disk as an input/output error
        raise NoSpaceError(f"{folder} cannot be written ({error}); free space and run the same command again") from None
    (folder / "lock.mdb").unlink(missing_ok=True)


def _put(environment: lmdb.Environment, batch: list[tuple[bytes, bytes]], size: int) -> None:
    while True:
        try:
            with environment.begin(write=True) as transaction:
                for key, value in batch:
                    if not transaction.put(key, value, overwrite=False):
                        raise UsageError(f"the key {key.decode(errors='replace')!r} came twice")
            return
        except lmdb.MapFullError:
            environment.set_mapsize(2 * environment.info()["map_size"] + 2 * size)


def is_lmdb(path: Path) -> bool:
    """Whether ``path`` is an LMDB file or its folder, by the magic number of its first page."""
    file = data_file(path)
    if not file.is_file():
        return False
    with open(file, "rb") as stream:
        return os.pread(stream.fileno(), 4, 16) == 0xBEEFC0DE.to_bytes(4, "little")
