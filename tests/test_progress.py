"""Lines of progress in a log, against what is computed by hand."""

import pytest

from megainter.progress import Progress, shown_seconds, shown_time


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.00327, "3.27 ms"), (0.05, "50 ms"), (0.424, "0.42 s"), (13.06, "13.1 s"), (132.0, "132.0 s")]
)
def test_a_short_time_has_the_digits_it_deserves(seconds: float, words: str) -> None:
    assert shown_seconds(seconds) == words


@pytest.mark.parametrize(
    ("seconds", "words"), [(40, "40 s"), (400, "7 min"), (5300, "88 min"), (9000, "2.5 h"), (170_000, "47.2 h"), (270_000, "3.1 days")]
)
def test_a_long_time_is_told_in_the_unit_one_plans_in(seconds: float, words: str) -> None:
    assert shown_time(seconds) == words


def test_what_was_before_the_work_began_does_not_slow_its_rate(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with Progress("extract", 100, "images") as progress:
        now[0] = 40.0  # processes start, and a first batch takes four seconds
        progress.began(4.0)
        progress.update(8)
        assert progress.rate == 2.0
    assert capsys.readouterr().out.splitlines()[0] == "extract: 8/100 images, 2.0/s, 0.8 min left"


def test_slow_units_are_told_by_the_seconds_of_each(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with Progress("slow", 60, "images") as slow, Progress("fast", 60, "images") as fast:
        now[0] += 26
        slow.update(2)
        fast.update(52)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["slow: 2/60 images, 13.0 s each, 12.6 min left", "fast: 52/60 images, 2.0/s, 0.1 min left"]
