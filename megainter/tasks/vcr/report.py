"""What VCR is measured by, and the files that say it: accuracies joined by question id, probabilities, the leaderboard's file."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from megainter.data.tables.parquet import write_parquet
from megainter.data.tables.questions import CHOICES, Questions
from megainter.errors import UsageError
from megainter.files import write_atomically
from megainter.tasks.vcr.batches import ChoiceToMake
from megainter.tasks.vcr.inputs import ANSWER, KINDS, RATIONALE

BOTH = "both"
CHANCE = {"answer": 1 / CHOICES, "rationale": 1 / CHOICES, BOTH: 1 / CHOICES**2}
SUBMISSION_COLUMNS = (
    "annot_id",
    *(f"answer_{i}" for i in range(CHOICES)),
    *(f"rationale_conditioned_on_a{given}_{i}" for given in range(CHOICES) for i in range(CHOICES)),
)


@dataclass(frozen=True)
class Judged:
    """Whether the choice that ``item`` asks for was right; items without a known answer are not judged."""

    question_id: str
    kind: int
    right: bool


def is_right(scores_N4: NDArray[np.floating], labels_N: NDArray[np.integer]) -> NDArray[np.bool_]:
    """bool [N]: the right choice scores above every other one. Ties count against the model."""
    rows = np.arange(len(labels_N))
    right = scores_N4[rows, labels_N]
    others = np.array(scores_N4, copy=True)
    others[rows, labels_N] = -np.inf
    return right > others.max(1)


def accuracies(judged: Iterable[Judged]) -> dict[str, float]:
    """Shares of right answers, right rationales, and questions with both right (Q->AR), of those questions that have both.

    Joined by question id, in whatever order they come; a figure of no questions is left out. ``UsageError`` where one comes twice.
    """
    right: tuple[dict[str, bool], dict[str, bool]] = ({}, {})
    for one in judged:
        if one.question_id in right[one.kind]:
            raise UsageError(f"question {one.question_id!r} was judged twice for its {KINDS[one.kind]}; question ids must be unique")
        right[one.kind][one.question_id] = one.right
    both = [right[ANSWER][question] and right[RATIONALE][question] for question in right[ANSWER] if question in right[RATIONALE]]
    shares = {"answer": list(right[ANSWER].values()), "rationale": list(right[RATIONALE].values()), BOTH: both}
    return {name: sum(values) / len(values) for name, values in shares.items() if values}


@dataclass(frozen=True)
class VcrReport:
    """What ``evaluate`` measured, as it stands in the JSON file.

    Accuracies are shares (0 to 1), None where there are no labels: ``answer`` Q->A, ``rationale`` QA->R given the right answer, ``both``
    Q->AR, both right. ``probabilities`` and ``submission`` name files. ``seconds`` is of this run alone.
    """

    answer: float | None
    rationale: float | None
    both: float | None
    questions: int
    labelled: int
    chance: dict[str, float]
    mode: str
    trained_for: str
    tie_objects: bool
    split: str | None
    precision: str
    model: str
    model_digest: str
    questions_file: str
    questions_digest: str
    store: str
    store_digest: str
    objects_store: str | None
    objects_store_digest: str | None
    device: str
    processes: int
    seconds: float
    choices_per_second: float
    probabilities: str
    submission: str | None


def summary(report: VcrReport) -> str:
    """One line for people."""
    names = {"answer": "Q->A", "rationale": "QA->R", BOTH: "Q->AR"}
    told = [f"{names[name]} {getattr(report, name):.2%} (chance {CHANCE[name]:.2%})" for name in names if getattr(report, name) is not None]
    return f"{', '.join(told) or 'no labels, no accuracies'}; {report.questions:,} questions"


def write_probabilities(path: Path, questions: Questions, items: Sequence[ChoiceToMake], probabilities_N4: NDArray[np.float32]) -> None:
    """A row for each question: its ids and labels, ``answer`` float32 [4], and ``rationale_given_0`` to ``_3`` float32 [4] each.

    Choices that were not scored are null: of a labelled question only the rationales given its right answer are asked for.
    """
    columns: dict[str, list[Any]] = {name: [None] * len(questions) for name in ("answer", *_given_columns())}
    labels = questions.table.column("answer_label").to_pylist()
    for item, row in zip(items, probabilities_N4, strict=True):
        given = item.given if item.given >= 0 else labels[item.row]
        columns["answer" if item.kind == ANSWER else _given_columns()[given]][item.row] = row
    probabilities = {name: pa.array(values, pa.list_(pa.float32(), CHOICES)) for name, values in columns.items()}
    facts = {name: questions.table.column(name) for name in ("question_id", "image_id", "answer_label", "rationale_label")}
    table = pa.table(facts | probabilities).combine_chunks()
    write_parquet(path, table.schema, table.to_batches())


def _given_columns() -> list[str]:
    return [f"rationale_given_{given}" for given in range(CHOICES)]


def write_submission(path: Path, questions: Questions, items: Sequence[ChoiceToMake], probabilities_N4: NDArray[np.float32]) -> None:
    """The CSV that VCR's leaderboard takes: 20 probabilities for each question. Every answer must have been given."""
    rows: list[Mapping[tuple[int, int], NDArray[np.float32]]] = [{} for _ in range(len(questions))]
    for item, scores in zip(items, probabilities_N4, strict=True):
        rows[item.row][item.kind, item.given] = scores  # type: ignore[index]
    wanted = [(ANSWER, -1), *((RATIONALE, given) for given in range(CHOICES))]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(SUBMISSION_COLUMNS)
    for question_id, row in zip(questions.table.column("question_id").to_pylist(), rows, strict=True):
        writer.writerow([question_id, *(f"{value:.8g}" for key in wanted for value in row[key].tolist())])
    write_atomically(path, text.getvalue())
