"""Work that is left in its middle when somebody asks for a stop: minutes may pass in PyTorch's C++ code, where no signal is noticed."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

Result = TypeVar("Result")

PATIENCE = 3.0  # seconds that work may go on after a stop was asked for
POLL_SECONDS = 0.25


class Unfinished(Exception):
    """A stop was asked for and the work is not done; its thread may go on until the process ends."""


def finished(work: Callable[[], Result], stop: Callable[[], bool], patience: float) -> Result:
    """What ``work`` gives, done in a thread of its own while this one asks ``stop``; it raises what ``work`` raises.

    Raises ``Unfinished`` where ``work`` is not done ``patience`` seconds after ``stop`` said yes for the first time.
    """
    future: Future[Result] = Future()
    threading.Thread(target=_do, args=(work, future), daemon=True).start()
    asked: float | None = None
    while not wait([future], POLL_SECONDS).done:
        if asked is None and stop():
            asked = time.monotonic()
        if asked is not None and time.monotonic() - asked >= patience:
            raise Unfinished
    return future.result()


def _do(work: Callable[[], Result], future: Future[Result]) -> None:
    try:
        future.set_result(work())
    except BaseException as error:
        future.set_exception(error)
