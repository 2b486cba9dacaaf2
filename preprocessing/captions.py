"""`megainter prepare`: the caption files people have, brought into one manifest of pairs.

    jsonl       one JSON object per line: {"image": "a.jpg", "caption": "..."} or {"captions": [...]}, optionally "image_id", "pair_id",
                "split"; the caption field may have another name
    coco        annotations/captions_*.json of COCO, or dataset_coco.json of the Karpathy split
    flickr30k   dataset_flickr30k.json of the Karpathy split, results_20130124.token, or the official code's *.jsonline

Captions are brought to Unicode NFC and one line. What is left out is counted by reason, in a report beside the manifest.
"""

import json
import os
import re
import unicodedata
from array import array
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import pyarrow.compute as pc
import pyarrow.parquet as pq

from megainter.data.manifest import SPLITS, DuplicatePairError, Pair, check_relative, write_pairs
from megainter.errors import TooManyBadInputsError, UsageError
from megainter.files import inside, read_json, write_json

MALFORMED, MISSING_IMAGE, BLANK, OTHER_SPLIT = "malformed", "image file missing", "blank caption", "another split"
EXAMPLES_KEPT = 20  # per reason, in the report
SPLIT_NAMES = {
    "restval": "train",
    "validation": "val",
    "valid": "val",
    "dev": "val",
}  # restval: COCO images outside Karpathy's val and test
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
SURROGATE = re.compile(r"[\ud800-\udfff]")


@dataclass(frozen=True)
class Item:
    """Captions of one image as a source gives them. ``where`` is the number of the line or entry, from 1.

    ``paths`` are places to look for the image, best first; ``pair_ids`` are made of the image id where None, ``image_id`` of the path.
    """

    where: int
    paths: tuple[str, ...]
    captions: list[str]
    pair_ids: list[str] | None = None
    image_id: str | None = None
    split: str = ""


@dataclass(frozen=True)
class Malformed:
    """A line or entry that cannot be used, and why."""

    where: int
    reason: str


Source = Iterator[Item | Malformed]
Finder = Callable[[tuple[str, ...]], str | None]


@dataclass
class Report:
    """What became of a caption file. ``dropped`` and ``examples`` are by reason; the others count captions, ``images`` images."""

    kept: int = 0
    images: int = 0
    splits: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def drop(self, reason: str, example: str, count: int = 1) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + count
        examples = self.examples.setdefault(reason, [])
        if len(examples) < EXAMPLES_KEPT:
            examples.append(example)

    def lines(self) -> list[str]:
        """The report for people."""
        splits = ", ".join(f"{name or 'no split'} {count:,}" for name, count in sorted(self.splits.items()))
        kept = f"kept {self.kept:,} captions of {self.images:,} images ({splits})"
        return [kept, *(f"dropped {n:,}: {reason}, first {self.examples[reason][0]}" for reason, n in sorted(self.dropped.items()))]


def prepare(
    source: Literal["jsonl", "coco", "flickr30k"],
    src: Path,
    output: Path,
    *,
    images: Path | None = None,
    split: str | None = None,
    captions: str | None = None,
    max_bad: float = 0.01,
) -> Report:
    """Write the manifest ``output`` from the caption file ``src``, print a report and write it to ``output``.report.json.

    ``images``: drop captions whose image is not in that folder. ``split``: keep only captions of that split; those that name none are
    given it. ``captions``: name of the caption field of a JSONL file (default "caption" or "captions").

    Raises ``UsageError`` (missing file, another format, pair ids that come twice, nothing kept) and ``TooManyBadInputsError`` where
    more than ``max_bad`` of the captions are malformed or without image; then no manifest is written, the report is.
    """
    if split is not None and split not in SPLITS[:-1]:
        raise UsageError(f"split {split!r} is not one of train, val, test")
    if not src.is_file():
        raise UsageError(f"{src} does not exist or is not a file")
    if images is not None and not images.is_dir():
        raise UsageError(f"images folder {images} does not exist or is not a folder")
    report, lines = Report(), array("Q")
    report_path = output.with_name(output.name + ".report.json")
    pairs = _pairs(_items(source, src, captions), report, lines, _finder(images), split)
    try:
        write_pairs(output, _checked_at_the_end(pairs, report, src, report_path, max_bad))
    except DuplicatePairError as error:
        unit, first, second = "entry" if src.suffix == ".json" else "line", lines[error.first], lines[error.second]
        raise UsageError(f"{src}: pair id {error.pair_id!r} comes in {unit} {first} and again in {unit} {second}") from None
    report.images = pc.count_distinct(pq.read_table(output, columns=["image_id"]).column("image_id")).as_py()
    write_json(report_path, asdict(report))
    print(f"{src} -> {output}", *report.lines(), sep="\n  ", flush=True)
    return report


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


def _pairs(items: Source, report: Report, lines: "array[int]", find: Finder, split: str | None) -> Iterator[Pair]:
    """Pairs of the items that can be used; ``lines`` takes the line of each."""
    for item in items:
        problem = item.reason if isinstance(item, Malformed) else _problem(item)
        if isinstance(item, Malformed) or problem:
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


def _items(source: str, src: Path, field_name: str | None) -> Source:
    """The items of a caption file in any of the formats."""
    if field_name is not None and source != "jsonl":
        raise UsageError(f"a caption field ({field_name!r}) can be named for jsonl only, not for {source}")
    if source == "jsonl":
        return _lines(src, lambda number, line: _jsonl_item(number, line, field_name))
    if source not in ("coco", "flickr30k"):
        raise UsageError(f"caption source {source!r} is not jsonl, coco or flickr30k")
    if src.suffix == ".json":
        return _json_items(src)
    if source == "coco":
        raise UsageError(f"{src} is not a COCO caption file; those are captions_*.json and dataset_coco.json")
    if src.suffix.startswith(".jsonl"):
        split = _split_in_name(src)
        return _lines(src, lambda number, line: _official_item(number, line, split))
    return _lines(src, _token_item)


def _lines(src: Path, parse: Callable[[int, str], Item]) -> Source:
    """Items of a text file, one per line, read as it is needed; empty lines are passed over."""
    with open(src, "rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if line:
                    yield parse(number, line)
            except UnicodeDecodeError:
                yield Malformed(number, "not UTF-8")
            except (ValueError, RecursionError) as error:
                yield Malformed(number, str(error))


def _json_object(line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def _text(value: dict[str, Any], name: str, default: str | None = None) -> str:
    """A string field; numbers count as strings, since ids are often written so. ``ValueError`` where it is missing or something else."""
    content = value.get(name, default)
    if isinstance(content, bool) or not isinstance(content, str | int) or (content == "" and default is None):
        raise ValueError(f"field {name!r} is {content!r}" if name in value else f"no field {name!r}")
    return str(content)


def _texts(value: dict[str, Any], name: str) -> list[str]:
    texts = value.get(name)
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"field {name!r} is not a list of strings" if name in value else f"no field {name!r}")
    return texts


def _jsonl_item(number: int, line: str, field_name: str | None) -> Item:
    value = _json_object(line)
    name = field_name or ("captions" if "captions" in value else "caption")
    if name not in value:
        raise ValueError(f"no field {name!r}; there are {', '.join(map(repr, value))}")
    image_id = _text(value, "image_id") if "image_id" in value else None
    pair_id = _text(value, "pair_id") if "pair_id" in value else None
    image, split = _text(value, "image"), _split(_text(value, "split", ""))
    if isinstance(value[name], str):
        # lines of one caption may repeat an image, so the line's number tells them apart
        pair_id = pair_id or f"{image_id or os.path.splitext(image)[0]}#line{number}"
        return Item(number, (image,), [value[name]], [pair_id], image_id, split)
    texts = _texts(value, name)
    return Item(number, (image,), texts, [f"{pair_id}#{n}" for n in range(len(texts))] if pair_id else None, image_id, split)


def _official_item(number: int, line: str, split: str) -> Item:
    """A line of the official code's Flickr30K files: "img_path" and five "sentences"."""
    value = _json_object(line)
    path = _text(value, "img_path")
    return Item(number, tuple(dict.fromkeys((path, os.path.basename(path)))), _texts(value, "sentences"), split=split)


def _token_item(number: int, line: str) -> Item:
    """``1000092795.jpg#0<tab>caption``: Flickr30K's and Flickr8k's own files."""
    name, tab, caption = line.partition("\t")
    image, mark, which = name.rpartition("#")
    if not (tab and mark and which.isdigit()):
        raise ValueError("not 'image.jpg#number<tab>caption'")
    return Item(number, (image,), [caption], [f"{os.path.splitext(image)[0]}#{which}"])


def _json_items(src: Path) -> Source:
    """Items of COCO's caption files or of a Karpathy split: one JSON document each, which has to be read whole."""
    document = read_json(src)
    if not isinstance(document, dict) or not isinstance(document.get("images"), list):
        raise UsageError(f"{src} is neither a COCO caption file nor a Karpathy split: it has no list of images")
    if isinstance(document.get("annotations"), list):
        return _each(document["annotations"], _coco_parser(src, document["images"]))
    if document["images"] and "sentences" not in document["images"][0]:
        raise UsageError(f"{src} has images but no captions; COCO's are in captions_*.json")
    return _each(document["images"], _karpathy_item)


def _each(entries: list[Any], parse: Callable[[int, dict[str, Any]], Item]) -> Source:
    for number, entry in enumerate(entries, 1):
        try:
            yield parse(number, entry)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            yield Malformed(number, f"no field {error}" if isinstance(error, KeyError) else str(error))


def _coco_parser(src: Path, images: list[Any]) -> Callable[[int, dict[str, Any]], Item]:
    names = {image["id"]: image["file_name"] for image in images if isinstance(image, dict) and {"id", "file_name"} <= set(image)}
    split, folder = _split_in_name(src), re.search(r"(train|val|test)\d{4}", src.name)

    def parse(number: int, entry: dict[str, Any]) -> Item:
        if entry["image_id"] not in names:
            raise ValueError(f"image_id {entry['image_id']!r} is not among the images")
        name = names[entry["image_id"]]
        paths = (name, f"{folder[0]}/{name}") if folder else (name,)
        return Item(number, paths, [_text(entry, "caption", "")], [_text(entry, "id")], split=split)

    return parse


def _karpathy_item(number: int, entry: dict[str, Any]) -> Item:
    name, sentences = _text(entry, "filename"), entry["sentences"]
    paths = (f"{entry['filepath']}/{name}", name) if "filepath" in entry else (name,)
    captions = [_text(sentence, "raw", "") for sentence in sentences]
    return Item(number, paths, captions, [_text(sentence, "sentid") for sentence in sentences], split=_split(_text(entry, "split", "")))


def _split(name: str) -> str:
    return SPLIT_NAMES.get(name, name)


def _split_in_name(src: Path) -> str:
    """The split a file's name tells: captions_val2017.json, all_data_final_train_2014.jsonline."""
    found = re.search(r"(?:^|_)(train|val|test)(?=_|\d|\.)", src.name)
    return found[1] if found else ""
