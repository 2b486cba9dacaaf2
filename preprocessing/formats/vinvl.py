"""VinVL's TSV of predictions: an image key and JSON. Neither says how large the image is; classes are spelled out.

Two kinds of JSON: {"objects": [{"rect", "class", "conf", "feature"}, ...]}, and Oscar's {"num_boxes", "features"} with the six numbers of
the position (shares of the image) behind each feature.
"""

import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from preprocessing.formats.entry import BadEntryError, Entry, Regions, Source, from_base64, region_count, unusable
from preprocessing.formats.tsv import lines

POSITION = 6  # x1, y1, x2, y2, w, h behind Oscar's features


def read(path: Path) -> Source:
    """A ``predictions.tsv`` or Oscar's ``features.tsv``."""
    return Source(path.stat().st_size, "bytes", partial(_entries, path))


def _entries(path: Path) -> Iterator[Entry]:
    for where, size, line in lines(path):
        key, tab, text = (line or b"").partition(b"\t")
        if not tab:
            yield unusable(where, size, "it is not a key and JSON")
            continue
        yield Entry(where, key.decode(errors="surrogateescape"), size, partial(_load, text))


def _load(text: bytes) -> Regions:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadEntryError(f"its JSON is not whole: {error}") from None
    try:
        return _from_oscar(value) if "num_boxes" in value else _from_objects(value["objects"])
    except (KeyError, TypeError, ValueError) as error:
        raise BadEntryError(f"its JSON is not VinVL's: {error}") from None


def _from_objects(objects: list[Mapping[str, Any]]) -> Regions:
    region_count(len(objects))
    boxes = np.array([item["rect"] for item in objects], np.float32)
    features = [from_base64(item["feature"], "<f4", 1, "feature")[0] for item in objects]
    if boxes.shape != (len(objects), 4) or len({len(feature) for feature in features}) != 1:
        raise BadEntryError("its boxes or features are not of one size")
    extras = {"objects_conf": np.array([float(item["conf"]) for item in objects], np.float32)}
    return Regions(boxes, np.stack(features), extras=extras, names=tuple(str(item["class"]) for item in objects))


def _from_oscar(value: Mapping[str, Any]) -> Regions:
    both = from_base64(value["features"], "<f4", region_count(value["num_boxes"]), "features")
    if both.shape[1] <= POSITION:
        raise BadEntryError(f"its features have {both.shape[1]} numbers")
    return Regions(both[:, -POSITION:-2], both[:, :-POSITION], normalised=True)
