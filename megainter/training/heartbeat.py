"""Signs of life of a run by time: records come every so many steps, and on a slow machine that may be hours."""

import logging
import time
from collections.abc import Callable

log = logging.getLogger("megainter")


class Heartbeat:
    """Logs the first step of a start, and a line wherever ``interval`` seconds passed without one, also inside a step.

    It touches no metrics and asks no other rank: the intervals of the records stay whole steps, the same in every run.
    """

    def __init__(self, start: int, total: int, micro_batches: int, interval: float = 60.0, clock: Callable[[], float] = time.monotonic):
        self.start, self.total, self.micro_batches = start, total, micro_batches
        self.interval, self.clock = interval, clock
        self.began = self.last_line = clock()

    def micro_batch(self, step: int, done: int) -> None:
        """``done`` micro-batches of the step after ``step`` are finished."""
        if done < self.micro_batches and self._due():
            seconds = self.clock() - self.began
            self._say("step %d/%d: micro-batch %d of %d, %.0f s since the start", step + 1, self.total, done, self.micro_batches, seconds)

    def step(self, finished: int, reported: bool) -> None:
        """``finished`` steps are done; ``reported``: a line of its own has just said so."""
        if reported:
            self.last_line = self.clock()
        elif finished == self.start + 1 or self._due():
            each = (self.clock() - self.began) / (finished - self.start)
            self._say("step %d/%d: %.1f s a step, %.1f min left", finished, self.total, each, each * (self.total - finished) / 60)

    def _due(self) -> bool:
        return self.clock() - self.last_line >= self.interval

    def _say(self, text: str, *values: float) -> None:
        self.last_line = self.clock()
        log.info(text, *values)
