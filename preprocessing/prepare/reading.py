"""What every caption source gives: items, or why there is none; and how fields of one record become an item."""

import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from megainter.errors import UsageError
from megainter.progress import Progress
from preprocessing.prepare import coco
from preprocessing.prepare.delimited import shown_names
from preprocessing.prepare.report import MALFORMED

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


def shown(reading: Reading[Entry], label: str) -> Iterator[Entry | Unusable]:
    """The items of a source, with progress."""
    with Progress(label, reading.total, reading.unit) as progress:
        for count, item in enumerate(reading.items, 1):
            if count % AT_ONCE == 0:
                progress.update((reading.position() if reading.position else count) - progress.done)
            yield item
        progress.update(reading.total - progress.done)


def read_lines(src: Path, parse: Callable[[int, str], Entry]) -> Reading[Entry]:
    """``parse(number, line)`` of a text file's lines, read as they are needed; empty lines are passed over."""
    file = open(src, "rb")  # noqa: SIM115 (closed by the generator)
    return Reading(decoded(file, parse), src.stat().st_size, "bytes", file.tell)


def decoded(file: Any, parse: Callable[[int, str], Entry]) -> Iterator[Entry | Unusable]:
    """What ``parse`` makes of each line of a binary file, or an ``Unusable``; closes the file."""
    with file:
        for number, raw in enumerate(file, 1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                if line.strip():
                    yield parse(number, line)
            except UnicodeDecodeError:
                yield Unusable(number, "not UTF-8")
            except NOT_ITS_FORM as error:
                yield Unusable(number, _reason(error))


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
    name = fields.captions or ("captions" if "captions" in value else "caption")
    if name not in value:
        raise ValueError(f"no field {name!r:.80}; there are {shown_names(value, quoted=True)}")
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
