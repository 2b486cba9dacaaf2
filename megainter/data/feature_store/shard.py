"""One shard of a feature store: its LMDB file, and where in the file each record lies.

A shard has two LMDB tables under the same 16-byte hashed keys, so that ids may have any length and characters: ``records`` (the bytes of
`megainter.data.feature_store.record`) and ``ids`` (region count, CRC-32, id), small enough to be read whole when a run is taken up again.
"""

import ctypes
import hashlib
import mmap
import os
import re
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pyarrow as pa

from megainter.data.feature_store import shard_probe
from megainter.data.feature_store.lock import WriterLock
from megainter.data.feature_store.record import AGAIN
from megainter.errors import DamagedError, UsageError
from megainter.files import checksum_of, read_json
from megainter.kinds import instead

FORMAT = {"format": "megainter feature store", "version": 1}
CHECKSUM = "checksum"  # of store.json, in itself
RECORDS, IDS = b"records", b"ids"
ENTRY = struct.Struct("<II")  # region count, CRC-32; the id follows
INDEX_SCHEMA = pa.schema(
    [
        ("id", pa.large_string()),
        ("shard", pa.int32()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
        ("regions", pa.int32()),
        ("crc", pa.uint32()),
    ]
)
FIRST_MAP_BYTES = 64 << 20  # grows when full; on Linux the file itself is only as large as its content
LOCKS_AT_ONCE = 64  # on a network disk each lock of a dead writer on another host is watched for seconds
ROWS_AT_ONCE = 65536
WAY_OUT = f"restore it, or delete it and {AGAIN}"


def key_of(image_id: str) -> bytes:
    """The LMDB key of an id: 16 bytes of BLAKE2b."""
    return hashlib.blake2b(image_id.encode(), digest_size=16).digest()


def shard_files(store: Path) -> list[Path]:
    """The shards of a store by name; one that was created but never written to is left out."""
    return sorted(path for path in store.glob("shard-*.lmdb") if path.stat().st_size > 0)


def read_store_json(store: Path) -> dict[str, Any]:
    """The description of a store; ``UsageError`` where ``store`` is none or is of another version."""
    if not store.is_dir():
        raise UsageError(f"{store} does not exist or is not a folder; `megainter extract` writes feature stores{instead(store)}")
    if not (store / "store.json").is_file():
        raise UsageError(f"{store} is not a feature store: it has no store.json{instead(store)}")
    description = read_json(store / "store.json")
    if not isinstance(description, dict) or {name: description.get(name) for name in FORMAT} != FORMAT:
        raise UsageError(f"{store / 'store.json'} is not a feature store of version {FORMAT['version']}")
    told = description.pop(CHECKSUM, None)  # earlier versions wrote none
    if told is not None and told != checksum_of(description):
        way_out = f"restore it, or correct it and take out its line {CHECKSUM!r}"
        raise DamagedError(f"{store / 'store.json'} does not match its own checksum; {way_out}")
    if not _is_complete(description):
        raise DamagedError(f"{store / 'store.json'} lacks what describes a store; restore it")
    return description


def _is_complete(description: dict[str, Any]) -> bool:
    """Whether everything that is read is there and of its type."""
    if not isinstance(description.get("schema"), dict) or not isinstance(description.get("sealed"), bool):
        return False
    if not description["sealed"]:
        return True
    index, shards = description.get("index"), description.get("shards")
    return (
        isinstance(description.get("digest"), str)
        and isinstance(index, dict)
        and isinstance(index.get("sha256"), str)
        and isinstance(index.get("bytes"), int)
        and isinstance(shards, list)
        and all(isinstance(shard, dict) and isinstance(shard.get("bytes"), int) and _is_name(shard.get("name")) for shard in shards)
    )


def _is_name(name: object) -> bool:
    return isinstance(name, str) and re.fullmatch(r"shard-[\w-]{1,100}\.lmdb", name) is not None


def open_for_writing(path: Path) -> lmdb.Environment:
    """The shard's environment, created where absent. Locking stays on and ``writemap`` off: a full disk is then an error, not SIGBUS."""
    return _open(path, map_size=max(FIRST_MAP_BYTES, 2 * path.stat().st_size if path.exists() else 0), metasync=True, sync=True)


def open_for_reading(path: Path) -> lmdb.Environment:
    """The shard's environment, read-only and without lock; only for a shard that nobody writes."""
    return _open(path, readonly=True, lock=False, create=False, readahead=False)


@contextmanager
def _reading(path: Path, *tables: bytes) -> Iterator[lmdb.Environment]:
    """``open_for_reading`` for some of its tables; what is damaged in them is a ``DamagedError``, also what would end its reader."""
    with open_for_reading(path):
        state = path.stat()
    if (wrong := _walked(path, tables, state.st_size, state.st_mtime_ns)) is not None:
        raise DamagedError(f"{path} is damaged ({wrong}); {WAY_OUT}")
    with open_for_reading(path) as environment:
        try:
            yield environment
        except (lmdb.Error, UnicodeDecodeError, struct.error) as error:
            raise DamagedError(f"{path} is damaged ({error}); {WAY_OUT}") from None


@cache
def _walked(path: Path, tables: tuple[bytes, ...], size: int, changed_ns: int) -> str | None:
    """What is wrong with tables of a shard, found by a process of its own, once for the file as it is; None where all of it can be read."""
    command = [sys.executable, "-P", shard_probe.__file__, str(path), *(table.decode() for table in tables)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode < 0:
        return f"its reader was ended by {signal.Signals(-done.returncode).name}"
    return None if done.returncode == 0 else " ".join(done.stdout.split()) or f"its reader ended with exit code {done.returncode}"


def _open(path: Path, **options: Any) -> lmdb.Environment:
    try:
        environment = lmdb.open(str(path), subdir=False, max_dbs=2, **options)
    except (lmdb.InvalidError, lmdb.CorruptedError, lmdb.VersionMismatchError) as error:
        raise DamagedError(f"{path} is not a readable shard ({error}); {WAY_OUT}") from None
    except lmdb.Error as error:
        raise UsageError(f"{path} cannot be opened: {error}") from None
    needed = needed_bytes(environment)
    if needed > path.stat().st_size:
        environment.close()
        raise DamagedError(f"{path} is truncated: it has {path.stat().st_size:,} bytes of {needed:,}; {WAY_OUT}")
    return environment


def needed_bytes(environment: lmdb.Environment) -> int:
    """How long the file of an environment must be; reading pages that are missing would be SIGBUS."""
    return (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]


def entries(path: Path) -> Iterator[tuple[str, int]]:
    """(id, CRC-32) of every record of a shard that nobody else in this process has open."""
    with _reading(path, IDS) as environment:
        try:
            table = environment.open_db(IDS, create=False)
        except lmdb.NotFoundError:
            return
        with environment.begin(db=table) as transaction:
            for value in transaction.cursor().iternext(keys=False, values=True):
                yield value[ENTRY.size :].decode(), ENTRY.unpack_from(value)[1]


def count_records(path: Path) -> int:
    """How many records a shard holds."""
    with _reading(path, IDS) as environment:
        try:
            table = environment.open_db(IDS, create=False)
        except lmdb.NotFoundError:
            return 0
        with environment.begin() as transaction:
            return transaction.stat(table)["entries"]


def scan_shards(shards: list[Path]) -> pa.Table:
    """The index of all records: ``INDEX_SCHEMA``, in no order. ``DamagedError`` for a shard that is truncated or inconsistent."""
    tables = [pa.Table.from_batches(_scan(path, number), INDEX_SCHEMA) for number, path in enumerate(shards)]
    return pa.concat_tables(tables) if tables else INDEX_SCHEMA.empty_table()


def _scan(path: Path, number: int) -> Iterator[pa.RecordBatch]:
    with _reading(path, IDS, RECORDS) as environment:
        try:
            ids, records = environment.open_db(IDS, create=False), environment.open_db(RECORDS, create=False)
        except lmdb.NotFoundError:
            return
        with environment.begin(buffers=True) as transaction:
            counts = [transaction.stat(table)["entries"] for table in (ids, records)]
            if counts[0] != counts[1]:
                raise DamagedError(f"{path} has {counts[0]:,} ids for {counts[1]:,} records; {WAY_OUT}")
            base, rows = None, []
            for (key, entry), (same_key, record) in zip(transaction.cursor(ids), transaction.cursor(records), strict=True):
                if key != same_key:
                    raise DamagedError(f"{path} has ids that do not belong to its records; {WAY_OUT}")
                address = _address(record)
                base = _map_base(path, record, environment.stat()["psize"]) if base is None else base
                regions, crc = ENTRY.unpack_from(entry)
                rows.append((str(entry[ENTRY.size :], "utf-8"), number, address - base, len(record), regions, crc))
                if len(rows) == ROWS_AT_ONCE:
                    yield _batch(rows)
                    rows = []
            yield _batch(rows)


def _batch(rows: list[tuple]) -> pa.RecordBatch:
    columns = list(zip(*rows, strict=True)) or [()] * len(INDEX_SCHEMA)
    return pa.record_batch([pa.array(column, field.type) for column, field in zip(columns, INDEX_SCHEMA, strict=True)], schema=INDEX_SCHEMA)


def _address(value: memoryview) -> int:
    return np.frombuffer(value, np.uint8).__array_interface__["data"][0]


def _map_base(path: Path, record: memoryview, page_size: int) -> int:
    """Address of the file's first byte in LMDB's map.

    A value lies in its first page, and every LMDB page starts with its own number (8 bytes); so number and address of the page of one value
    give the address of page 0. The bytes read from the file at the place found must be the value's: that makes it certain.
    """
    address = _address(record)
    for page in range(address - address % mmap.PAGESIZE, address - page_size, -mmap.PAGESIZE):
        offset = int.from_bytes(ctypes.string_at(page, 8), "little") * page_size + address - page
        if _bytes_at(path, offset, len(record)) == record:
            return address - offset
    raise DamagedError(f"{path}: its first record is not where LMDB's page numbers say; {WAY_OUT}")


def _bytes_at(path: Path, offset: int, length: int) -> bytes:
    with open(path, "rb") as file:
        return os.pread(file.fileno(), length, offset) if offset < path.stat().st_size else b""


def refuse_live_writers(store: Path) -> None:
    """``LockedError`` where a process is writing one of the shards."""
    locks = [lock for lock in sorted(store.glob("shard-*.lmdb.lock")) if os.access(lock, os.W_OK)]  # nobody writes to a read-only store
    with ThreadPoolExecutor(LOCKS_AT_ONCE) as pool:
        list(pool.map(lambda lock: WriterLock(lock).release(), locks))
