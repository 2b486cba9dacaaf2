"""Caption tables with named columns: CSV, Parquet, and what img2dataset writes beside the images it downloads."""

from collections.abc import Iterator
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from megainter.data.tables.parquet import open_parquet
from megainter.errors import UsageError
from preprocessing.prepare.caption_sources.addresses import Address, names_of
from preprocessing.prepare.caption_sources.embedded import ROWS_AT_ONCE, EmbeddedImages, holds_images
from preprocessing.prepare.delimited import Fault, delimited_rows, header_cells, literal_notes, shown_names
from preprocessing.prepare.reading import (
    CAPTION_NAMES,
    IMAGE_NAMES,
    NOT_DOWNLOADED,
    UTF8,
    Fields,
    Item,
    Items,
    Reading,
    Unusable,
    decodable,
    is_broken,
    named,
    not_utf8,
    record_item,
    text,
    text_encoding,
)

DELIMITERS = (",", "\t", ";", "|")
DOWNLOADED = {"key", "url", "caption", "status"}  # columns of img2dataset's tables
DOWNLOADED_IMAGES = ("jpg", "png", "webp")  # its columns of images, where its output is Parquet


def table_of_csv(src: Path, fields: Fields, encoding: str | None = None) -> Reading[Item]:
    """A header line, then a row for each caption; the delimiter is the one that the header has most of."""
    found = text_encoding(src, encoding)
    raw = open(src, "rb")  # noqa: SIM115 (closed by the generator)
    file = TextIOWrapper(raw, encoding=found, errors="surrogateescape" if found == UTF8 else "strict", newline="")
    lines = decodable(src, file)
    header = next(lines, "")
    delimiter = max(DELIMITERS, key=header.count)
    columns = header_cells(header, delimiter)
    given, fields = fields, named(tuple(columns), fields)
    _refuse_missing(src, columns, fields)

    literal = list[int]()
    items = _csv_items(file, lines, columns, delimiter, fields, literal)
    notes = partial(_csv_notes, given, fields, literal)
    return Reading(items, src.stat().st_size, "bytes", raw.tell, notes=notes)


def _csv_notes(given: Fields, fields: Fields, literal: list[int]) -> list[str]:
    return [*_names_taken(given, fields), *literal_notes(literal)]


def _names_taken(given: Fields, fields: Fields) -> list[str]:
    """What the user should know of columns that were taken without having been named, under other names than the first usual ones."""
    taken = [f"captions from column {fields.captions!r:.80}"] if fields.captions not in (given.captions, "caption", "captions") else []
    taken += [f"images from column {fields.image!r:.80}"] if fields.image not in (given.image, "image") else []
    return [f"note: {', '.join(taken)} (--captions and --image-field name others)"] if taken else []


def _csv_items(file: TextIO, lines: Iterator[str], columns: list[str], delimiter: str, fields: Fields, literal: list[int]) -> Items:
    """``literal`` takes the lines in which quotation marks were taken for text."""
    with file:
        for row in delimited_rows(lines, delimiter, len(columns), columns.index(fields.image or "image")):
            if isinstance(row, Fault):
                yield Unusable(row.number, row.reason)
                continue
            if row.literal:
                literal.append(row.number)
            try:
                yield _csv_item(row.number, row.cells, columns, fields)
            except ValueError as error:
                yield Unusable(row.number, str(error))


def _csv_item(number: int, row: list[str], columns: list[str], fields: Fields) -> Item:
    if len(row) != len(columns):
        raise ValueError(f"{len(row)} columns, the header has {len(columns)}")
    if broken := next(filter(is_broken, row), None):
        raise ValueError(not_utf8(broken))
    return record_item(number, {name: cell for name, cell in zip(columns, row, strict=True) if cell or name != "image_id"}, fields)


def table_of_parquet(src: Path, fields: Fields, images: Path | None = None) -> Reading[Item]:
    """A Parquet file, or a folder of them in the order of their names; img2dataset's are known by their columns.

    Where the column of images holds these and not their paths, they are written to ``images``, which is made.
    """
    files = sorted(src.glob("*.parquet")) if src.is_dir() else [src]
    if not files:
        raise UsageError(f"folder {src} has no *.parquet")
    opened = [open_parquet(file, made_by="give a Parquet file or a folder of them") for file in files]
    columns = opened[0].schema_arrow.names
    downloaded, taken = set(columns) >= DOWNLOADED and fields.image is None, list[str]()
    if not downloaded:
        if fields.image_names is not None:
            raise UsageError(f"{src}: image names are for tables of img2dataset, which have columns {', '.join(sorted(DOWNLOADED))}")
        given, fields = fields, named(tuple(columns), fields)
        _refuse_missing(src, columns, fields)
        taken = _names_taken(given, fields)
    total = sum(file.metadata.num_rows for file in opened)
    names = DOWNLOADED_IMAGES if downloaded else (fields.image or "image",)
    column = next((name for name in names if name in columns and holds_images(opened[0].schema_arrow.field(name).type)), None)
    embedded = EmbeddedImages(images) if column is not None else None
    items = _downloaded_items(files, fields, column, embedded) if downloaded else _parquet_items(files, fields, embedded)
    if embedded is None:
        return Reading(items, total, "rows", place="row", notes=lambda: taken)
    where = f"written to {images}" if images is not None else "not written anywhere; give --images FOLDER to have them there"
    return Reading(items, total, "rows", place="row", notes=lambda: [*taken, f"note: the images stand in the table and were {where}"])


def is_download(src: Path) -> bool:
    """True for a folder or file that img2dataset can have written: Parquet."""
    return src.suffix == ".parquet" or (src.is_dir() and any(src.glob("*.parquet")))


def _parquet_items(files: list[Path], fields: Fields, embedded: EmbeddedImages | None = None) -> Items:
    image = fields.image or "image"
    wanted = {fields.captions, image, fields.split or "split", fields.pair_id or "pair_id", "image_id"}
    wanted |= set() if fields.captions else {"caption", "captions"}
    for number, file, row in _rows(files, {name for name in wanted if name}, ROWS_AT_ONCE if embedded else 8192):
        try:
            placed = {} if embedded is None else {image: embedded.place(row[image], file.stem, number)}
            yield record_item(number, row | placed, fields, "row")
        except ValueError as error:
            yield Unusable(number, str(error))


def _downloaded_items(files: list[Path], fields: Fields, column: str | None, embedded: EmbeddedImages | None) -> Items:
    """Images lie in SHARD/KEY.jpg beside SHARD.parquet (output format "files"), in SHARD.tar ("webdataset"), where the key is the id, or in
    the table itself, in ``column`` ("parquet").

    Keys are unique over all shards.
    """
    paths = names_of(fields.image_names or "{shard}/{key}.jpg,{shard}/{key}.png,{shard}/{key}.webp")
    caption = fields.captions or "caption"
    wanted = DOWNLOADED | {caption} | ({column} if column is not None else set())
    for number, file, row in _rows(files, wanted, 8192 if embedded is None else ROWS_AT_ONCE):
        try:
            if row["status"] != "success":
                yield Unusable(number, f"{row['url']!r:.80} {row['status']}", NOT_DOWNLOADED)
                continue
            key = text(row, "key")
            address = Address(number, row["url"] or "", shard=file.stem, key=key)
            image_id = key if file.with_suffix(".tar").exists() else None
            found = paths(address)
            if embedded is not None and column is not None:
                found = (embedded.place({"bytes": row[column], "path": f"{file.stem}/{key}.{column}"}, file.stem, number),)
            said = text(row, caption, "") if row[caption] is not None else ""  # an address without a caption is no fault
            yield Item(number, found, [said], [f"{file.stem}/{key}"], image_id)
        except ValueError as error:
            yield Unusable(number, str(error))


def _rows(files: list[Path], columns: set[str], at_once: int = 8192) -> Iterator[tuple[int, Path, dict[str, Any]]]:
    """(number from 1 over all files, file, row) of those columns that are there."""
    number = 0
    for path in files:
        file = open_parquet(path, made_by="give a Parquet file or a folder of them")
        for batch in _batches(path, file, [name for name in file.schema_arrow.names if name in columns], at_once):
            for row in batch.to_pylist():
                number += 1
                yield number, path, row


def _batches(path: Path, file: pq.ParquetFile, columns: list[str], at_once: int) -> Iterator[pa.RecordBatch]:
    try:
        yield from file.iter_batches(batch_size=at_once, columns=columns)
    except (pa.ArrowInvalid, OSError) as error:
        raise UsageError(f"{path} is damaged: {str(error).splitlines()[0]:.200}") from None


def _refuse_missing(src: Path, columns: list[str], fields: Fields) -> None:
    """``UsageError`` that names what is missing, and only that, with the option that names another column."""
    wanted = {
        "--image-field": fields.image or f"of images ({', '.join(IMAGE_NAMES)})",
        "--captions": fields.captions or f"of captions ({', '.join(CAPTION_NAMES)})",
        "--split-field": fields.split,
        "--id-field": fields.pair_id,
    }
    missing = {option: name for option, name in wanted.items() if name is not None and name not in columns}
    if missing:
        has = shown_names(columns) if columns else "no header line"
        raise UsageError(
            f"{src} has no column {' and no column '.join(missing.values())}; it has {has}: name yours with {', '.join(missing)}"
        )
