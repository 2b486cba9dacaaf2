"""Reports of `megainter evaluate` side by side: every figure with its difference, and whether single queries tell two models apart."""

from dataclasses import dataclass
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megainter.data.tables.parquet import open_parquet
from megainter.errors import UsageError
from megainter.files import sha256_of
from megainter.paths import short_names
from megainter.reports import Outcomes, ReportKind, kind_of, read_report

OF_THE_DATA = ("split", "max_regions", "max_text_tokens", "store_digest")  # beside the counts of a kind


@dataclass(frozen=True)
class Figure:
    """One figure of all reports, in their order; None where a report has none. ``difference``: of the last and the first."""

    name: str
    values: list[float | None]
    difference: float | None


@dataclass(frozen=True)
class Paired:
    """Queries that both of two models were asked: right with both, with the first alone, with the second alone, with neither; ``p`` of
    McNemar's exact test that the two are alike (Psychometrika 12, 1947, page 153; two-sided)."""

    words: str
    both: int
    first_alone: int
    second_alone: int
    neither: int
    p: float


@dataclass(frozen=True)
class Compared:
    """Reports by their paths, their figures, what they were measured on that is not the same, and the queries of two of them.

    ``sizes``: how many queries the figures are shares of, each number once; ``same_weights``: all reports are of one model's;
    ``settings``: how each was measured, where that differs; ``uncounted``: why queries that could be are not counted, "" where they are.
    """

    task: str
    reports: list[Path]
    figures: list[Figure]
    sizes: list[int]
    same_weights: bool
    settings: list[str]
    unlike: list[str]
    paired: Paired | None
    uncounted: str


def compare(paths: list[Path]) -> Compared:
    """Compare reports of one task. ``UsageError`` for fewer than two, another file, or reports of several tasks."""
    if len(paths) < 2:
        raise UsageError("give at least two reports of `megainter evaluate`")
    reports = [read_report(path) for path in paths]
    kinds = [kind_of(report) for report in reports]
    for path, kind in zip(paths, kinds, strict=True):
        if kind is not kinds[0]:
            raise UsageError(f"{paths[0]} is a report of {kinds[0].command} and {path} of {kind.command}; compare reports of one task")
    kind = kinds[0]
    unlike, settings = _unlike(kind, reports), [kind.setting(report) for report in reports]
    countable = len(paths) == 2 and not unlike and all(kind.table_of_outcomes(report) is not None for report in reports)
    paired = _paired(kind, paths, reports) if countable else None
    return Compared(
        task=kind.command,
        reports=paths,
        figures=_figures(kind, reports),
        sizes=sorted({size for report in reports for size in kind.sizes(report)}),
        same_weights=len({report["model_digest"] for report in reports}) == 1,
        settings=settings if len(set(settings)) > 1 else [],
        unlike=unlike,
        paired=paired,
        uncounted="the tables beside the reports are not there, or were written anew" if countable and paired is None else "",
    )


def _figures(kind: ReportKind, reports: list[dict[str, Any]]) -> list[Figure]:
    found = [{name: value for _, name, value in kind.metrics(report)} for report in reports]
    figures = []
    for name in dict.fromkeys(name for values in found for name in values):
        values = [each.get(name) for each in found]
        first, last = values[0], values[-1]
        figures.append(Figure(name, values, None if first is None or last is None else round(last - first, 4)))
    return figures


def _unlike(kind: ReportKind, reports: list[dict[str, Any]]) -> list[str]:
    """What the reports were measured on and how, where that is not the same in all."""
    told: list[str] = []
    for name in (*kind.counts, *OF_THE_DATA):
        values = [report.get(name) for report in reports]
        if any(value != values[0] for value in values):
            shown = ", ".join(f"{value!s:.12}" if name.endswith("digest") else str(value) for value in values)
            told.append(f"{name.replace('_', ' ')}: {shown}")
    return told


def _paired(kind: ReportKind, paths: list[Path], reports: list[dict[str, Any]]) -> Paired | None:
    """The queries' outcomes, where both tables are beside their reports and have the same queries."""
    found = []
    for path, report in zip(paths, reports, strict=True):
        outcomes = kind.table_of_outcomes(report)
        if outcomes is None or not _is_its_own(path.parent / outcomes.file, outcomes):
            return None
        found.append((outcomes.words, _right(path.parent / outcomes.file, outcomes)))
    (words, first), (_, second) = found
    if first.keys() != second.keys() or not first:
        return None
    sums = np.bincount([2 * first[name] + second[name] for name in first], minlength=4).tolist()
    return Paired(words, sums[3], sums[2], sums[1], sums[0], mcnemar(sums[2], sums[1]))


def _is_its_own(path: Path, outcomes: Outcomes) -> bool:
    """Whether the table beside a report is there, and still the one that was written with it."""
    return path.name == outcomes.file and path.is_file() and (outcomes.sha256 is None or sha256_of(path) == outcomes.sha256)


def _right(path: Path, outcomes: Outcomes) -> dict[str, bool]:
    """Whether each query's outcome is right; those without a label, and outcomes that are partly right, are not counted."""
    columns = open_parquet(path, made_by="`megainter evaluate` writes it").schema_arrow.names
    if {outcomes.name, outcomes.outcome} - set(columns):
        raise UsageError(f"{path} has no columns {outcomes.name} and {outcomes.outcome}: it is not what `megainter evaluate` wrote")
    table: pa.Table = pq.read_table(path, columns=[outcomes.name, outcomes.outcome])
    names, values = table.column(outcomes.name).to_pylist(), table.column(outcomes.outcome).to_numpy()
    whole = np.isfinite(values) & (values == np.rint(values))
    return {name: bool(value == outcomes.right) for name, value, known in zip(names, values, whole, strict=True) if known}


def mcnemar(first_alone: int, second_alone: int) -> float:
    """Two-sided exact p that of so many queries on which two models differ so many fall to each.

    >>> round(mcnemar(2, 8), 4)
    0.1094
    """
    count = first_alone + second_alone
    tail = sum(comb(count, k) for k in range(min(first_alone, second_alone) + 1))
    return min(1.0, 2 * tail / 2**count)


def told(compared: Compared) -> str:
    """The comparison for people: one column for each report, and the difference of the last and the first."""
    names = short_names(compared.reports)
    head = ["", *names, "difference"]
    rows = [[each.name, *map(_shown, each.values), _signed(each.difference)] for each in compared.figures]
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in [head, *rows]]
    lines += [f"in percent; one of {size:,} is {100 / size:.2g}" for size in compared.sizes] if compared.sizes else []
    lines += [f"measured by: {'; '.join(compared.settings)}"] * bool(compared.settings)
    lines += ["all are of the same weights"] * compared.same_weights + [f"not measured alike: {each}" for each in compared.unlike]
    lines += [f"queries are not counted one by one: {compared.uncounted}"] * bool(compared.uncounted)
    if (paired := compared.paired) is not None:
        queries = paired.both + paired.first_alone + paired.second_alone + paired.neither
        alone = f"{paired.first_alone:,} with {names[0]} alone, {paired.second_alone:,} with {names[1]} alone"
        lines.append(
            f"{paired.words}, query by query: of {queries:,}, {paired.both:,} with both, {alone}; p {paired.p:.2g} (McNemar, exact)"
        )
    return "\n".join(lines)


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def _signed(value: float | None) -> str:
    return "" if value is None else f"{value:+g}"
