"""A part of a GPU run that finds something and then fails."""

from benchmarks.gpu.part import Report, Setting, Wrong, run_part


def check(setting: Setting, report: Report) -> None:
    """Find something, fail."""
    report.row("found before", "1")
    raise Wrong("two and two are five here")


if __name__ == "__main__":
    run_part("failing", check)
