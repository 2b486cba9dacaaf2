"""Background loading: worker processes make whole steps ahead of the trainer, in order, and never outlive it."""

import atexit
import os
import signal
import weakref
from collections.abc import Iterator
from functools import partial
from typing import Any, Protocol, Self, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from megainter.errors import MegainterError
from megainter.process import end_with_parent

Item = TypeVar("Item", covariant=True)


class Indexed(Protocol[Item]):
    """Anything with ``source[i]``: a stream or validation batches."""

    def __getitem__(self, i: int, /) -> Item: ...


def make_loader(source: Indexed[Item], start_step: int, stop_step: int, workers: int, prefetch: int = 2) -> "StepLoader[Item]":
    """``source[start_step] .. source[stop_step - 1]``, in order, made ahead by ``workers`` processes (0: made here, when asked for).

    Each worker keeps ``prefetch`` whole steps ready. Memory is pinned where CUDA is there. Close the loader (or use ``with``) when it is
    left before its end; a user's error in a worker arrives as it was raised.
    """
    return StepLoader(source, range(start_step, stop_step), workers, prefetch)


class StepLoader(Iterator[Item]):
    """The iterator that ``make_loader`` gives. Workers are forked, so that the caption table is shared and not sent."""

    def __init__(self, source: Indexed[Item], steps: range, workers: int, prefetch: int) -> None:
        self._source, self._steps, self._next = source, steps, 0
        self._running: list[Iterator[Any]] = []  # the only reference to the workers: dropping it ends them
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
        item = next(self._running[0]) if self._running else _pinned(self._source[step])
        self._next += 1
        if isinstance(item, MegainterError):
            self.close()
            raise item
        return item

    def close(self) -> None:
        """End the workers; the loader gives nothing more."""
        self._next = len(self._steps)
        self._running.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


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
