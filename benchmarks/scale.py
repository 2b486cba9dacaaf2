"""``python -m benchmarks.scale --rows 100000000``: what a run's data cost where there are very many captions.

A manifest and a feature store are made in a temporary folder, the index is built as the first start of a run does it, and fresh processes
then open both as every rank does. Memory is what a process has for itself (RssAnon): pages of mapped files belong to the system.
Tokens are drawn at random rather than encoded, which would take an hour for 100 million captions and is not what is measured.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.batches import CAPTIONS_BY_LENGTH
from megainter.data.feature_store.reader import FeatureStore
from megainter.data.feature_store.record import RegionRecord, StoreSchema
from megainter.data.feature_store.writer import FeatureStoreWriter, seal_store
from megainter.data.pairs_index.index import build_pairs_index, open_pairs_index
from megainter.data.tables.pairs import PAIRS_SCHEMA, read_pairs
from megainter.data.tables.parquet import ROWS_PER_GROUP
from megainter.data.text.token_table import _BATCH as ROWS_PER_BATCH
from megainter.data.text.token_table import open_token_table
from megainter.data.text.vocabulary import VocabularyFacts
from megainter.tasks.pretraining.batches import collate
from megainter.tasks.pretraining.sampling import Sampler, StreamSettings

WORDS = np.array(["a", "dog", "man", "woman", "two", "red", "white", "black", "on", "the", "in", "with", "street", "grass", "water"])
SCHEMA = StoreSchema(16, 8, ("__background__", *"abcdefg"), "none")
STEP = 1024  # samples drawn at once
BYTES_PER_ROW = 260  # of manifest, index and tokens together, on the disk


def main() -> None:
    """Make the data, measure in processes of their own, print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000_000)
    parser.add_argument("--records", type=int, default=1_000_000, help="records of the store; captions are of these images in turn")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="the temporary folder is made in it")
    parser.add_argument("--store", type=Path, help="a store that this benchmark made before, of as many records")
    parser.add_argument("--in-memory", action="store_true", help="also read the whole manifest into memory, for comparison")
    parser.add_argument("--part", choices=[*PARTS], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        print(json.dumps(PARTS[arguments.part](arguments.folder, arguments.rows)))
        return
    disk = os.statvfs(arguments.folder)
    needed, free = arguments.rows * BYTES_PER_ROW + arguments.records * 2000, disk.f_bavail * disk.f_frsize
    if needed > free:
        sys.exit(f"{arguments.folder} has {free / 1e9:.0f} GB free, and {arguments.rows:,} rows take up to {needed / 1e9:.0f} GB; --folder")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        measure(Path(name), arguments)


def measure(folder: Path, arguments: argparse.Namespace) -> None:
    """All parts in turn, each figure printed as it comes."""
    found: dict[str, Any] = {"rows": arguments.rows, "records": arguments.records}
    if arguments.store is not None:
        (folder / "regions.store").symlink_to(arguments.store.resolve())
    else:
        found["write_store_s"] = timed(lambda: write_store(folder / "regions.store", arguments.records))
    found["write_manifest_s"] = timed(lambda: write_manifest(folder / "pairs.parquet", arguments.rows, arguments.records))
    found["manifest_bytes_per_row"] = (folder / "pairs.parquet").stat().st_size / arguments.rows
    say(found)
    for part in ("store", "build", "tokens", "open", "open", *(["in_memory"] if arguments.in_memory else [])):
        found[part] = own_process(part, folder, arguments.rows)
        say({part: found[part]})
    print(json.dumps(found, indent=2))


def own_process(part: str, folder: Path, rows: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.scale", "--part", part, "--folder", str(folder), "--rows", str(rows)]
    result: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])
    return result


def write_store(path: Path, records: int) -> None:
    """Small records: four regions of 16 numbers."""
    rng = np.random.default_rng(0)
    boxes, probs = np.tile(np.array([[0, 0, 50, 50]], np.float32), (4, 1)), np.full((4, 8), 1 / 8, np.float32)
    features = rng.standard_normal((1000, 4, 16)).astype(np.float16)
    with FeatureStoreWriter(path, SCHEMA) as writer:
        for number in range(records):
            writer.add(image_id(number), RegionRecord(boxes, features[number % 1000], probs, 100, 100))
    seal_store(path)


def image_id(number: int) -> str:
    return f"photo-{number:09d}"


def write_manifest(path: Path, rows: int, images: int) -> None:
    """Captions of Flickr8k's lengths, of the images in turn; the last 1,000 are of the split val."""
    rng = np.random.default_rng(1)
    share = np.array(CAPTIONS_BY_LENGTH) / sum(CAPTIONS_BY_LENGTH)
    lengths = rng.choice(np.arange(2, 2 + len(share)), 20_000, p=share)  # without [CLS] and [SEP]
    captions = pa.array([" ".join(rng.choice(WORDS, length)) for length in lengths])
    with pq.ParquetWriter(path, PAIRS_SCHEMA, compression="zstd") as writer:
        for start in range(0, rows, ROWS_PER_GROUP):
            numbers = np.arange(start, min(start + ROWS_PER_GROUP, rows))
            splits = pa.array(np.where(numbers < rows - 1000, "train", "val"))
            of = numbers * 7919 % images if images % 7919 else numbers % images  # not in the store's order
            columns = [numbered("pair-", numbers), numbered("photo-", of), numbered("photos/", of, ".jpg")]
            columns += [captions.take(pa.array(rng.integers(0, 20_000, len(numbers)))), splits]
            writer.write_batch(pa.record_batch(columns, PAIRS_SCHEMA))


def numbered(prefix: str, numbers: np.ndarray, suffix: str = "") -> pa.StringArray:
    """``prefix``, nine digits and ``suffix`` for each number, without a Python string for any."""
    characters = np.empty((len(numbers), len(prefix) + 9 + len(suffix)), np.uint8)
    characters[:, : len(prefix)] = np.frombuffer(prefix.encode(), np.uint8)
    characters[:, len(prefix) : len(prefix) + 9] = numbers[:, None] // 10 ** np.arange(8, -1, -1) % 10 + ord("0")
    characters[:, len(prefix) + 9 :] = np.frombuffer(suffix.encode(), np.uint8)
    offsets = (np.arange(len(numbers) + 1) * characters.shape[1]).astype(np.int32)
    return pa.StringArray.from_buffers(len(numbers), pa.py_buffer(offsets), pa.py_buffer(characters))


def random_reads(folder: Path, _: int) -> dict[str, Any]:
    """Opening the store, and reading records in random order (from the system's cache, where they were written)."""
    before = private_bytes()
    start = time.perf_counter()
    store = FeatureStore(folder / "regions.store")
    opened = time.perf_counter() - start
    numbers = np.random.default_rng(2).integers(0, len(store), 20_000)
    ids = [image_id(int(number)) for number in numbers]
    start = time.perf_counter()
    for name in ids:
        store[name]
    by_id = time.perf_counter() - start
    start = time.perf_counter()
    for row in numbers.tolist():
        store.at(row)
    by_row = time.perf_counter() - start
    return {
        "records": len(store),
        "open_s": opened,
        "reads_per_s": {"by id": len(ids) / by_id, "by row": len(ids) / by_row},
        "private_bytes_per_record": (private_bytes() - before) / len(store),
    }


def build(folder: Path, rows: int) -> dict[str, Any]:
    """The first start of a run."""
    store = FeatureStore(folder / "regions.store")
    start = time.perf_counter()
    build_pairs_index(folder / "pairs.parquet", "train", store, folder / "index", progress=False)
    seconds = time.perf_counter() - start
    on_disk = sum(file.stat().st_size for file in (folder / "index").iterdir())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds, "rows_per_s": rows / seconds, "bytes_per_row_on_disk": on_disk / rows, "peak_rss_gb": peak / 1e9}


def write_tokens(folder: Path, rows: int) -> dict[str, Any]:
    """A token table of the form that the run's would have."""
    rng, left = np.random.default_rng(3), rows - 1000
    schema = pa.schema([pa.field("ids", pa.list_(pa.int32()))], metadata={"key": "random"})
    share = np.array(CAPTIONS_BY_LENGTH) / sum(CAPTIONS_BY_LENGTH)
    start = time.perf_counter()
    with open(folder / "tokens.arrow", "wb") as file, pa.ipc.new_file(file, schema) as writer:
        while left > 0:
            lengths = rng.choice(np.arange(2, 2 + len(share)), min(left, ROWS_PER_BATCH), p=share)
            ids = rng.integers(1000, 30000, lengths.sum(), np.int32)
            lists = pa.ListArray.from_arrays(pa.array(np.concatenate([[0], lengths.cumsum()]), pa.int32()), pa.array(ids))
            writer.write_batch(pa.record_batch([lists], schema=schema), custom_metadata={"truncated": "0", "unknown": "0"})
            left -= len(lengths)
    return {"seconds": time.perf_counter() - start}


def open_all(folder: Path, rows: int) -> dict[str, Any]:
    """Every later start, on every rank: open all, then draw samples in the order of an epoch."""
    before, seconds = private_bytes(), {}
    start = time.perf_counter()
    store = FeatureStore(folder / "regions.store")
    seconds["store"] = time.perf_counter() - start
    key, _ = build_pairs_index(folder / "pairs.parquet", "train", store, folder / "index", progress=False)
    pairs = open_pairs_index(folder / "index", key, store)
    seconds["pairs"] = time.perf_counter() - start - seconds["store"]
    tokens = open_token_table(folder / "tokens.arrow", "random")
    facts = VocabularyFacts(
        size=30522, pad_id=0, unk_id=100, cls_id=101, sep_id=102, mask_id=103, is_continuation=np.zeros(30522, np.bool_)
    )
    sampler = Sampler(pairs, store, tokens, facts, StreamSettings(seed=1, global_batch=STEP, micro_batch=STEP))
    seconds["tokens and sampler"] = time.perf_counter() - start - sum(seconds.values())
    opened = time.perf_counter() - start
    after_opening = private_bytes() - before
    epoch = np.zeros(STEP, np.int64)

    def draw(step: int) -> None:
        sampler.lengths(sampler.draws(epoch, (step * STEP + np.arange(STEP)) % len(pairs)))

    drawing = timed(lambda: [draw(step) for step in range(200)])
    seen = np.concatenate([sampler.draws(epoch, step * STEP + np.arange(STEP)).rows for step in range(min(200, len(pairs) // STEP))])
    draws = sampler.draws(epoch, np.arange(STEP))
    making = timed(lambda: collate(sampler.samples(draws, np.arange(STEP)), sampler.settings))
    return {
        "open_s": opened,
        "open_parts_s": seconds,
        "private_mb_after_opening": after_opening / 1e6,
        "private_bytes_per_pair_after_opening": after_opening / rows,
        "private_bytes_per_pair_after_drawing": (private_bytes() - before) / rows,
        "drawn_per_s": 200 * STEP / drawing,
        "made_per_s": STEP / making,
        "rows_drawn_twice": len(seen) - len(np.unique(seen)),
    }


def in_memory(folder: Path, rows: int) -> dict[str, Any]:
    """`read_pairs`, which holds the whole manifest."""
    before, start = private_bytes(), time.perf_counter()
    pairs = read_pairs(folder / "pairs.parquet", "train")
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "private_bytes_per_pair": (private_bytes() - before) / len(pairs)}


def private_bytes() -> int:
    """Memory of this process that no file stands behind."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))


def timed(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def say(found: dict[str, Any]) -> None:
    print(json.dumps(found), flush=True)


PARTS = {"store": random_reads, "build": build, "tokens": write_tokens, "open": open_all, "in_memory": in_memory}

if __name__ == "__main__":
    main()
