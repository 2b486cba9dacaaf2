"""ViLBERT's and InterBERT's Conceptual Captions LMDB, as tensorpack's LMDBSerializer wrote it: numbered lists, pickled or in msgpack.

A list is [features, cls_prob, boxes, num_boxes, image_h, image_w, image_id, caption], arrays with or without their shape, background first.
VOLTA's are dicts under the names of its other LMDB.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from preprocessing.features.formats.entry import BadEntryError, Entry, ForeignRegions, Source, integer, region_count, rows, shown, unusable
from preprocessing.features.formats.lmdb_file import ForeignLmdb, image_count
from preprocessing.features.formats.msgpack_arrays import unpack
from preprocessing.features.formats.vilbert_lmdb import array_regions, unpickled

INDEX_KEY = b"__keys__"


def read(path: Path) -> Source:
    """A ``training_feat_*.lmdb`` or ``validation_*.lmdb``; its captions are not read."""
    return Source(image_count(path, INDEX_KEY), "images", partial(_entries, path))


def _entries(path: Path) -> Iterator[Entry]:
    with ForeignLmdb(path) as source:
        for key in source.all_keys():
            where = f"key {key.decode(errors='backslashreplace')!r:.80}"
            try:
                row = datapoint(source.get(key)) if key != INDEX_KEY else []
                if isinstance(row, dict):
                    yield Entry(where, _text(row.get("img_id", row.get("image_id", ""))), 1, partial(array_regions, row))
                elif row:
                    yield Entry(where, _text(row[6]), 1, partial(_regions, row))
            except BadEntryError as error:
                yield unusable(where, 1, str(error))


def datapoint(data: bytes) -> list[Any] | dict[str, Any]:
    """The list of eight, or VOLTA's dict, in ``data``; pickles of protocol 2 and later begin with what is an empty dict in msgpack."""
    value = unpickled(data) if data[:1] == b"\x80" else unpack(data)
    if isinstance(value, dict):
        return {_text(name): item for name, item in value.items()}
    if not isinstance(value, list | tuple) or len(value) != 8:
        raise BadEntryError("it is neither a list of eight nor a dict")
    return list(value)


def _text(value: Any) -> str:
    if not isinstance(value, bytes | str | int | float | np.number):
        raise BadEntryError(f"its id is {shown(value)}")
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _regions(row: list[Any]) -> ForeignRegions:
    n = region_count(row[3])
    features, probs, boxes = (rows(row[at], n, what) for at, what in enumerate(("features", "cls_prob", "boxes")))
    return ForeignRegions(boxes, features, integer(row[5], "image_w"), integer(row[4], "image_h"), probs)
