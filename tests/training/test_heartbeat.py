"""Lines by time, on a clock that the test turns."""

import logging
from collections.abc import Callable

import pytest

from megainter.training.heartbeat import Heartbeat


def lines_of(caplog: pytest.LogCaptureFixture, run: Callable[[Heartbeat, Callable[[float], None]], None], start: int = 0) -> list[str]:
    now = [1000.0]
    logger = logging.getLogger("megainter")
    logger.addHandler(caplog.handler)  # a run's own log does not pass its lines on
    try:
        with caplog.at_level(logging.INFO, logger="megainter"):
            run(Heartbeat(start, 100, 8, clock=lambda: now[0]), lambda seconds: now.__setitem__(0, now[0] + seconds))
    finally:
        logger.removeHandler(caplog.handler)
    return [record.getMessage() for record in dict.fromkeys(caplog.records)]


def test_the_first_step_of_a_start_is_told_and_quick_ones_after_it_are_not(caplog: pytest.LogCaptureFixture) -> None:
    def run(pulse: Heartbeat, wait: Callable[[float], None]) -> None:
        for step in range(40, 50):
            wait(3)
            pulse.step(step + 1, reported=False)

    assert lines_of(caplog, run, start=40) == ["step 41/100: 3.0 s a step, 3.0 min left"]


def test_a_minute_without_a_line_gives_one(caplog: pytest.LogCaptureFixture) -> None:
    def run(pulse: Heartbeat, wait: Callable[[float], None]) -> None:
        for step in range(9):
            wait(20)
            pulse.step(step + 1, reported=False)

    assert lines_of(caplog, run) == [
        "step 1/100: 20.0 s a step, 33.0 min left",
        "step 4/100: 20.0 s a step, 32.0 min left",
        "step 7/100: 20.0 s a step, 31.0 min left",
    ]


def test_a_step_that_takes_minutes_tells_how_far_it_is(caplog: pytest.LogCaptureFixture) -> None:
    def run(pulse: Heartbeat, wait: Callable[[float], None]) -> None:
        for done in range(1, 9):
            wait(25)
            pulse.micro_batch(0, done)

    assert lines_of(caplog, run) == [
        "step 1/100: micro-batch 3 of 8, 75 s since the start",
        "step 1/100: micro-batch 6 of 8, 150 s since the start",
    ]


def test_records_count_as_lines(caplog: pytest.LogCaptureFixture) -> None:
    def run(pulse: Heartbeat, wait: Callable[[float], None]) -> None:
        for step in range(20):
            wait(30)
            pulse.step(step + 1, reported=True)

    assert lines_of(caplog, run) == []
