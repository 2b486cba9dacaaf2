"""Labelled examples as a Parquet table: one or two texts, up to two images, and what is to be predicted.

One table serves sentences and pairs of them (GLUE), questions about an image (VQA), and statements about one image (SNLI-VE) or two
(NLVR2). What kind of task it is stands in the file's metadata, so that a model is trained and measured without naming the task again.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from megainter.data.tables.parquet import groups, keep_split, open_parquet, parquet_aside, read_table, record_batch, write_batches
from megainter.errors import UsageError

EXAMPLES_SCHEMA = pa.schema(
    [
        ("example_id", pa.string()),
        ("text_a", pa.string()),
        ("text_b", pa.string()),
        ("images", pa.list_(pa.string())),
        ("labels", pa.list_(pa.string())),
        ("targets", pa.list_(pa.float32())),
        ("counts", pa.list_(pa.int16())),
        ("kinds", pa.list_(pa.string())),
        ("group", pa.string()),
        ("split", pa.string()),
    ]
)
MOST_IMAGES = 2
TASK_KEY = b"megainter.task"  # of the Parquet metadata

Problem = Literal["single_label", "multi_label", "regression"]


@dataclass(frozen=True)
class TaskFacts:
    """What all examples of a table have in common.

    ``classes`` are the labels that a model may give, in the order of its logits; none for regression, and none where no example has a
    label, so that there is something to predict and nothing to learn. Labels outside of them are
    allowed where the problem is "multi_label" (rare answers to a question) and count as never given. ``figure`` names the metric by
    which the best model is chosen.
    """

    name: str
    problem: Problem
    classes: tuple[str, ...]
    figure: str


@dataclass(frozen=True)
class Example:
    """One example. ``images`` are ids in a feature store; ``text_b`` is empty where there is one text.

    single_label: one label with target 1. multi_label: labels with soft targets from 0 to 1. regression: no label, one target. Nothing at
    all: not public. ``counts`` say how many annotators gave each label, where scoring needs it (VQA). ``kinds`` are headings under which
    figures are broken down ("question: how many"). Examples of one ``group`` are right together or not at all (NLVR2's consistency).
    """

    example_id: str
    text_a: str
    text_b: str = ""
    images: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    targets: tuple[float, ...] = ()
    counts: tuple[int, ...] = ()
    kinds: tuple[str, ...] = ()
    group: str = ""
    split: str = ""


@dataclass(frozen=True, eq=False)
class Examples:
    """The examples of a file or of one split, kept as Arrow columns, and what they have in common.

    ``images`` is the number of images that every example has; ``digest`` is a SHA-256 over the content, however it is encoded.
    """

    table: pa.Table
    task: TaskFacts
    images: int
    digest: str

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, row: int) -> Example:
        values = self.table.slice(row, 1).to_pylist()
        if not values or row < 0:
            raise IndexError(row)
        return _example(values[0])

    def column(self, name: str) -> list[Any]:
        """A column as Python values."""
        values: list[Any] = self.table.column(name).to_pylist()
        return values

    def take(self, rows: np.ndarray) -> "Examples":
        """Those of some rows, int64 [n]."""
        table = self.table.take(pa.array(rows)).combine_chunks()
        return Examples(table, self.task, self.images, _digest(table, self.task))


def write_examples(path: Path, rows: Iterable[Example], task: TaskFacts, replace: bool = True) -> int:
    """Write examples as they come, atomically, and return how many; ``replace`` as in ``parquet.parquet_aside``.

    ``UsageError`` for one that cannot be read back, or an id that repeats.
    """
    _check_task(path, task)
    known, count, seen = frozenset(task.classes), 0, set[str]()
    schema = EXAMPLES_SCHEMA.with_metadata({TASK_KEY: json.dumps(asdict(task))})

    def batches() -> Iterator[pa.RecordBatch]:
        nonlocal count
        for examples in groups(rows):
            for example in examples:
                if problem := example_problem(example, task, known):
                    raise UsageError(f"{path}: example {example.example_id!r} {problem}")
                if example.example_id in seen:
                    raise UsageError(f"{path}: example id {example.example_id!r} comes twice; ids must be unique")
                seen.add(example.example_id)
            count += len(examples)
            columns = [[getattr(example, name) for example in examples] for name in schema.names]
            yield record_batch(path, columns, EXAMPLES_SCHEMA)

    with parquet_aside(path, EXAMPLES_SCHEMA, replace) as partial:
        write_batches(partial, schema, batches())
    return count


def read_examples(path: Path, split: str | None = None) -> Examples:
    """Read a table of examples, or its rows of one split.

    ``UsageError`` for another file, missing values, a split without rows, an id that repeats, labels that do not fit the task, and
    examples of which some have images and others have not.
    """
    task = read_task(path)
    table = keep_split(path, read_table(path, EXAMPLES_SCHEMA), split)
    if pc.count_distinct(table.column("example_id")).as_py() != table.num_rows:
        raise UsageError(f"{path} has an example id that comes twice; ids must be unique")
    known = frozenset(task.classes)
    for batch in table.to_batches():
        for row in batch.to_pylist():
            example = _example(row)
            if problem := example_problem(example, task, known):
                raise UsageError(f"{path}: example {example.example_id!r} {problem}")
    return Examples(table, task, _images_of(path, table), _digest(table, task))


def has_examples(path: Path, split: str) -> bool:
    """Whether a table has rows of ``split``. ``UsageError`` as for reading it."""
    return bool(pc.any(pc.equal(read_table(path, EXAMPLES_SCHEMA).column("split"), split)).as_py())


def read_task(path: Path) -> TaskFacts:
    """What a table's metadata says of its task; ``UsageError`` where it says nothing or something unknown."""
    written = (open_parquet(path).schema_arrow.metadata or {}).get(TASK_KEY)
    if written is None:
        raise UsageError(f"{path} is no table of labelled examples: `megainter prepare examples` writes one")
    try:
        value = json.loads(written)
        task = TaskFacts(str(value["name"]), value["problem"], tuple(map(str, value["classes"])), str(value["figure"]))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise UsageError(f"{path}: its metadata does not describe a task ({error!r}); prepare it again") from None
    _check_task(path, task)
    return task


def _check_task(path: Path, task: TaskFacts) -> None:
    if task.problem not in get_args(Problem):
        raise UsageError(f"{path}: the problem is {task.problem!r}; known are {', '.join(get_args(Problem))}")
    if len(set(task.classes)) != len(task.classes):
        raise UsageError(f"{path}: a class is listed twice among {len(task.classes)}")
    if task.problem == "regression" and task.classes:
        raise UsageError(f"{path}: regression has no classes, and here are {len(task.classes)}")


def example_problem(example: Example, task: TaskFacts, classes: frozenset[str]) -> str | None:
    """Why an example does not fit its task (whose classes are ``classes``), or None where it does."""
    if not example.example_id or not example.text_a:
        return "has no text" if example.example_id else "has no id"
    if len(example.images) > MOST_IMAGES or not all(example.images):
        return f"has the images {example.images}; at most {MOST_IMAGES}, each with an id"
    if not all(math.isfinite(target) for target in example.targets):
        return f"has the targets {example.targets}, which are not all numbers"
    if example.counts and len(example.counts) != len(example.labels):
        return f"has {len(example.counts)} counts for {len(example.labels)} labels"
    if task.problem == "regression":
        wrong = bool(example.labels) or len(example.targets) > 1
        return f"has {len(example.labels)} labels and {len(example.targets)} values; regression has one value" if wrong else None
    if len(example.labels) != len(example.targets) or len(set(example.labels)) != len(example.labels):
        return f"has the labels {example.labels} with {len(example.targets)} targets"
    if task.problem == "single_label":
        wrong = example.targets not in ((), (1.0,)) or not set(example.labels) <= classes
        return f"has the labels {example.labels} with targets {example.targets}; it has one of the classes, or none" if wrong else None
    if example.labels and not classes:
        return f"has the labels {example.labels}, and the table has no classes"
    outside = any(not 0 <= target <= 1 for target in example.targets)
    return f"has the targets {example.targets}; each is from 0 to 1" if outside else None


def _images_of(path: Path, table: pa.Table) -> int:
    counts = pc.value_counts(pc.list_value_length(table.column("images"))).to_pylist()
    if len(counts) > 1:
        found = ", ".join(f"{entry['counts']:,} have {entry['values']}" for entry in sorted(counts, key=lambda entry: entry["values"]))
        raise UsageError(f"{path}: of its examples {found} images; all must have as many: put the others into a table of their own")
    return int(counts[0]["values"])


def _example(row: dict[str, Any]) -> Example:
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in row.items()}
    return Example(**values)


def _digest(table: pa.Table, task: TaskFacts) -> str:
    """SHA-256 over the task and over lengths and values of every column: chunking and encoding do not enter it."""
    total = hashlib.sha256(json.dumps(asdict(task)).encode())
    for name in table.schema.names:
        column = table.column(name)
        total.update(name.encode())
        if pa.types.is_list(column.type):
            total.update(_numbers(pc.list_value_length(column)))
            column = pc.list_flatten(column)
        if pa.types.is_string(column.type):
            total.update(_numbers(pc.binary_length(column)))
            total.update("".join(column.to_pylist()).encode())
        else:
            total.update(_numbers(column))
    return total.hexdigest()


def _numbers(column: Any) -> bytes:
    array = np.asarray(column.to_numpy(), dtype=np.float64)  # exact for lengths, counts and float32 alike
    return array.astype("<f8").tobytes()


def answer_accuracy(count: int, annotators: int = 10) -> float:
    """VQA's accuracy of an answer that ``count`` of the annotators gave: the mean over leaving each of them out of min(others / 3, 1)."""
    left_in, left_out = min(count / 3, 1.0), min((count - 1) / 3, 1.0) if count else 0.0
    return (count * left_out + (annotators - count) * left_in) / annotators
