"""Who writes a file: one lock that the kernel frees when its owner dies, and a heartbeat where the kernels of several hosts must agree.

``flock`` is certain among the processes of one host. On a network file system it may be local to each host, or a lost host may keep it:
there the owner's name stands in the lock file, the owner touches the file every few seconds, and whoever finds another host's name
takes the lock only where nothing beats any more.
"""

import fcntl
import json
import os
import re
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from megainter.errors import LockedError, UsageError

LOCK_PATIENCE = 1.0  # seconds to wait for a writer that is just ending
BEAT_SECONDS = 5.0
SILENCE_SECONDS = 4 * BEAT_SECONDS  # attributes of files on NFS may be this old on another host
SETTLE_SECONDS = 1.0  # two hosts that take a dead owner's lock at once: the later name stays, and the other one sees it
MOUNTS = Path("/proc/self/mountinfo")
# on these a write may be seen late or in parts by another host, and LMDB's own rules ask for a local disk
LOOSE = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "afs", "fuse.sshfs", "fuse.s3fs", "fuse.gcsfuse", "fuse.rclone", "fuse.glusterfs"}
COHERENT = {"lustre", "gpfs", "ceph", "fuse.ceph", "beegfs", "wekafs", "ocfs2", "gfs2"}  # cluster file systems


def network_filesystem(path: Path, mounts: Path = MOUNTS) -> str | None:
    """The kind of network file system that ``path`` (or the nearest folder above it that exists) is on; None for a local disk."""
    try:
        lines = mounts.read_text(errors="replace").splitlines()
    except OSError:
        return None  # no Linux
    real, best, kind = os.path.realpath(path), "", ""
    for line in lines:
        before, _, after = line.partition(" - ")
        point = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), before.split()[4])
        if len(point) >= len(best) and (real == point or real.startswith(point.rstrip("/") + "/")):
            best, kind = point, after.split()[0]
    return kind if kind in LOOSE | COHERENT else None


class WriterLock:
    """A lock file held while its owner writes; it is freed by the kernel when the owner dies, however it dies.

    ``LockedError`` names the owner after a second, ``UsageError`` where the folder cannot be written to.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stop: threading.Event | None = None
        try:
            self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UsageError(f"{path.parent} cannot be written to: {error.strerror}") from None
        try:
            self._acquire()
            if network_filesystem(path.parent):
                self._agree_with_other_hosts()
            else:
                self._sign()
        except BaseException:
            os.close(self.descriptor)
            raise

    def _acquire(self) -> None:
        deadline = time.monotonic() + LOCK_PATIENCE
        while True:
            try:
                return fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise self._in_use() from None
                time.sleep(0.05)
            except OSError as error:
                raise UsageError(f"{self.path.parent} cannot be locked ({error.strerror}); write to a local disk") from None

    def _agree_with_other_hosts(self) -> None:
        owner = self._owner()
        if owner and owner["host"] != socket.gethostname():
            self._watch()
            print(f"{self.path}: its owner (pid {owner['pid']} on {owner['host']}) is silent; the lock is taken over", file=sys.stderr)
            self._sign()
            time.sleep(SETTLE_SECONDS)
            now = self._owner()
            if not now or (now["pid"], now["host"]) != (os.getpid(), socket.gethostname()):
                raise self._in_use()
        self._sign()
        self.stop = threading.Event()
        threading.Thread(target=self._beat, args=(self.stop,), daemon=True, name="lock-heartbeat").start()

    def _watch(self) -> None:
        """``LockedError`` where the owner's heartbeat is seen; the clocks of the hosts do not enter."""
        first, deadline = self._modified(), time.monotonic() + SILENCE_SECONDS
        while time.monotonic() < deadline:
            time.sleep(min(0.5, SILENCE_SECONDS / 4))
            if self._modified() != first:
                raise self._in_use()

    def _modified(self) -> int:
        with open(self.path, "rb") as file:  # opening asks the server anew
            return os.fstat(file.fileno()).st_mtime_ns

    def _beat(self, stop: threading.Event) -> None:
        while not stop.wait(BEAT_SECONDS):
            try:
                os.utime(self.path)
            except OSError:
                continue  # a server that is away for a while

    def _sign(self) -> None:
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        text = json.dumps(owner).encode()
        with suppress(OSError):  # a full disk: the lock holds without a name
            os.pwrite(self.descriptor, text, 0)
            os.ftruncate(self.descriptor, len(text))

    def _owner(self) -> dict[str, Any]:
        try:
            with open(self.path, "rb") as file:
                owner = json.loads(file.read(4096))
            return owner if {"pid", "host", "since"} <= set(owner) else {}
        except (ValueError, TypeError, OSError):
            return {}

    def _in_use(self) -> LockedError:
        owner = self._owner()
        by = f"pid {owner['pid']} on {owner['host']} since {owner['since']}" if owner else "another process"
        return LockedError(f"{self.path.with_suffix('')} is in use by {by}; wait for it or stop it")

    def release(self) -> None:
        """Free the lock; the file stays, since removing it would let two writers lock two files of one name."""
        if self.descriptor < 0:
            return
        if self.stop is not None:
            self.stop.set()
        with suppress(OSError):
            os.ftruncate(self.descriptor, 0)
        os.close(self.descriptor)
        self.descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()
