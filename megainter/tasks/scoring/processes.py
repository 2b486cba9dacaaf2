"""Chunks of work scored by processes, one for each device."""

import multiprocessing
import os
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from megainter.errors import MegainterError

_DEAD = (
    "a scoring process ended without a word (out of memory?): give fewer --processes or a smaller --batch-pairs; "
    "the same command goes on where it stopped"
)


class Scorer(Protocol):
    """A model on a device."""

    def score(self, chunk: int) -> NDArray[np.float32]:
        """The scores of one chunk."""


class Scored(Protocol):
    """Whatever can be scored chunk by chunk; sent to every process."""

    def scorer(self, device: torch.device) -> Scorer:
        """Its model on a device."""


def score_chunks(job: Scored, chunks: list[int], devices: list[torch.device]) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """(chunk, its scores) as they come, in no particular order. One device: in this process; several: a process for each."""
    if not chunks:
        return
    if len(devices) == 1:
        yield from _score_here(job, chunks, devices[0])
    else:
        yield from _score_in_processes(job, chunks, devices[: len(chunks)])


def _score_here(job: Scored, chunks: list[int], device: torch.device) -> Iterator[tuple[int, NDArray[np.float32]]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        scorer = job.scorer(device)
        for chunk in chunks:
            yield chunk, scorer.score(chunk)
    finally:
        torch.set_num_threads(threads)


def _score_in_processes(job: Scored, chunks: list[int], devices: list[torch.device]) -> Iterator[tuple[int, NDArray[np.float32]]]:
    context = multiprocessing.get_context("spawn")  # a fork would copy this process's threads' locks and CUDA state
    processes, pipes = [], []
    try:
        for device in devices:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(job, device, theirs), daemon=True)
            process.start()
            theirs.close()  # so that reading ends when the process does
            processes.append(process)
            pipes.append(ours)
        yield from _share_out(chunks, pipes)
    finally:
        for pipe in pipes:
            pipe.close()
        for process in processes:
            process.terminate()
            process.join()


def _share_out(chunks: list[int], pipes: list[Connection]) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Hand each process its next chunk when it has returned the one before."""
    waiting = iter(chunks)
    busy: dict[Connection, int] = {}
    for pipe in pipes:
        _hand_out(pipe, waiting, busy)
    while busy:
        pipe, scores = _next_result(list(busy))
        finished = busy.pop(pipe)
        _hand_out(pipe, waiting, busy)
        yield finished, scores


def _hand_out(pipe: Connection, waiting: Iterator[int], busy: dict[Connection, int]) -> None:
    chunk = next(waiting, None)
    if chunk is None:
        return
    try:
        pipe.send(chunk)
    except OSError:
        raise MegainterError(_DEAD) from None
    busy[pipe] = chunk


def _next_result(pipes: list[Connection]) -> tuple[Connection, NDArray[np.float32]]:
    pipe = wait(pipes)[0]
    assert isinstance(pipe, Connection)
    try:
        result = pipe.recv()
    except (EOFError, OSError):
        raise MegainterError(_DEAD) from None
    if isinstance(result, BaseException):
        raise result
    return pipe, result


def _serve(job: Scored, device: torch.device, pipe: Connection) -> None:
    """One scoring process: chunk numbers in, scores out, until the pipe closes (also because the other end was killed)."""
    torch.set_num_threads(1)
    try:
        scorer = None
        while True:
            chunk = pipe.recv()
            scorer = scorer or job.scorer(device)
            pipe.send(scorer.score(chunk))
    except (EOFError, BrokenPipeError, ConnectionResetError, KeyboardInterrupt):
        return
    except MegainterError as error:
        pipe.send(error)
    except Exception:
        pipe.send(RuntimeError(f"in scoring process {os.getpid()}:\n{traceback.format_exc()}"))
