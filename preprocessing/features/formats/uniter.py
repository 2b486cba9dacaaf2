"""UNITER's features: a folder of .npz files, or an LMDB of them as they are or in msgpack. Boxes are shares of an image of unknown size.

Arrays: ``norm_bb`` [n, 6] (x1, y1, x2, y2, w, h), ``features`` [n, F], ``conf`` [n, 1], ``soft_labels`` [n, C] with background first.
"""

import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megainter.data.feature_store.record import RegionRecord, StoreSchema
from megainter.files import write_json
from preprocessing.features.formats import lmdb_file
from preprocessing.features.formats.entry import BadEntryError, Entry, ForeignRegions, Source, column, optional, region_count, rows
from preprocessing.features.formats.msgpack_arrays import pack, unpack
from preprocessing.features.formats.npz import npz_source, read_npz
from preprocessing.features.formats.tsv import labels

INDEX_KEY = b"__keys__"
ARRAYS = ("norm_bb", "features", "conf", "soft_labels")
SUFFIX = ".npz"  # of the keys, which are file names
id_problem = partial(lmdb_file.id_problem, suffix=SUFFIX, reserved=INDEX_KEY.decode())


def read_lmdb(path: Path) -> Source:
    """The LMDB of ``path`` (``feat_th0.2_max100_min10`` and the like, compressed or not); ids are its keys without ".npz"."""
    source = lmdb_file.lmdb_source(path, INDEX_KEY, _decode)
    return Source(source.total, source.unit, partial(_named, source))


def read_npz_folder(path: Path) -> Source:
    """The .npz files of UNITER's extraction."""
    return npz_source(path, _from_npz)


def _named(source: Source) -> Iterator[Entry]:
    for entry in source.entries():
        yield Entry(entry.where, entry.image_id.removesuffix(SUFFIX), entry.size, entry.load)


def _decode(data: bytes) -> ForeignRegions:
    if data.startswith(b"PK"):
        return _from_npz(data)
    value = unpack(data)
    if not isinstance(value, dict):
        raise BadEntryError("it is not a dict of arrays")
    return _regions({key.decode(errors="replace"): item for key, item in value.items() if isinstance(key, bytes)})


def _from_npz(file: BinaryIO | bytes) -> ForeignRegions:
    return _regions(read_npz(file, ARRAYS))


def _regions(arrays: Mapping[str, Any]) -> ForeignRegions:
    features = arrays.get("features")
    n = region_count(len(features) if isinstance(features, np.ndarray) and features.ndim else 0)
    boxes = rows(arrays.get("norm_bb"), n, "norm_bb")[:, :4]
    found, left_out = optional(arrays, ("soft_labels",), lambda value, name: rows(value, n, name))
    confidences, bad = optional(arrays, ("conf",), lambda value, name: column(value, n, name))
    extras = {"objects_conf": confidences["conf"]} if confidences else {}
    return ForeignRegions(
        boxes, rows(features, n, "features"), probs=found.get("soft_labels"), extras=extras, normalised=True, left_out=left_out | bad
    )


def write_lmdb(records: Iterator[tuple[str, RegionRecord]], schema: StoreSchema, destination: Path) -> None:
    """``destination``/feat_th0.2_max100_min10 and its nbb_*.json, named after the box limits the store was extracted with."""
    limits = f"th0.2_max{schema.settings.get('max_boxes', 100)}_min{schema.settings.get('min_boxes', 10)}"
    counts: dict[str, int] = {}
    destination.mkdir()
    lmdb_file.write_lmdb(destination / f"feat_{limits}", _items(records, counts))
    write_json(destination / f"nbb_{limits}.json", counts)


def _items(records: Iterator[tuple[str, RegionRecord]], counts: dict[str, int]) -> Iterator[tuple[bytes, bytes]]:
    for image_id, record in records:
        name = image_id + SUFFIX
        counts[name] = len(record)
        yield name.encode(), pack(_arrays(record))
    yield INDEX_KEY, json.dumps(list(counts)).encode()


def _arrays(record: RegionRecord) -> dict[str, np.ndarray]:
    corners = record.boxes / np.array([record.width, record.height] * 2, np.float32)
    sides = corners[:, 2:] - corners[:, :2]
    arrays = (np.hstack([corners, sides]), record.features, labels(record)["objects_conf"][:, None], record.class_probs)
    return {name: array.astype("<f2") for name, array in zip(ARRAYS, arrays, strict=True)}
