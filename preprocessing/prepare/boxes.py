"""`megainter prepare boxes`: labelled boxes of photos as a manifest that a detector learns from, and that `extract --boxes` takes.

COCO's instances_*.json, which most annotation tools write, or JSON Lines of our own.
"""

import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megainter.data.image_ids import renamer
from megainter.data.tables.boxes import BOX_TOLERANCE, ImageBoxes, box_problem, write_boxes
from megainter.data.tables.parquet import SPLITS, check_relative
from megainter.errors import UsageError
from megainter.files import read_json
from megainter.paths import require_file
from preprocessing.prepare.caption_sources.annotations import coco_paths
from preprocessing.prepare.finding import Finder
from preprocessing.prepare.kinds import BOXES, refuse_another_kind
from preprocessing.prepare.reading import (
    NOT_ITS_FORM,
    Reading,
    Unusable,
    has_id,
    json_object,
    parsed,
    read_lines,
    shown,
    split_in_name,
    split_name,
    text,
    texts,
)
from preprocessing.prepare.report import MALFORMED, OTHER_SPLIT, Report, checked, publish, refuse_overwriting
from preprocessing.prepare.splits import Shares, Splitting

CROWD, EMPTY = "box around a crowd", "box without area"
REACH = 0.1  # of lines of our own, where a box farther out is often x, y, width, height taken for two corners

Format = Literal["coco", "jsonl"]


@dataclass(frozen=True)
class Labelled:
    """The boxes of one image as a source gives them; ``image.image_id`` is empty where it is to be made of the path.

    ``where`` is the number of the line or entry, ``paths`` are places to look for the image, best first; ``reach`` is how far over the
    edge a box may be, as a share of the image's side, and still be meant.
    """

    where: int
    paths: tuple[str, ...]
    image: ImageBoxes
    crowds: int = 0
    reach: float = REACH


@dataclass
class _Annotations:
    """What COCO says of one image: boxes as x, y, width, height in pixels."""

    boxes: list[list[float]] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    crowds: int = 0


def prepare_boxes(
    src: Path,
    output: Path,
    *,
    source: Format = "coco",
    images: Path | None = None,
    split: str | None = None,
    shares: Shares | None = None,
    ids: str | None = None,
    max_bad: float = 0.01,
    encoding: str | None = None,
    similar_names: bool = False,
    replace_table: bool = True,
) -> Report:
    """Write the manifest of boxes ``output`` from ``src``, print a report and write it to ``output``.report.json.

    ``images``: drop images that are not in that folder. ``split`` and ``shares`` as for captions; the same shares and seed give an image
    the same split in both. ``ids``: how an image's id is made of the usual one. Boxes are cut at the image's edge, of lines of our own if
    they are a tenth of its side over it at most; images without boxes stay, crowds are left out, and so is every box that is no box or
    not in the image.

    Raises ``UsageError`` (missing file, another format, an image that comes twice, nothing kept) and ``TooManyBadInputsError`` where more
    than ``max_bad`` of the boxes, and more than one line, are malformed or without image; then nothing is written. ``encoding``,
    ``similar_names`` and ``replace_table`` as for captions.
    """
    require_file(src)
    splitting, find = Splitting(split, shares), Finder(images, similar_names)
    refuse_overwriting(output, src)
    refuse_another_kind(src, "json" if source == "coco" else source, BOXES)
    if encoding is not None and source == "coco":
        raise UsageError("COCO's JSON is always UTF-8; --encoding is for --format jsonl")
    reading: Reading[Labelled] = _coco(src) if source == "coco" else read_lines(src, _line, encoding, asks_encoding=True)
    rename = renamer(ids) if ids is not None else str
    report, items = Report(place=reading.place), shown(reading, src)
    cut = list[str]()
    rows = _rows(src, items, report, find, splitting, cut, rename)
    write_boxes(output, checked(rows, report, src, output, max_bad, "boxes", images), replace_table)
    notes = [f"note: {len(cut):,} boxes were cut at the image's edge, first of image {cut[0]}"] if cut else []
    find.enter(report)
    publish(report, src, output, "boxes", *notes, *find.notes(), *splitting.notes(report))
    return report


def _rows(
    src: Path,
    items: Iterator[Labelled | Unusable],
    report: Report,
    find: Finder,
    splitting: Splitting,
    cut: list[str],
    rename: Callable[[str], str],
) -> Iterator[ImageBoxes]:
    """The images that can be used, each once; ``cut`` takes the image of each box that is cut."""
    seen = dict[str, int]()
    for item in items:
        if isinstance(item, Unusable):
            report.drop(item.kind, f"{item.where}: {item.reason}", item.count)
        elif problem := box_problem(replace(item.image, image_id=_name(item), boxes=np.zeros_like(item.image.boxes))):
            report.drop(MALFORMED, f"{item.where}: {problem}", max(1, len(item.image.boxes)))
        elif not splitting.keeps(item.image.split):
            report.drop(OTHER_SPLIT, f"{item.where}: {item.image.split}", max(1, len(item.image.boxes)))
        elif (path := find(item.paths)) is None:
            reason, words = find.missing(item.paths)
            report.drop(reason, f"{item.where}: {words}", max(1, len(item.image.boxes)))
        else:
            try:
                image_id = rename(item.image.image_id or os.path.splitext(path)[0])
            except ValueError as error:
                report.drop(MALFORMED, f"{item.where}: {error}", max(1, len(item.image.boxes)))
                continue
            _refuse_repeated(src, image_id, item.where, seen, report.place)
            image = replace(item.image, image_id=image_id, image=path, split=splitting.of(item.image.split, image_id))
            yield _counted(item, image, report, cut)


def _refuse_repeated(src: Path, image_id: str, where: int, seen: dict[str, int], place: str) -> None:
    first = seen.setdefault(image_id, where)
    if first != where:
        again = f"image {image_id!r:.80} comes in {place} {first} and again in {place} {where}"
        raise UsageError(f"{src}: {again}; put all boxes of an image into one {place}")


def _name(item: Labelled) -> str:
    return item.image.image_id or os.path.splitext(item.paths[0])[0]


def _counted(item: Labelled, image: ImageBoxes, report: Report, cut: list[str]) -> ImageBoxes:
    """The image with its boxes inside it, those that are none or without area left out, and all of them counted."""
    size = np.array([image.width, image.height] * 2, np.float32)
    bad = _unusable(image, item.reach)
    for place in np.flatnonzero(bad):
        only = replace(image, boxes=image.boxes[place : place + 1], labels=image.labels[place : place + 1])
        report.drop(MALFORMED, f"{item.where}: {box_problem(only) or f'image {image.image_id!r:.80} has a box outside it'}")
    boxes = image.boxes.clip(0, size)
    solid: np.ndarray = np.all(boxes[:, 2:] > boxes[:, :2], axis=1) & ~bad
    cut += [repr(image.image_id)] * int((solid & (np.abs(boxes - image.boxes) > BOX_TOLERANCE).any(1)).sum())
    for reason, count in ((EMPTY, int((~solid & ~bad).sum())), (CROWD, item.crowds)):
        if count:
            report.drop(reason, f"{item.where}: {image.image!r:.80}", count)
    report.images += 1
    report.keep(image.split, int(solid.sum()))
    return replace(image, boxes=boxes[solid], labels=[label for label, kept in zip(image.labels, solid, strict=True) if kept])


def _unusable(image: ImageBoxes, reach: float) -> np.ndarray:
    """bool [n]: boxes that are no two corners, wholly outside the image, or farther over its edge than ``reach`` of its sides."""
    size, boxes = np.array([image.width, image.height] * 2, np.float32), image.boxes
    with np.errstate(invalid="ignore"):
        over = np.maximum(np.maximum(-boxes, boxes - size), 0)
        outside = (boxes[:, 2:] < 0).any(1) | (boxes[:, :2] > size[:2]).any(1)
        far = (over > np.maximum(BOX_TOLERANCE, reach * size)).any(1)
        inverted = (boxes[:, 2:] < boxes[:, :2]).any(1)
    return ~np.isfinite(boxes).all(1) | outside | far | inverted


def _line(number: int, line: str) -> Labelled:
    """``{"image", "width", "height", "boxes": [[x1, y1, x2, y2]], "labels"}``, optionally "image_id", "split"."""
    value = json_object(line)
    if "boxes" not in value:
        raise ValueError("no field 'boxes'")
    split = split_name(text(value, "split", "") if value.get("split") is not None else "")
    image_id = text(value, "image_id") if value.get("image_id") is not None else ""
    return _labelled(number, (text(value, "image"),), value, value["boxes"], texts(value, "labels"), image_id, split)


def _labelled(
    number: int,
    paths: tuple[str, ...],
    value: dict[str, Any],
    boxes: Any,
    labels: list[str],
    image_id: str,
    split: str,
    crowds: int = 0,
    reach: float = REACH,
) -> Labelled:
    """``ValueError`` says what is wrong with it."""
    for path in paths:
        if reason := check_relative(path):
            raise ValueError(f"image {path!r:.80} {reason}")
    if split not in SPLITS:
        raise ValueError(f"split {split!r:.80} is not train, val or test")
    width, height = (int(text(value, name)) for name in ("width", "height"))
    image = ImageBoxes(image_id=image_id, image=paths[0], width=width, height=height, boxes=_numbers(boxes), labels=labels, split=split)
    return Labelled(number, paths, image, crowds, reach)


def _numbers(boxes: Any) -> np.ndarray:
    """Boxes as float32 [n,4]; ``ValueError`` where they are not lists of four numbers."""
    try:
        found = np.array(boxes, np.float32)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"boxes {boxes!r:.80} are not lists of four numbers") from None
    if found.size == 0:
        return np.zeros((0, 4), np.float32)
    if found.ndim != 2 or found.shape[1] != 4:
        raise ValueError(f"boxes {boxes!r:.80} are not lists of four numbers")
    return found


def _coco(src: Path) -> Reading[Labelled]:
    """COCO's instances as images with their boxes; the document has to be read whole, as its parts stand in any order."""
    document = read_json(src)
    parts = [document.get(name) if isinstance(document, dict) else None for name in ("images", "annotations", "categories")]
    if not all(isinstance(part, list) for part in parts):
        raise UsageError(f"{src} is no COCO instances file: it needs the lists 'images', 'annotations' and 'categories'")
    images, annotations, categories = (part or [] for part in parts)
    if annotations and isinstance(annotations[0], dict) and "bbox" not in annotations[0]:
        raise UsageError(f"{src} has annotations but no boxes; COCO's are in instances_*.json")
    split, names = split_in_name(src), {entry.get("id"): entry.get("name") for entry in categories if has_id(entry)}
    bad, of_image = _by_image(annotations, names, {entry.get("id") for entry in images if has_id(entry)})

    def parse(number: int, entry: dict[str, Any]) -> Labelled | Unusable:
        found = of_image.get(entry["id"], _Annotations())
        boxes = _numbers(found.boxes)
        boxes[:, 2:] += boxes[:, :2]
        try:
            paths = coco_paths(src, text(entry, "file_name"))
            return _labelled(
                number=number,
                paths=paths,
                value=entry,
                boxes=boxes,
                labels=found.labels,
                image_id="",
                split=split,
                crowds=found.crowds,
                reach=math.inf,
            )
        except ValueError as error:
            return Unusable(number, f"image {entry.get('file_name', entry['id'])!r:.80}: {error}", count=max(1, len(boxes)))

    return Reading(chain(bad, parsed(iter(images), parse)), len(bad) + len(images), "entries", place="entry")


def _by_image(annotations: list[Any], names: dict[Any, Any], images: set[Any]) -> tuple[list[Unusable], dict[Any, _Annotations]]:
    """Annotations that cannot be used, and the others by the id of their image."""
    bad, of_image = list[Unusable](), defaultdict[Any, _Annotations](_Annotations)
    for number, entry in enumerate(annotations, 1):
        try:
            _add(of_image[entry["image_id"]], entry, names)
            if entry["image_id"] not in images:
                raise ValueError(f"image_id {entry['image_id']!r:.80} is not among the images")
        except NOT_ITS_FORM as error:
            bad.append(Unusable(number, f"of the annotations: {f'no field {error}' if isinstance(error, KeyError) else error}"))
    return bad, dict(of_image)


def _add(found: _Annotations, entry: dict[str, Any], names: dict[Any, Any]) -> None:
    """``ValueError`` or ``KeyError`` says what is wrong with the annotation."""
    if entry.get("iscrowd"):
        found.crowds += 1
        return
    if entry["category_id"] not in names:
        raise ValueError(f"category_id {entry['category_id']!r:.80} is not among the categories")
    box = _numbers([entry["bbox"]])
    if len(box) != 1:
        raise ValueError(f"bbox {entry['bbox']!r:.80} is not four numbers")
    found.boxes.append(box[0].tolist())
    found.labels.append(str(names[entry["category_id"]]))
