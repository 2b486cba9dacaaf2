"""The one table at the end, as plain text and as Markdown."""

from collections.abc import Iterable, Sequence

from benchmarks.gpu.runner import NOT_RUN, OK, Result

Row = tuple[str, str, str]
HEADINGS: Row = ("part", "what", "found")


def rows_of(results: Iterable[Result]) -> list[Row]:
    """For each part how it ended, then what it found, then what went wrong."""
    rows: list[Row] = []
    for result in results:
        rows.append((result.part, _outcome(result), ""))
        rows += [("", str(what), str(found)) for what, found in result.figures.get("rows", [])]
        rows += [("", "FAILED", str(failure)) for failure in result.figures.get("failures", [])]
        if result.outcome not in (OK, NOT_RUN) and not result.figures.get("failures"):
            rows.append(("", "end of its log", result.tail[-1].strip() if result.tail else "(empty)"))
    return rows


def _outcome(result: Result) -> str:
    return result.outcome if result.outcome == NOT_RUN else f"{result.outcome}, {result.seconds:.0f} s of {result.limit:.0f}"


def plain(rows: Sequence[Row]) -> str:
    """Columns beside each other; the last one as long as it is."""
    all_rows = [HEADINGS, *rows]
    widths = [max(len(row[column]) for row in all_rows) for column in range(2)]
    return "".join(f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]}".rstrip() + "\n" for row in all_rows)


def markdown(rows: Sequence[Row]) -> str:
    """The same table for a page."""
    lines = [HEADINGS, ("---",) * len(HEADINGS), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |\n" for row in lines)
