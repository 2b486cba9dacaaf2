"""Folders of .npy files: MMF's and Pythia's features beside a dict of what else there is, and vilbert-multi-task's dict of everything.

MMF writes STEM.npy [n, F] and STEM_info.npy; its script for VinVL puts the position behind the features, in both.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from preprocessing.features.formats.entry import BadEntryError, Entry, ForeignRegions, Source, column, integer, optional, region_count, rows
from preprocessing.features.formats.mmf import described
from preprocessing.features.formats.npz import read_npy
from preprocessing.features.formats.vilbert_lmdb import array_regions
from preprocessing.features.formats.vinvl import POSITION

INFO = "_info.npy"


def read(path: Path) -> Source:
    """All .npy files below ``path`` but those of information; ids are their paths in it, without the suffix."""
    files = sorted(file.relative_to(path).as_posix() for file in path.rglob("*.npy") if not file.name.endswith(INFO))
    return Source(len(files), "images", partial(_entries, path, files))


def _entries(folder: Path, files: list[str]) -> Iterator[Entry]:
    for name in files:
        where = name.encode(errors="backslashreplace").decode()
        image_id = name.removesuffix(".npy").encode(errors="surrogateescape").decode(errors="surrogateescape")
        yield Entry(where, image_id, 1, partial(_load, folder / name))


def _load(path: Path) -> ForeignRegions:
    features = _content(path)
    if isinstance(features, dict):
        return array_regions({str(name): value for name, value in features.items()})
    info_path = path.with_name(path.name.removesuffix(".npy") + INFO)
    info = _content(info_path)
    if not isinstance(info, dict) or not isinstance(features, np.ndarray):
        raise BadEntryError(f"it has no dict of boxes in {info_path.name} beside it")
    boxes = info.get("bbox")
    if isinstance(boxes, np.ndarray) and boxes.shape[1:] == (POSITION,):
        return _of_vinvl(info, features)
    n = min(region_count(info.get("num_boxes", len(features))), len(features))
    return described(info, n, rows(info.get("bbox"), n, "bbox"), rows(features, n, "features"))


def _of_vinvl(info: dict[str, Any], features: np.ndarray) -> ForeignRegions:
    n = region_count(len(features))
    boxes, both = rows(info.get("bbox"), n, "bbox"), rows(features, n, "features")
    width, height = (integer(info.get(f"image_{side}") or 0, f"image_{side}") for side in ("width", "height"))
    found, left_out = optional(info, ("scores",), lambda value, name: column(value, n, name))
    extras = {"objects_conf": found["scores"]} if found else {}
    return ForeignRegions(boxes[:, :4], both[:, :-POSITION], width, height, extras=extras, normalised=True, left_out=left_out)


def _content(path: Path) -> Any:
    try:
        with open(path, "rb") as file:
            return read_npy(file, path.name)
    except OSError as error:
        raise BadEntryError(f"{path.name} cannot be read: {error.strerror}") from None
