"""Questions of VCR (visualcommonsense.com) as a Parquet table: a question, four answers, four rationales, and the objects they point at.

A token is a word, or a tuple of indices into the image's objects: what VCR writes as ["Is", [0, 1], "happy"] stays so, because the objects'
names alone do not say which of three persons is meant.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow as pa

from megainter.data.tables.parquet import groups, keep_split, parquet_aside, read_table, record_batch, write_batches
from megainter.errors import UsageError

CHOICES = 4
_TOKENS = pa.list_(pa.struct([("word", pa.string()), ("objects", pa.list_(pa.int16()))]))
QUESTIONS_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("question_id", "image_id", "image", "metadata", "split")),
        ("objects", pa.list_(pa.string())),
        ("question", _TOKENS),
        ("answers", pa.list_(_TOKENS)),
        ("rationales", pa.list_(_TOKENS)),
        ("answer_label", pa.int8()),
        ("rationale_label", pa.int8()),
    ]
)

Token = str | tuple[int, ...]
Tokens = tuple[Token, ...]


@dataclass(frozen=True)
class Question:
    """One question about one image. ``image`` and ``metadata`` (the annotated boxes' JSON) are relative to the images folder.

    ``objects`` are the class names of the annotated objects, in the order of their boxes; labels are 0-3, or -1 where they are not public.
    """

    question_id: str
    image_id: str
    image: str
    metadata: str
    split: str
    objects: tuple[str, ...]
    question: Tokens
    answers: tuple[Tokens, ...]
    rationales: tuple[Tokens, ...]
    answer_label: int = -1
    rationale_label: int = -1


@dataclass(frozen=True, eq=False)
class Questions:
    """Questions of a file or of one split, kept as Arrow columns; ``questions[row]`` is one."""

    table: pa.Table

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, row: int) -> Question:
        values = self.table.slice(row, 1).to_pylist()
        if not values or row < 0:
            raise IndexError(row)
        return _question(values[0])


def write_questions(path: Path, rows: Iterable[Question], replace: bool = True) -> int:
    """Write questions as they come, atomically, and return how many. ``UsageError`` for a row that cannot be read back.

    ``replace`` as in ``parquet.parquet_aside``.
    """
    count = 0

    def batches() -> Iterator[pa.RecordBatch]:
        nonlocal count
        for questions in groups(rows):
            for question in questions:
                check_question(question)
            count += len(questions)
            columns = [[_cell(question, name) for question in questions] for name in QUESTIONS_SCHEMA.names]
            yield record_batch(path, columns, QUESTIONS_SCHEMA)

    with parquet_aside(path, QUESTIONS_SCHEMA, replace) as partial:
        write_batches(partial, QUESTIONS_SCHEMA, batches())
    return count


def read_questions(path: Path, split: str | None = None) -> Questions:
    """Read a file of questions, or its rows of one split. ``UsageError`` for another file or a split without rows."""
    return Questions(keep_split(path, read_table(path, QUESTIONS_SCHEMA), split))


def check_question(question: Question) -> None:
    """``UsageError`` where it has not four choices of each, a label is none of them, or a token points at no object."""
    where = f"question {question.question_id!r}"
    if {len(question.answers), len(question.rationales)} != {CHOICES}:
        raise UsageError(f"{where} has {len(question.answers)} answers and {len(question.rationales)} rationales, not {CHOICES} of each")
    if not -1 <= min(question.answer_label, question.rationale_label) <= max(question.answer_label, question.rationale_label) < CHOICES:
        raise UsageError(f"{where} has the labels {question.answer_label} and {question.rationale_label}, which are not 0 to {CHOICES - 1}")
    for tokens in (question.question, *question.answers, *question.rationales):
        for token in tokens:
            if not token or (isinstance(token, tuple) and not 0 <= min(token) <= max(token) < len(question.objects)):
                raise UsageError(f"{where} has the token {token!r}, with {len(question.objects)} objects")


def _cell(question: Question, name: str) -> Any:
    value = getattr(question, name)
    if name == "question":
        return _as_structs(value)
    return [_as_structs(tokens) for tokens in value] if name in ("answers", "rationales") else value


def _as_structs(tokens: Tokens) -> list[dict[str, Any]]:
    return [{"word": token, "objects": []} if isinstance(token, str) else {"word": "", "objects": token} for token in tokens]


def _question(row: dict[str, Any]) -> Question:
    row["objects"], row["question"] = tuple(row["objects"]), _as_tokens(row["question"])
    for name in ("answers", "rationales"):
        row[name] = tuple(_as_tokens(tokens) for tokens in row[name])
    return Question(**{field.name: row[field.name] for field in fields(Question)})


def _as_tokens(structs: list[dict[str, Any]]) -> Tokens:
    return tuple(tuple(struct["objects"]) if struct["objects"] else struct["word"] for struct in structs)
