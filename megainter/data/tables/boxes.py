"""Labelled boxes of images, one Parquet row for each image."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from megainter.data.tables.parquet import (
    groups,
    keep_split,
    open_parquet,
    parquet_aside,
    read_table,
    record_batch,
    refuse_escaping_paths,
    write_batches,
)
from megainter.errors import UsageError

BOXES_SCHEMA = pa.schema(
    [
        ("image_id", pa.string()),
        ("image", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("boxes", pa.list_(pa.list_(pa.float32()))),
        ("labels", pa.list_(pa.string())),
        ("split", pa.string()),
    ]
)
BOX_TOLERANCE = 1.0  # pixels a box may stand out of its image: annotators count the last pixel in or out


@dataclass(frozen=True, eq=False)
class ImageBoxes:
    """The labelled boxes of one image: ``boxes`` float32 [n, 4], xyxy in pixels of a ``width`` x ``height`` frame."""

    image_id: str
    image: str
    width: int
    height: int
    boxes: np.ndarray
    labels: list[str]
    split: str = ""


def read_boxes(path: Path, split: str | None = None) -> list[ImageBoxes]:
    """Read a manifest of boxes, or its rows of one split. ``UsageError`` as for pairs, and for boxes outside their image or reversed."""
    table = keep_split(path, read_table(path, BOXES_SCHEMA), split)
    refuse_escaping_paths(path, table)
    images = [_image_boxes(path, row) for batch in table.to_batches() for row in batch.to_pylist()]
    seen: set[str] = set()
    for image in images:
        if image.image_id in seen:
            raise UsageError(f"{path}: image id {image.image_id!r:.80} stands in two rows; image ids must be unique")
        seen.add(image.image_id)
    return images


def write_boxes(path: Path, rows: Iterable[ImageBoxes], replace: bool = True) -> int:
    """Write images with boxes as they come, atomically, and return how many. ``UsageError`` for a bad box.

    ``replace`` as in ``parquet.parquet_aside``.
    """
    count = 0

    def batches() -> Iterator[pa.RecordBatch]:
        nonlocal count
        for images in groups(rows):
            for image in images:
                _check_boxes(path, image)
            columns = [[_cell(image, name) for image in images] for name in BOXES_SCHEMA.names]
            count += len(images)
            yield record_batch(path, columns, BOXES_SCHEMA)

    with parquet_aside(path, BOXES_SCHEMA, replace) as partial:
        write_batches(partial, BOXES_SCHEMA, batches())
    return count


def is_boxes_manifest(path: Path) -> bool:
    """True where the Parquet file has box columns, False where it has captions; ``UsageError`` where it is neither."""
    names = set(open_parquet(path).schema_arrow.names)
    if not names & {"boxes", "caption"}:
        raise UsageError(f"{path} is no manifest: it has columns {', '.join(sorted(names))}, neither 'caption' nor 'boxes'")
    return "boxes" in names


def _cell(image: ImageBoxes, name: str) -> object:
    value = getattr(image, name)
    return value.astype(np.float32).tolist() if name == "boxes" else value


def _image_boxes(path: Path, row: dict) -> ImageBoxes:
    if any(box is None or len(box) != 4 for box in row["boxes"]):
        raise UsageError(f"{path}: image {row['image_id']!r:.80} has a box that is not four numbers")
    row["boxes"] = np.asarray(row["boxes"], np.float32).reshape(-1, 4)
    image = ImageBoxes(**row)
    _check_boxes(path, image)
    return image


def _check_boxes(path: Path, image: ImageBoxes) -> None:
    if problem := box_problem(image):
        raise UsageError(f"{path}: {problem}")


def box_problem(image: ImageBoxes) -> str | None:
    """What is wrong: boxes and labels differ in number, or a box is not xyxy inside its image (often xywh taken for xyxy). Else None."""
    where, boxes = f"image {image.image_id!r:.80}", image.boxes
    if image.width <= 0 or image.height <= 0:
        return f"{where} has size {image.width} x {image.height}"
    if len(boxes) != len(image.labels) or boxes.ndim != 2 or boxes.shape[1] != 4:
        return f"{where} has boxes of shape {boxes.shape} for {len(image.labels)} labels"
    limit = np.array([image.width, image.height] * 2, np.float32) + BOX_TOLERANCE
    bad = ~(np.isfinite(boxes) & (boxes >= -BOX_TOLERANCE) & (boxes <= limit)).all(1) | (boxes[:, 2:] < boxes[:, :2]).any(1)
    if bad.any():
        box = boxes[int(np.argmax(bad))].tolist()
        return f"{where} ({image.width} x {image.height}) has box {box}, which is not x1, y1, x2, y2 inside it"
    return None
