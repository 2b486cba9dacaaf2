"""What a file is by its first bytes, so that one given to another format's reader is refused with the command that reads it."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from megainter.errors import UsageError

Kind = Literal["jsonl", "csv", "json", "parquet", "zip", "gzip"]
HEAD = 1 << 16  # bytes that are looked at
SHOWN = 60  # characters of a first line in a message
NAMES: Mapping[Kind, str] = {
    "jsonl": "JSON Lines",
    "csv": "a table of text (CSV)",
    "json": "one JSON document",
    "parquet": "a Parquet file",
    "zip": "a zip file, as workbooks of Excel are",
    "gzip": "a compressed file",
}
DOCUMENT = re.compile(r'\{\s*"(images|annotations|info|licenses|categories|dataset)"\s*:\s*[\[{"]')  # COCO's and Karpathy's
OPEN = re.compile(r'\{(\s*$|\s*"[^"]*"\s*:\s*[\[{]?$)')  # an object that goes on in the next lines
MAGIC: Mapping[bytes, Kind] = {b"PAR1": "parquet", b"PK\x03\x04": "zip", b"\x1f\x8b": "gzip"}
UNPACK: Mapping[Kind, str] = {
    "zip": "save a workbook as CSV (UTF-8) and give that to `megainter prepare csv`; unpack another zip file",
    "gzip": "unpack it (gunzip)",
}
CAPTIONS: Mapping[Kind, str] = {
    "jsonl": "`megainter prepare jsonl` reads it",
    "csv": "`megainter prepare csv` reads it",
    "parquet": "`megainter prepare parquet` reads it",
    "json": "`megainter prepare coco` reads COCO's captions; write others as JSON Lines, one object a line",
}
BOXES: Mapping[Kind, str] = {
    "jsonl": "--format jsonl reads it",
    "json": "--format coco reads COCO's instances; write others as JSON Lines, one object a line",
    "csv": "write it as JSON Lines, one object a line",
    "parquet": "a manifest of boxes needs no preparing; write other tables as JSON Lines",
}


def refuse_another_kind(src: Path, wanted: Kind, ways: Mapping[Kind, str]) -> None:
    """``UsageError`` where the file ``src`` is plainly another kind than ``wanted``; ``ways`` say what reads each."""
    found, lines = kind_of(src)
    if found is None or found == wanted or (found == "jsonl" and wanted == "json" and len(lines) == 1):  # one object may be a document
        return
    first = f", its first line is {lines[0][:SHOWN]!r}" if lines else ""
    raise UsageError(f"{src} is not {NAMES[wanted]} but looks like {NAMES[found]}{first}: {UNPACK.get(found) or ways[found]}")


def kind_of(src: Path) -> tuple[Kind | None, list[str]]:
    """The kind of a file (None: it does not tell), and its first lines where it is text."""
    with open(src, "rb") as file:
        head = file.read(HEAD)
    for magic, kind in MAGIC.items():
        if head.startswith(magic):
            return kind, []
    text = head.decode("utf-16" if head.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig", "replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    whole = lines[:-1] if len(head) == HEAD else lines  # the last one may go on
    return (_kind_of_lines(lines[0], whole[:5]), lines) if lines else (None, [])


def _kind_of_lines(first: str, whole: list[str]) -> Kind | None:
    """By the ``first`` line and those that are ``whole``: a broken one among lines of JSON does not make these a table."""
    if DOCUMENT.match(first):
        return "json"
    if any(_is_object(line) for line in whole):
        return "jsonl"
    if first.startswith("[") or (whole and OPEN.match(first)):
        return "json"
    return "csv" if re.search(r"[,;\t|]", first) and not first.startswith(("{", "<")) else None


def _is_object(line: str) -> bool:
    try:
        return line.startswith("{") and isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False
