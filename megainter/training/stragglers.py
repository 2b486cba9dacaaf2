"""A rank that the others wait for: found by the time that each spends where it waits for none of them.

That is its waiting for data and its forward passes; the backward pass and the update wait for the other ranks' gradients. At ZeRO stage 3
the forward waits for weights of the others too, so that there only data tell ranks apart. On a GPU the device's own clock is read, when
its events have passed: nobody waits for them.
"""

import statistics
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

TOLD = 0.2  # share of the time that the others wait, from which a line says so


class OwnTime:
    """Seconds that this rank spends waiting for data and in forward passes, since they were last taken."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._events: deque[tuple[Any, Any]] = deque()
        self._seconds, self._steps = 0.0, 0
        self.suspect: int | None = None  # whom the last record found, where that was much

    @contextmanager
    def forward(self) -> Iterator[None]:
        """A forward pass."""
        if self._on_gpu:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            yield
            end.record()
            self._events.append((begin, end))
        else:
            began = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - began

    def step(self, waited: float) -> None:
        """A step is done, for whose data the rank ``waited`` (seconds)."""
        self._seconds += waited
        self._steps += 1
        while self._events and self._events[0][1].query():
            begin, end = self._events.popleft()
            self._seconds += begin.elapsed_time(end) / 1000

    def take(self) -> float:
        """Seconds a step since the last call."""
        each = self._seconds / max(self._steps, 1)
        self._seconds, self._steps = 0.0, 0
        return each


def slowest(own: list[float], step_seconds: float) -> tuple[int, float]:
    """The rank with the most time of its own, and the share of a step of ``step_seconds`` that the others at least wait for it.

    ``own``: seconds a step by rank, two ranks or more. They are compared with the median of the others.

    >>> slowest([0.1, 0.1, 0.4, 0.2], 1.0)
    (2, 0.3)
    """
    rank = max(range(len(own)), key=own.__getitem__)
    others = statistics.median(seconds for other, seconds in enumerate(own) if other != rank)
    return rank, round(max(own[rank] - others, 0.0) / max(step_seconds, 1e-9), 4)
