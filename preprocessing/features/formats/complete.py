"""From what a foreign format says of an image to a record of a store; what it does not say is filled in by rules that are stated here.

Image sizes: from a file of sizes, else from the entry, else (for boxes that are shares of the image) a nominal 1024 x 1024, which leaves
relative positions exact. Class probabilities: background moved to column 0, or added with the mass the others leave; of a format that
has only the likeliest class and its confidence, that confidence, the rest spread evenly; of a format without classes, equal ones, from
which nothing can be learnt. Labels of a region that are missing beside others' are -1, their confidence 0.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megainter.data.feature_store.record import EXTRA_DTYPES, RegionRecord
from megainter.errors import UsageError
from preprocessing.features.formats.entry import Background, BadEntryError, ForeignRegions, LabelIds
from preprocessing.prepare.delimited import Fault, delimited_rows, header_cells, shown_names

NOMINAL_SIDE = 1024  # a power of two: shares of it in half precision are exact pixels
SIZES = ("image_id", "width", "height")
BACKGROUND_SHARE = 0.15  # of the labels, from which on number 0 is taken for the background: a class would be a tenth of that at most
VISUAL_GENOME_CLASSES, VISUAL_GENOME_ATTRIBUTES = 1600, 400  # of bottom-up-attention's vocabularies, without background and none


@dataclass(frozen=True)
class Completion:
    """What the user adds: names of the foreground classes, image sizes (width, height) by id, where the background stands.

    ``labels`` is what the first entries show of ids that may count the background (``label_ids``).
    """

    num_classes: int  # with background
    classes: tuple[str, ...] | None = None
    sizes: Mapping[str, tuple[int, int]] | None = None
    background: Background | None = None
    labels: LabelIds = "foreground"


@dataclass(frozen=True)
class Labels:
    """Whether ids count the background, and how that is known, in words."""

    ids: LabelIds
    reason: str


def label_ids(samples: Sequence[ForeignRegions], background: Background | None, classes: int) -> Labels | None:
    """What entries whose format leaves open whether ids count the background show of it; None where the format says so.

    ``background`` is the user's word, ``classes`` the number of classes without it. Where probabilities stand beside ids, these are the
    columns of the largest ones, with or without the background. Where not, an id that only a count with background has tells it, or that
    0 is the commonest of all: of Visual Genome's classes that is none, and of regions that a detector kept, background is the likeliest
    for many.
    """
    regions = [one for one in samples if one.ids_over == "unknown" and "objects_id" in one.extras]
    if not regions:
        return None
    if background is not None:
        return Labels("foreground" if background == "none" else "columns", f"as --background {background} says")
    if any(one.probs is not None for one in regions):
        return _label_ids_by_probs([one for one in regions if one.probs is not None], classes)
    ids = np.concatenate([one.extras["objects_id"] for one in regions])
    none, most = (ids == 0).mean(), np.bincount(ids[(ids >= 0) & (ids <= classes)].astype(np.int64), minlength=1).argmax()
    if ids.max() == classes:
        return Labels("columns", f"as id {classes} is none of {classes:,} classes counted from 0")
    if most == 0 and none >= BACKGROUND_SHARE:
        return Labels("columns", f"as {none:.0%} of the first ones are number 0")
    return Labels("foreground", f"as only {none:.0%} of the first ones are number 0")


def _label_ids_by_probs(regions: Sequence[ForeignRegions], classes: int) -> Labels:
    agree = {"columns": 0, "foreground": 0}
    for one in regions:
        assert one.probs is not None
        ids, counted = one.extras["objects_id"], one.probs.shape[1] == classes + 1
        agree["columns"] += int((ids == one.probs.argmax(1)).sum()) if counted else 0
        agree["foreground"] += int((ids == (one.probs[:, 1:] if counted else one.probs).argmax(1)).sum())
    return Labels("columns" if agree["columns"] > agree["foreground"] else "foreground", "as the probabilities beside them show")


def complete(image_id: str, regions: ForeignRegions, how: Completion) -> RegionRecord:
    """The record of ``regions``; ``BadEntryError`` where they contradict ``how`` or each other."""
    if how.background is not None:
        regions = replace(regions, background=how.background)
    n = len(regions.boxes)
    width, height = _size(image_id, regions, how)
    scale = np.array([width, height] * 2, np.float32) if regions.normalised else np.ones(1, np.float32)
    if regions.boxes.shape != (n, 4) or len(regions.features) != n:
        raise BadEntryError(f"boxes {list(regions.boxes.shape)} and features {list(regions.features.shape)} do not belong together")
    extras = _extras(regions, how)
    probs = _probs(regions, how) if regions.probs is not None else _probs_of_labels(n, extras, how.num_classes)
    return RegionRecord(
        boxes=regions.boxes.astype(np.float32) * scale,
        features=regions.features,
        class_probs=probs,
        width=width,
        height=height,
        extras=extras,
    )


def class_count(regions: ForeignRegions, classes: tuple[str, ...] | None, background: Background | None) -> int:
    """How many classes, background counted, a source has, from one of its entries; Visual Genome's 1,601 where it does not say."""
    if classes is not None:
        return len(classes) + 1
    if regions.probs is None:
        return VISUAL_GENOME_CLASSES + 1
    columns, where = regions.probs.shape[1], background or regions.background
    if where == "unknown" and columns - VISUAL_GENOME_CLASSES not in (0, 1):
        raise UsageError(f"class probabilities have {columns} columns; say with --background whether the background is among them")
    return VISUAL_GENOME_CLASSES + 1 if where == "unknown" else columns + (where == "none")


def _size(image_id: str, regions: ForeignRegions, how: Completion) -> tuple[int, int]:
    if how.sizes is not None and image_id in how.sizes:
        return how.sizes[image_id]
    if regions.width and regions.height:
        return regions.width, regions.height
    if how.sizes is not None:
        raise BadEntryError("its image is not in the file of sizes")
    if not regions.normalised:
        raise BadEntryError("the size of its image is not known; give a file of sizes (--sizes)")
    return NOMINAL_SIDE, NOMINAL_SIDE


def _background(regions: ForeignRegions, how: Completion) -> Background:
    if regions.background != "unknown" or regions.probs is None:
        return regions.background
    return "first" if regions.probs.shape[1] == how.num_classes else "none"


def _probs(regions: ForeignRegions, how: Completion) -> np.ndarray:
    probs, where = np.asarray(regions.probs, np.float32), _background(regions, how)
    if probs.shape[1] != how.num_classes - (where == "none"):
        raise BadEntryError(f"class probabilities have {probs.shape[1]} columns, not {how.num_classes - (where == 'none')}")
    if where == "none":
        return np.hstack([np.maximum(0, 1 - probs.sum(1, keepdims=True)), probs])
    return np.roll(probs, 1, axis=1) if where == "last" else probs


def _probs_of_labels(n: int, extras: Mapping[str, np.ndarray], num_classes: int) -> np.ndarray:
    """[n, C] of the likeliest class and its confidence."""
    if "objects_id" not in extras:
        return np.full((n, num_classes), 1 / num_classes, np.float32)
    ids, values = extras["objects_id"] + 1, np.asarray(extras.get("objects_conf", np.ones(n)), np.float32)
    if ids.min() < 0 or ids.max() >= num_classes or not (values >= 0).all() or values.max() > 1:
        raise BadEntryError(f"its labels are not among the {num_classes - 1:,} classes, or its confidences not between 0 and 1")
    probs = np.repeat((1 - values[:, None]) / (num_classes - 1), num_classes, axis=1)
    probs[np.arange(n), ids] = values
    return probs


def _extras(regions: ForeignRegions, how: Completion) -> dict[str, np.ndarray]:
    """Extras in dtypes of the store; ids over the foreground, -1 for background and for no attribute."""
    extras = {name: value if value.dtype.name in EXTRA_DTYPES else value.astype(_dtype(value)) for name, value in regions.extras.items()}
    if regions.names is not None:
        extras["objects_id"] = _ids_of_names(regions.names, how)
    if (how.labels if regions.ids_over == "unknown" else regions.ids_over) == "columns":
        where = _background(regions, how)
        limits = {"objects_id": how.num_classes - 1, "attrs_id": VISUAL_GENOME_ATTRIBUTES}
        for name in limits.keys() & extras.keys():
            extras[name] = _over_foreground(extras[name], where, limits[name])
    return dict(sorted(extras.items()))


def _over_foreground(ids: np.ndarray, where: Background, none: int) -> np.ndarray:
    if where == "first":
        return ids - 1
    return np.where(ids == none, -1, ids) if where == "last" else ids


def _dtype(value: np.ndarray) -> str:
    return "int64" if value.dtype.kind in "iub" else "float32"


def _ids_of_names(names: tuple[str, ...], how: Completion) -> np.ndarray:
    if how.classes is None:
        raise BadEntryError("its classes are spelled out; give the list of all classes (--classes)")
    known = {name: place for place, name in reversed(list(enumerate(how.classes)))}
    if unknown := set(names) - known.keys():
        raise BadEntryError(f"class {min(unknown)!r:.80} is not in the list of classes")
    return np.array([known[name] for name in names], np.int64)


def read_classes(path: Path) -> tuple[str, ...]:
    """Names of the foreground classes: one per line (of synonyms with commas the first), or JSON with VinVL's ``label_to_idx``."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the list of classes {path} cannot be read: {error}") from None
    if text.lstrip().startswith("{"):
        names = _labelmap(path, text)
    else:
        names = [line.split(",")[0].strip() for line in text.splitlines()]
    if not names or not all(names):
        raise UsageError(f"{path} is no list of classes: it has an empty line or none at all")
    return tuple(names)


def _labelmap(path: Path, text: str) -> list[str]:
    try:
        value = json.loads(text)
        places = value.get("label_to_idx", value)
        return sorted((str(name) for name in places if not str(name).startswith("__")), key=lambda name: int(places[name]))
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        raise UsageError(f"{path} is not VinVL's labelmap: it maps no names to numbers") from None


def read_sizes(path: Path) -> dict[str, tuple[int, int]]:
    """(width, height) by image id from a Parquet, CSV or TSV file with columns image_id, width, height, or from VinVL's hw.tsv."""
    try:
        with open(path, "rb") as file:
            first = file.readline(4096)
        if b"\t" in first and b"{" in first:
            return _hw_tsv(path)
        return _sizes_of_parquet(path) if first.startswith(b"PAR1") else _sizes_of_text(path)
    except (OSError, pa.ArrowException, LookupError, ValueError, TypeError, OverflowError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"{path} gives no image sizes ({reason}); it needs columns image_id, width, height, or be VinVL's hw.tsv"
        ) from None


def _sizes_of_parquet(path: Path) -> dict[str, tuple[int, int]]:
    table = pq.read_table(path, columns=list(SIZES))
    ids = table.column("image_id").cast(pa.string()).to_pylist()
    return dict(zip(ids, zip(*(table.column(name).cast(pa.int64()).to_pylist() for name in SIZES[1:]), strict=True), strict=True))


def _sizes_of_text(path: Path) -> dict[str, tuple[int, int]]:
    """``ValueError`` names the first line that is no row of sizes."""
    sizes = {}
    with open(path, encoding="utf-8-sig", newline="") as file:
        header = file.readline()
        delimiter = max(",\t;", key=header.count)
        names = [name.strip() for name in header_cells(header, delimiter)]
        if missing := [name for name in SIZES if name not in names]:
            raise ValueError(f"no column {', '.join(missing)}; it has {shown_names(names)}")
        key, *sides = map(names.index, SIZES)
        for row in delimited_rows(file, delimiter, len(names), key):
            if isinstance(row, Fault) or len(row.cells) != len(names):
                raise ValueError(f"line {row.number}: {row.reason if isinstance(row, Fault) else f'{len(row.cells)} columns'}")
            sizes[row.cells[key]] = int(row.cells[sides[0]]), int(row.cells[sides[1]])
    return sizes


def _hw_tsv(path: Path) -> dict[str, tuple[int, int]]:
    sizes = {}
    with open(path, encoding="utf-8") as file:
        for line in file:
            key, _, text = line.rstrip("\n").partition("\t")
            value = json.loads(text)
            value = value[0] if isinstance(value, list) else value
            sizes[key] = int(value["width"]), int(value["height"])
    return sizes


def fitted(record: RegionRecord, extras: Mapping[str, str]) -> tuple[RegionRecord, list[str]]:
    """The record with exactly the ``extras`` (dtypes by name) of its store, and the names of those that it lacks or has beyond them."""
    lacking = [name for name in extras if name not in record.extras]
    beyond = [name for name in record.extras if name not in extras]
    if not lacking and not beyond:
        return record, []
    filled = {name: np.full(len(record), -1 if name.endswith("_id") else 0, dtype) for name, dtype in extras.items() if name in lacking}
    kept = {name: value for name, value in record.extras.items() if name in extras}
    return replace(record, extras=dict(sorted((kept | filled).items()))), lacking + beyond
