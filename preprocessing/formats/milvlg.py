"""The .npz files of MILVLG's bottom-up-attention.pytorch: features, boxes, sizes, and labels in a pickled dict."""

from pathlib import Path
from typing import BinaryIO

import numpy as np

from preprocessing.formats.entry import BadEntryError, Regions, Source, column, integer, region_count, rows
from preprocessing.formats.npz import npz_source, read_npz

ARRAYS = ("x", "bbox", "num_bbox", "image_h", "image_w", "info")
LABELS = ("objects_id", "objects_conf", "attrs_id", "attrs_conf")


def read(path: Path) -> Source:
    """Labels and attributes of ``info`` count background and "no attribute": as the first ("caffe" models) unless told otherwise."""
    return npz_source(path, _regions)


def _regions(file: BinaryIO) -> Regions:
    arrays = read_npz(file, ARRAYS)
    n = region_count(arrays.get("num_bbox"))
    info = arrays.get("info") or {}
    if not isinstance(info, dict):
        raise BadEntryError("info is not a dict")
    extras = {name: column(info[name], n, name) for name in LABELS if isinstance(info.get(name), np.ndarray)}
    boxes, features = rows(arrays.get("bbox"), n, "bbox"), rows(arrays.get("x"), n, "x")
    width, height = (integer(arrays.get(f"image_{side}"), f"image_{side}") for side in "wh")
    return Regions(boxes, features, width, height, extras=extras, ids_over="columns")
