"""`mpirun -n N megainter extract ...`: rank 0 hands out the batches (a child process of it works too), every rank fills its own shard.

The ranks talk to rank 0 alone. A rank that dies takes the job with it, as mpirun does; one that is silent (a lost host, a stopped
process) is named after a minute. What any of them committed stays, and the next run, on however many ranks, hands out the rest.
"""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch

from megainter.devices import units_of
from megainter.errors import MegainterError, UsageError
from megainter.precision import Units
from preprocessing.extraction.crew import RANK_POLL_SECONDS, Worker
from preprocessing.extraction.worker import work

RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK")  # Open MPI, MPICH and Intel MPI, Slurm with PMIx
BEAT_SECONDS = 5.0
SILENCE_SECONDS = 60.0
UNSEEN_SECONDS = 1.0


def launched_rank() -> int | None:
    """This process's rank where mpirun or srun started it, read from the environment without starting MPI."""
    return next((int(os.environ[name]) for name in RANK_VARIABLES if name in os.environ), None)


class RankLink:
    """Messages to and from one other rank, any thread of this process; never blocks in MPI, which would spin on a core."""

    def __init__(self, world: Any, rank: int, patience: float | None = None) -> None:
        self.world, self.rank, self.patience = world, rank, patience
        self.lock = threading.Lock()
        self.outgoing: list[Any] = []
        self.heard = self.looked = time.monotonic()
        self.outcome: int | None = None  # the exit code that rank 0 told at the end

    def send(self, message: Any, /) -> None:
        """Hand a message over; it leaves while this process goes on."""
        with self.lock:
            self._forget_sent()
            self.outgoing.append(self.world.isend(message, self.rank))

    def poll(self) -> bool:
        """Whether ``recv`` would answer at once, be it with an error."""
        with self.lock:
            self._forget_sent()
            return self._waiting() or self._silent()

    def recv(self) -> Any:
        """The next message; EOFError after the last, or where the other rank has been silent for ``patience`` seconds."""
        while self.outcome is None:
            with self.lock:
                if self._waiting():
                    message = self.world.recv(source=self.rank)
                    self.heard = time.monotonic()
                    if not (isinstance(message, tuple) and message[0] == "end"):
                        return message
                    self.outcome = message[1]
                elif self._silent():
                    break
            time.sleep(RANK_POLL_SECONDS)
        raise EOFError

    def close(self) -> None:
        """Wait until what was sent has left."""
        while self.outgoing:
            with self.lock:
                self._forget_sent()
            time.sleep(RANK_POLL_SECONDS)

    def _forget_sent(self) -> None:
        self.outgoing = [request for request in self.outgoing if not request.test()[0]]

    def _waiting(self) -> bool:
        """Whether a message is there. Silence counts only while somebody looks, for a message may lie there unseen."""
        now = time.monotonic()
        if now - self.looked > UNSEEN_SECONDS:
            self.heard = now
        self.looked = now
        return bool(self.world.iprobe(self.rank))

    def _silent(self) -> bool:
        return self.patience is not None and time.monotonic() - self.heard > self.patience


def extract_on_ranks(extract: Callable[..., Any], **arguments: Any) -> None:
    """Run ``extract(**arguments, ranks=[the other ranks])`` on rank 0, and serve it on the others; every rank ends with its exit code.

    ``UsageError`` without mpi4py, or where a number of workers was asked for: each rank is one.
    """
    os.environ.setdefault("RANK", str(launched_rank()))  # a mistake is told once and not per rank
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise UsageError(f"under mpirun, extract needs mpi4py: pip install 'megainter[mpi]' ({error})") from None
    world = MPI.COMM_WORLD
    if world.size == 1:
        extract(**arguments)
        return
    if arguments["workers"] not in (None, 1):
        raise UsageError(f"under mpirun each rank is one worker; start {arguments['workers']} ranks instead of workers")
    places = world.allgather((socket.gethostname(), os.getpid()))
    place = sum(host == places[world.rank][0] for host, _ in places[: world.rank])
    elsewhere = world.gather(_units(_device(arguments["device"] or "cuda", place)))
    if world.rank:
        code = _serve(RankLink(world, 0), place)
    else:
        code = _lead(extract, arguments | {"workers": 1, "elsewhere": elsewhere[1:]}, world, places)
    MPI.Finalize()
    if code:
        sys.exit(code)


def _lead(extract: Callable[..., Any], arguments: dict[str, Any], world: Any, places: list[tuple[str, int]]) -> int:
    """Rank 0: extract with the others' help, then tell them how it ended."""
    links = [RankLink(world, rank, SILENCE_SECONDS) for rank in range(1, world.size)]
    workers = [Worker(f"rank {link.rank} (pid {places[link.rank][1]} on {places[link.rank][0]})", link) for link in links]
    code = 1
    try:
        extract(**arguments, ranks=workers)
        code = 0
    except MegainterError as error:
        code = error.exit_code
        print(f"megainter: {error}", file=sys.stderr, flush=True)
    finally:
        for link in links:
            link.send(("end", code))
        if not all(_left(link) for link in links):  # the others could not finalize without it
            world.Abort(code or MegainterError.exit_code)
    return code


def _left(link: RankLink) -> bool:
    """Wait for a rank's last message; False where it is silent."""
    try:
        while link.recv() != ("bye",):
            continue
    except EOFError:
        return False
    link.close()
    return True


def _serve(link: RankLink, place: int) -> int:
    """Another rank: work at what rank 0 sends, if it sends any; ``place`` is its number among the ranks of its host."""
    ended = threading.Event()
    beating = threading.Thread(target=_beat, args=(link, ended), daemon=True)
    beating.start()
    with suppress(EOFError):
        job = link.recv()
        work(link, replace(job, device=_device(job.device, place), parent=os.getppid()))  # it ends with mpirun's daemon on this host
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # nothing is left that it could keep
        while True:
            link.recv()
    ended.set()
    beating.join()
    link.send(("bye",))
    link.close()
    return link.outcome or 0


def _beat(link: RankLink, ended: threading.Event) -> None:
    while not ended.wait(BEAT_SECONDS):
        link.send(("alive",))


def _units(name: str) -> Units:
    """What a rank's device computes; of a name that is none, which rank 0 will refuse, only fp32."""
    try:
        return units_of(torch.device(name))
    except RuntimeError:
        return Units(name, frozenset({"fp32"}))


def _device(name: str, place: int) -> str:
    """The device of a rank: its own GPU among those of its host, unless rank 0 named another kind."""
    if name.startswith("cuda") and torch.cuda.is_available():
        return f"cuda:{place % torch.cuda.device_count()}"
    return "cpu" if name.startswith("cuda") else name
