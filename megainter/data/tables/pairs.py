"""Pairs: which caption belongs to which image, one row per (image, caption) pair of a Parquet table (``PAIRS_SCHEMA``).

Image paths are relative to the images folder and use forward slashes; ids are data and are never used to build a path.
"""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from megainter.data.tables.parquet import (
    ContentDigest,
    groups,
    hash64,
    keep_split,
    numbered,
    open_parquet,
    parquet_aside,
    read_table,
    record_batch,
    refuse_escaping_paths,
    refuse_missing_values,
    refuse_other_columns,
    write_batches,
)
from megainter.errors import UsageError

PAIRS_SCHEMA = pa.schema([(name, pa.string()) for name in ("pair_id", "image_id", "image", "caption", "split")])


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
    ``found`` and ``chinese_share`` (of the captions) are known of pairs that `megainter.data.pairs_index.index` opened, whose table has the
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
    numbers, ids = numbered(table.column("image_id"))
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


def write_pairs(path: Path, rows: Iterable[Pair], replace: bool = True) -> int:
    """Write pairs as they come, atomically, and return how many; ``replace`` as in ``parquet.parquet_aside``.

    ``DuplicatePairError`` where a pair id comes twice, ``UsageError`` where an image id has two paths or a row cannot be read back.
    """
    hashes = array("Q")

    def batches() -> Iterator[pa.RecordBatch]:
        for rows_of_group in groups(rows):
            hashes.extend(hash64(row.pair_id) for row in rows_of_group)
            columns = [[getattr(row, name) for row in rows_of_group] for name in PAIRS_SCHEMA.names]
            yield record_batch(path, columns, PAIRS_SCHEMA)

    with parquet_aside(path, PAIRS_SCHEMA, replace) as partial:
        write_batches(partial, PAIRS_SCHEMA, batches())
        _refuse_repeated_hashes(path, partial, np.frombuffer(hashes, np.uint64))
        images = pq.read_table(partial, columns=["image_id", "image"])
        refuse_missing_values(path, images)
        _refuse_two_paths(path, images, *numbered(images.column("image_id")))
    return len(hashes)


def refuse_contradictions(path: Path, split: str | None) -> None:
    """``UsageError`` for a pair id that comes twice and an image id with two paths, by the whole columns; memory for all of them."""
    columns = ["pair_id", "image_id", "image", "split"]
    table = read_table(path, pa.schema([PAIRS_SCHEMA.field(name) for name in columns]))
    table = keep_split(path, table, split)
    _refuse_duplicate_pairs(path, table)
    _refuse_two_paths(path, table, *numbered(table.column("image_id")))


def _refuse_duplicate_pairs(path: Path, table: pa.Table) -> None:
    column = table.column("pair_id")
    if pc.count_distinct(column).as_py() == len(column):
        return
    counts = pc.value_counts(column)
    repeated = counts.field("values")[pc.index(pc.greater(counts.field("counts"), 1), True).as_py()]
    rows = np.flatnonzero(pc.equal(column, repeated).to_numpy())
    raise DuplicatePairError(path, repeated.as_py(), int(rows[0]), int(rows[1]))


def _refuse_repeated_hashes(path: Path, partial: Path, hashes: np.ndarray) -> None:
    """64-bit hashes find the candidates without keeping the ids; the ids written decide."""
    order = np.argsort(hashes, kind="stable")
    repeats = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])
    if not len(repeats):
        return
    ids = pq.read_table(partial, columns=["pair_id"]).column("pair_id")
    for second, first in sorted((int(order[at + 1]), int(order[at])) for at in repeats):  # a stable sort keeps rows in order
        if ids[first] == ids[second]:
            raise DuplicatePairError(path, ids[first].as_py(), first, second)


def _refuse_two_paths(path: Path, table: pa.Table, numbers: np.ndarray, ids: pa.Array) -> None:
    """Every image id has one path, and that path stays inside the images folder."""
    refuse_escaping_paths(path, table)
    paths, names = numbered(table.column("image"))
    path_of_image = np.zeros(len(ids), paths.dtype)
    path_of_image[numbers] = paths
    clash = np.flatnonzero(path_of_image[numbers] != paths)
    if len(clash):
        row = int(clash[0])
        one, two = names[int(path_of_image[numbers[row]])].as_py(), names[int(paths[row])].as_py()
        raise UsageError(f"{path}: image id {ids[int(numbers[row])].as_py()!r:.80} has two files, {one!r:.80} and {two!r:.80}")


def _content_digest(table: pa.Table) -> str:
    digest = ContentDigest(table.schema.names)
    digest.update(table)
    return digest.hexdigest()
