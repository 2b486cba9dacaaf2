"""Reports of `megainter evaluate`, as they stand in JSON: which kind one is, and its figures by names that people know."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from megainter.errors import UsageError, one_line
from megainter.files import read_json

Report = Mapping[str, Any]
_BOTH = {"text_to_image": "text to image", "image_to_text": "image to text"}
_RECALLS = {"r_at_1": "R@1", "r_at_5": "R@5", "r_at_10": "R@10"}
_VCR = {"answer": "Q->A", "rationale": "QA->R", "both": "Q->AR"}


def read_report(path: Path) -> dict[str, Any]:
    """The report in a JSON file; ``UsageError`` for one without figures or another file."""
    report = read_json(path)
    if not isinstance(report, dict) or not isinstance(report.get("model_digest"), str) or find_kind(report) is None:
        raise UsageError(f"{path} is no report of `megainter evaluate` that has figures")
    return report


@dataclass(frozen=True)
class Outcomes:
    """A Parquet file beside a report with one row for each query: its digest, what the queries are called, the column of their name and
    that of their outcome, and the value that a right one has there."""

    file: str
    sha256: str | None
    words: str
    name: str
    outcome: str
    right: int


class ReportKind(ABC):
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

    def sizes(self, report: Report) -> list[int]:
        """How many queries the figures are shares of, in percent; none where they are something else."""
        return [report[name] for name in self.counts if isinstance(report.get(name), int)]

    def setting(self, report: Report) -> str:
        """How it was measured; reports of one data set are told apart by it."""
        return str(report.get("precision"))

    @abstractmethod
    def metrics(self, report: Report) -> Iterable[tuple[str, str, float]]:
        """Metric, its name, its value."""

    @abstractmethod
    def rows(self, report: Report) -> Iterable[tuple[Any, ...]]:
        """Cells below ``head``."""

    def table_of_outcomes(self, report: Report) -> Outcomes | None:
        """Where each query's outcome stands, beside the report; None where that is not written."""
        return None


class _Retrieval(ReportKind):
    command, counts = "retrieval", ("images", "captions", "pairs_digest")
    head = ("gallery", "direction", *_RECALLS.values(), "median rank", "chance R@1")

    def fits(self, report: Report) -> bool:
        return isinstance(report.get("pairs"), str) and _has_recalls(report)

    def dataset(self, report: Report) -> str:
        return Path(report["pairs"]).stem

    def task(self, report: Report) -> tuple[str, str]:
        return "image-text-retrieval", "Image-text retrieval"

    def setting(self, report: Report) -> str:
        return ", ".join([super().setting(report), *_candidates(report)])

    def metrics(self, report: Report) -> Iterable[tuple[str, str, float]]:
        for stage, found in _stages(report):
            for key, way in _BOTH.items():
                for value, recall in _RECALLS.items():
                    yield "recall", f"{stage}{way} {recall}", round(100 * found[key][value], 2)

    def rows(self, report: Report) -> Iterable[tuple[Any, ...]]:
        candidates = "".join(f", {words}" for words in _candidates(report))
        gallery = f"{_where(self, report)}: {report.get('images')} images{_how(report, candidates)}"
        for stage, found in _stages(report):
            for key, way in _BOTH.items():
                figures = [f"{found[key][name]:.1%}" for name in _RECALLS]
                yield gallery, f"{stage}{way}", *figures, found[key].get("median_rank", ""), _share(found[key].get("chance_at_1"))

    def table_of_outcomes(self, report: Report) -> Outcomes | None:
        top = report.get("top")
        return Outcomes(top, report.get("top_sha256"), "text to image R@1", "pair_id", "rank", 1) if isinstance(top, str) else None


class _Vcr(ReportKind):
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


class _Classification(ReportKind):
    command, counts = "classification", ("count", "examples_digest")
    head = ("examples", "figure", "value")

    def sizes(self, report: Report) -> list[int]:
        return []

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

    def table_of_outcomes(self, report: Report) -> Outcomes | None:
        table = report.get("predictions")
        if not isinstance(table, str):
            return None
        return Outcomes(table, report.get("predictions_sha256"), "right predictions", "example_id", "right", 1)


KINDS: tuple[ReportKind, ...] = (_Retrieval(), _Vcr(), _Classification())


def find_kind(report: Report) -> ReportKind | None:
    """The kind of a report; None for something else."""
    return next((kind for kind in KINDS if kind.fits(report)), None)


def kind_of(report: Report) -> ReportKind:
    """The kind of a report that is known to be one."""
    kind = find_kind(report)
    assert kind is not None
    return kind


def _stages(report: Report) -> Iterator[tuple[str, Report]]:
    """What retrieval was measured by, as words before a direction, with the recalls: matching, and where there are two stages each."""
    yield "", report
    for words, name in (("both stages, ", "both_stages"), ("first stage, ", "prefilter")):
        found = report.get(name)
        if isinstance(found, dict) and _has_recalls(found):
            yield words, found


def _has_recalls(found: Report) -> bool:
    ways = [found.get(way) for way in _BOTH]
    return all(isinstance(way, dict) and _numbers(way, _RECALLS) for way in ways)


def _candidates(report: Report) -> list[str]:
    """How many candidates of a first stage were ranked, in words; none where all pairs were."""
    first = report.get("prefilter")
    return [f"{first['candidates']} candidates of a first stage"] if isinstance(first, dict) and "candidates" in first else []


def _where(kind: ReportKind, report: Report) -> str:
    return f"{kind.dataset(report)}, {report.get('split')}"


def _how(report: Report, more: str = "") -> str:
    return f" ({report.get('precision')}{more}{', before this conversion' if report.get('of_the_source') else ''})"


def _numbers(values: Mapping[str, Any], names: Iterable[str]) -> bool:
    return all(isinstance(values.get(name), int | float) and not isinstance(values.get(name), bool) for name in names)


def _share(value: Any) -> str:
    return f"{value:.2%}" if isinstance(value, int | float) else ""
