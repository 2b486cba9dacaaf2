"""LMDBs of pickled dicts: ViLBERT's and InterBERT's for their tasks (a TSV row, still base64) and vilbert-multi-task's (arrays)."""

import pickle
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from megainter.data.record import RegionRecord, StoreSchema
from megainter.errors import MegainterError
from preprocessing.formats import lmdb_file
from preprocessing.formats.entry import BadEntryError, Regions, Source, integer, region_count, rows
from preprocessing.formats.tsv import base64_regions, to_base64
from preprocessing.restricted_pickle import load_restricted

INDEX_KEY = b"keys"
id_problem = partial(lmdb_file.id_problem, reserved=INDEX_KEY.decode())


def read(path: Path) -> Source:
    """Either kind; class probabilities where the dict has ``cls_prob`` (background first)."""
    return lmdb_file.lmdb_source(path, INDEX_KEY, _regions)


def unpickled(data: bytes) -> Any:
    """The object pickled in ``data``, read without running anything; ``BadEntryError`` where it asks for more or is not whole."""
    try:
        return load_restricted(data)
    except MegainterError as error:
        raise BadEntryError(str(error)) from None


def unpickled_dict(data: bytes) -> dict[str, Any]:
    """A pickled dict with text as keys."""
    value = unpickled(data)
    if not isinstance(value, dict):
        raise BadEntryError(f"it is a pickled {type(value).__name__}, not a dict")
    return {key.decode(errors="replace") if isinstance(key, bytes) else str(key): item for key, item in value.items()}


def _regions(data: bytes) -> Regions:
    row = unpickled_dict(data)
    if isinstance(row.get("features"), str | bytes):
        return base64_regions(row)
    n = region_count(row.get("num_boxes"))
    probs = rows(row["cls_prob"], n, "cls_prob") if isinstance(row.get("cls_prob"), np.ndarray) else None
    width, height = (integer(row.get(f"image_{side}"), f"image_{side}") for side in "wh")
    return Regions(rows(row.get("boxes"), n, "boxes"), rows(row.get("features"), n, "features"), width, height, probs)


def write(records: Iterator[tuple[str, RegionRecord]], schema: StoreSchema, destination: Path) -> None:
    """ViLBERT's task LMDB: all values are text, float32 arrays as base64, ``cls_prob`` with background first."""
    lmdb_file.write_lmdb(destination, _items(records))


def _items(records: Iterator[tuple[str, RegionRecord]]) -> Iterator[tuple[bytes, bytes]]:
    ids = []
    for image_id, record in records:
        ids.append(image_id.encode())
        numbers = {"image_id": image_id, "image_w": record.width, "image_h": record.height, "num_boxes": len(record)}
        arrays = {"boxes": record.boxes, "features": record.features, "cls_prob": record.class_probs}
        row = {name: str(value) for name, value in numbers.items()}
        row |= {name: to_base64(value, "<f4").decode() for name, value in arrays.items()}
        yield ids[-1], pickle.dumps(row, protocol=3)
    yield INDEX_KEY, pickle.dumps(ids, protocol=3)
