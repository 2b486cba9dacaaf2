"""This process among the others: world, signals, ports, the lock of a run folder, and not outliving the launcher."""

import contextlib
import ctypes
import fcntl
import json
import os
import signal
import socket
import sys
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from megainter.errors import LockedError, MegainterError, StoppedEarly
from megainter.files import write_atomically

WATCH_VARIABLE = "MEGAINTER_WATCH_PID"  # a process whose end must end this one too
STOP_VARIABLE = "MEGAINTER_STOP_FILE"  # a file; when it appears, this process treats it as SIGTERM
PULSE_VARIABLE = "MEGAINTER_PULSE_FILE"  # a file that a launcher on another host rewrites while it lives
OUTCOME_VARIABLE = "MEGAINTER_OUTCOME_FOLDER"  # where exit codes are left: launchers turn them into their own
RANKS_VARIABLE = "MEGAINTER_RANKS_FROM"  # "slurm": srun started the ranks
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
PR_SET_PDEATHSIG = 1  # linux/prctl.h
PULSE_LIMIT = 60.0  # seconds without a new pulse after which the launcher counts as dead
MPI_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
RANK_SOURCES = {  # rank, world size, local rank, local world size
    "openmpi": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    "slurm": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE"),
}


def launched() -> bool:
    """Whether a launcher (deepspeed, torchrun, mpirun) started this process as one of several ranks."""
    return "RANK" in os.environ or any(name in os.environ for name in MPI_VARIABLES)


def become_single_process() -> None:
    """Set the environment of a world of one, with a free port, for a process started by hand."""
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))


def adopt_rank() -> None:
    """Take rank and world size from Open MPI or, where ``RANKS_VARIABLE`` says so, from srun, into the names PyTorch reads.

    Without MASTER_ADDR this is done on one machine only: there the address is known, and the port follows from the job's name.
    """
    source = RANK_SOURCES["slurm" if os.environ.get(RANKS_VARIABLE) == "slurm" else "openmpi"]
    if "RANK" in os.environ or not all(name in os.environ for name in source[:3]):
        return
    rank, size, local_rank, local_size = (os.environ.get(name, "") for name in source)
    if "MASTER_ADDR" not in os.environ:
        if local_size != size:
            return
        job = os.environ.get("PMIX_NAMESPACE", "") or os.environ.get("OMPI_MCA_ess_base_jobid", "")  # noqa: SIM112 - its name
        os.environ["MASTER_ADDR"] = "127.0.0.1"
        os.environ.setdefault("MASTER_PORT", str(20000 + zlib.crc32(job.encode()) % 10000))
    os.environ.update(RANK=rank, WORLD_SIZE=size, LOCAL_RANK=local_rank)


def record_exit(code: int) -> None:
    """Leave the exit code for a supervising launcher: rank 0 always, other ranks where they fail."""
    folder, rank = os.environ.get(OUTCOME_VARIABLE), int(os.environ.get("RANK", "0"))
    if folder and (rank == 0 or code):
        with contextlib.suppress(OSError, MegainterError):
            write_atomically(Path(folder) / f"rank-{rank:05d}", f"{code}\n")


class StopRequest:
    """Signals that ask this process to stop: ``count`` of them so far, ``number`` the last one (0: none).

    The second one ends the process at once with 128 + its number; where ``patient``, whoever asks ``count`` sees to that. As a context
    manager it gives the signals back to whoever had them. Outside the main thread, where Python lets nobody handle signals, none comes.
    """

    def __init__(self, signals: Sequence[signal.Signals] = STOP_SIGNALS, patient: bool = False) -> None:
        self.count, self.number, self._patient = 0, 0, patient
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in signals}

    @property
    def asked(self) -> bool:
        """Whether a signal came."""
        return self.count > 0

    def __enter__(self) -> "StopRequest":
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.asked and not self._patient:
            os._exit(128 + number)
        self.count, self.number = self.count + 1, number


def interrupt_on_sigterm() -> None:
    """From here on SIGTERM is to this process, and not to its children, what Ctrl-C is, until something that saves takes it over."""
    own = os.getpid()

    def interrupt(number: int, frame: object) -> None:
        if os.getpid() == own:
            raise KeyboardInterrupt
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, interrupt)


def raise_on_signals(message: str) -> None:
    """From here on the first SIGTERM or SIGINT raises ``StoppedEarly`` where this process is; the next ones do what they did before."""

    def stop(number: int, frame: object) -> None:
        for each, handler in before.items():
            signal.signal(each, handler)
        raise StoppedEarly(message)

    before: dict[int, Any] = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}


def end_with_parent(parent: int, last: signal.Signals = signal.SIGKILL) -> None:
    """Have ``last`` sent to this process when its ``parent`` dies (Linux); one that is dead already ends it here."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, last, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(128 + last)


def free_port() -> int:
    """A TCP port of this host that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


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


class _Pulse:
    """A launcher's file on a shared disk: alive as long as its text changes, by this host's clock; an unreadable file says nothing."""

    def __init__(self, path: str | None) -> None:
        self.path, self.text, self.changed = path, "", time.monotonic()

    def beats(self) -> bool:
        if self.path is None:
            return True
        with contextlib.suppress(OSError):
            text = Path(self.path).read_text()
            if text != self.text:
                self.text, self.changed = text, time.monotonic()
            return time.monotonic() - self.changed < PULSE_LIMIT
        self.changed = time.monotonic()
        return True


def end_with_launcher(interval: float = 0.5) -> None:
    """Start a thread that ends this process within seconds of its launcher's death, and passes on the launcher's wish to stop.

    DeepSpeed's launcher, when killed, leaves its ranks running; they would go on writing to the run folder. Signals do not reach ranks
    on other hosts, and launchers kill where they should ask: a file on the shared disk reaches every rank under each of them.
    """
    watched, stop = _launchers(), os.environ.get(STOP_VARIABLE)
    pulse = _Pulse(os.environ.get(PULSE_VARIABLE))

    def watch() -> None:
        asked = False
        while all(_alive(pid) for pid in watched) and pulse.beats():
            if stop is not None and not asked and os.path.exists(stop):
                asked = True
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(interval)
        os._exit(143)

    if (watched or stop or pulse.path) and Path("/proc/self/stat").exists():
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
