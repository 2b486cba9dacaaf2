"""The feature store: a folder that holds the regions of every image, written so that a kill loses nothing and read without surprises.

    store.json      format version, schema (sizes, class names, detector, settings), counts, digest, sealed or not
    index.arrow     one row per image, sorted by id: shard, place and length of its record, region count, CRC-32
    shard-*.lmdb    the records (`megainter.data.feature_store.record`), each shard with one writer at a time

While it is written, a shard is an LMDB environment: a transaction is there whole or not at all. Sealing then notes where each record
lies in its shard's file. A sealed store never changes, so reading a record is one ``pread`` and a checksum: no memory map that a
truncated file turns into SIGBUS, no environment that may be opened only once per process and never across a fork.
"""

import os
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from megainter.data.feature_store.first_regions import FirstRegions
from megainter.data.feature_store.record import AGAIN, RegionRecord, StoreSchema
from megainter.data.feature_store.shard import INDEX_SCHEMA, WAY_OUT, count_records, read_store_json, refuse_live_writers, shard_files
from megainter.data.feature_store.verified import VerifiedRecords, files_identity
from megainter.data.feature_store.views import RegionViews, decode, decode_views, first_bytes, probs_span
from megainter.data.feature_store.writer import index_digest, sorted_index
from megainter.data.lookup import Lookup
from megainter.errors import DamagedError, UsageError
from megainter.files import sha256_of

Result = TypeVar("Result")
READ_ATTEMPTS = 3  # network disks report passing input/output errors


class Ids(Sequence[str]):
    """The ids of a store in order, without a Python string for each until it is asked for."""

    def __init__(self, column: pa.LargeStringArray) -> None:
        self.column = column

    def __len__(self) -> int:
        return len(self.column)

    def __getitem__(self, row: Any) -> Any:
        return self.column[row].as_py() if not isinstance(row, slice) else self.column[row].to_pylist()

    def encoded(self, rows: np.ndarray) -> list[bytes]:
        """The ids of ``rows`` int64 [n] in UTF-8, without an Arrow scalar for each."""
        if not len(rows):
            return []
        _, offsets, content = self.column.buffers()
        ends = np.frombuffer(offsets, np.int64, len(self) + 1, 8 * self.column.offset)
        data = memoryview(content)
        return [data[first:end].tobytes() for first, end in zip(ends[rows].tolist(), ends[rows + 1].tolist(), strict=True)]


class FeatureStore:
    """Reads a feature store by image id; safe to use from threads, after a fork, and pickled to another process.

    ``UsageError`` where ``path`` is no store, ``DamagedError`` where it is unfinished (unless ``allow_partial``), truncated or its
    index does not match its checksum; ``LockedError`` for an unfinished store that is being written.
    """

    def __init__(self, path: Path | str, allow_partial: bool = False) -> None:
        self.path = Path(path)
        self._open(allow_partial, verify=True)

    def _open(self, allow_partial: bool, verify: bool) -> None:
        self._files: dict[int, BinaryIO] = {}
        self._allow_partial = allow_partial
        description = read_store_json(self.path)
        self.schema = StoreSchema.from_json(description["schema"])
        self.sealed: bool = description["sealed"]
        if not self.sealed and not allow_partial:
            raise DamagedError(self._incomplete())
        if self.sealed:
            shards = [(self.path / shard["name"], shard["bytes"]) for shard in description["shards"]]
            index = _read_index(self.path, description["index"], [size for _, size in shards] if verify else None)
        else:
            refuse_live_writers(self.path)
            shards = [(shard, shard.stat().st_size) for shard in shard_files(self.path)]
            index = sorted_index(self.path, [shard for shard, _ in shards])
        self._shards = shards
        for number in range(len(shards)):
            self._check_shard(number)
        self._set_index(index)
        self.digest: str = description["digest"] if self.sealed else index_digest(index)

    def _set_index(self, index: pa.Table) -> None:
        columns = {name: _joined(index.column(name)) for name in INDEX_SCHEMA.names}
        self.ids: Sequence[str] = Ids(columns.pop("id"))
        self._seen = VerifiedRecords(len(self.ids))  # by this process and its forks
        self._column = {name: column.to_numpy() for name, column in columns.items()}

    def __len__(self) -> int:
        return len(self.ids)

    def __contains__(self, image_id: object) -> bool:
        return isinstance(image_id, str) and self._row(image_id) >= 0

    def __getitem__(self, image_id: str) -> RegionRecord:
        """The record of one image; ``UsageError`` where there is none, ``DamagedError`` naming it where it is not as it was written."""
        return self._verified(image_id, self._existing_row(image_id))[1]

    def at(self, row: int, most: int | None = None) -> RegionViews:
        """The first ``most`` regions (None: all) of the record of ``ids[row]``: ``first_regions`` of one."""
        return self.first_regions(np.array([row]), most).views(0)

    def views(self, image_ids: Sequence[str], most: int | None = None) -> list[RegionViews]:
        """The first ``most`` regions (None: all) of some images: ``first_regions`` by id; ``UsageError`` where the store lacks one."""
        regions = self.first_regions(self.rows_of(image_ids), most)
        return [regions.views(i) for i in range(len(regions))]

    def first_regions(self, rows: np.ndarray, most: int | None = None) -> FirstRegions:
        """The first ``most`` regions (None: all) of the records of ``rows`` int64 [S]: to read them again and again, in training.

        A record that nobody has verified yet (`verified`) is read whole and its checksum verified. Of others no more is
        read than is given: header, id and boxes, features and class probabilities when they are asked for; header, id and length are
        verified, and that what is given are finite numbers. ``DamagedError`` as for the id.
        """
        columns = {name: column[rows] for name, column in self._column.items()}
        shards, offsets = columns["shard"].tolist(), columns["offset"].tolist()
        whole = {i: self._whole(int(rows[i])) for i in np.flatnonzero(~self._seen.of(rows)).tolist()}

        def read(i: int, out: memoryview, at: int) -> int:
            try:
                return os.preadv(self._file(shards[i]).fileno(), [out], offsets[i] + at)
            except OSError:
                return self._retried(int(rows[i]), shards[i], lambda descriptor: os.preadv(descriptor, [out], offsets[i] + at))

        ids, regions = self.ids.encoded(rows), columns["regions"].astype(np.int64)  # type: ignore[attr-defined]
        numbers = columns["length"], regions, columns["crc"]
        return FirstRegions(ids, *numbers, most, self.schema, whole, read, lambda i: self._shards[shards[i]][0])

    def _whole(self, row: int) -> bytes:
        """A record's bytes after its checksum was found right, which is noted."""
        image_id, (data, where) = self.ids[row], self._data(row)
        self._refuse_another(image_id, row, decode_views(data, image_id, self.schema, where).regions, where)
        self._seen.add(row)
        return data

    @contextmanager
    def verified_together(self, token: str) -> Iterator[str | None]:
        """From here on a record counts as verified when any process of this host that came here with the same ``token`` verified it.

        Leave the block when all have entered it. Gives None, or why that is not possible here: then each process counts for itself and
        those forked from it.
        """
        files = [shard for shard, _ in self._shards]
        index = [self.path / "index.arrow"] if self.sealed else []
        with self._seen.shared(files_identity(token, self.digest, [*index, *files])) as reason:
            yield reason

    def encoded(self, image_id: str) -> tuple[bytes, int, int]:
        """A record's bytes, CRC-32 and region count, verified; for copying it to another store of the same schema."""
        row = self._existing_row(image_id)
        data, record = self._verified(image_id, row)
        return data, int(self._column["crc"][row]), len(record)

    def rows_in_storage_order(self) -> np.ndarray:
        """int64 [records]: rows of ``ids`` in the order in which their records lie on the disk."""
        return np.lexsort((self._column["offset"], self._column["shard"]))

    def in_storage_order(self) -> Iterator[str]:
        """All ids in the order in which their records lie on the disk: the order to read everything in."""
        for row in self.rows_in_storage_order().tolist():
            yield self.ids[row]

    def shard_sizes(self) -> dict[str, int]:
        """Bytes of each shard's file."""
        return {shard.name: shard.stat().st_size for shard, _ in self._shards}

    def checksums(self, image_ids: Sequence[str]) -> np.ndarray:
        """int64 [len(image_ids)]: CRC-32 of each record by the index, -1 where the store lacks the image."""
        rows = self.find(image_ids)
        return np.where(rows < 0, -1, self._column["crc"][rows].astype(np.int64))

    def region_count(self, image_id: str) -> int:
        """Regions of one image, without reading its record."""
        return int(self._column["regions"][self._existing_row(image_id)])

    def rows_of(self, image_ids: Sequence[str]) -> np.ndarray:
        """int64 [len(image_ids)]: their rows of ``ids``; ``UsageError`` naming the first that is missing and how many are."""
        rows = self.find(image_ids)
        missing = np.flatnonzero(rows < 0)
        if len(missing):
            first = image_ids[int(missing[0])]
            raise UsageError(f"{self.path} has no regions for {len(missing):,} of {len(rows):,} images, first {first!r}; extract them")
        return rows

    def region_counts(self, image_ids: Sequence[str]) -> np.ndarray:
        """int32 [len(image_ids)]: regions of each image; ``UsageError`` as ``rows_of``."""
        return self._column["regions"][self.rows_of(image_ids)]

    def announce(self, rows: np.ndarray, most: int | None = None) -> None:
        """Ask the system to fetch what ``at`` will read of ``ids[row]``, int64 [rows], while other work goes on; it then waits less."""
        if not hasattr(os, "posix_fadvise"):
            return
        shards, offsets = (self._column[name][rows] for name in ("shard", "offset"))
        order = np.lexsort((offsets, shards))
        firsts, sizes = self._parts(rows[order], most)
        for shard, offset, first, size in zip(
            shards[order].tolist(), offsets[order].tolist(), firsts.tolist(), sizes.tolist(), strict=True
        ):
            for at, length in zip(first, size, strict=True):
                if length:
                    os.posix_fadvise(self._file(shard).fileno(), offset + at, length, os.POSIX_FADV_WILLNEED)

    def _parts(self, rows: np.ndarray, most: int | None) -> tuple[np.ndarray, np.ndarray]:
        """Which bytes of records ``first_regions`` reads, class probabilities included: int64 [n, 2] from, int64 [n, 2] how many.

        All of it as one part where it was not verified before, or all regions are wanted.
        """
        regions = self._column["regions"][rows].astype(np.int64)
        kept = regions if most is None else regions.clip(max=most)
        id_bytes = np.array([len(image_id) for image_id in self.ids.encoded(rows)], np.int64)  # type: ignore[attr-defined]
        probs_at, probs_bytes = probs_span(regions, kept, id_bytes, self.schema)
        firsts = np.stack([np.zeros_like(regions), probs_at], axis=1)
        sizes = np.stack([first_bytes(regions, kept, id_bytes, self.schema), probs_bytes], axis=1)
        all_of_it = ~self._seen.of(rows) | (kept == regions)
        firsts[all_of_it], sizes[all_of_it] = 0, 0
        sizes[all_of_it, 0] = self._column["length"][rows[all_of_it]]
        return firsts, sizes

    def regions_at(self, rows: np.ndarray) -> np.ndarray:
        """int32 [len(rows)]: region counts of ``ids[row]`` for each row, without reading the records."""
        return self._column["regions"][rows]

    def lookup(self) -> Lookup:
        """For finding the places of many batches of ids in ``ids``."""
        return Lookup(self.ids.column)  # type: ignore[attr-defined]

    def find(self, image_ids: Sequence[str]) -> np.ndarray:
        """int64 [len(image_ids)]: place of each id in ``ids``, -1 where the store lacks it. One hash join, made for millions."""
        found = pc.index_in(pa.array(image_ids, pa.large_string()), value_set=self.ids.column)  # type: ignore[attr-defined]
        return pc.fill_null(found, -1).to_numpy(zero_copy_only=False).astype(np.int64)

    def damaged(self) -> Iterator[tuple[str, str]]:
        """Reads every record and yields (id, what is wrong) of those that are not as written."""
        for image_id in self.ids:
            try:
                self[image_id]
            except DamagedError as error:
                yield image_id, str(error)

    def close(self) -> None:
        """Close the files; records already read stay valid."""
        while self._files:
            self._files.popitem()[1].close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "allow_partial": self._allow_partial}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.path = state["path"]
        self._open(state["allow_partial"], verify=False)  # its checksum was verified where it was opened first

    def _row(self, image_id: str) -> int:
        row = bisect_left(self.ids, image_id)  # code points sort like their UTF-8 bytes
        return row if row < len(self.ids) and self.ids[row] == image_id else -1

    def _existing_row(self, image_id: str) -> int:
        row = self._row(image_id)
        if row < 0:
            raise UsageError(f"{self.path} has no regions for image {image_id!r}; extract it, or leave its captions out")
        return row

    def _verified(self, image_id: str, row: int) -> tuple[bytes, RegionRecord]:
        data, where = self._data(row)
        record = decode(data, image_id, self.schema, where)
        self._refuse_another(image_id, row, len(record), where)
        return data, record

    def _data(self, row: int) -> tuple[bytes, Path]:
        """A record's bytes, and the shard they are of."""
        shard, offset, length = (int(self._column[name][row]) for name in ("shard", "offset", "length"))
        return self._read(row, shard, offset, length), self._shards[shard][0]

    def _refuse_another(self, image_id: str, row: int, regions: int, where: Path) -> None:
        if regions != self._column["regions"][row]:
            raise DamagedError(f"record {image_id!r} in {where} is not the one of the index; seal the store again")

    def _check_shard(self, number: int) -> None:
        shard, size = self._shards[number]
        if not shard.is_file():
            raise DamagedError(f"{shard} is missing; restore it, or {AGAIN}")
        if shard.stat().st_size < size:
            raise DamagedError(f"{shard} is truncated: it has {shard.stat().st_size:,} bytes of {size:,}; {WAY_OUT}")

    def _file(self, number: int) -> BinaryIO:
        if number not in self._files:
            file = open(self._shards[number][0], "rb", buffering=0)  # noqa: SIM115 (closed by close)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # samples come in shuffled order
            self._files[number] = file  # type: ignore[assignment]
        return self._files[number]

    def _read(self, row: int, shard: int, offset: int, length: int) -> bytes:
        return self._retried(row, shard, lambda descriptor: os.pread(descriptor, length, offset))

    def _retried(self, row: int, shard: int, read: Callable[[int], Result]) -> Result:
        """``pread`` and ``preadv`` move no file position, so forked processes and threads may share the descriptor."""
        for attempt in range(READ_ATTEMPTS):
            try:
                return read(self._file(shard).fileno())
            except OSError as error:
                if attempt == READ_ATTEMPTS - 1:
                    where = self._shards[shard][0]
                    raise DamagedError(f"record {self.ids[row]!r} in {where} cannot be read: {error.strerror}; check the disk") from None
        raise AssertionError("unreachable")

    def _incomplete(self) -> str:
        records = sum(count_records(shard) for shard in shard_files(self.path))
        partial = "from Python, FeatureStore(path, allow_partial=True) reads what is there"
        return f"{self.path} is incomplete: {records:,} records, not sealed; run the same extraction again ({partial})"


def _joined(column: pa.ChunkedArray) -> pa.Array:
    """One array: the chunk itself where there is one, so that a sealed index stays a view of its file (``combine_chunks`` copies)."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _read_index(path: Path, expected: dict[str, Any], verify: list[int] | None) -> pa.Table:
    """The sealed index, memory-mapped after its size was found right; with ``verify`` (sizes of shards), its checksum and content."""
    file = path / "index.arrow"
    if not file.is_file() or file.stat().st_size != expected["bytes"] or (verify is not None and sha256_of(file) != expected["sha256"]):
        raise DamagedError(f"{file} is missing or is not the sealed one; run the same extraction again to write it anew")
    try:
        index = pa.ipc.open_file(pa.memory_map(str(file))).read_all()
        sound = index.schema.equals(INDEX_SCHEMA) and (verify is None or _is_sound(index, np.array(verify, np.int64)))
    except (pa.ArrowException, OSError):
        sound = False
    if not sound:
        raise DamagedError(f"{file} is no index of a store; run the same extraction again to write it anew")
    return index


def _is_sound(index: pa.Table, sizes: np.ndarray) -> bool:
    """Whether every id is text and every record lies in its shard; ``ArrowInvalid`` where the columns contradict themselves."""
    index.validate(full=True)
    if any(column.null_count for column in index.columns):
        return False
    columns = {name: _joined(index.column(name)).to_numpy() for name in ("shard", "offset", "length", "regions")}
    if not all((column >= 0).all() for column in columns.values()) or (columns["shard"] >= len(sizes)).any():
        return False
    return bool((columns["length"] <= sizes[columns["shard"]] - columns["offset"]).all())
