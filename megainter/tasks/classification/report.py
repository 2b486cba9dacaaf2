"""What an evaluation of a classifier finds: figures and predictions."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from megainter.data.tables.labelled import Examples
from megainter.errors import UsageError
from megainter.tasks.classification.batches import EncodedExamples
from megainter.tasks.classification.metrics import right


@dataclass(frozen=True)
class ClassificationReport:
    """What ``evaluate`` measured, as it stands in the JSON file.

    ``figures`` are those of the task, empty where labels are not public; ``by_kind`` breaks them down by kind of example. ``predictions``
    names the Parquet file beside the JSON. ``seconds`` are of this run alone.
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


def summary(report: ClassificationReport) -> str:
    """One line for people."""
    values = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in report.figures.items())
    return f"{report.task}, {report.count:,} examples: {values or 'no labels, predictions alone'} ({report.predictions})"


def write_predictions(path: Path, examples: Examples, encoded: EncodedExamples, found_N3: NDArray[np.float32]) -> None:
    """One row per example: example_id, prediction (class, or value in figures), score (its probability, or the value), right (0 to 1)."""
    classes, labels, given = encoded.labels.classes, encoded.labels, found_N3[:, 0].astype(np.float64)
    names = [classes[int(number)] for number in given] if classes else [f"{value:.6g}" for value in given]
    columns = {
        "example_id": examples.table.column("example_id"),
        "prediction": pa.array(names, pa.string()),
        "score": pa.array(found_N3[:, 1] if classes else found_N3[:, 0], pa.float32()),
        "right": pa.array(np.where(labels.known, right(labels, given), np.nan), pa.float32()),
    }
    try:
        pq.write_table(pa.table(columns), path, compression="zstd")
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror or error}") from None
