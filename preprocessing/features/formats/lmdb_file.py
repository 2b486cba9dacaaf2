"""LMDB files of other programs: read where a damaged one can do no harm, and written so that no batch is lost when the map grows."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Self

import lmdb

from megainter.errors import DamagedError, NoSpaceError, UsageError
from preprocessing.features.formats import lmdb_server
from preprocessing.features.formats.entry import BadEntryError, Entry, ForeignRegions, Source

MAX_KEY_BYTES = 511  # LMDB's limit as it is usually built
BATCH_BYTES = 64 << 20


def data_file(path: Path) -> Path:
    """The LMDB file of ``path``, which may be the folder it stands in."""
    return path / "data.mdb" if path.is_dir() else path


class ForeignLmdb:
    """A foreign LMDB, read by a process of its own. ``DamagedError`` where it is truncated or unreadable, or ends its reader."""

    def __init__(self, path: Path) -> None:
        self.file = data_file(path)
        self._start()

    def _start(self) -> None:
        command = [sys.executable, "-P", lmdb_server.__file__, str(self.file)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests = Connection(os.dup(self._process.stdin.fileno()), readable=False)
        self._answers = Connection(os.dup(self._process.stdout.fileno()), writable=False)
        try:
            (self.total,) = lmdb_server.COUNT.unpack(self._answer())
        except (BadEntryError, EOFError, OSError) as error:
            self.close()
            raise self._damaged(str(error) or self._death()) from None

    def get(self, key: bytes) -> bytes:
        """The value of ``key``; ``BadEntryError`` where there is none or it cannot be read."""
        try:
            self._requests.send_bytes(b"V" + key)
            return self._answer()
        except (EOFError, OSError):
            self.close()
            death = self._death()
            self._start()
            raise BadEntryError(f"LMDB cannot read it: {death}") from None

    def all_keys(self) -> Iterator[bytes]:
        """Every key in order."""
        last = b""
        while True:
            try:
                self._requests.send_bytes(b"K" + last)
                answer = self._answer()
            except (BadEntryError, EOFError, OSError) as error:
                self.close()
                raise self._damaged(str(error) or self._death()) from None
            if not answer:
                return
            at = 0
            while at < len(answer):
                (length,) = lmdb_server.LENGTH.unpack_from(answer, at)
                at += lmdb_server.LENGTH.size + length
                last = answer[at - length : at]
                yield last

    def _answer(self) -> bytes:
        answer = self._answers.recv_bytes()
        if answer[:1] != b"+":
            raise BadEntryError(answer[1:].decode(errors="replace"))
        return answer[1:]

    def _death(self) -> str:
        code = self._process.wait()
        return f"its reader was ended by {signal.Signals(-code).name}" if code < 0 else f"its reader ended with exit code {code}"

    def _damaged(self, reason: str) -> DamagedError:
        return DamagedError(f"{self.file} is damaged: {reason}; fetch or copy it again")

    def close(self) -> None:
        """End the reader."""
        for connection in (self._requests, self._answers):
            connection.close()
        with self._process:  # closes its pipes, at whose end it ends
            pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _has(source: ForeignLmdb, key: bytes) -> bool:
    try:
        return bool(source.get(key))
    except BadEntryError:
        return False


def image_count(path: Path, index_key: bytes) -> int:
    """The number of entries without the one that lists the others."""
    with ForeignLmdb(path) as source:
        return source.total - _has(source, index_key)


def lmdb_source(path: Path, index_key: bytes, decode: Callable[[bytes], ForeignRegions]) -> Source:
    """All entries of an LMDB whose keys are the image ids, but the one that lists the others."""
    return Source(image_count(path, index_key), "images", partial(_entries, path, index_key, decode))


def _entries(path: Path, index_key: bytes, decode: Callable[[bytes], ForeignRegions]) -> Iterator[Entry]:
    with ForeignLmdb(path) as source:
        for key in source.all_keys():
            if key != index_key:
                load = partial(_load, source, key, decode)
                yield Entry(f"key {key.decode(errors='backslashreplace')!r:.80}", key.decode(errors="surrogateescape"), 1, load)


def _load(source: ForeignLmdb, key: bytes, decode: Callable[[bytes], ForeignRegions]) -> ForeignRegions:
    return decode(source.get(key))


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
                        raise UsageError(f"the key {key.decode(errors='replace')!r:.80} came twice")
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
