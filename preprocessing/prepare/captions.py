"""From caption sources to the manifest of pairs, with a report of what was left out."""

import os
import re
import unicodedata
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pyarrow.compute as pc
import pyarrow.parquet as pq

from megainter.data.feature_store.reader import FeatureStore
from megainter.data.image_ids import match, renamer
from megainter.data.tables.pairs import DuplicatePairError, Pair, write_pairs
from megainter.data.tables.parquet import SPLITS, check_relative
from megainter.errors import UsageError
from megainter.paths import not_a_file
from preprocessing.prepare import kinds
from preprocessing.prepare.caption_sources import addresses, annotations, tables
from preprocessing.prepare.finding import Finder
from preprocessing.prepare.kinds import CAPTIONS, refuse_another_kind
from preprocessing.prepare.reading import Fields, Item, Items, Reading, Unusable, refuse_fields, shown
from preprocessing.prepare.report import BLANK, MALFORMED, NOT_STORED, OTHER_SPLIT, Report, checked, publish, refuse_overwriting
from preprocessing.prepare.splits import Shares, Splitting

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
SURROGATE = re.compile(r"[\ud800-\udfff]")
COLUMNS = ("captions", "image", "split", "pair_id")
# What a user may name of each source that is no Parquet.
NAMED: Mapping[str, Sequence[str]] = {"jsonl": COLUMNS, "csv": COLUMNS, "conceptual-captions": ("image_names",), "sbu": ("image_names",)}

# What a file of each source is, as far as its first bytes tell.
WANTED: Mapping[str, kinds.Kind] = {"jsonl": "jsonl", "csv": "csv", "parquet": "parquet", "coco": "json", "visual-genome": "json"}

Kind = Literal["coco", "flickr30k", "conceptual-captions", "sbu", "visual-genome", "jsonl", "csv", "parquet"]


def prepare(
    source: Kind,
    src: Path,
    output: Path,
    *,
    images: Path | None = None,
    split: str | None = None,
    shares: Shares | None = None,
    fields: Fields | None = None,
    ids: str | None = None,
    store: Path | None = None,
    max_bad: float = 0.01,
    encoding: str | None = None,
    similar_names: bool = False,
    only_stored: bool = False,
    replace_table: bool = True,
) -> Report:
    """Write the manifest ``output`` from the captions ``src``, print a report and write it to ``output``.report.json.

    ``images``: drop captions whose image is not in that folder; images that stand in the table are written there. ``split``: keep only
    captions of that split; those that name none are given it. ``shares``: for captions without splits. ``fields``: names that the source
    uses instead of the usual ones. ``ids``: how an image's id is made of the usual one (``image_ids.renamer``). ``store``: give images the
    ids that this feature store has them under, whatever form of their name that is; ``only_stored``: drop captions of other images.
    ``encoding`` of a jsonl or csv that is not UTF-8. ``similar_names``: as ``finding.Finder``. Without ``replace_table`` another table
    that is at ``output`` stays.

    Raises ``UsageError`` (missing file, another format, pair ids that come twice, nothing kept, an ``output`` that is the source or
    something else than a manifest) and ``TooManyBadInputsError`` where more than ``max_bad`` of the captions, and more than one line, are
    malformed or without image; then nothing is written.
    """
    splitting = Splitting(split, shares)
    refuse_overwriting(output, src, *(src.glob("*.parquet") if src.is_dir() else ()))
    if only_stored and store is None:
        raise UsageError("--only-stored leaves out what is not in a feature store; give it as --store")
    reading = _open(source, src, fields or Fields(), images, encoding)
    find = Finder(images, similar_names)
    report, lines = Report(place=reading.place), array("Q")
    items = shown(reading, src)
    found = _pairs(items, report, lines, find, splitting, renamer(ids) if ids else str)
    pairs, notes = checked(found, report, src, output, max_bad, "captions", images), list[str]()
    if store is not None:
        pairs = iter(_matched([*pairs], store, notes, only_stored, report, lines))
    try:
        write_pairs(output, pairs, replace_table)
    except DuplicatePairError as error:
        first, second = (f"{reading.place} {lines[row]}" for row in (error.first, error.second))
        raise UsageError(_twice(src, error.pair_id, first, second)) from None
    find.enter(report)
    report.images = pc.count_distinct(pq.read_table(output, columns=["image_id"]).column("image_id")).as_py()
    publish(report, src, output, "captions", *reading.notes(), *notes, *find.notes(), *splitting.notes(report))
    return report


def _matched(
    pairs: list[Pair], store: Path, notes: list[str], only_stored: bool, report: Report, lines: "array[int]"
) -> list[Pair]:  # fmt: skip
    """The pairs under the ids of the store's images, with ``only_stored`` no others; ``notes`` takes what was found."""
    names, told = names_in_store(dict.fromkeys(pair.image_id for pair in pairs), store)
    absent = sum(pair.image_id not in names for pair in pairs)
    if absent and not only_stored:
        told += f"; {absent:,} captions of the others stay: --only-stored drops them, pretrain takes up to --data.max_bad of such images"
    notes.append(told)
    taken = _stored(pairs, names, report, lines) if only_stored else pairs
    return [replace(pair, image_id=names.get(pair.image_id, pair.image_id)) for pair in taken]


def _stored(pairs: list[Pair], names: Mapping[str, str], report: Report, lines: "array[int]") -> list[Pair]:
    """The pairs of images in ``names``; the others are counted in ``report`` as dropped, and their ``lines`` taken out."""
    kept, places = list[Pair](), array("Q")
    for pair, line in zip(pairs, lines, strict=True):
        if pair.image_id in names:
            kept.append(pair)
            places.append(line)
        else:
            report.drop_kept(pair.split, NOT_STORED, f"{line}: {pair.image_id!r:.80}")
    lines[:] = places
    return kept


def names_in_store(image_ids: Iterable[str], store: Path) -> tuple[dict[str, str], str]:
    """The ids in a store by those wanted (each once), where they are found, and a note for the user. ``UsageError`` where none is."""
    wanted = list(image_ids)
    with FeatureStore(store, allow_partial=True) as opened:
        stored = opened.ids[:]
    found = match(wanted, stored)
    told = found.told(wanted, stored, store)
    if wanted and not found.names:
        raise UsageError(f"{told}: name the images as the store does (--ids, --image-names), or extract these")
    return found.names, f"note: {told}"


def _twice(src: Path, pair_id: str, first: str, second: str) -> str:
    return (
        f"{src}: pair id {pair_id!r:.80} comes in {first} and again in {second}; pair ids must be unique: put all captions of an image "
        "into one entry, give each pair an id of its own, or remove one of the two"
    )


def _open(source: str, src: Path, fields: Fields, images: Path | None, encoding: str | None) -> Reading[Item]:
    """The captions of ``src`` in any of the formats; images that stand in it are written to the folder ``images``."""
    tabular = source == "parquet" or (source in ("conceptual-captions", "sbu") and tables.is_download(src))
    if not (src.is_file() or (src.is_dir() and (tabular or source == "sbu"))):
        raise UsageError(not_a_file(src))
    if encoding is not None and source not in ("jsonl", "csv"):
        raise UsageError(f"{source} is always UTF-8; --encoding is for jsonl and csv")
    if not tabular:
        refuse_fields(source, fields, *NAMED.get(source, ()))
    if src.is_file() and (wanted := WANTED.get("parquet" if tabular else source)):
        refuse_another_kind(src, wanted, CAPTIONS)
    if tabular:
        return tables.table_of_parquet(src, fields, images)
    if source == "jsonl":
        return annotations.jsonl(src, fields, encoding)
    if source == "csv":
        return tables.table_of_csv(src, fields, encoding)
    if source in ("conceptual-captions", "sbu"):
        return addresses.conceptual_captions(src, fields) if source == "conceptual-captions" else addresses.sbu(src, fields)
    if source == "visual-genome":
        return annotations.visual_genome(src)
    return annotations.coco(src) if source == "coco" else annotations.flickr30k(src)


def normalise(caption: str) -> str:
    """Unicode NFC on one line: runs of white space and control characters become one space, lone surrogates U+FFFD."""
    text = caption if caption.isascii() else caption.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return " ".join(unicodedata.normalize("NFC", CONTROL.sub(" ", text)).split())


def _pairs(
    items: Items, report: Report, lines: "array[int]", find: Finder, splitting: Splitting, rename: Callable[[str], str]
) -> Iterator[Pair]:
    """Pairs of the items that can be used; ``lines`` takes the line of each."""
    for item in items:
        if isinstance(item, Unusable):
            report.drop(item.kind, f"{item.where}: {item.reason}", item.count)
        elif problem := _problem(item):
            report.drop(MALFORMED, f"{item.where}: {problem}")
        elif not splitting.keeps(item.split):
            report.drop(OTHER_SPLIT, f"{item.where}: {item.split}", len(item.captions))
        elif (path := find(item.paths)) is None:
            reason, words = find.missing(item.paths)
            report.drop(reason, f"{item.where}: {words}{_exchanged(item, find) if not report.kept else ''}", len(item.captions))
        else:
            try:
                image_id = rename(item.image_id or os.path.splitext(path)[0])
            except ValueError as error:
                report.drop(MALFORMED, f"{item.where}: {error}", len(item.captions))
                continue
            for pair in _item_pairs(item, image_id, path, splitting, report):
                lines.append(item.where)
                yield pair


def _exchanged(item: Item, find: Finder) -> str:
    """What is said where the caption names an image that is there, in place of the path."""
    names = tuple(text for text in item.captions if not check_relative(text))
    return "; its caption is an image's name: --captions and --image-field may be exchanged" if find(names) is not None else ""


def _item_pairs(item: Item, image_id: str, path: str, splitting: Splitting, report: Report) -> Iterator[Pair]:
    split = splitting.of(item.split, image_id)
    for number, text in enumerate(item.captions):
        caption = normalise(text)
        if not caption:
            report.drop(BLANK, str(item.where))
            continue
        report.keep(split)
        yield Pair(item.pair_ids[number] if item.pair_ids else f"{image_id}#{number}", image_id, path, caption, split)


def _problem(item: Item) -> str | None:
    """Why an item cannot be used, or None where it can."""
    for text in (*item.paths, item.image_id or "", *(item.pair_ids or ())):
        if SURROGATE.search(text):
            return f"{text!r:.80} is not valid Unicode"
    for path in item.paths:
        if reason := check_relative(path):
            return f"image {path!r:.80} {reason}"
    return None if item.split in SPLITS else f"split {item.split!r:.80} is not train, val or test"
