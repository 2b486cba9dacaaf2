"""From caption sources to the manifest of pairs, with a report of what was left out."""

import os
import re
import unicodedata
from array import array
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Literal

import pyarrow.compute as pc
import pyarrow.parquet as pq

from megainter.data.manifest import SPLITS, DuplicatePairError, Pair, check_relative, write_pairs
from megainter.errors import TooManyBadInputsError, UsageError
from megainter.files import inside, write_json
from megainter.progress import Progress
from preprocessing.captions import addresses, annotations, tables
from preprocessing.captions.items import (
    BLANK,
    MALFORMED,
    MISSING_IMAGE,
    OTHER_SPLIT,
    Fields,
    Item,
    Items,
    Reading,
    Report,
    Unusable,
    refuse_fields,
)

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
SURROGATE = re.compile(r"[\ud800-\udfff]")
COLUMNS = ("captions", "image", "split", "pair_id")
AT_ONCE = 1000  # items between two looks at the progress

Kind = Literal["coco", "flickr30k", "conceptual-captions", "sbu", "visual-genome", "jsonl", "csv", "parquet"]
Finder = Callable[[tuple[str, ...]], str | None]


def prepare(
    source: Kind,
    src: Path,
    output: Path,
    *,
    images: Path | None = None,
    split: str | None = None,
    fields: Fields | None = None,
    max_bad: float = 0.01,
) -> Report:
    """Write the manifest ``output`` from the captions ``src``, print a report and write it to ``output``.report.json.

    ``images``: drop captions whose image is not in that folder. ``split``: keep only captions of that split; those that name none are
    given it. ``fields``: names that the source uses instead of the usual ones.

    Raises ``UsageError`` (missing file, another format, pair ids that come twice, nothing kept) and ``TooManyBadInputsError`` where
    more than ``max_bad`` of the captions are malformed or without image; then no manifest is written, the report is.
    """
    if split is not None and split not in SPLITS[:-1]:
        raise UsageError(f"split {split!r} is not one of train, val, test")
    if images is not None and not images.is_dir():
        raise UsageError(f"images folder {images} does not exist or is not a folder")
    reading = _open(source, src, fields or Fields())
    report, lines = Report(), array("Q")
    report_path = output.with_name(output.name + ".report.json")
    pairs = _pairs(_shown(reading), report, lines, _finder(images), split)
    try:
        write_pairs(output, _checked_at_the_end(pairs, report, src, report_path, max_bad))
    except DuplicatePairError as error:
        first, second = lines[error.first], lines[error.second]
        raise UsageError(
            f"{src}: pair id {error.pair_id!r} comes in {reading.place} {first} and again in {reading.place} {second}"
        ) from None
    report.images = pc.count_distinct(pq.read_table(output, columns=["image_id"]).column("image_id")).as_py()
    write_json(report_path, asdict(report))
    print(f"{src} -> {output}", *report.lines(), sep="\n  ", flush=True)
    return report


def _open(source: str, src: Path, fields: Fields) -> Reading[Item]:
    """The captions of ``src`` in any of the formats."""
    tabular = source == "parquet" or (source in ("conceptual-captions", "sbu") and tables.is_download(src))
    if not (src.is_file() or (src.is_dir() and (tabular or source == "sbu"))):
        raise UsageError(f"{src} does not exist or is not a file")
    if tabular:
        return tables.table_of_parquet(src, fields)
    if source in ("jsonl", "csv"):
        refuse_fields(source, fields, *COLUMNS)
        return annotations.jsonl(src, fields) if source == "jsonl" else tables.table_of_csv(src, fields)
    if source in ("conceptual-captions", "sbu"):
        refuse_fields(source, fields, "image_names")
        return addresses.conceptual_captions(src, fields) if source == "conceptual-captions" else addresses.sbu(src, fields)
    refuse_fields(source, fields)
    if source == "visual-genome":
        return annotations.visual_genome(src)
    return annotations.coco(src) if source == "coco" else annotations.flickr30k(src)


def _shown(reading: Reading[Item]) -> Items:
    """The items, with progress."""
    with Progress("captions", reading.total, reading.unit) as progress:
        for count, item in enumerate(reading.items, 1):
            if count % AT_ONCE == 0:
                progress.update((reading.position() if reading.position else item.where) - progress.done)
            yield item
        progress.update(reading.total - progress.done)


def normalise(caption: str) -> str:
    """Unicode NFC on one line: runs of white space and control characters become one space, lone surrogates U+FFFD."""
    text = caption if caption.isascii() else caption.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return " ".join(unicodedata.normalize("NFC", CONTROL.sub(" ", text)).split())


def _checked_at_the_end(pairs: Iterator[Pair], report: Report, src: Path, report_path: Path, max_bad: float) -> Iterator[Pair]:
    """Passes pairs on; at the end, with the counts known and nothing published, refuses what may not become a manifest."""
    yield from pairs
    bad, total = sum(report.dropped.get(reason, 0) for reason in (MALFORMED, MISSING_IMAGE)), report.kept + sum(report.dropped.values())
    if bad <= max_bad * total and report.kept:
        return
    report_path.parent.mkdir(parents=True, exist_ok=True)
    write_json(report_path, asdict(report))
    what = "; ".join(report.lines()[1:]) or "it holds none"
    if bad <= max_bad * total:
        raise UsageError(f"{src}: no caption is left: {what}")
    raise TooManyBadInputsError(f"{src}: {bad:,} of {total:,} captions cannot be used, more than {max_bad:.1%}: {what}; see {report_path}")


def _pairs(items: Items, report: Report, lines: "array[int]", find: Finder, split: str | None) -> Iterator[Pair]:
    """Pairs of the items that can be used; ``lines`` takes the line of each."""
    for item in items:
        if isinstance(item, Unusable):
            report.drop(item.kind, f"{item.where}: {item.reason}")
            continue
        if problem := _problem(item):
            report.drop(MALFORMED, f"{item.where}: {problem}")
            continue
        own_split = item.split or split or ""
        if split is not None and own_split != split:
            report.drop(OTHER_SPLIT, f"{item.where}: {own_split}", len(item.captions))
        elif (path := find(item.paths)) is None:
            report.drop(MISSING_IMAGE, f"{item.where}: {item.paths[0]!r}", len(item.captions))
        else:
            for pair in _item_pairs(item, path, own_split, report):
                lines.append(item.where)
                yield pair


def _item_pairs(item: Item, path: str, split: str, report: Report) -> Iterator[Pair]:
    image_id = item.image_id or os.path.splitext(path)[0]
    for number, text in enumerate(item.captions):
        caption = normalise(text)
        if not caption:
            report.drop(BLANK, str(item.where))
            continue
        report.kept += 1
        report.splits[split] = report.splits.get(split, 0) + 1
        yield Pair(item.pair_ids[number] if item.pair_ids else f"{image_id}#{number}", image_id, path, caption, split)


def _problem(item: Item) -> str | None:
    """Why an item cannot be used, or None where it can."""
    for text in (*item.paths, item.image_id or "", *(item.pair_ids or ())):
        if SURROGATE.search(text):
            return f"{text!r} is not valid Unicode"
    for path in item.paths:
        if reason := check_relative(path):
            return f"image {path!r} {reason}"
    return None if item.split in SPLITS else f"split {item.split!r} is not train, val or test"


def _finder(folder: Path | None) -> Finder:
    """Which of an image's paths to take: the one that is there, or the first where no folder was given."""
    if folder is None:
        return lambda paths: os.path.normpath(paths[0])

    @lru_cache(maxsize=65536)  # captions of one image stand near each other
    def find(paths: tuple[str, ...]) -> str | None:
        return next((os.path.normpath(path) for path in paths if _is_file(folder, path)), None)

    return find


def _is_file(folder: Path, path: str) -> bool:
    try:
        return inside(folder, path).is_file()
    except (UsageError, OSError):
        return False
