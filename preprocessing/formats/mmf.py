"""MMF's LMDB: pickled dicts of arrays under their feature's path. Whether probabilities count the background depends on how it was made."""

from pathlib import Path

import numpy as np

from preprocessing.formats.entry import Regions, Source, column, integer, region_count, rows
from preprocessing.formats.lmdb_file import lmdb_source
from preprocessing.formats.vilbert_lmdb import INDEX_KEY, unpickled_dict


def read(path: Path) -> Source:
    """Boxes are ``bbox``; rows beyond ``num_boxes``, which MMF fills with regions of confidence 0, are left out."""
    return lmdb_source(path, INDEX_KEY, _regions)


def _regions(data: bytes) -> Regions:
    row = unpickled_dict(data)
    n = region_count(row.get("num_boxes"))
    boxes, features = rows(row.get("bbox"), n, "bbox"), rows(row.get("features"), n, "features")
    probs = rows(row["cls_prob"], n, "cls_prob") if isinstance(row.get("cls_prob"), np.ndarray) else None
    extras = {"objects_id": column(row["objects"], n, "objects")} if isinstance(row.get("objects"), np.ndarray) else {}
    width, height = (integer(row.get(f"image_{side}"), f"image_{side}") for side in ("width", "height"))
    return Regions(boxes, features, width, height, probs, "unknown", extras, "columns")
