"""Manifests: which caption belongs to which image, and which boxes lie in it, as Parquet tables.

Two schemas. ``PAIRS_SCHEMA`` has one row per (image, caption) pair, ``BOXES_SCHEMA`` one row per image with its labelled boxes.
Image paths are relative to the images folder and use forward slashes; ids are data and are never used to build a path.
"""

import errno
import hashlib
import os
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from megainter.data.mapped import string_buffers
from megainter.errors import NoSpaceError, UsageError
from megainter.files import fsync_folder

SPLITS = ("train", "val", "test", "")
PAIRS_SCHEMA = pa.schema([(name, pa.string()) for name in ("pair_id", "image_id", "image", "caption", "split")])
BOXES_SCHEMA = pa.schema(
    [
        ("image_id", pa.string()),
        ("image", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("boxes", pa.list_(pa.list_(pa.float32()))),
        ("labels", pa.list_(pa.string())),
        ("split", pa.string()),
    ]
)
BOX_TOLERANCE = 1.0  # pixels a box may stand out of its image: annotators count the last pixel in or out
ROWS_PER_GROUP = 65536
Row = TypeVar("Row")


@dataclass(frozen=True)
class Pair:
    """One caption of one image. ``image`` is relative to the images folder; ``split`` is one of ``SPLITS``."""

    pair_id: str
    image_id: str
    image: str
    caption: str
    split: str = ""


@dataclass(frozen=True, eq=False)
class FoundImages:
    """Where the images of some pairs are in a feature store: ``rows`` int32 [images] into its ids; ``store_digest`` says which store."""

    store_digest: str
    rows: np.ndarray


@dataclass(frozen=True, eq=False)
class Pairs:
    """All pairs of a manifest (or of one split), kept as Arrow columns.

    ``image_numbers`` int32 [rows]: number of the row's image, 0 .. n_images - 1 in order of first appearance.
    ``image_ids``: number -> image_id. ``digest``: SHA-256 over the content, the same however the Parquet file is encoded.
    ``found`` and ``chinese_share`` (of the captions) are known of pairs that `megainter.data.pairs_index` opened, whose table has the
    columns pair_id and caption alone.
    """

    table: pa.Table
    image_numbers: np.ndarray
    image_ids: Sequence[str]
    digest: str
    found: FoundImages | None = None
    chinese_share: float | None = None

    def __len__(self) -> int:
        return self.table.num_rows

    def caption(self, row: int) -> str:
        return self.table.column("caption")[row].as_py()

    def captions(self, rows: Iterable[int]) -> list[str]:
        """The captions of some rows. One by one: taking them from a column in many chunks would join these first."""
        column = self.table.column("caption")
        return [column[int(row)].as_py() for row in rows]

    def pair_id(self, row: int) -> str:
        return self.table.column("pair_id")[row].as_py()

    def image_id(self, row: int) -> str:
        return self.image_ids[int(self.image_numbers[row])]


@dataclass(frozen=True, eq=False)
class ImageBoxes:
    """The labelled boxes of one image: ``boxes`` float32 [n, 4], xyxy in pixels of a ``width`` x ``height`` frame."""

    image_id: str
    image: str
    width: int
    height: int
    boxes: np.ndarray
    labels: list[str]
    split: str = ""


class DuplicatePairError(UsageError):
    """Two rows with one pair id; ``first`` and ``second`` are their numbers, from 0, in the order they were written."""

    def __init__(self, path: Path, pair_id: str, first: int, second: int) -> None:
        super().__init__(f"{path}: pair id {pair_id!r:.80} stands in rows {first + 1} and {second + 1}; pair ids must be unique")
        self.pair_id, self.first, self.second = pair_id, first, second


def read_pairs(path: Path, split: str | None = None) -> Pairs:
    """Read a manifest of pairs, or its rows of one split.

    ``UsageError`` for a missing file, another schema, missing values, an unknown split, a duplicate pair id, an image id with two
    paths, a path that leaves the images folder, or a split without rows.
    """
    table = keep_split(path, read_table(path, PAIRS_SCHEMA), split)
    _refuse_duplicate_pairs(path, table)
    numbers, ids = _numbered(table.column("image_id"))
    _refuse_two_paths(path, table, numbers, ids)
    return Pairs(table, numbers, ids.to_pylist(), _content_digest(table))


def has_split(path: Path, split: str) -> bool:
    """Whether a manifest of pairs has rows of ``split``: what the file says of its row groups answers, else their column of splits."""
    file = open_parquet(path)
    refuse_other_columns(path, file, PAIRS_SCHEMA)
    return any(_group_has(file, group, split) for group in range(file.num_row_groups))


def _group_has(file: pq.ParquetFile, group: int, split: str) -> bool:
    columns = file.metadata.schema
    place = next(i for i in range(len(columns)) if columns.column(i).path == "split")
    statistics = file.metadata.row_group(group).column(place).statistics
    known = statistics is not None and statistics.has_min_max and isinstance(statistics.min, str)
    if known and not statistics.min <= split <= statistics.max:
        return False
    values = file.read_row_group(group, columns=["split"]).column("split").cast(pa.string())
    return bool(pc.any(pc.equal(values, split)).as_py())


def write_pairs(path: Path, rows: Iterable[Pair]) -> int:
    """Write pairs as they come, atomically, and return how many.

    ``DuplicatePairError`` where a pair id comes twice, ``UsageError`` where an image id has two paths or a row cannot be read back.
    """
    hashes = array("Q")

    def batches() -> Iterator[pa.RecordBatch]:
        for rows_of_group in groups(rows):
            hashes.extend(_hash64(row.pair_id) for row in rows_of_group)
            columns = [[getattr(row, name) for row in rows_of_group] for name in PAIRS_SCHEMA.names]
            yield record_batch(path, columns, PAIRS_SCHEMA)

    with parquet_aside(path, PAIRS_SCHEMA) as aside:
        write_batches(path, aside, PAIRS_SCHEMA, batches())
        _refuse_repeated_hashes(path, aside, np.frombuffer(hashes, np.uint64))
        images = pq.read_table(aside, columns=["image_id", "image"])
        _refuse_missing_values(path, images)
        _refuse_two_paths(path, images, *_numbered(images.column("image_id")))
    return len(hashes)


def read_boxes(path: Path, split: str | None = None) -> list[ImageBoxes]:
    """Read a manifest of boxes, or its rows of one split. ``UsageError`` as for pairs, and for boxes outside their image or reversed."""
    table = keep_split(path, read_table(path, BOXES_SCHEMA), split)
    refuse_escaping_paths(path, table)
    images = [_image_boxes(path, row) for batch in table.to_batches() for row in batch.to_pylist()]
    seen: set[str] = set()
    for image in images:
        if image.image_id in seen:
            raise UsageError(f"{path}: image id {image.image_id!r:.80} stands in two rows; image ids must be unique")
        seen.add(image.image_id)
    return images


def write_boxes(path: Path, rows: Iterable[ImageBoxes]) -> int:
    """Write images with boxes as they come, atomically, and return how many. ``UsageError`` for a bad box."""
    count = 0

    def batches() -> Iterator[pa.RecordBatch]:
        nonlocal count
        for images in groups(rows):
            for image in images:
                _check_boxes(path, image)
            columns = [[_cell(image, name) for image in images] for name in BOXES_SCHEMA.names]
            count += len(images)
            yield record_batch(path, columns, BOXES_SCHEMA)

    with parquet_aside(path, BOXES_SCHEMA) as aside:
        write_batches(path, aside, BOXES_SCHEMA, batches())
    return count


def is_boxes_manifest(path: Path) -> bool:
    """True where the Parquet file has box columns, False where it has captions; ``UsageError`` where it is neither."""
    names = set(open_parquet(path).schema_arrow.names)
    if not names & {"boxes", "caption"}:
        raise UsageError(f"{path} is no manifest: it has columns {', '.join(sorted(names))}, neither 'caption' nor 'boxes'")
    return "boxes" in names


def check_relative(relative: str) -> str | None:
    """Why ``relative`` is no path inside a folder, or None where it is one. Lexical: symbolic links are checked when the file is opened."""
    if not relative or "\0" in relative:
        return "is empty or holds a NUL"
    if relative.startswith("/") or ".." in relative.split("/"):
        return "leaves the images folder"
    return None


@contextmanager
def parquet_aside(path: Path, schema: pa.Schema) -> Iterator[Path]:
    """A file beside ``path`` that takes its place where the block ends well, and vanishes where it does not.

    ``UsageError`` at once where ``path`` is there and is something else than a table with the columns of ``schema``.
    """
    _refuse_another_file(path, schema)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield aside
        with open(aside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
        fsync_folder(path.parent)
    finally:
        aside.unlink(missing_ok=True)


def _refuse_another_file(path: Path, schema: pa.Schema) -> None:
    if not path.exists():
        return
    try:
        names = open_parquet(path).schema_arrow.names
    except UsageError:
        names = []
    if names != schema.names:
        what = "a folder" if path.is_dir() else "another file than this command writes"
        raise UsageError(f"{path} is there, and is {what}; give another name, or remove it first")


def write_batches(path: Path, aside: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
    """Write record batches to ``aside`` as they come. ``NoSpaceError`` or ``UsageError`` that names ``path`` where the disk refuses."""
    try:
        with pq.ParquetWriter(aside, schema, compression="zstd") as writer:
            for batch in batches:
                writer.write_batch(batch)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpaceError(f"{path} cannot be written: no space left; free space and run the same command") from None
        raise UsageError(f"{path} cannot be written: {error.strerror or error}") from None


def open_parquet(path: Path, made_by: str = "`megainter prepare` writes manifests") -> pq.ParquetFile:
    """Open a Parquet file; a ``UsageError`` where it is missing or something else."""
    if not path.is_file():
        raise UsageError(f"{path} does not exist or is not a file; {made_by}")
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise UsageError(f"{path} is not a Parquet file: {str(error).splitlines()[0]}") from None


def groups(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Lists of up to ``ROWS_PER_GROUP`` rows, as they come."""
    iterator = iter(rows)
    while group := list(islice(iterator, ROWS_PER_GROUP)):
        yield group


def _hash64(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _cell(image: ImageBoxes, name: str) -> object:
    value = getattr(image, name)
    return value.astype(np.float32).tolist() if name == "boxes" else value


def record_batch(path: Path, columns: list[list], schema: pa.Schema) -> pa.RecordBatch:
    """Columns of Python values as Arrow; ``UsageError`` where they do not fit or a split is unknown."""
    try:
        batch = pa.record_batch([pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)], schema=schema)
    except (pa.ArrowInvalid, pa.ArrowTypeError, UnicodeEncodeError) as error:
        raise UsageError(f"{path}: a row does not fit the manifest's columns: {error}") from None
    for split in set(batch.column("split").to_pylist()) - set(SPLITS):
        raise UsageError(f"{path}: split {split!r:.80} is not one of 'train', 'val', 'test' or empty")
    return batch


def read_table(path: Path, schema: pa.Schema) -> pa.Table:
    """A Parquet file's columns of ``schema``; ``UsageError`` for another file, other columns and missing values."""
    file = open_parquet(path)
    refuse_other_columns(path, file, schema)
    with _readable(path):
        table = file.read(columns=schema.names).select(schema.names).cast(schema).combine_chunks()
    _refuse_missing_values(path, table)
    return table


def read_in_parts(path: Path, schema: pa.Schema) -> Iterator[pa.Table]:
    """A Parquet file's columns of ``schema`` in tables of at most ``ROWS_PER_GROUP`` rows. ``UsageError`` as for ``read_table``."""
    file, row = open_parquet(path), 0
    refuse_other_columns(path, file, schema)
    every = range(file.num_row_groups)  # one at a time: a reader of all of them keeps what it has read of the file
    parts = chain.from_iterable(file.iter_batches(ROWS_PER_GROUP, row_groups=[group], columns=schema.names) for group in every)
    while True:
        with _readable(path):
            batch = next(parts, None)
            if batch is None:
                return
            table = pa.Table.from_batches([batch]).select(schema.names).cast(schema).combine_chunks()
        _refuse_missing_values(path, table, row)
        yield table
        row += len(table)


def refuse_other_columns(path: Path, file: pq.ParquetFile, schema: pa.Schema) -> None:
    """``UsageError`` where a Parquet file lacks columns of ``schema``."""
    missing = [name for name in schema.names if name not in file.schema_arrow.names]
    if missing:
        raise UsageError(f"{path} has no column {', '.join(missing)}; a manifest has {', '.join(schema.names)}")


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise UsageError(f"{path} cannot be read as a manifest: {str(error).splitlines()[0]}") from None


def _refuse_missing_values(path: Path, table: pa.Table, rows_before: int = 0) -> None:
    for name in table.schema.names:
        if table.column(name).null_count:
            row = pc.index(pc.is_null(table.column(name)), True).as_py()
            raise UsageError(f"{path}: row {rows_before + row + 1} has no {name}")
    for name in {"pair_id", "question_id", "image_id", "image"} & set(table.schema.names):
        row = pc.index(table.column(name), "").as_py()
        if row >= 0:
            raise UsageError(f"{path}: row {rows_before + row + 1} has an empty {name}")


def keep_split(path: Path, table: pa.Table, split: str | None) -> pa.Table:
    """The rows of one split, or all; ``UsageError`` where there are none."""
    counts = split_counts(path, table)
    refuse_absent_split(path, counts, split)
    return table if split is None else rows_of_split(table, split)


def rows_of_split(table: pa.Table, split: str) -> pa.Table:
    """The rows of one split."""
    return table.filter(pc.equal(table.column("split"), split)).combine_chunks()


def split_counts(path: Path, table: pa.Table) -> dict[str, int]:
    """Rows of each split; ``UsageError`` for an unknown one."""
    counts = {entry["values"]: entry["counts"] for entry in pc.value_counts(table.column("split")).to_pylist()}
    for name in set(counts) - set(SPLITS):
        raise UsageError(f"{path}: split {name!r:.80} is not one of 'train', 'val', 'test' or empty")
    return counts


def refuse_absent_split(path: Path, counts: Mapping[str, int], split: str | None) -> None:
    """``UsageError`` where a manifest with so many rows of each split has none, or none of ``split``."""
    if not any(counts.values()):
        raise UsageError(f"{path} has no rows")
    if split is not None and not counts.get(split):
        has = ", ".join(f"{name or '(none)'} {count:,}" for name, count in sorted(counts.items()))
        given = "; `prepare --split train` gives captions without a split one" if "" in counts else ""
        raise UsageError(f"{path} has no rows of split {split!r:.80}; it has {has}{given}")


def refuse_contradictions(path: Path, split: str | None) -> None:
    """``UsageError`` for a pair id that comes twice and an image id with two paths, by the whole columns; memory for all of them."""
    columns = ["pair_id", "image_id", "image", "split"]
    table = read_table(path, pa.schema([PAIRS_SCHEMA.field(name) for name in columns]))
    table = keep_split(path, table, split)
    _refuse_duplicate_pairs(path, table)
    _refuse_two_paths(path, table, *_numbered(table.column("image_id")))


def _refuse_duplicate_pairs(path: Path, table: pa.Table) -> None:
    column = table.column("pair_id")
    if pc.count_distinct(column).as_py() == len(column):
        return
    counts = pc.value_counts(column)
    repeated = counts.field("values")[pc.index(pc.greater(counts.field("counts"), 1), True).as_py()]
    rows = np.flatnonzero(pc.equal(column, repeated).to_numpy())
    raise DuplicatePairError(path, repeated.as_py(), int(rows[0]), int(rows[1]))


def _refuse_repeated_hashes(path: Path, aside: Path, hashes: np.ndarray) -> None:
    """64-bit hashes find the candidates without keeping the ids; the ids written decide."""
    order = np.argsort(hashes, kind="stable")
    repeats = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])
    if not len(repeats):
        return
    ids = pq.read_table(aside, columns=["pair_id"]).column("pair_id")
    for second, first in sorted((int(order[at + 1]), int(order[at])) for at in repeats):  # a stable sort keeps rows in order
        if ids[first] == ids[second]:
            raise DuplicatePairError(path, ids[first].as_py(), first, second)


def _numbered(column: pa.ChunkedArray) -> tuple[np.ndarray, pa.Array]:
    """int32 [rows] numbers in order of first appearance, and the value of each number."""
    encoded = pc.dictionary_encode(column).combine_chunks()
    encoded = encoded.chunk(0) if isinstance(encoded, pa.ChunkedArray) and encoded.num_chunks else encoded
    return encoded.indices.to_numpy().astype(np.int32, copy=False), encoded.dictionary


def _refuse_two_paths(path: Path, table: pa.Table, numbers: np.ndarray, ids: pa.Array) -> None:
    """Every image id has one path, and that path stays inside the images folder."""
    refuse_escaping_paths(path, table)
    paths, names = _numbered(table.column("image"))
    path_of_image = np.zeros(len(ids), paths.dtype)
    path_of_image[numbers] = paths
    clash = np.flatnonzero(path_of_image[numbers] != paths)
    if len(clash):
        row = int(clash[0])
        one, two = names[int(path_of_image[numbers[row]])].as_py(), names[int(paths[row])].as_py()
        raise UsageError(f"{path}: image id {ids[int(numbers[row])].as_py()!r:.80} has two files, {one!r:.80} and {two!r:.80}")


def refuse_escaping_paths(path: Path, table: pa.Table, rows_before: int = 0) -> None:
    """``UsageError`` where a path leaves the images folder; ``rows_before`` are those of earlier parts of the table."""
    column = table.column("image")
    suspect = pc.match_substring_regex(column, r"^/|(^|/)\.\.(/|$)|\x00")
    row = pc.index(suspect, True).as_py()
    if row >= 0:
        raise UsageError(f"{path}: row {rows_before + row + 1}: image {column[row].as_py()!r:.80} {check_relative(column[row].as_py())}")


class ContentDigest:
    """SHA-256 over names, string lengths and bytes of every column of tables end to end: parts, chunks and encoding do not enter it."""

    def __init__(self, names: Sequence[str]) -> None:
        self.rows = 0
        self._columns = {name: (hashlib.sha256(), hashlib.sha256()) for name in names}

    def update(self, table: pa.Table) -> None:
        """Go on with the rows of ``table``."""
        self.rows += len(table)
        for name, (lengths, content) in self._columns.items():
            for chunk in table.column(name).chunks:
                offsets, characters = string_buffers(chunk)
                lengths.update(np.diff(offsets).astype("<i4").tobytes())
                content.update(characters.data)

    def hexdigest(self) -> str:
        """The digest of all rows so far."""
        total = hashlib.sha256(str(self.rows).encode())
        for name, (lengths, content) in self._columns.items():
            total.update(name.encode() + lengths.digest() + content.digest())
        return total.hexdigest()


def digest_of_kept(digest: str, keep: np.ndarray) -> str:
    """The digest of those rows of pairs with ``digest`` that ``keep`` bool [rows] names."""
    return hashlib.sha256(digest.encode() + np.packbits(keep).tobytes()).hexdigest()


def _content_digest(table: pa.Table) -> str:
    digest = ContentDigest(table.schema.names)
    digest.update(table)
    return digest.hexdigest()


def _image_boxes(path: Path, row: dict) -> ImageBoxes:
    if any(box is None or len(box) != 4 for box in row["boxes"]):
        raise UsageError(f"{path}: image {row['image_id']!r:.80} has a box that is not four numbers")
    row["boxes"] = np.asarray(row["boxes"], np.float32).reshape(-1, 4)
    image = ImageBoxes(**row)
    _check_boxes(path, image)
    return image


def _check_boxes(path: Path, image: ImageBoxes) -> None:
    if problem := box_problem(image):
        raise UsageError(f"{path}: {problem}")


def box_problem(image: ImageBoxes) -> str | None:
    """What is wrong: boxes and labels differ in number, or a box is not xyxy inside its image (often xywh taken for xyxy). Else None."""
    where, boxes = f"image {image.image_id!r:.80}", image.boxes
    if image.width <= 0 or image.height <= 0:
        return f"{where} has size {image.width} x {image.height}"
    if len(boxes) != len(image.labels) or boxes.ndim != 2 or boxes.shape[1] != 4:
        return f"{where} has boxes of shape {boxes.shape} for {len(image.labels)} labels"
    limit = np.array([image.width, image.height] * 2, np.float32) + BOX_TOLERANCE
    bad = ~(np.isfinite(boxes) & (boxes >= -BOX_TOLERANCE) & (boxes <= limit)).all(1) | (boxes[:, 2:] < boxes[:, :2]).any(1)
    if bad.any():
        box = boxes[int(np.argmax(bad))].tolist()
        return f"{where} ({image.width} x {image.height}) has box {box}, which is not x1, y1, x2, y2 inside it"
    return None
