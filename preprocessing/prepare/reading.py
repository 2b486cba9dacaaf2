"""What every caption source gives: items, or why there is none; and how fields of one record become an item."""

import codecs
import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from io import TextIOWrapper
from pathlib import Path
from typing import Any, Generic, TextIO, TypeVar

from megainter.errors import UsageError
from megainter.progress import Progress
from preprocessing.prepare import coco
from preprocessing.prepare.delimited import shown_names
from preprocessing.prepare.report import MALFORMED

UTF8 = "utf-8-sig"  # with a byte order mark or without
NOT_UTF8 = "not UTF-8"
# Names that fields and columns usually have, the first that is there.
IMAGE_NAMES = ("image", "file", "file_name", "filename", "filepath")
CAPTION_NAMES = ("captions", "caption", "text", "title")
NOT_DOWNLOADED, SHARED_NAME = "not downloaded", "file name shared by several addresses"
# What parsers of an entry raise where it holds something else than they look for, in itself or as a number of too many digits.
NOT_ITS_FORM = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)
AT_ONCE = 1000  # items between two looks at the progress
SPLIT_NAMES = {
    "restval": "train",
    "validation": "val",
    "valid": "val",
    "dev": "val",
}  # restval: COCO images outside Karpathy's val and test


@dataclass(frozen=True)
class Fields:
    """Names that a user gave for what a source calls otherwise; None: the usual ones. ``image_names``: patterns, apart by commas."""

    captions: str | None = None
    image: str | None = None
    split: str | None = None
    pair_id: str | None = None
    image_names: str | None = None


@dataclass(frozen=True)
class Item:
    """Captions of one image as a source gives them. ``where`` is the number of the line, row or entry, from 1.

    ``paths`` are places to look for the image, best first; ``pair_ids`` are made of the image id where None, ``image_id`` of the path.
    """

    where: int
    paths: tuple[str, ...]
    captions: list[str]
    pair_ids: list[str] | None = None
    image_id: str | None = None
    split: str = ""


@dataclass(frozen=True)
class Unusable:
    """A line, row or entry that cannot be used, and why; ``kind`` is the heading it is counted under, ``count`` how much was in it."""

    where: int
    reason: str
    kind: str = MALFORMED
    count: int = 1


Items = Iterator[Item | Unusable]
Entry = TypeVar("Entry")


@dataclass(frozen=True)
class Reading(Generic[Entry]):
    """A source that is being read: its items, and how far it is, in ``unit`` of ``total`` (``position`` None: items' numbers)."""

    items: Iterator[Entry | Unusable]
    total: int
    unit: str
    position: Callable[[], int] | None = None
    place: str = "line"  # what an item's number counts
    notes: Callable[[], list[str]] = list  # what the user should know when all items have been read


def shown(reading: Reading[Entry], src: Path) -> Iterator[Entry | Unusable]:
    """The items of the source ``src``, with progress."""
    with Progress(f"reading {src.name or src}", reading.total, reading.unit) as progress:
        for count, item in enumerate(reading.items, 1):
            if count % AT_ONCE == 0:
                progress.update((reading.position() if reading.position else count) - progress.done)
            yield item
        progress.update(reading.total - progress.done)


def read_lines(
    src: Path, parse: Callable[[int, str], Entry], encoding: str | None = None, asks_encoding: bool = False
) -> Reading[Entry]:  # fmt: skip
    """``parse(number, line)`` of a text file's lines, read as they are needed; empty lines are passed over.

    ``encoding`` as for ``text_encoding``. Where the command takes one (``asks_encoding``), a line that is not UTF-8 says so.
    """
    found = text_encoding(src, encoding)
    raw = open(src, "rb")  # noqa: SIM115 (closed by the generator)
    lines = TextIOWrapper(raw, found, "surrogateescape" if found == UTF8 else "strict", newline="\n")
    return Reading(_parsed_lines(src, lines, parse, asks_encoding), src.stat().st_size, "bytes", raw.tell)


def _parsed_lines(src: Path, file: TextIO, parse: Callable[[int, str], Entry], asks_encoding: bool) -> Iterator[Entry | Unusable]:
    """What ``parse`` makes of each line, or an ``Unusable``; closes the file."""
    with file:
        for number, line in enumerate(decodable(src, file), 1):
            if is_broken(line):
                yield Unusable(number, not_utf8(line) if asks_encoding else NOT_UTF8)
                continue
            try:
                if line.strip():
                    yield parse(number, line.rstrip("\r\n"))
            except NOT_ITS_FORM as error:
                yield Unusable(number, _reason(error))


def text_encoding(src: Path, asked: str | None) -> str:
    """The encoding of a text file: the one ``asked`` for, UTF-16 where the first bytes are its mark, else UTF-8, with or without mark.

    ``UsageError`` for one that Python does not know.
    """
    if asked is None:
        with open(src, "rb") as file:
            return "utf-16" if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else UTF8
    try:
        "".encode(asked).decode(asked)
        return UTF8 if codecs.lookup(asked).name in ("utf-8", "ascii") else asked
    except (LookupError, ValueError):
        raise UsageError(f"--encoding {asked!r:.80} is not known: give one such as utf-8, utf-16, cp1252, gb18030 or shift_jis") from None


def decodable(src: Path, lines: Iterable[str]) -> Iterator[str]:
    """``lines``; ``UsageError`` where one cannot be decoded."""
    try:
        yield from lines
    except UnicodeError as error:
        raise UsageError(f"{src} is not in the encoding that was named or that its first bytes tell: {error}") from None


def is_broken(text: str) -> bool:
    """Whether ``text`` holds bytes that were not UTF-8 (``surrogateescape``)."""
    return not text.isascii() and any("\udc80" <= character <= "\udcff" for character in text)


def not_utf8(text: str) -> str:
    """What is wrong with a broken line, and the encoding that it may have: a Chinese one where it reads as Chinese, else Windows's."""
    raw = text.encode("utf-8", "surrogateescape")
    try:
        chinese = any("\u4e00" <= character <= "\u9fff" for character in raw.decode("gb2312"))  # whose characters are two bytes, both high
    except UnicodeDecodeError:
        chinese = False
    return f"{NOT_UTF8}; perhaps --encoding {'gb18030' if chinese else 'cp1252'}"


def read_entries(entries: list[Any], parse: Callable[[int, dict[str, Any]], Item]) -> Reading[Item]:
    """``parse(number, entry)`` of a list that stands in a JSON document."""
    return Reading(parsed(iter(entries), parse), len(entries), "entries", place="entry")


def parsed(entries: Iterator[Any], parse: Callable[[int, dict[str, Any]], Entry]) -> Iterator[Entry | Unusable]:
    """What ``parse`` makes of each entry, or why it cannot."""
    for number, entry in enumerate(entries, 1):
        try:
            yield parse(number, entry)
        except NOT_ITS_FORM as error:
            yield Unusable(number, _reason(error))


def _reason(error: Exception) -> str:
    return f"no field {error}" if isinstance(error, KeyError) else str(error)


def has_id(entry: Any) -> bool:
    """Whether an entry of a document is an object with an id, in text or as a number."""
    return isinstance(entry, dict) and isinstance(entry.get("id"), str | int)


def json_object(line: str) -> dict[str, Any]:
    """The object that a line of JSON holds; ``ValueError`` for anything else."""
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def text(value: dict[str, Any], name: str, default: str | None = None) -> str:
    """A string field; numbers count as strings, since ids are often written so. ``ValueError`` where it is missing or something else."""
    content = value.get(name, default)
    if isinstance(content, bool) or not isinstance(content, str | int) or (content == "" and default is None):
        raise ValueError(f"field {name!r:.80} is {content!r:.80}" if name in value else f"no field {name!r:.80}")
    return str(content)


def texts(value: dict[str, Any], name: str) -> list[str]:
    """A field that is a list of strings."""
    content = value.get(name)
    if not isinstance(content, list) or not all(isinstance(one, str) for one in content):
        raise ValueError(f"field {name!r:.80} is not a list of strings" if name in value else f"no field {name!r:.80}")
    return content


def record_item(number: int, value: dict[str, Any], fields: Fields, place: str = "line") -> Item:
    """An item of one record with named fields: a line of JSON, a row of CSV or Parquet."""
    if fields.captions is None or fields.image is None:
        fields = named(tuple(value), fields)
    name = fields.captions or "caption"
    if name not in value:
        raise ValueError(f"no field {name!r:.80}; there are {shown_names(value, quoted=True)}: name yours with --captions")
    image_id = _optional(value, "image_id")
    pair_id = _optional(value, fields.pair_id or "pair_id")
    image, split = text(value, fields.image or "image"), split_name(_optional(value, fields.split or "split") or "")
    if isinstance(value[name], str):
        # records of one caption may repeat an image, so their number tells them apart
        pair_id = pair_id or f"{image_id or os.path.splitext(image)[0]}#{place}{number}"
        return Item(where=number, paths=(image,), captions=[value[name]], pair_ids=[pair_id], image_id=image_id, split=split)
    captions = texts(value, name)
    return Item(
        where=number,
        paths=(image,),
        captions=captions,
        pair_ids=[f"{pair_id}#{n}" for n in range(len(captions))] if pair_id else None,
        image_id=image_id,
        split=split,
    )


@lru_cache(maxsize=256)  # records of one file have the same names, nearly all
def named(names: tuple[str, ...], fields: Fields) -> Fields:
    """``fields`` with the names that are not given found among ``names``, where they are there."""
    return replace(
        fields,
        captions=fields.captions or usual_name(names, CAPTION_NAMES),
        image=fields.image or usual_name(names, IMAGE_NAMES),
        split=fields.split or usual_name(names, ("split",)),
        pair_id=fields.pair_id or usual_name(names, ("pair_id",)),
    )


def usual_name(names: Collection[str], usual: Sequence[str]) -> str | None:
    """The first of the ``usual`` names that is among ``names``, as it is written there: Caption, FILE, with blanks around."""
    if exact := next((name for name in usual if name in names), None):
        return exact
    plain = {name.strip().casefold(): name for name in names}
    return next((plain[name] for name in usual if name in plain), None)


def _optional(value: dict[str, Any], name: str) -> str | None:
    return text(value, name, "") or None if value.get(name) is not None else None


def split_name(name: str) -> str:
    """The split that a source means."""
    return SPLIT_NAMES.get(name, name)


def split_in_name(src: Path) -> str:
    """The split a file's name tells: captions_val2017.json, all_data_final_train_2014.jsonline."""
    found = re.search(r"(?:^|_)(train|val|test)(?=_|\d|\.)", src.name)
    return coco.split_of(src.name) or (found[1] if found else "")


def refuse_fields(source: str, fields: Fields, *allowed: str) -> None:
    """``UsageError`` where a name was given that this source has no use for."""
    for name, given in vars(fields).items():
        if given is not None and name not in allowed:
            raise UsageError(f"{source} has no {name.replace('_', ' ')} to name, but {given!r:.80} was given; leave it out")
