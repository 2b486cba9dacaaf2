"""Images that stand in a table, as data sets of Hugging Face have them: {"bytes", "path"} or bytes alone, beside their captions.

A manifest names files, so each gets a name: its path where that is one below a folder and no other image has it, else the table's and the
row's number. With a folder for them, images are written there as they are.
"""

import os
import zlib
from pathlib import Path
from typing import Any

import pyarrow as pa

from megainter.data.tables.parquet import check_relative
from megainter.errors import UsageError
from megainter.files import inside, write_atomically
from preprocessing.images.decode import MORE_SUFFIXES, SUFFIXES, is_heif

MAGIC = ((b"\xff\xd8\xff", ".jpg"), (b"\x89PNG", ".png"), (b"GIF8", ".gif"), (b"BM", ".bmp"), (b"II*\0", ".tif"), (b"MM\0*", ".tif"))
ROWS_AT_ONCE = 32  # of a table with images, which may have megabytes each


def holds_images(kind: pa.DataType) -> bool:
    """Whether a column of this type holds images, and not their paths."""
    fields = {field.name for field in kind} if pa.types.is_struct(kind) else set()
    return "bytes" in fields or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


class EmbeddedImages:
    """Names for the images of one source, and the folder they are written to (None: nowhere)."""

    def __init__(self, folder: Path | None) -> None:
        self.folder, self.checksums = folder, dict[str, int]()
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def place(self, value: Any, table: str, row: int) -> str:
        """The path of the image that a cell holds, written there; ``ValueError`` says why there is none."""
        content, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
        if not isinstance(content, bytes) or not content:
            if isinstance(path, str) and path:
                return path  # a data set that was saved without its images
            raise ValueError("its image is empty")
        suffix = _suffix(content)
        name = _usable(path, suffix) or f"{table}-{row:08d}{suffix}"
        checksum = zlib.crc32(content)
        if self.checksums.setdefault(name, checksum) != checksum:
            name = f"{table}-{row:08d}{suffix}"
            self.checksums[name] = checksum
        if self.folder is not None:
            _write(self.folder, name, content)
        return name


def _suffix(content: bytes) -> str:
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return ".webp"
    if is_heif(content):
        return ".heic"
    found = next((suffix for magic, suffix in MAGIC if content.startswith(magic)), "")
    if not found:
        raise ValueError(f"its image of {len(content):,} bytes has a format that is not known")
    return found


def _usable(path: Any, suffix: str) -> str:
    """The path where it can be one below a folder, else its last part; with the suffix of its format where it has none."""
    if not isinstance(path, str) or not path:
        return ""
    name = path if check_relative(path) is None else os.path.basename(path)
    if check_relative(name) is not None:
        return ""
    return name if os.path.splitext(name)[1].lower() in SUFFIXES | MORE_SUFFIXES else name + suffix


def _write(folder: Path, name: str, content: bytes) -> None:
    try:
        path = inside(folder, name)
        if path.exists():
            if path.stat().st_size != len(content):
                raise ValueError(f"another file stands at {name!r:.80} in {folder}")
            return
        path.parent.mkdir(parents=True, exist_ok=True)
    except UsageError as error:
        raise ValueError(str(error)) from None
    write_atomically(path, content)
