"""The .npz files of MILVLG's bottom-up-attention.pytorch: features, boxes, sizes, and labels in a pickled dict.

Its extractor has two modes. "caffe" writes the likeliest class and attribute of each region: since September 2020 counted without
background and "no attribute", before that with them as number 0. "d2" writes ``objects`` and ``cls_prob`` of the 1,600 classes, and
attributes as tensors of PyTorch, which are left out.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from preprocessing.detector.restricted_pickle import Foreign
from preprocessing.features.formats.entry import (
    BadEntryError,
    ForeignRegions,
    Source,
    column,
    integer,
    optional,
    refusal,
    region_count,
    rows,
)
from preprocessing.features.formats.npz import npz_source, read_npz

ARRAYS = ("x", "bbox", "num_bbox", "image_h", "image_w")
LABELS = ("objects_id", "objects_conf", "attrs_id", "attrs_conf")


def read(path: Path) -> Source:
    """Whether labels of "caffe" mode count the background is what the first entries show, unless told otherwise."""
    return npz_source(path, _regions)


def _regions(file: BinaryIO) -> ForeignRegions:
    arrays = read_npz(file, ARRAYS)
    info, left_out = _info(file)
    n = region_count(arrays.get("num_bbox"))
    boxes, features = rows(arrays.get("bbox"), n, "bbox"), rows(arrays.get("x"), n, "x")
    width, height = (integer(arrays.get(f"image_{side}", info.get(f"image_{side}", 0)), f"image_{side}") for side in "wh")
    labels, bad_labels = optional(info, (*LABELS, "attrs_scores"), partial(column_of, n))
    whole, bad = optional(info, ("cls_prob", "objects"), lambda value, name: rows(value, n, name))
    if "objects" in whole or "cls_prob" in whole:
        return _of_d2(ForeignRegions(boxes, features, width, height, extras=labels, left_out=left_out | bad | bad_labels), whole)
    return ForeignRegions(boxes, features, width, height, extras=labels, ids_over="unknown", left_out=left_out | bad | bad_labels)


def column_of(count: int, value: Any, what: str) -> np.ndarray:
    """``entry.column`` of a member that is there to be one number a region."""
    if isinstance(value, Foreign):
        raise BadEntryError(refusal(value, what))
    if not isinstance(value, np.ndarray):
        raise BadEntryError(f"{what} is a {type(value).__name__}, not an array")
    return column(value, count, what)


def _info(file: BinaryIO) -> tuple[Mapping[str, Any], dict[str, str]]:
    """The dict of labels, or an empty one and why it cannot be used."""
    try:
        info = read_npz(file, ("info",)).get("info")
    except BadEntryError as error:
        return {}, {"info": str(error)}
    if isinstance(info, dict):
        return info, {str(name): refusal(value, str(name)) for name, value in info.items() if isinstance(value, Foreign)}
    if isinstance(info, Foreign):
        return {}, {"info": refusal(info, "info")}
    return {}, {} if info is None else {"info": f"info is a {type(info).__name__}, not a dict"}


def _of_d2(regions: ForeignRegions, whole: Mapping[str, np.ndarray]) -> ForeignRegions:
    """Classes counted without background, which given boxes may have as the last one."""
    probs = whole.get("cls_prob")
    count = probs.shape[1] if probs is not None else None
    extras = dict(regions.extras)
    if "objects" in whole and whole["objects"].shape[1] == 1:
        ids = whole["objects"][:, 0].astype(np.int64)
        extras["objects_id"] = ids if count is None else np.where(ids >= count, -1, ids)
    return replace(regions, probs=probs, background="none", extras=extras)
