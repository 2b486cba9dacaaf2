"""MMF's LMDB: pickled dicts of arrays under their feature's path.

Whether probabilities count the background depends on how it was made, and whether ``objects`` does, on the version of MMF: both are seen
by comparing the two.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from preprocessing.features.formats.entry import ForeignRegions, Source, column, integer, optional, region_count, rows
from preprocessing.features.formats.lmdb_file import lmdb_source
from preprocessing.features.formats.vilbert_lmdb import INDEX_KEY, unpickled_dict


def read(path: Path) -> Source:
    """Boxes are ``bbox``; rows beyond ``num_boxes``, which MMF fills with regions of confidence 0, are left out."""
    return lmdb_source(path, INDEX_KEY, _regions)


def _regions(data: bytes) -> ForeignRegions:
    row = unpickled_dict(data)
    n = region_count(row.get("num_boxes"))
    boxes, features = rows(row.get("bbox"), n, "bbox"), rows(row.get("features"), n, "features")
    return described(row, n, boxes, features)


def described(info: Mapping[str, Any], n: int, boxes: np.ndarray, features: np.ndarray) -> ForeignRegions:
    """What MMF's dict says of ``n`` regions beside their boxes and features."""
    width, height = (integer(info.get(f"image_{side}") or 0, f"image_{side}") for side in ("width", "height"))
    found, left_out = optional(info, ("cls_prob",), lambda value, name: rows(value, n, name))
    labels, bad = optional(info, ("objects",), lambda value, name: column(value, n, name))
    extras = {"objects_id": labels["objects"]} if labels else {}
    return ForeignRegions(boxes, features, width, height, found.get("cls_prob"), "unknown", extras, "unknown", left_out=left_out | bad)
