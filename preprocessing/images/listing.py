"""Which images to extract: those below a folder, those a manifest or a table of paths names, or the members of tar files (WebDataset).

A source is a list in a fixed order, each image with an id of its own; where two would share an id, nothing starts and both are named.
"""

import glob
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from megainter.data.image_ids import renamer
from megainter.data.tables.boxes import is_boxes_manifest, read_boxes
from megainter.data.tables.pairs import read_pairs
from megainter.data.tables.parquet import check_relative
from megainter.errors import UsageError
from megainter.paths import require_file
from megainter.progress import Progress
from preprocessing.images.decode import MORE_SUFFIXES, SUFFIXES, Part, find_images
from preprocessing.prepare.delimited import Fault, delimited_rows, header_cells, literal_notes, shown_names

PARQUET_MAGIC = b"PAR1"
DELIMITERS = {",": "comma", "\t": "tab", ";": "semicolon"}


class ListedImage(NamedTuple):
    """One image: its id, its file relative to the source's root, and where in that file it stands (None: it is the whole file)."""

    image_id: str
    path: str
    part: Part | None = None


@dataclass(frozen=True)
class ImageList:
    """The images of one extraction. Files are in the folder ``root``."""

    root: Path
    items: list[ListedImage]


def renamed(source: ImageList, pattern: str) -> ImageList:
    """The images of a source, in its order, under the ids that ``pattern`` makes of theirs (``image_ids.renamer``).

    ``UsageError`` for ids that lack a part of the pattern, and for images that would share one: how many, and both files of the first.
    """
    rename, items, of_id, clashes = renamer(pattern), list[ListedImage](), dict[str, ListedImage](), list[str]()
    for item in source.items:
        try:
            new = item._replace(image_id=rename(item.image_id))
        except ValueError as error:
            raise UsageError(
                f"{_file_of(item)} in {source.root}: {error} {pattern!r:.80}; leave it out, or name images in a --manifest"
            ) from None
        if not new.image_id:
            raise UsageError(f"{_file_of(item)} in {source.root}: --ids {pattern!r:.80} makes an empty id of {item.image_id!r:.80}")
        first = of_id.setdefault(new.image_id, item)
        if first is not item:
            clashes.append(f"{_file_of(first)} and {_file_of(item)} would both have the image id {new.image_id!r:.80}")
        items.append(new)
    if clashes:
        more = f", and {len(clashes) - 1:,} more" if len(clashes) > 1 else ""
        raise UsageError(f"{source.root}: by --ids {pattern!r:.80} {clashes[0]}{more}; give a pattern that tells them apart")
    return ImageList(source.root, items)


def _file_of(item: ListedImage) -> str:
    return f"{item.path!r:.200}" if item.part is None else f"{item.image_id!r:.200} of {item.path!r:.80}"


def list_images(images: Path, manifest: Path | None = None) -> ImageList:
    """All images of a folder of images, of a folder of tar files, of one tar file or of a glob such as ``shards/*.tar``.

    With ``manifest``, those that it names, in the folder ``images``: a Parquet manifest of pairs or boxes, or a CSV or TSV file with a
    column ``image`` and maybe ``image_id`` (else the id is the path without its suffix). A folder's images come sorted by id, those of
    tar files in the order in which they stand there. ``UsageError`` for what is missing or empty, and for an id that comes twice.
    """
    if manifest is not None:
        if not images.is_dir():
            raise UsageError(f"images folder {images} does not exist or is not a folder")
        return ImageList(images, sorted(_manifest_items(manifest)))
    if not images.is_dir():
        return _tar_source(images, _matching_tars(images))
    tars = sorted(images.glob("*.tar"))
    if not tars:
        return ImageList(images, [ListedImage(*found) for found in find_images(images)])
    if any(path.suffix.lower() in SUFFIXES | MORE_SUFFIXES for path in images.iterdir()):
        raise UsageError(f"{images} holds both images and tar files; give the tar files as '{images}/*.tar', or move them elsewhere")
    return _tar_source(images, tars)


# --- manifests ---------------------------------------------------------------------------------------------------------------------


def _manifest_items(manifest: Path) -> Iterator[ListedImage]:
    require_file(manifest)
    with open(manifest, "rb") as file:
        parquet = file.read(len(PARQUET_MAGIC)) == PARQUET_MAGIC
    if not parquet:
        yield from _table_items(manifest)
    elif is_boxes_manifest(manifest):
        yield from (ListedImage(image.image_id, image.image) for image in read_boxes(manifest))
    else:
        columns = read_pairs(manifest).table.select(["image_id", "image"]).group_by(["image_id", "image"]).aggregate([])
        yield from map(ListedImage, columns.column("image_id").to_pylist(), columns.column("image").to_pylist())


def _table_items(table: Path) -> Iterator[ListedImage]:
    """The rows of a CSV or TSV file, each id once; ``UsageError`` with the number of the line that cannot be right."""
    seen: dict[str, tuple[str, int]] = {}
    repeated = 0
    for line, row in _table_rows(table):
        path, where = row["image"], f"{table}: line {line}"
        if problem := check_relative(path):
            raise UsageError(f"{where}: image {path!r:.80} {problem}")
        image_id = row.get("image_id", os.path.splitext(path)[0])
        if not image_id:
            raise UsageError(f"{where} has an empty image_id")
        known, first = seen.setdefault(image_id, (path, line))
        if known != path:
            raise UsageError(f"{where}: image id {image_id!r:.80} has two files, {known!r:.80} (line {first}) and {path!r:.80}")
        repeated += first != line
        if first == line:
            yield ListedImage(image_id, path)
    if not seen:
        raise UsageError(f"{table} has no rows")
    if repeated:
        print(f"{table}: {repeated:,} rows name an image again; it is taken once", flush=True)


def _table_rows(table: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """(line number, cells by column name) of every row."""
    line, delimiter, literal = 1, _delimiter(table), list[int]()
    try:
        with open(table, encoding="utf-8-sig", newline="") as file:
            names = header_cells(file.readline(), delimiter)
            for row in delimited_rows(file, delimiter, len(names), names.index("image")):
                if isinstance(row, Fault):
                    raise UsageError(f"{table}: line {row.number} cannot be read: {row.reason}")
                line = row.number
                if len(row.cells) != len(names):
                    raise UsageError(f"{table}: line {line} has {len(row.cells)} cells for {len(names)} columns")
                cells = dict(zip(names, row.cells, strict=True))
                if row.literal and '"' in cells["image"] + cells.get("image_id", ""):
                    raise UsageError(
                        f"{table}: line {line} cannot be read: the quotation mark of {cells['image'][:80]!r:.80} does not close"
                    )
                literal += [line] * row.literal
                yield line, cells
    except UnicodeDecodeError:
        raise UsageError(f"{table} is not UTF-8 after line {line}; save it as UTF-8") from None
    for note in literal_notes(literal):
        print(f"{table}: {note}", flush=True)


def _delimiter(table: Path) -> str:
    """The one delimiter with which the first line has a column ``image``, and no column name is repeated."""
    with open(table, "rb") as file:
        header = file.readline(65536).decode("utf-8-sig", "replace").rstrip("\r\n")
    found = [mark for mark in DELIMITERS if "image" in header_cells(header, mark)]
    if not found:
        marks = " or ".join(DELIMITERS.values())
        raise UsageError(
            f"{table} is neither a Parquet manifest nor a table with a column 'image' ({marks} separated): {header[:80]!r:.80}"
        )
    names = header_cells(header, found[0])
    if len(names) != len(set(names)):
        raise UsageError(f"{table} has a column name twice: {shown_names(names)}")
    return found[0]


# --- tar files ---------------------------------------------------------------------------------------------------------------------


def _matching_tars(pattern: Path) -> list[Path]:
    tars = [Path(name) for name in sorted(glob.glob(str(pattern), recursive=True))]
    if not tars and not glob.has_magic(str(pattern)):
        raise UsageError(f"images folder {pattern} does not exist or is not a folder")
    if not tars:
        raise UsageError(f"no tar file matches {pattern}")
    return tars


def _tar_source(given: Path, tars: list[Path]) -> ImageList:
    """The images in ``tars``. Only headers are read, and no member's name ever becomes a path."""
    root = given if given.is_dir() else _fixed_part(given)
    items: list[ListedImage] = []
    home: dict[str, str] = {}
    with Progress("index", len(tars), "tar files") as progress:
        for tar in tars:
            name = tar.relative_to(root).as_posix()
            for key, part in _members(tar):
                if key in home:
                    raise UsageError(f"image id {key!r:.80} stands in {home[key]} and in {name}; keys must be unique over all tar files")
                home[key] = name
                items.append(ListedImage(key, name, part))
            progress.update()
    if not items:
        raise UsageError(f"{given} holds no images ({', '.join(sorted(SUFFIXES))})")
    return ImageList(root, items)


def _fixed_part(pattern: Path) -> Path:
    """The folder above the first part of ``pattern`` that has a wildcard."""
    folder = pattern.parent
    while glob.has_magic(str(folder)):
        folder = folder.parent
    return folder


def _members(tar: Path) -> Iterator[tuple[str, Part]]:
    """(key, where) of every image member: the key is the member's name without its suffix."""
    count = 0
    try:
        with tarfile.open(tar, "r:") as archive:
            for member in archive:
                key, suffix = os.path.splitext(re.sub(r"^(\./)+", "", member.name))
                if member.isreg() and suffix.lower() in SUFFIXES | MORE_SUFFIXES and not os.path.basename(key).startswith("."):
                    yield key, (member.offset_data, member.size)
                count += 1
                archive.members = []  # type: ignore[attr-defined]  # it would keep every header
            if tar.stat().st_size <= archive.offset:  # cut off between two members
                raise tarfile.ReadError("no end mark")
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        raise UsageError(
            f"{tar} is not a whole, uncompressed tar file ({str(error) or type(error).__name__} after {count:,} members); "
            "unpack a compressed one, fetch a damaged one again, or leave it out"
        ) from None
