"""Which records of a store have been read whole and found as they were written: a bit each, in memory that processes share.

A store's own bits are an anonymous shared mapping: the loader processes that a rank forks write to the same one, without any file. Ranks
of one host are no forks of each other; for them the bits lie in a file of the host's memory (``/dev/shm``), under a name that holds a token
drawn at this start of the run and what the store's files are. It is unlinked as soon as every rank has mapped it. So bits are never those
of an earlier run, of another host, of a time before a reboot, of another store or of files that were written again since, and nobody can
cut the file under a mapping. A run verifies everything itself: that costs one epoch of whole reads, and nothing has to be believed about
what happened to a disk between runs.

Setting a bit reads and writes its byte. Where two processes do that at once one of the bits may be lost, never gained: the record is then
read whole once more.
"""

import hashlib
import json
import mmap
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

SHARED_MEMORY = Path("/dev/shm")  # the system's place for it: never on a disk, never on a network, empty after a reboot


class VerifiedRecords:
    """The bits of ``records`` records, none set."""

    def __init__(self, records: int) -> None:
        self._records = records
        self._bits = self._view(mmap.mmap(-1, self._bytes()))  # shared with forks

    def of(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """bool [n]: which of the records ``rows`` int64 [n] are verified."""
        return (self._bits[rows >> 3] >> (rows & 7).astype(np.uint8) & 1).astype(np.bool_)

    def add(self, row: int) -> None:
        """Say that a record was read whole and is as it was written."""
        self._bits[row >> 3] |= 1 << (row & 7)

    @contextmanager
    def shared(self, name: str) -> Iterator[str | None]:
        """From here on the bits are those that all processes of this user on this host share under ``name``; what was set stays set.

        Leave the block when all have entered it: the name is then gone. Gives None, or where the host has no such memory the reason, in
        which case the bits stay as they were.
        """
        path = SHARED_MEMORY / f"megainter-{os.geteuid()}-{name}"
        try:
            bits = self._view(_mapped(path, self._bytes()))
        except OSError as error:
            yield f"{path.parent}: {error.strerror or error}"
            return
        try:
            bits |= self._bits
            self._bits = bits
            yield None
        finally:
            path.unlink(missing_ok=True)

    def _bytes(self) -> int:
        return max(1, -(-self._records // 8))  # no mapping is empty

    def _view(self, memory: mmap.mmap) -> NDArray[np.uint8]:
        return np.frombuffer(memory, np.uint8)


def _mapped(path: Path, size: int) -> mmap.mmap:
    """A file of ``size`` bytes, created full of zeros where absent, mapped. All its memory is taken here: no later write can fail."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        state = os.fstat(descriptor)
        if state.st_uid != os.geteuid() or not stat.S_ISREG(state.st_mode):
            raise PermissionError(None, "another user's file")
        os.posix_fallocate(descriptor, 0, size)  # several ranks may do it at once: it neither cuts nor clears
        return mmap.mmap(descriptor, size)
    except OSError:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)


def files_identity(token: str, digest: str, files: Sequence[Path]) -> str:
    """Hex digest of a token, a store's digest and which files it is read from: device, inode, size and time of change of each."""
    states = [(file.name, state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns) for file in files for state in (file.stat(),)]
    return hashlib.sha256(json.dumps([token, digest, states]).encode()).hexdigest()[:32]
