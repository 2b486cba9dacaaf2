"""Reports of `megainter evaluate` on a model's card: the figures as the Hub's model-index has them, and as a table."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from megainter.errors import UsageError, one_line
from megainter.reports import KINDS, Report, find_kind, kind_of, read_report


def read_evaluations(paths: Sequence[Path], folder: Path, earlier: Path | None, changed: bool) -> list[dict[str, Any]]:
    """The reports in ``paths``, each of the weights in ``folder`` or of those in ``earlier``, which these were made from.

    ``changed``: these weights are others than those. ``UsageError`` for a report of other weights, one without figures, or another file.
    """
    if not paths:
        return []
    from megainter.model.folder import model_digest  # with transformers, which help must not wait for

    own = model_digest(folder)
    before = model_digest(earlier) if earlier is not None else own
    reports: list[dict[str, Any]] = []
    seen: dict[str, Path] = {}
    for path in paths:
        report = read_report(path)
        if report["model_digest"] not in (own, before):
            raise UsageError(f"{path} was measured with other weights ({report['model']!s:.120}); evaluate these, or leave it out")
        if (same := seen.setdefault(_identity(report), path)) is not path:
            raise UsageError(f"{same} and {path} report the same evaluation, {kind_of(report).setting(report)}; give one of them")
        reports.append(report | {"of_the_source": changed})
    return reports


def _identity(report: Report) -> str:
    """What was measured and how; no two reports of a card are of the same."""
    kind = kind_of(report)
    counts = [report.get(part) for part in kind.counts]
    return repr((kind.task(report), kind.dataset(report), kind.setting(report), report.get("split"), counts))


def results(report: Report) -> list[Any]:
    """A report's figures for the Hub's model-index; recalls and accuracies of VCR in percent."""
    from huggingface_hub import EvalResult

    kind = kind_of(report)
    name, (task, task_name) = kind.dataset(report), kind.task(report)
    counts = {part: report[part] for part in kind.counts if report.get(part) is not None}
    return [
        EvalResult(
            task_type=task,
            task_name=task_name,
            dataset_type=re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-") or "data",
            dataset_name=one_line(name),
            dataset_config=kind.setting(report),
            dataset_split=report.get("split"),
            dataset_args=counts,
            metric_type=metric,
            metric_name=metric_name,
            metric_value=value,
        )
        for metric, metric_name, value in kind.metrics(report)
    ]


def section(reports: Sequence[Report]) -> str:
    """The card's section: a table for each kind of report that is there."""
    parts = []
    for kind in KINDS:
        rows = [row for report in reports if find_kind(report) is kind for row in kind.rows(report)]
        if rows:
            parts.append("\n".join([f"By `megainter evaluate {kind.command}`:", "", *table(kind.head, rows)]))
    return "\n\n".join(parts)


# --- text of a card -------------------------------------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """The lines of a Markdown table; none without rows."""
    cells = [[plain(str(cell)) for cell in row] for row in rows]
    return ["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *("| " + " | ".join(row) + " |" for row in cells)] if cells else []


def plain(text: str) -> str:
    """``text`` as a page shows it and nothing acts on it: one line, no markup, no cell's end."""
    return one_line(text).replace("`", "'").replace("|", "/").replace("<", "‹").replace(">", "›")
