"""Background loading: worker processes make whole steps ahead of the trainer, in order, and never outlive it."""

import atexit
import os
import signal
import time
import weakref
from collections.abc import Iterator
from functools import partial
from typing import Any, Protocol, Self, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from megainter.errors import MegainterError
from megainter.process import end_with_parent

Item = TypeVar("Item", covariant=True)
DEATH_PATIENCE = 1.0  # seconds in which a worker that broke its connection is known to be dead
CAUSES: dict[int, str] = {  # of a worker's end by a signal, and what helps
    signal.SIGKILL: "as the system does where memory is short: give data.workers fewer processes, or the job more memory",
    signal.SIGBUS: "as shared memory (/dev/shm) is full: enlarge it (docker: --shm-size 8g), or give data.workers fewer processes",
}


class Indexed(Protocol[Item]):
    """Anything with ``source[i]``: a stream or validation batches."""

    def __getitem__(self, i: int, /) -> Item: ...


def make_loader(source: Indexed[Item], start_step: int, stop_step: int, workers: int, prefetch: int = 2) -> "StepLoader[Item]":
    """``source[start_step] .. source[stop_step - 1]``, in order, made ahead by ``workers`` processes (0: made here, when asked for).

    Each worker keeps ``prefetch`` whole steps ready. Memory is pinned where CUDA is there. Close the loader (or use ``with``) when it is
    left before its end; a user's error in a worker arrives as it was raised, and ``MegainterError`` says that one died.
    """
    return StepLoader(source, range(start_step, stop_step), workers, prefetch)


class StepLoader(Iterator[Item]):
    """The iterator that ``make_loader`` gives. Workers are forked, so that the caption table is shared and not sent."""

    def __init__(self, source: Indexed[Item], steps: range, workers: int, prefetch: int) -> None:
        self._source, self._steps, self._next = source, steps, 0
        self._running: list[Any] = []  # torch's iterator over the workers, where there are any
        if workers and len(steps):
            self._running.append(iter(_data_loader(source, steps, min(workers, len(steps)), prefetch)))
            # Runs before multiprocessing's own exit hook, which would wait for workers that nobody told to stop. Weak: a loader that is
            # dropped takes its workers along at once.
            atexit.register(_close_at_exit, weakref.ref(self))

    def __len__(self) -> int:
        """Steps left."""
        return len(self._steps) - self._next

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Item:
        if self._next >= len(self._steps):
            self.close()
            raise StopIteration
        step = self._steps[self._next]
        try:
            item = next(self._running[0]) if self._running else _pinned(self._source[step])
        except Exception as error:
            self._end_with(error)
            raise
        self._next += 1
        if isinstance(item, MegainterError):
            self.close()
            raise item
        return item

    def close(self) -> None:
        """End the workers; the loader gives nothing more."""
        self._next = len(self._steps)
        while self._running:
            iterator = self._running.pop()
            iterator._shutdown_workers()

            # They ignore SIGTERM, and multiprocessing waits without end for those that are left.
            for worker in iterator._workers:
                worker.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self._end_with(error)
        self.close()

    def _end_with(self, error: BaseException) -> None:
        """Close, and say so in place of ``error`` where that came of a worker's death: torch raises wherever the trainer is then."""
        told = isinstance(error, MegainterError) or not isinstance(error, Exception)
        code = None if told else self._death()
        self.close()
        if code is not None:
            ended = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
            cause = CAUSES.get(-code, "which nobody foresaw: please report it")
            raise MegainterError(f"a loader process {ended}, {cause}; the same command goes on from the last checkpoint") from error

    def _death(self) -> int | None:
        """The exit code of a worker that did not end well, minus the signal's number where one killed it; None where all are well."""
        workers = [worker for iterator in self._running for worker in iterator._workers]
        deadline = time.monotonic() + DEATH_PATIENCE
        while workers and time.monotonic() < deadline:
            for worker in workers:
                if worker.exitcode:
                    return int(worker.exitcode)
            time.sleep(0.01)
        return None


def _pinned(item: Any) -> Any:
    """What the DataLoader does with what its workers made: batches in page-locked memory where CUDA is there."""
    if not torch.cuda.is_available():
        return item
    return [batch.pin_memory() for batch in item] if isinstance(item, list) else item.pin_memory()


def _close_at_exit(loader: "weakref.ref[StepLoader[Any]]") -> None:
    alive = loader()
    if alive is not None:
        alive.close()


class _UserErrorsAsItems(Dataset[Any]):
    """Hands a user's error over as an item: torch would raise it with the worker's traceback as its text."""

    def __init__(self, source: Indexed[Any]) -> None:
        self.source = source

    def __getitem__(self, step: int) -> Any:
        try:
            return self.source[step]
        except MegainterError as error:
            return error


def _data_loader(source: Indexed[Any], steps: range, workers: int, prefetch: int) -> DataLoader[Any]:
    return DataLoader(
        _UserErrorsAsItems(source),
        batch_size=None,
        sampler=steps,
        num_workers=workers,
        prefetch_factor=prefetch,
        pin_memory=torch.cuda.is_available(),
        multiprocessing_context="fork",
        worker_init_fn=partial(_start_worker, os.getpid()),
    )


def _start_worker(parent: int, _: int) -> None:
    """In a fresh worker: one thread, no part in the trainer's signals, and death with the trainer.

    The trainer answers SIGTERM and Ctrl-C by finishing its step and saving, for which it needs its workers; a scheduler or a terminal
    sends these signals to the whole process group.
    """
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    end_with_parent(parent)
