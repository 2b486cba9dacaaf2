"""Parquet tables on the disk: opened and read strictly, in parts, written aside; splits and digests."""

import filecmp
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from megainter.data.mapped import string_buffers
from megainter.errors import UsageError
from megainter.files import aside
from megainter.kinds import instead
from megainter.paths import not_a_file

SPLITS = ("train", "val", "test", "")
ROWS_PER_GROUP = 65536
Row = TypeVar("Row")


def check_relative(relative: str) -> str | None:
    """Why ``relative`` is no path inside a folder, or None where it is one. Lexical: symbolic links are checked when the file is opened."""
    if not relative or "\0" in relative:
        return "is empty or holds a NUL"
    if relative.startswith("/") or ".." in relative.split("/"):
        return "leaves the images folder"
    return None


@contextmanager
def parquet_aside(path: Path, schema: pa.Schema, replace: bool = True) -> Iterator[Path]:
    """``files.aside`` in a folder that is made. ``UsageError`` at once where ``path`` is something else than a table with these columns.

    Without ``replace`` a table that is there stays, and ``UsageError`` says so, unless the new one is the same.
    """
    _refuse_another_file(path, schema)
    path.parent.mkdir(parents=True, exist_ok=True)
    with aside(path) as partial:
        yield partial
        if not replace and path.exists() and not filecmp.cmp(partial, path, shallow=False):
            raise UsageError(f"{path} is there with other content, and stays: add --replace to put the new table in its place")


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


def write_batches(partial: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
    """Write record batches to ``partial`` as they come."""
    with pq.ParquetWriter(partial, schema, compression="zstd") as writer:
        for batch in batches:
            writer.write_batch(batch)


def write_parquet(path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
    """Write record batches as they come, the file whole or not at all; raises as ``files.aside`` where the disk refuses."""
    with aside(path) as partial:
        write_batches(partial, schema, batches)


def open_parquet(path: Path, made_by: str = "`megainter prepare` writes manifests") -> pq.ParquetFile:
    """Open a Parquet file; a ``UsageError`` where it is missing or something else."""
    if not path.is_file():
        raise UsageError(f"{not_a_file(path)}; {made_by}{instead(path)}")
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise UsageError(f"{path} {_damage(path, error)}; {made_by}") from None


def _damage(path: Path, error: Exception) -> str:
    """What is wrong with a file that does not open as Parquet: it begins and ends with the same four letters where it is whole."""
    try:
        with open(path, "rb") as file:
            begins = file.read(4) == b"PAR1"
            file.seek(max(0, path.stat().st_size - 4))
            ends = file.read() == b"PAR1"
    except OSError as unreadable:
        return f"cannot be read ({unreadable.strerror})"
    if begins and not ends:
        return "is cut off: it begins as a Parquet file and has no end; make it again"
    return f"is damaged ({str(error).splitlines()[0]:.120})" if begins else "is not a Parquet file"


def groups(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Lists of up to ``ROWS_PER_GROUP`` rows, as they come."""
    iterator = iter(rows)
    while group := list(islice(iterator, ROWS_PER_GROUP)):
        yield group


def hash64(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


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
    refuse_missing_values(path, table)
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
        refuse_missing_values(path, table, row)
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


def refuse_missing_values(path: Path, table: pa.Table, rows_before: int = 0) -> None:
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
        raise UsageError(f"{path} has no rows of split {split!r:.80}; it has {has} (data.split and validation.split, or --split){given}")


def numbered(column: pa.ChunkedArray) -> tuple[np.ndarray, pa.Array]:
    """int32 [rows] numbers in order of first appearance, and the value of each number."""
    encoded = pc.dictionary_encode(column).combine_chunks()
    encoded = encoded.chunk(0) if isinstance(encoded, pa.ChunkedArray) and encoded.num_chunks else encoded
    return encoded.indices.to_numpy().astype(np.int32, copy=False), encoded.dictionary


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
