"""What an evaluation of a classifier finds: figures and predictions."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from megainter.data.tables.labelled import Examples
from megainter.data.tables.parquet import write_parquet
from megainter.tasks.classification.batches import EncodedExamples
from megainter.tasks.classification.metrics import right


@dataclass(frozen=True)
class ClassificationReport:
    """What ``evaluate`` measured, as it stands in the JSON file.

    ``figures`` are those of the task, empty where labels are not public; ``by_kind`` breaks them down by kind of example. ``predictions``
    names the Parquet file beside the JSON, ``submission`` a benchmark's file. ``seconds`` are of this run alone.
    """

    task: str
    figures: dict[str, float]
    by_kind: dict[str, dict[str, float]]
    split: str | None
    count: int
    missing_examples: int
    max_regions: int
    max_text_tokens: int
    precision: str
    model: str
    model_digest: str
    examples: str
    examples_digest: str
    store: str | None
    store_digest: str | None
    device: str
    processes: int
    seconds: float
    predictions: str
    predictions_sha256: str
    submission: str | None


def summary(report: ClassificationReport) -> str:
    """One line for people."""
    values = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in report.figures.items())
    return f"{report.task}, {report.count:,} examples: {values or 'no labels, predictions alone'} ({report.predictions})"


def named_predictions(encoded: EncodedExamples, found_N3: NDArray[np.float32]) -> list[str]:
    """What is predicted of each example: a class, or a value in figures."""
    classes = encoded.labels.classes
    return [classes[int(number)] if classes else f"{number:.6g}" for number in found_N3[:, 0].astype(np.float64)]


def write_predictions(path: Path, examples: Examples, encoded: EncodedExamples, found_N3: NDArray[np.float32]) -> None:
    """One row per example: example_id, prediction (class, or value in figures), score (its probability, or the value), right (0 to 1)."""
    classes, labels, given = encoded.labels.classes, encoded.labels, found_N3[:, 0].astype(np.float64)
    columns = {
        "example_id": examples.table.column("example_id"),
        "prediction": pa.array(named_predictions(encoded, found_N3), pa.string()),
        "score": pa.array(found_N3[:, 1] if classes else found_N3[:, 0], pa.float32()),
        "right": pa.array(np.where(labels.known, right(labels, given), np.nan), pa.float32()),
    }
    table = pa.table(columns).combine_chunks()
    write_parquet(path, table.schema, table.to_batches())
