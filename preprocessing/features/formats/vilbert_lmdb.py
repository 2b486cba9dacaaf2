"""LMDBs of pickled dicts: ViLBERT's and InterBERT's for their tasks (a row of TSV), vilbert-multi-task's and VOLTA's (arrays)."""

import pickle
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from megainter.data.feature_store.record import RegionRecord, StoreSchema
from megainter.errors import MegainterError
from preprocessing.detector.restricted_pickle import Foreign, load_restricted
from preprocessing.features.formats import lmdb_file
from preprocessing.features.formats.entry import BadEntryError, ForeignRegions, Source, column, integer, optional, region_count, rows
from preprocessing.features.formats.tsv import base64_regions, to_base64

INDEX_KEY = b"keys"
VOLTA_LABELS = MappingProxyType({"obj_id": "objects_id", "obj_conf": "objects_conf", "attr_id": "attrs_id", "attr_conf": "attrs_conf"})
id_problem = partial(lmdb_file.id_problem, reserved=INDEX_KEY.decode())


def read(path: Path) -> Source:
    """Any of these; class probabilities where the dict has ``cls_prob`` (background first)."""
    return lmdb_file.lmdb_source(path, INDEX_KEY, _regions)


def unpickled(data: bytes, stand_in: bool = False) -> Any:
    """The object pickled in ``data``, read without running anything; ``BadEntryError`` where it asks for more or is not whole.

    With ``stand_in``, what is no plain data becomes a ``Foreign``.
    """
    try:
        return load_restricted(data, stand_in=stand_in)
    except MegainterError as error:
        raise BadEntryError(str(error)) from None


def unpickled_dict(data: bytes) -> dict[str, Any]:
    """A pickled dict with text as keys; what is no plain data in it is a ``Foreign``."""
    value = unpickled(data, stand_in=True)
    if isinstance(value, Foreign):
        raise BadEntryError(f"it is refused: its pickle asks for {value.name}, which is not plain data; nothing of it was run")
    if not isinstance(value, dict):
        raise BadEntryError(f"it is a pickled {type(value).__name__}, not a dict")
    return {key.decode(errors="replace") if isinstance(key, bytes) else str(key): item for key, item in value.items()}


def _regions(data: bytes) -> ForeignRegions:
    row = unpickled_dict(data)
    if isinstance(row.get("features"), str | bytes):
        return base64_regions(row)
    return array_regions(row)


def array_regions(row: Mapping[str, Any]) -> ForeignRegions:
    """Regions of a dict of arrays: vilbert-multi-task's, or VOLTA's, which counts nothing and has labels without background."""
    features = row.get("features")
    n = region_count(row.get("num_boxes", len(features) if isinstance(features, np.ndarray) and features.ndim == 2 else None))
    width, height = (integer(row.get(f"image_{side}", row.get(f"img_{side}", 0)), f"image_{side}") for side in "wh")
    found, left_out = optional(row, ("cls_prob",), lambda value, name: rows(value, n, name))
    labels, bad = optional(row, VOLTA_LABELS, lambda value, name: column(value, n, name))
    extras = {VOLTA_LABELS[name]: values for name, values in labels.items()}
    boxes, features = rows(row.get("boxes"), n, "boxes"), rows(features, n, "features")
    return ForeignRegions(boxes, features, width, height, found.get("cls_prob"), extras=extras, left_out=left_out | bad)


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
