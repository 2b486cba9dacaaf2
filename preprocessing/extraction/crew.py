"""The workers of an extraction as rank 0 or the only process sees them: child processes, and other MPI ranks."""

import multiprocessing
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from megainter.errors import MegainterError, StoppedEarly
from megainter.progress import Progress, shown_seconds, shown_time
from preprocessing.extraction.worker import STOP, Failure, Link, Task, WorkerSetup, work

BATCHES_AHEAD = 2  # per worker: one in work, one being decoded
SECONDS_TO_STOP = 8.0  # then a child process is killed, which costs its open batch
POLL_SECONDS = 0.5  # so often a signal is noticed,
RANK_POLL_SECONDS = 0.005  # and messages of MPI ranks, which cannot be waited for
START_METHOD = "spawn"  # a detector on a GPU does not survive a fork


@dataclass
class Worker:
    """A worker and what it owes. ``process`` is None for an MPI rank."""

    name: str
    link: Link
    process: BaseProcess | None = None
    batches: list[list[Task]] = field(default_factory=list)  # sent and not answered
    closed: bool = False
    told_to_end: bool = False


@dataclass
class Expectation:
    """How long ``images`` will take these workers, said once: as soon as the first batch of one of them is done."""

    images: int
    workers: Sequence[Worker]
    told: bool = False

    def tell(self, images: int, seconds: float) -> None:
        """A worker did ``images`` in ``seconds`` of its own, without its start."""
        if self.told or not images:
            return
        self.told = True
        each = seconds / images
        whole = shown_time(each * self.images / len(self.workers))
        first = f"first {images:,} took {shown_seconds(each)} each" if images > 1 else f"first image took {shown_seconds(each)}"
        print(f"extract: the {first}; {self.images:,} by {self.crew} take about {whole}", flush=True)

    @property
    def crew(self) -> str:
        """How many work."""
        return f"{len(self.workers)} processes" if len(self.workers) > 1 else "1 process"


def start_child(job: WorkerSetup) -> Worker:
    """A worker in a process of its own on this machine."""
    context = multiprocessing.get_context(START_METHOD)
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(theirs, job), daemon=True, name=f"extract-{job.number}")  # type: ignore[attr-defined]
    with _interrupt_ignored():
        process.start()
    theirs.close()
    return Worker(f"{process.name} (pid {process.pid})", ours, process)


@contextmanager
def _interrupt_ignored() -> Iterator[None]:
    """What starts here ignores Ctrl-C from its first instruction on: it reaches the whole group, and the parent decides."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def feed(worker: Worker, batches: Iterator[list[Task]]) -> None:
    """Send a worker what it has room for."""
    try:
        while len(worker.batches) < BATCHES_AHEAD and not worker.told_to_end:
            batch = next(batches, None)
            worker.link.send(batch)
            worker.batches += [batch] if batch else []
            worker.told_to_end = batch is None
    except (BrokenPipeError, ConnectionResetError):
        worker.told_to_end = True  # it is dead; receive says so


def with_news(workers: list[Worker]) -> list[Worker]:
    """Workers that have sent something or ended, waiting half a second at most so that a signal is noticed."""
    children = {worker.link: worker for worker in workers if worker.process and not worker.closed}
    ranks = [worker for worker in workers if not worker.process and not worker.closed]
    sources = wait([link for link in children if isinstance(link, Connection)], RANK_POLL_SECONDS if ranks else POLL_SECONDS)
    return [children[source] for source in sources if isinstance(source, Connection)] + [rank for rank in ranks if rank.link.poll()]


def receive(worker: Worker, failures: list[Failure], progress: Progress, expectation: Expectation) -> int:
    """Take one message; returns the images it finished. Raises what the worker raised, and ``StoppedEarly`` where it was told to end."""
    try:
        message = worker.link.recv()
    except (EOFError, ConnectionResetError):
        worker.closed = True
        raise _death(worker) from None
    worker.closed = message[0] not in ("done", "alive")
    match message:
        case ("done", int(count), list(failed), float(seconds)):
            worker.batches.pop(0)
            failures.extend(failed)
            if not expectation.told:
                progress.began(seconds)
            expectation.tell(count - len(failed), seconds)
            progress.fail(len(failed))
            progress.update(count, f"{len(failures)} failed" if failures else "")
            return count
        case ("closed",) | ("alive",):
            return 0
        case ("stopped",):
            raise StoppedEarly(f"{worker.name} was told to end; what is stored is kept, run the same command to go on")
        case ("error", MegainterError() as error):
            raise error
        case _:
            raise RuntimeError(f"{worker.name} failed unexpectedly:\n{message[1]}")


def _death(worker: Worker) -> MegainterError:
    kept = "what is stored is kept, run the same command to go on"
    if worker.process is None:
        return MegainterError(f"{worker.name} has gone silent; {kept}")
    worker.process.join(5)
    code = worker.process.exitcode
    how = f"was killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"ended with exit code {code}"
    hint = "often memory ran out: try fewer workers; " if code == -signal.SIGKILL else ""
    ids = [task.image_id for batch in worker.batches[:1] for task in batch]
    place = f" at images {ids[0]!r} to {ids[-1]!r}" if ids else ""
    return MegainterError(f"{worker.name} {how}{place}; {hint}{kept}")


def end(workers: list[Worker]) -> None:
    """End what still runs: SIGTERM or ``STOP``, on which a worker commits what it has finished; a child that does not end is killed."""
    for worker in workers:
        if worker.process is None and not worker.closed:
            worker.link.send(STOP)
        elif worker.process is not None and not worker.closed and worker.process.is_alive():
            worker.process.terminate()
    deadline = time.monotonic() + SECONDS_TO_STOP
    for worker in workers:
        if worker.process is None:
            _drain(worker, deadline)
            continue
        worker.process.join(max(0.0, deadline - time.monotonic()))
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()
        worker.link.close()


def _drain(worker: Worker, deadline: float) -> None:
    """Take a rank's messages until its last one."""
    while not worker.closed and time.monotonic() < deadline:
        if worker.link.poll():
            try:
                worker.closed = worker.link.recv()[0] not in ("done", "alive")
            except EOFError:
                return
        else:
            time.sleep(RANK_POLL_SECONDS)
