"""Progress of long work: a bar on a terminal, plain lines with rate and remaining time in a log."""

import sys
import time
from types import TracebackType
from typing import Self

from tqdm import tqdm


def shown_seconds(seconds: float) -> str:
    """A short time with the digits that it deserves: 3.27 ms, 0.42 s, 13.1 s."""
    if seconds < 0.1:
        return f"{1000 * seconds:.3g} ms"
    return f"{seconds:.2f} s" if seconds < 1 else f"{seconds:.1f} s"


def shown_time(seconds: float) -> str:
    """A long time in the unit that one plans in: 40 s, 7 min, 2.5 h, 3.1 days."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


SOON = 1.0  # seconds, before which a rate says nothing


class Progress:
    """Counts finished units of ``total`` and shows rate and ETA: a tqdm bar on a terminal, else a line every ``interval`` seconds.

    No pace is told in the first second; units that ``failed`` are counted as done, and not for the rate.
    """

    def __init__(self, label: str, total: int, unit: str, done: int = 0, interval: float = 10.0, enabled: bool = True) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.started_at, self.done, self.failed = done, done, 0
        self.interval, self.enabled = interval, enabled
        self.start = self.last_line = time.monotonic()
        terminal = enabled and sys.stderr.isatty()
        self.bar = tqdm(total=total, initial=done, desc=label, unit=f" {unit}", smoothing=0.1) if terminal else None

    def update(self, count: int = 1, note: str = "") -> None:
        """``count`` more units are finished."""
        self.done += count
        if self.bar is not None:
            self.bar.update(count)
            if note:
                self.bar.set_postfix_str(note, refresh=False)
        elif self.enabled and time.monotonic() - self.last_line >= self.interval:
            self.last_line = time.monotonic()
            print(self._line(note), flush=True)

    def fail(self, count: int) -> None:
        """``count`` of the units that are told as finished gave nothing."""
        self.failed += count

    def began(self, seconds: float) -> None:
        """The work began ``seconds`` ago, and what was before (the start of processes) does not count for the rate."""
        self.start = time.monotonic() - seconds

    @property
    def rate(self) -> float:
        """Units per second that gave something, since the start (work found done then is not counted); 0 in the first second."""
        seconds = time.monotonic() - self.start
        return (self.done - self.started_at - self.failed) / seconds if seconds >= SOON else 0.0

    def _line(self, note: str) -> str:
        parts = [f"{self.label}: {self.done:,}/{self.total:,} {self.unit}"]
        if self.rate > 0:
            parts += [self._pace(), f"{(self.total - self.done) / self.rate / 60:.1f} min left"]
        return ", ".join([*parts, note] if note else parts)

    def _pace(self) -> str:
        """Units per second; of slow ones the seconds that each takes."""
        if self.rate >= 1000:
            return f"{self.rate:,.0f}/s"
        return f"{self.rate:.1f}/s" if self.rate >= 1 else f"{shown_seconds(1 / self.rate)} each"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.close()
        elif self.enabled and kind is None:
            seconds = time.monotonic() - self.start
            took = "less than a second" if seconds < SOON else f"{seconds:.0f} s"
            pace = f", {self._pace()}" if self.rate > 0 else ""
            print(f"{self.label}: {self.done:,}/{self.total:,} {self.unit} in {took}{pace}", flush=True)
