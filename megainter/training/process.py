"""This process among the others: world, signals, the lock of a run folder, and not outliving the launcher."""

import fcntl
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from megainter.errors import LockedError

WATCH_VARIABLE = "MEGAINTER_WATCH_PID"  # a process whose end must end this one too
MPI_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


def launched() -> bool:
    """Whether a launcher (deepspeed, torchrun, mpirun) started this process as one of several ranks."""
    return "RANK" in os.environ or any(name in os.environ for name in MPI_VARIABLES)


def become_single_process() -> None:
    """Set the environment of a world of one, with a free port, for a process started by hand."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


class StopRequest:
    """Set by SIGTERM, SIGINT or SIGUSR1; a second signal ends the process at once with 128 + its number."""

    def __init__(self) -> None:
        self.signal_name: str | None = None
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal_name is not None:
            os._exit(128 + number)
        self.signal_name = signal.Signals(number).name


def _parent_of(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return 0


def _command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def _launchers() -> list[int]:
    """The processes whose end must end this rank: its launcher, that launcher's own runner, and whoever asked by variable."""
    watched = [int(os.environ[WATCH_VARIABLE])] if WATCH_VARIABLE in os.environ else []
    pid = os.getppid()
    while pid > 1 and any(word in _command_of(pid) for word in ("deepspeed", "torchrun", "torch.distributed")):
        watched.append(pid)
        pid = _parent_of(pid)
    return watched


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def end_with_launcher(interval: float = 1.0) -> None:
    """Start a thread that ends this process within seconds of its launcher's death.

    DeepSpeed's launcher, when killed, leaves its ranks running; they would go on writing to the run folder.
    """
    watched = _launchers()

    def watch() -> None:
        while all(_alive(pid) for pid in watched):
            time.sleep(interval)
        os._exit(143)

    if watched and Path("/proc/self/stat").exists():
        threading.Thread(target=watch, daemon=True, name="launcher-watch").start()


@contextmanager
def folder_lock(folder: Path, patience: float = 10.0) -> Iterator[None]:
    """Hold the only writer's place in ``folder``; ``LockedError`` names the holder after ``patience`` seconds.

    The wait covers ranks of a killed run that are still ending. The kernel drops the lock with the process.
    """
    with open(folder / ".lock", "a+") as file:
        deadline = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    file.seek(0)
                    raise LockedError(f"{folder} is in use by another run: {file.read() or 'holder unknown'}; wait or stop it") from None
                time.sleep(0.2)
        file.truncate(0)
        file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}))
        file.flush()
        yield
