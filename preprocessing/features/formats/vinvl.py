"""VinVL's TSVs: an image key, and what there is of its regions. Few say how large the image is.

Predictions are JSON, {"objects": [{"rect", "class", "conf", "feature"}, ...]} or the list alone, with classes spelled out. The features
that Oscar trains on have the six numbers of the position (shares of the image) behind each: as JSON, {"num_boxes", "features"}, or (as
released for retrieval, VQA and pretraining) in two more columns, the number of regions and their features in base64.
"""

import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from preprocessing.features.formats.entry import BadEntryError, Entry, ForeignRegions, Source, from_base64, integer, region_count, unusable
from preprocessing.features.formats.tsv import lines

POSITION = 6  # x1, y1, x2, y2, w, h behind Oscar's features
MANY_DIGITS = 100  # of base64: one region with a feature has more


def read(path: Path) -> Source:
    """A ``predictions.tsv``, or Oscar's ``features.tsv`` in either form."""
    return Source(path.stat().st_size, "bytes", partial(_entries, path))


def is_row(line: bytes) -> bool:
    """Whether a line can be of such a file."""
    cells = line.split(b"\t")
    if len(cells) == 2:
        return cells[1].lstrip()[:1] == b"{" or cells[1].lstrip()[:2] in (b"[{", b"[]")
    return len(cells) == 3 and cells[1].strip().isdigit() and len(cells[2].strip()) > MANY_DIGITS


def _entries(path: Path) -> Iterator[Entry]:
    for where, size, line in lines(path):
        key, *cells = (line or b"").split(b"\t")
        if len(cells) not in (1, 2):
            yield unusable(where, size, "it is not a key and JSON, nor a key, a number and features")
            continue
        load = partial(_load, cells[0]) if len(cells) == 1 else partial(_positioned, cells[0].strip(), cells[1].strip())
        yield Entry(where, key.decode(errors="surrogateescape"), size, load)


def _load(text: bytes) -> ForeignRegions:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadEntryError(f"its JSON is not whole: {error}") from None
    try:
        if "num_boxes" in value:
            return _positioned(value["num_boxes"], value["features"])
        return _from_objects(value, {}) if isinstance(value, list) else _from_objects(value["objects"], value)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise BadEntryError(f"its JSON is not VinVL's: {_missing(error)}") from None


def _missing(error: Exception) -> str:
    return f"no {error}" if isinstance(error, KeyError) else str(error)[:200]


def _from_objects(objects: list[Mapping[str, Any]], whole: Mapping[str, Any]) -> ForeignRegions:
    region_count(len(objects))
    width, height = (integer(whole.get(f"image_{side}", 0), f"image_{side}") for side in "wh")
    boxes = np.array([item["rect"] for item in objects], np.float32)
    features = [from_base64(item["feature"], "<f4", 1, "feature")[0] for item in objects]
    if boxes.shape != (len(objects), 4) or len({len(feature) for feature in features}) != 1:
        raise BadEntryError("its boxes or features are not of one size")
    extras = {"objects_conf": np.array([float(item["conf"]) for item in objects], np.float32)}
    return ForeignRegions(boxes, np.stack(features), width, height, extras=extras, names=tuple(str(item["class"]) for item in objects))


def _positioned(num_boxes: Any, features: Any) -> ForeignRegions:
    return split_position(from_base64(features, "<f4", region_count(num_boxes), "features"))


def split_position(both: np.ndarray) -> ForeignRegions:
    """Features [n, F] and boxes from [n, F + 6]; ``BadEntryError`` where the last six numbers are no position."""
    boxes, sides = both[:, -POSITION:-2], both[:, -2:]
    if (
        both.shape[1] <= POSITION
        or not (np.abs(boxes - 0.5) <= 0.6).all()
        or not (np.abs(boxes[:, 2:] - boxes[:, :2] - sides) < 0.05).all()
    ):
        raise BadEntryError(f"its features have {both.shape[1]} numbers, of which the last {POSITION} are no position in the image")
    return ForeignRegions(boxes, both[:, :-POSITION], normalised=True)
