"""Writing a feature store: transactions that a kill leaves whole, one writer per shard, and the seal that ends the work."""

import errno
import hashlib
import os
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import lmdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from megainter.data.feature_store.record import RegionRecord, StoreSchema, encode
from megainter.data.feature_store.shard import (
    CHECKSUM,
    ENTRY,
    FORMAT,
    IDS,
    RECORDS,
    WriterLock,
    entries,
    key_of,
    open_for_writing,
    read_store_json,
    scan_shards,
    shard_files,
)
from megainter.errors import DamagedError, NoSpaceError, UsageError
from megainter.files import aside, checksum_of, is_full, sha256_of, write_json

SPARE_BYTES = 4 << 20  # LMDB copies the tree pages it changes; keep that much free beside the records


def create_store(path: Path, schema: StoreSchema) -> None:
    """Make an empty store at ``path``, or check that the one there has this schema. ``UsageError`` says what differs."""
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is a file; a feature store is a folder")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{path} cannot be created: {error.strerror}") from None
    if (path / "store.json").exists():
        return _check_schema(path, schema)
    foreign = [name for name in os.listdir(path) if not name.startswith(("store.", ".store."))]
    if foreign and not (path / "store.json").exists():  # another writer may have made the store just now
        raise UsageError(f"{path} holds other files ({sorted(foreign)[0]}); give an empty or a new folder for the store")
    with WriterLock(path / "store.lock"):
        if (path / "store.json").exists():
            return _check_schema(path, schema)
        _describe(path, schema, {"sealed": False})


def _describe(path: Path, schema: StoreSchema, state: dict[str, Any]) -> None:
    """Write store.json. ``NoSpaceError`` where it cannot be written: the old one, if any, is still there."""
    description = FORMAT | {"schema": schema.to_json()} | state
    write_json(path / "store.json", description | {CHECKSUM: checksum_of(description)})


def _check_schema(path: Path, schema: StoreSchema) -> None:
    there = StoreSchema.from_json(read_store_json(path)["schema"])
    if difference := there.difference(schema):
        raise UsageError(f"{path} was written with other settings: there {difference}; use those, or another store")


def stored_ids(path: Path) -> set[str]:
    """The ids of all committed records of all shards. No writer of this process may be open on the store."""
    return {image_id for shard in shard_files(path) for image_id, _ in entries(shard)}


def forget(path: Path, image_ids: Iterable[str]) -> None:
    """Take the records of some images out of a store, which is then not sealed. ``LockedError`` while a writer is at work."""
    keys = [key_of(image_id) for image_id in image_ids]
    for shard in shard_files(path):
        with FeatureStoreWriter(path, StoreSchema.from_json(read_store_json(path)["schema"]), shard.stem) as writer:
            writer.remove(keys)


class FeatureStoreWriter:
    """Writes records into one shard of a store; creates store and shard where absent and goes on where an earlier writer stopped.

    Records are committed in transactions of ``batch_records`` or ``batch_seconds``, whichever comes first: a kill loses at most the
    records since. Raises ``LockedError`` where another process writes this shard, ``UsageError`` for another schema or a record that
    may not be stored, ``NoSpaceError`` when the disk is full (everything committed is kept).
    """

    def __init__(
        self, path: Path, schema: StoreSchema, shard_name: str = "shard-00000", batch_records: int = 64, batch_seconds: float = 2.0
    ) -> None:
        create_store(path, schema)
        self.path, self.schema, self.shard = path, schema, path / f"{shard_name}.lmdb"
        self.batch_records, self.batch_seconds = batch_records, batch_seconds
        self.lock = WriterLock(path / f"{shard_name}.lmdb.lock")
        try:
            self.done = dict(entries(self.shard)) if self.shard in shard_files(path) else {}
            self.environment = open_for_writing(self.shard)
            self.tables = {name: self.environment.open_db(name) for name in (RECORDS, IDS)}
        except BaseException:
            self.lock.release()
            raise
        self.pending: dict[str, tuple[bytes, int, int]] = {}
        self.oldest_pending = 0.0
        self.unsealed = False

    def __contains__(self, image_id: object) -> bool:
        return image_id in self.done or image_id in self.pending

    def __len__(self) -> int:
        return len(self.done) + len(self.pending)

    def add(self, image_id: str, record: RegionRecord) -> None:
        """Store one record, [n, 4], [n, F], [n, C]; the same record again is ignored, another one under its id is a ``UsageError``."""
        self.add_all([(image_id, record)])

    def add_all(self, records: Iterable[tuple[str, RegionRecord]]) -> None:
        """Store records that end in one transaction: after a kill all of them are there or none."""
        self.add_encoded([(image_id, *encode(image_id, record, self.schema), len(record)) for image_id, record in records])

    def add_encoded(self, records: Iterable[tuple[str, bytes, int, int]]) -> None:
        """``add_all`` for records that are bytes of this schema already: (id, bytes, CRC-32, region count) each."""
        for image_id, data, crc, regions in records:
            known = self.pending[image_id][1] if image_id in self.pending else self.done.get(image_id)
            if known is None:
                self.oldest_pending = self.oldest_pending if self.pending else time.monotonic()
                self.pending[image_id] = data, crc, regions
            elif known != crc:
                raise UsageError(f"{self.path} already has another record for image {image_id!r}; ids must be unique")
        if len(self.pending) >= self.batch_records or (self.pending and time.monotonic() - self.oldest_pending >= self.batch_seconds):
            self.commit()

    def commit(self) -> None:
        """Make everything added so far durable (fsync)."""
        if not self.pending:
            return
        self._unseal()
        size = sum(len(data) for data, _, _ in self.pending.values())
        self._require_space(size)
        while not self._put_pending():
            self.environment.set_mapsize(2 * self.environment.info()["map_size"] + 2 * size)
        self.done.update((image_id, crc) for image_id, (_, crc, _) in self.pending.items())
        self.pending.clear()

    def remove(self, keys: Iterable[bytes]) -> None:
        """Take out the records under some keys (``shard.key_of``), those that this shard has, in one transaction."""
        self._unseal()
        with self.environment.begin(write=True) as transaction:
            for key in keys:
                for table in self.tables.values():
                    transaction.delete(key, db=table)

    def close(self) -> None:
        """Commit, and let others write the shard."""
        try:
            self.commit()
        finally:
            self.environment.close()
            self.lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None and issubclass(kind, NoSpaceError):
            self.pending.clear()  # it would fail again and hide the first error
        self.close()

    def _put_pending(self) -> bool:
        """Write the open batch in one transaction; False, with nothing written, where the map is too small for it."""
        try:
            with self.environment.begin(write=True) as transaction:
                for image_id, (data, crc, regions) in self.pending.items():
                    key = key_of(image_id)
                    transaction.put(key, data, db=self.tables[RECORDS])
                    transaction.put(key, ENTRY.pack(regions, crc) + image_id.encode(), db=self.tables[IDS])
        except lmdb.MapFullError:
            return False
        except lmdb.Error as error:
            if isinstance(error, lmdb.DiskError) or is_full(error) or os.strerror(errno.EIO) in str(error):  # EIO: a full disk, to LMDB
                raise self._no_space(str(error)) from None
            raise DamagedError(f"{self.shard} cannot be written after {len(self.done):,} records, all of them kept: {error}") from None
        return True

    def _require_space(self, size: int) -> None:
        disk = os.statvfs(self.path)
        if disk.f_bavail * disk.f_frsize < size + SPARE_BYTES:
            raise self._no_space("the disk is full")

    def _no_space(self, reason: str) -> NoSpaceError:
        return NoSpaceError(
            f"no space left for {self.shard} after {len(self.done):,} records, all of them kept ({reason}); "
            "free space (or raise the quota or the file size limit) and run the same command again"
        )

    def _unseal(self) -> None:
        """A sealed store that is added to is incomplete until it is sealed again."""
        if self.unsealed:
            return
        with WriterLock(self.path / "store.lock"):
            if read_store_json(self.path)["sealed"]:
                _describe(self.path, self.schema, {"sealed": False})
        self.unsealed = True


def seal_store(path: Path) -> str:
    """Write the index of a finished store, mark it sealed and return its digest: SHA-256 over sorted (id, CRC-32 of the record).

    ``LockedError`` while a writer is at work, ``DamagedError`` for a damaged shard or two different records under one id,
    ``UsageError`` for a store without records.
    """
    schema = StoreSchema.from_json(read_store_json(path)["schema"])
    shards = shard_files(path)
    locks: list[WriterLock] = []
    try:
        for name in ["store.lock", *(f"{shard.name}.lock" for shard in shards)]:
            locks.append(WriterLock(path / name))
        index = sorted_index(path, shards)
        if not len(index):
            raise UsageError(f"{path} has no records to seal")
        _publish(path, schema, shards, index)
        return index_digest(index)
    finally:
        for lock in locks:
            lock.release()


def is_sealed(path: Path) -> bool:
    """Whether the store is sealed and its index is the one it was sealed with; one that is damaged is written anew by ``seal_store``."""
    description, index = read_store_json(path), path / "index.arrow"
    return bool(description["sealed"]) and index.is_file() and _facts(index) == description["index"]


def _facts(index: Path) -> dict[str, Any]:
    return {"bytes": index.stat().st_size, "sha256": sha256_of(index)}


def sorted_index(path: Path, shards: list[Path]) -> pa.Table:
    """The index of all shards sorted by id (UTF-8 bytes), each id once."""
    index = scan_shards(shards)
    index = index.take(pc.sort_indices(index, [("id", "ascending"), ("shard", "ascending")])).combine_chunks()
    ids, crc = index.column("id"), index.column("crc").to_numpy()
    if len(index) < 2:
        return index
    repeated = np.concatenate([[False], pc.equal(ids.slice(1), ids.slice(0, len(ids) - 1)).to_numpy()])
    other = np.flatnonzero(repeated[1:] & (crc[1:] != crc[:-1]))
    if len(other):
        image_id = ids[int(other[0])].as_py()
        one, two = (shards[index.column("shard")[int(row)].as_py()].name for row in (other[0], other[0] + 1))
        raise DamagedError(f"{path}: image {image_id!r} has different records in {one} and {two}; delete one shard")
    return index.filter(pa.array(~repeated)).combine_chunks() if repeated.any() else index


def index_digest(index: pa.Table) -> str:
    """SHA-256 over the ids in order and their records' checksums: the same content gives the same digest in whatever shards it lies."""
    content, checksums = hashlib.sha256(), hashlib.sha256()
    for chunk in index.column("id").chunks:
        offsets = np.frombuffer(chunk.buffers()[1], np.int64, len(chunk) + 1, chunk.offset * 8)
        checksums.update(np.diff(offsets).astype("<i8").tobytes())
        content.update(memoryview(chunk.buffers()[2])[int(offsets[0]) : int(offsets[-1])])
    checksums.update(index.column("crc").to_numpy().astype("<u4").tobytes())
    return hashlib.sha256(content.digest() + checksums.digest()).hexdigest()


def _publish(path: Path, schema: StoreSchema, shards: list[Path], index: pa.Table) -> None:
    with aside(path / "index.arrow") as partial, pa.OSFile(str(partial), "wb") as file, pa.ipc.new_file(file, index.schema) as writer:
        writer.write_table(index)
    _describe(path, schema, {"sealed": True} | _summary(path, shards, index))


def _summary(path: Path, shards: list[Path], index: pa.Table) -> dict[str, Any]:
    """What store.json says of a sealed store beside its schema."""
    return {
        "records": len(index),
        "regions": pc.sum(index.column("regions")).as_py(),
        "digest": index_digest(index),
        "index": _facts(path / "index.arrow"),
        "shards": [{"name": shard.name, "bytes": shard.stat().st_size} for shard in shards],
    }
