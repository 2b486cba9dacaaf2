"""Reports of `megainter evaluate` on a model's card: the figures as the Hub's model-index has them, and as a table."""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from megainter.errors import UsageError, one_line
from megainter.files import read_json

Report = Mapping[str, Any]
_BOTH = {"text_to_image": "text to image", "image_to_text": "image to text"}
_RECALLS = {"r_at_1": "R@1", "r_at_5": "R@5", "r_at_10": "R@10"}
_VCR = {"answer": "Q->A", "rationale": "QA->R", "both": "Q->AR"}


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
        report = read_json(path)
        if not isinstance(report, dict) or not isinstance(report.get("model_digest"), str) or _kind(report) is None:
            raise UsageError(f"{path} is no report of `megainter evaluate` that has figures")
        if report["model_digest"] not in (own, before):
            raise UsageError(f"{path} was measured with other weights ({report['model']!s:.120}); evaluate these, or leave it out")
        if (same := seen.setdefault(_identity(report), path)) is not path:
            raise UsageError(f"{same} and {path} report the same evaluation, {_kind_of(report).setting(report)}; give one of them")
        reports.append(report | {"of_the_source": changed})
    return reports


def _identity(report: Report) -> str:
    """What was measured and how; no two reports of a card are of the same."""
    kind = _kind_of(report)
    counts = [report.get(part) for part in kind.counts]
    return repr((kind.task(report), kind.dataset(report), kind.setting(report), report.get("split"), counts))


def results(report: Report) -> list[Any]:
    """A report's figures for the Hub's model-index; recalls and accuracies of VCR in percent."""
    from huggingface_hub import EvalResult

    kind = _kind_of(report)
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
    for kind in _KINDS:
        rows = [row for report in reports if _kind(report) is kind for row in kind.rows(report)]
        if rows:
            parts.append("\n".join([f"By `megainter evaluate {kind.command}`:", "", *table(kind.head, rows)]))
    return "\n\n".join(parts)


class _Kind(ABC):
    """What one task's reports say, and where."""

    command: ClassVar[str]
    counts: ClassVar[tuple[str, ...]]
    head: ClassVar[tuple[str, ...]]

    @abstractmethod
    def fits(self, report: Report) -> bool:
        """Whether this is such a report, with figures."""

    @abstractmethod
    def dataset(self, report: Report) -> str:
        """The name of what was measured on."""

    @abstractmethod
    def task(self, report: Report) -> tuple[str, str]:
        """The task as the Hub knows it, and in words."""

    def setting(self, report: Report) -> str:
        """How it was measured; reports of one data set are told apart by it."""
        return str(report.get("precision"))

    @abstractmethod
    def metrics(self, report: Report) -> Iterable[tuple[str, str, float]]:
        """Metric, its name, its value."""

    @abstractmethod
    def rows(self, report: Report) -> Iterable[tuple[Any, ...]]:
        """Cells below ``head``."""


class _Retrieval(_Kind):
    command, counts = "retrieval", ("images", "captions", "pairs_digest")
    head = ("gallery", "direction", *_RECALLS.values(), "median rank", "chance R@1")

    def fits(self, report: Report) -> bool:
        ways = [report.get(way) for way in _BOTH]
        return isinstance(report.get("pairs"), str) and all(isinstance(way, dict) and _numbers(way, _RECALLS) for way in ways)

    def dataset(self, report: Report) -> str:
        return Path(report["pairs"]).stem

    def task(self, report: Report) -> tuple[str, str]:
        return "image-text-retrieval", "Image-text retrieval"

    def setting(self, report: Report) -> str:
        return ", ".join([super().setting(report), *_candidates(report)])

    def metrics(self, report: Report) -> Iterable[tuple[str, str, float]]:
        for key, way in _BOTH.items():
            for value, recall in _RECALLS.items():
                yield "recall", f"{way} {recall}", round(100 * report[key][value], 2)

    def rows(self, report: Report) -> Iterable[tuple[Any, ...]]:
        candidates = "".join(f", {words}" for words in _candidates(report))
        gallery = f"{_where(self, report)}: {report.get('images')} images{_how(report, candidates)}"
        for key, way in _BOTH.items():
            figures = [f"{report[key][name]:.1%}" for name in _RECALLS]
            yield gallery, way, *figures, report[key].get("median_rank", ""), _share(report[key].get("chance_at_1"))


class _Vcr(_Kind):
    command, counts = "vcr", ("labelled", "questions_digest")
    head = ("questions", *_VCR.values(), "chance Q->AR")

    def fits(self, report: Report) -> bool:
        return isinstance(report.get("questions_file"), str) and any(_numbers(report, [name]) for name in _VCR)

    def dataset(self, report: Report) -> str:
        return Path(report["questions_file"]).stem

    def task(self, report: Report) -> tuple[str, str]:
        return "visual-question-answering", "Visual commonsense reasoning"

    def metrics(self, report: Report) -> Iterable[tuple[str, str, float]]:
        for name, words in _VCR.items():
            if _numbers(report, [name]):
                yield "accuracy", words, round(100 * report[name], 2)

    def rows(self, report: Report) -> Iterable[tuple[Any, ...]]:
        chance = report.get("chance")
        whole = chance.get("both") if isinstance(chance, dict) else None
        where = f"{_where(self, report)}: {report.get('labelled')} with labels{_how(report)}"
        yield where, *(f"{report[name]:.1%}" if _numbers(report, [name]) else "" for name in _VCR), _share(whole)


class _Classification(_Kind):
    command, counts = "classification", ("count", "examples_digest")
    head = ("examples", "figure", "value")

    def fits(self, report: Report) -> bool:
        figures = report.get("figures")
        named = isinstance(report.get("examples"), str) and isinstance(report.get("task"), str)
        return named and isinstance(figures, dict) and bool(figures) and _numbers(figures, figures)

    def dataset(self, report: Report) -> str:
        return Path(report["examples"]).stem

    def task(self, report: Report) -> tuple[str, str]:
        known = {"vqa": "visual-question-answering"}
        usual = "text-classification" if report.get("store") is None else "image-text-classification"
        return known.get(report["task"], usual), one_line(report["task"])

    def metrics(self, report: Report) -> Iterable[tuple[str, str, float]]:
        for name, value in report["figures"].items():
            yield name, name.replace("_", " "), round(value, 4)

    def rows(self, report: Report) -> Iterable[tuple[Any, ...]]:
        for name, value in report["figures"].items():
            yield f"{_where(self, report)}: {report.get('count')}{_how(report)}", name.replace("_", " "), f"{value:.4f}"


_KINDS: tuple[_Kind, ...] = (_Retrieval(), _Vcr(), _Classification())


def _kind(report: Report) -> _Kind | None:
    return next((kind for kind in _KINDS if kind.fits(report)), None)


def _kind_of(report: Report) -> _Kind:
    """The kind of a report that is known to be one."""
    kind = _kind(report)
    assert kind is not None
    return kind


def _candidates(report: Report) -> list[str]:
    """How many candidates of a first stage were ranked, in words; none where all pairs were."""
    first = report.get("prefilter")
    return [f"{first['candidates']} candidates of a first stage"] if isinstance(first, dict) and "candidates" in first else []


def _where(kind: _Kind, report: Report) -> str:
    return f"{plain(kind.dataset(report))}, {plain(str(report.get('split')))}"


def _how(report: Report, more: str = "") -> str:
    return f" ({report.get('precision')}{more}{', before this conversion' if report['of_the_source'] else ''})"


def _numbers(values: Mapping[str, Any], names: Iterable[str]) -> bool:
    return all(isinstance(values.get(name), int | float) and not isinstance(values.get(name), bool) for name in names)


def _share(value: Any) -> str:
    return f"{value:.2%}" if isinstance(value, int | float) else ""


# --- text of a card -------------------------------------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """The lines of a Markdown table; none without rows."""
    cells = [[plain(str(cell)) for cell in row] for row in rows]
    return ["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *("| " + " | ".join(row) + " |" for row in cells)] if cells else []


def plain(text: str) -> str:
    """``text`` as a page shows it and nothing acts on it: one line, no markup, no cell's end."""
    return one_line(text).replace("`", "'").replace("|", "/").replace("<", "‹").replace(">", "›")
