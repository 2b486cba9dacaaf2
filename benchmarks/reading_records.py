"""``python -m benchmarks.reading_records``: reading regions in random order, ours against
the stores of earlier programs, and making samples of them.

The same records are written in each format, as its program defines it, and each reader gives what its program's reader gives: features,
boxes and class probabilities as arrays. Ours checks what it reads; the others do not. Plain copies within memory,
in the same random order, are the measure of what a reader can reach: of our whole records, and of no more than what training is given of
them. Everything is written to a temporary folder by the benchmark itself: nothing else is ever unpickled.

"loaders" counts how many reads are whole and verified, over 15 epochs and for up to 256 loader processes: each is a store opened for
itself, with memory of its own for what it verified, or with the memory that the processes of a host share.
"""

import argparse
import base64
import io
import json
import multiprocessing
import os
import pickle
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lmdb
import msgpack
import numpy as np
import pyarrow as pa
import torch

from benchmarks.batches import CAPTIONS_BY_LENGTH, VOCABULARY
from megainter.data.feature_store.reader import FeatureStore
from megainter.data.feature_store.record import RegionRecord, StoreSchema
from megainter.data.feature_store.views import first_bytes, probs_span
from megainter.data.feature_store.writer import FeatureStoreWriter, seal_store
from megainter.data.stream.order import permuted, permuted_by_blocks
from megainter.data.tables.pairs import Pairs
from megainter.data.text.vocabulary import VocabularyFacts
from megainter.memory import keep_freed_memory
from megainter.tasks.pretraining.batches import collate
from megainter.tasks.pretraining.sampling import Sampler, StreamSettings

FEATURES, CLASSES = 2048, 1601
SCHEMA = StoreSchema(FEATURES, CLASSES, ("__background__", *(f"class {i}" for i in range(1, CLASSES))), "none")
MAP_BYTES = 1 << 36
MOST = StreamSettings.max_regions
EPOCHS, SMALL_RECORDS, SMALL_STEP = 15, 2048, 4
Read = Callable[[int], object]


@dataclass(frozen=True)
class Format:
    """One way to keep records: ``write`` them to a folder, ``reader`` opens it there (in the process that reads)."""

    write: Callable[[Path, int], None]
    reader: Callable[[Path], Read]


def main() -> None:
    """Write, measure, print tables and one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=600, help="10 to 100 regions each, 0.4 MB in our format")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="the temporary folder is made in it")
    parts = ("formats", "order", "samples", "loaders")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    arguments = parser.parse_args()
    keep_freed_memory()  # as a run does
    torch.set_num_threads(1)
    found: dict[str, Any] = {"records": arguments.records}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        if "formats" in arguments.parts:
            found["formats"] = measure_formats(Path(name), arguments.records, arguments.rounds)
        if "order" in arguments.parts:
            found["order"] = measure_order(Path(name), arguments.records, arguments.rounds)
        if "samples" in arguments.parts:
            found["samples_per_cpu_s"] = measure_samples(Path(name), arguments.records, arguments.rounds)
        if "loaders" in arguments.parts:
            found["whole_reads"] = measure_loaders(Path(name))
    print(json.dumps(found, indent=2))


def record(number: int) -> RegionRecord:
    """10 to 100 regions; features as after a ReLU, few classes likely."""
    rng = np.random.default_rng(number)
    n = int(rng.integers(10, 101))
    corners = rng.uniform(0, 300, (n, 2, 2))
    boxes = np.concatenate([corners.min(1), corners.max(1)], axis=1).astype(np.float32)
    features = np.abs(rng.standard_normal((n, FEATURES), np.float32))
    logits = 4 * rng.standard_normal((n, CLASSES), np.float32)
    probs = np.exp(logits - logits.max(1, keepdims=True))
    return RegionRecord(boxes, features, probs / probs.sum(1, keepdims=True), 300, 300)


def image_id(number: int) -> str:
    return f"{number:012d}"


# -- ours


def write_ours(folder: Path, records: int) -> None:
    with FeatureStoreWriter(folder / "regions.store", SCHEMA) as writer:
        for number in range(records):
            writer.add(image_id(number), record(number))
    seal_store(folder / "regions.store")


def read_ours(folder: Path) -> Read:
    store = FeatureStore(folder / "regions.store")
    return lambda number: store[image_id(number)]


def read_for_training(folder: Path) -> Read:
    """As training reads from the second time on: boxes and features of the first regions, and ``predicted`` class probabilities."""
    store = FeatureStore(folder / "regions.store")

    def read(number: int) -> object:
        views = store.at(number, MOST)
        return views.features, views.boxes, views.class_probs(predicted(number, len(views)))

    return read


def predicted(number: int, regions: int) -> np.ndarray:
    """Whose class probabilities training asks for: a quarter of the regions of every second record, since half of the pairs match."""
    return np.arange(0, 0 if number % 2 else regions, 4)


def read_all_regions(folder: Path) -> Read:
    """Boxes and features of all regions, and the class probabilities of a quarter of them, of every record."""
    store = FeatureStore(folder / "regions.store")

    def read(number: int) -> object:
        views = store.at(number)
        return views.features, views.boxes, views.class_probs(np.arange(0, len(views), 4))

    return read


# -- ViLBERT's and InterBERT's LMDB: a pickled dictionary of strings, arrays in base64


def write_base64(folder: Path, records: int) -> None:
    def row(number: int) -> bytes:
        regions = record(number)
        arrays = {"features": regions.features, "boxes": regions.boxes, "cls_prob": regions.class_probs}
        texts = {name: base64.b64encode(array.astype(np.float32)).decode() for name, array in arrays.items()}
        facts = {"image_id": image_id(number), "image_h": "300", "image_w": "300", "num_boxes": str(len(regions))}
        return pickle.dumps(facts | texts)

    write_lmdb(folder, ((image_id(number).encode(), row(number)) for number in range(records)))


def read_base64(folder: Path) -> Read:
    get = lmdb_get(folder)

    def read(number: int) -> object:
        item = pickle.loads(get(image_id(number).encode()))
        n = int(item["num_boxes"])
        return tuple(np.frombuffer(base64.b64decode(item[name]), np.float32).reshape(n, -1) for name in ("features", "boxes", "cls_prob"))

    return read


# -- tensorpack's LMDB (Conceptual Captions): msgpack of a list, arrays as msgpack_numpy writes them


def write_tensorpack(folder: Path, records: int) -> None:
    def row(number: int) -> bytes:
        regions = record(number)
        arrays = [packed_array(array.astype(np.float32).ravel()) for array in (regions.features, regions.class_probs, regions.boxes)]
        return msgpack.packb([*arrays, str(len(regions)), "300", "300", image_id(number), "two dogs on a beach"])

    write_lmdb(folder, ((f"{number:08d}".encode(), row(number)) for number in range(records)))


def read_tensorpack(folder: Path) -> Read:
    get = lmdb_get(folder)

    def read(number: int) -> object:
        features, probs, boxes, count, *_ = unpacked(get(f"{number:08d}".encode()))
        return tuple(array.reshape(int(count), -1) for array in (features, boxes, probs))

    return read


# -- UNITER's LMDB: half precision, as compressed npz; or msgpack, here also under LZ4


def uniter_arrays(number: int) -> dict[str, np.ndarray]:
    regions = record(number)
    x1, y1, x2, y2 = regions.boxes.T / 300
    arrays = {
        "norm_bb": np.stack([x1, y1, x2, y2, x2 - x1, y2 - y1], axis=1),
        "features": regions.features,
        "conf": regions.class_probs.max(1, keepdims=True),
        "soft_labels": regions.class_probs,
    }
    return {name: array.astype(np.float16) for name, array in arrays.items()}


def write_npz(folder: Path, records: int) -> None:
    def row(number: int) -> bytes:
        file = io.BytesIO()
        np.savez_compressed(file, **uniter_arrays(number))  # type: ignore[arg-type]
        return file.getvalue()

    write_lmdb(folder, ((image_id(number).encode(), row(number)) for number in range(records)))


def read_npz(folder: Path) -> Read:
    get = lmdb_get(folder)

    def read(number: int) -> object:
        item = np.load(io.BytesIO(get(image_id(number).encode())), allow_pickle=False)
        return item["features"], item["norm_bb"], item["soft_labels"]

    return read


def write_lz4(folder: Path, records: int) -> None:
    def row(number: int) -> bytes:
        data = msgpack.packb({name: packed_array(array) for name, array in uniter_arrays(number).items()})
        return len(data).to_bytes(8, "little") + pa.compress(data, "lz4", asbytes=True)

    write_lmdb(folder, ((image_id(number).encode(), row(number)) for number in range(records)))


def read_lz4(folder: Path) -> Read:
    get = lmdb_get(folder)

    def read(number: int) -> object:
        value = get(image_id(number).encode())
        data = pa.decompress(value[8:], int.from_bytes(value[:8], "little"), "lz4", asbytes=True)
        item = unpacked(data)
        return item["features"], item["norm_bb"], item["soft_labels"]

    return read


def packed_array(array: np.ndarray) -> dict[bytes, Any]:
    return {b"nd": True, b"type": array.dtype.str, b"kind": b"", b"shape": array.shape, b"data": array.tobytes()}


def unpacked(data: bytes) -> Any:
    return msgpack.unpackb(data, object_hook=unpacked_array, raw=False, strict_map_key=False)


def unpacked_array(item: dict[Any, Any]) -> Any:
    if b"nd" not in item:
        return item
    return np.frombuffer(item[b"data"], np.dtype(item[b"type"])).reshape(item[b"shape"])


def write_lmdb(folder: Path, rows: Iterator[tuple[bytes, bytes]]) -> None:
    with lmdb.open(str(folder / "lmdb"), map_size=MAP_BYTES) as environment:
        for key, value in rows:
            with environment.begin(write=True) as transaction:
                transaction.put(key, value)


def lmdb_get(folder: Path) -> Callable[[bytes], bytes]:
    """Opened as ViLBERT opens it."""
    environment = lmdb.open(str(folder / "lmdb"), max_readers=1, readonly=True, lock=False, readahead=False, meminit=False)

    def get(key: bytes) -> bytes:
        with environment.begin(write=False) as transaction:
            value: bytes = transaction.get(key)
        return value

    return get


# -- plain copies


def read_copy(folder: Path) -> Read:
    """The bytes of our records, copied within memory."""
    records = records_in_memory(folder)
    return lambda number: bytes(records[number])


def read_copy_of_given(folder: Path) -> Read:
    """The bytes of what ``read_for_training`` gives, copied within memory: all up to the last feature, and rows of probabilities."""
    records, store = records_in_memory(folder), FeatureStore(folder / "regions.store")
    firsts, tables, rows = [], [], []
    for number, regions in enumerate(store.regions_at(np.arange(len(records))).tolist()):
        id_bytes, kept = len(image_id(number)), min(regions, MOST)
        at, size = probs_span(regions, kept, id_bytes, SCHEMA)
        firsts.append(records[number][: first_bytes(regions, kept, id_bytes, SCHEMA)])
        tables.append(np.frombuffer(records[number][at : at + size], np.uint16).reshape(-1, CLASSES))
        rows.append(predicted(number, kept))
    return lambda number: (bytes(firsts[number]), tables[number][rows[number]])


def records_in_memory(folder: Path) -> list[memoryview]:
    """Our records one behind the other, as on the disk."""
    with FeatureStore(folder / "regions.store") as store:
        everything = memoryview(b"".join(store.encoded(name)[0] for name in store.ids))
        ends = np.cumsum([len(store.encoded(name)[0]) for name in store.ids]).tolist()
    return [everything[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def given_bytes(records: int) -> float:
    """Bytes of a record that training is given, a mean."""
    counts = [len(record(number)) for number in range(records)]
    probs = [SCHEMA.probs_bytes * len(predicted(number, min(n, MOST))) for number, n in enumerate(counts)]
    return float(np.mean([first_bytes(n, min(n, MOST), 12, SCHEMA) for n in counts]) + np.mean(probs))


TRAINING, COPY, COPY_OF_GIVEN = "ours, as training reads", "plain copy of whole records", "plain copy of what training reads"
FORMATS = {
    TRAINING: Format(write_ours, read_for_training),
    "ours, all regions": Format(write_ours, read_all_regions),
    "ours, every checksum and probability": Format(write_ours, read_ours),
    "pickled base64 LMDB": Format(write_base64, read_base64),
    "tensorpack msgpack LMDB": Format(write_tensorpack, read_tensorpack),
    "UNITER npz LMDB": Format(write_npz, read_npz),
    "UNITER msgpack lz4 LMDB": Format(write_lz4, read_lz4),
}
COPIES = {COPY: read_copy, COPY_OF_GIVEN: read_copy_of_given}


def measure_formats(folder: Path, records: int, rounds: int) -> dict[str, Any]:
    """Rates of each format, medians over rounds in which all take turns. GB/s counts the bytes that its files hold, or that are given.

    "records_per_s" is by the clock, over all workers; "per_cpu_s" by the processor time that the workers spent together, which other
    programs on the machine disturb less. "copies" is how many plain copies ours takes as long as: the median over the rounds.
    """
    places = {name: written(folder, kind.write, records) for name, kind in FORMATS.items()}
    readers = {name: (kind.reader, places[name]) for name, kind in FORMATS.items()}
    readers |= {name: (reader, places[TRAINING]) for name, reader in COPIES.items()}
    sizes = {name: bytes_in(place) / records for name, (_, place) in readers.items()}
    sizes |= dict.fromkeys((TRAINING, COPY_OF_GIVEN), given_bytes(records))
    rates: dict[str, dict[str, list[tuple[float, float]]]] = {name: {} for name in readers}
    for turn in range(rounds):
        for workers in (1, 2, 4):
            for name, (reader, place) in readers.items():
                rates[name].setdefault(f"warm, {workers}", []).append(rate(reader, place, records, workers, turn))
    for turn in range(min(rounds, 3)):
        for workers in (1, 4):
            for name, kind in FORMATS.items():
                drop_from_cache(places[name])
                rates[name].setdefault(f"cold, {workers}", []).append(rate(kind.reader, places[name], records, workers, turn, warm=False))
    copies = {name: per_cpu_ratio(rates[name]["warm, 1"], rates[TRAINING]["warm, 1"]) for name in COPIES}
    return {"copies": copies} | {name: summary(sizes[name], per_setting) for name, per_setting in rates.items()}


def per_cpu_ratio(copying: list[tuple[float, float]], reading: list[tuple[float, float]]) -> float:
    return round(statistics.median(copy / read for (_, copy), (_, read) in zip(copying, reading, strict=True)), 2)


def written(folder: Path, write: Callable[[Path, int], None], records: int) -> Path:
    """The folder of a format, made where it is not there yet."""
    place = folder / write.__name__
    if not place.exists():
        place.mkdir()
        write(place, records)
        sync(place)
    return place


def summary(size: float, per_setting: dict[str, list[tuple[float, float]]]) -> dict[str, Any]:
    by_clock, by_cpu = ({name: statistics.median(pair[i] for pair in pairs) for name, pairs in per_setting.items()} for i in (0, 1))
    return {
        "bytes_per_record": round(size),
        "records_per_s": {setting: round(value) for setting, value in by_clock.items()},
        "gb_per_s": {setting: round(value * size / 1e9, 2) for setting, value in by_clock.items()},
        "per_cpu_s": {setting: round(value) for setting, value in by_cpu.items()},
    }


def rate(reader: Callable[[Path], Read], place: Path, records: int, workers: int, seed: int, warm: bool = True) -> tuple[float, float]:
    """Records per second and per second of processor time over all workers, processes as the loader forks them.

    Each reads its share of a random order, after one warming pass.
    """
    context = multiprocessing.get_context("fork")
    ready, seconds = context.Barrier(workers), context.SimpleQueue()
    order = np.random.default_rng(seed).permutation(records)
    shares = [order[i::workers].tolist() for i in range(workers)]
    processes = [context.Process(target=work, args=(reader, place, share, warm, ready, seconds)) for share in shares]
    for process in processes:
        process.start()
    spent = [seconds.get() for _ in processes]
    for process in processes:
        process.join()
    return records / max(clock for clock, _ in spent), records / sum(cpu for _, cpu in spent)


def work(reader: Callable[[Path], Read], place: Path, numbers: list[int], warm: bool, ready: Any, seconds: Any) -> None:
    """One worker: opens, waits for the others, reads."""
    read = reader(place)
    if warm:
        for number in numbers:
            read(number)
    ready.wait()
    start, cpu = time.perf_counter(), time.process_time()
    for number in numbers:
        read(number)
    seconds.put((time.perf_counter() - start, time.process_time() - cpu))


def sync(folder: Path) -> None:
    for path in files_in(folder):
        with open(path, "rb") as file:
            os.fsync(file.fileno())


def drop_from_cache(folder: Path) -> None:
    """Ask the system to forget the files' pages; nobody may have them mapped."""
    for path in files_in(folder):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def bytes_in(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in files_in(folder))


# -- the order of an epoch


def measure_order(folder: Path, records: int, rounds: int) -> dict[str, int]:
    """Records/s of one process from the disk itself, 64 at a time, medians: in random order and by blocks, asked for ahead or not."""
    place, rates = written(folder, write_ours, records), {}
    for turn in range(rounds):
        for order in ("random", "blocks"):
            for ahead in (False, True):
                drop_from_cache(place)
                name = f"{order}{', asked for ahead' if ahead else ''}"
                rates.setdefault(name, []).append(cold_rate(place, order, ahead, turn))
    return {name: round(statistics.median(values)) for name, values in rates.items()}


def cold_rate(place: Path, order: str, ahead: bool, seed: int) -> float:
    with FeatureStore(place / "regions.store") as store:
        count = np.arange(len(store))
        places = permuted(seed, 0, count, len(store)) if order == "random" else permuted_by_blocks(seed, 0, count, len(store), 64)
        rows = store.rows_in_storage_order()[places]
        start = time.perf_counter()
        for first in range(0, len(rows), 64):
            if ahead:
                store.announce(rows[first : first + 64])
            for row in rows[first : first + 64].tolist():
                store.at(row)
        return len(rows) / (time.perf_counter() - start)


# -- samples: masked and packed


@dataclass(frozen=True)
class DrawnTokens:
    """Captions of Flickr8k's lengths, tokens drawn at random: what a token table gives."""

    ids: list[np.ndarray]
    lengths: np.ndarray
    path: str = "none"

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> np.ndarray:
        return self.ids[row]

    def continues(self, row: int) -> None:
        return None


def measure_samples(folder: Path, records: int, rounds: int) -> dict[str, dict[int, int]]:
    """Samples per second of processor time, medians: read from the system's cache, masked and packed in micro-batches of 64.

    By masking recipe and number of processes that do it at once, as the loader forks them; every record was verified before.
    """
    place, found = written(folder, write_ours, records), {}
    for masking in ("official", "paper", "bert"):
        sampler = make_sampler(place, records, masking)
        make_batches(sampler, 0, records)
        rates = {processes: [sample_rate(sampler, processes, turn) for turn in range(rounds)] for processes in (1, 2, 4)}
        found[masking] = {processes: round(statistics.median(values)) for processes, values in rates.items()}
    return found


def sample_rate(sampler: Sampler, processes: int, epoch: int) -> float:
    """Samples per second of the processor time of all processes together, each of which makes as many of an epoch's first 512."""
    context = multiprocessing.get_context("fork")
    ready, seconds, count = context.Barrier(processes), context.SimpleQueue(), min(512, len(sampler.pairs))

    def work() -> None:
        make_batches(sampler, epoch, count)  # the first time a fork touches memory it is copied
        ready.wait()
        seconds.put(make_batches(sampler, epoch + 1, count))

    started = [context.Process(target=work) for _ in range(processes)]
    for process in started:
        process.start()
    spent = [seconds.get() for _ in started]
    for process in started:
        process.join()
    return processes * count / sum(spent)


def make_sampler(place: Path, records: int, masking: str) -> Sampler:
    rng = np.random.default_rng(0)
    share = np.array(CAPTIONS_BY_LENGTH) / sum(CAPTIONS_BY_LENGTH)
    lengths = rng.choice(np.arange(2, 2 + len(share)), records, p=share)
    tokens: Any = DrawnTokens([rng.integers(1000, VOCABULARY, n).astype(np.int32) for n in lengths], lengths)
    texts = pa.array([f"caption {i}" for i in range(records)])
    table = pa.table({"pair_id": texts, "caption": texts})
    pairs = Pairs(table, np.arange(records, dtype=np.int32), [image_id(i) for i in range(records)], "none")
    facts = VocabularyFacts(
        size=VOCABULARY, pad_id=0, unk_id=100, cls_id=101, sep_id=102, mask_id=103, is_continuation=rng.random(VOCABULARY) < 0.2
    )
    settings = StreamSettings(seed=1, global_batch=512, micro_batch=64, masking=masking)
    return Sampler(pairs, FeatureStore(place / "regions.store"), tokens, facts, settings)


def make_batches(sampler: Sampler, epoch: int, count: int) -> float:
    """The processor time of making the first samples of an epoch."""
    start = time.process_time()
    drawn = sampler.draws(np.full(count, epoch), np.arange(count))
    for first in range(0, len(drawn), 64):
        collate(sampler.samples(drawn, np.arange(first, min(first + 64, len(drawn)))), sampler.settings)
    return time.process_time() - start


# -- whole reads


class CountingStore(FeatureStore):
    """Counts the records that it reads whole to verify them."""

    wholes = 0

    def _whole(self, row: int) -> bytes:
        self.wholes += 1
        return super()._whole(row)


def measure_loaders(folder: Path) -> dict[str, Any]:
    """Per cent of reads that are whole: of all over 15 epochs, and of those after the first epoch; and what arithmetic says."""
    place, found = folder / "small.store", dict[str, Any]()
    write_small(place, SMALL_RECORDS)
    for processes in (1, 2, 4, 8, 32, 128, 256):
        own, shared = (whole_shares(place, processes, EPOCHS, hosts) for hosts in (None, 1))
        expected = [(1 - 1 / processes) ** epoch for epoch in range(EPOCHS)]
        found[f"{processes} processes"] = {
            "each for itself": per_cent(own),
            "by arithmetic": per_cent(expected),
            "together": per_cent(shared),
        }
    for hosts in (2, 4, 8):
        found[f"256 processes on {hosts} hosts, together on each"] = per_cent(whole_shares(place, 256, EPOCHS, hosts))
    return found


def per_cent(shares: list[float]) -> dict[str, float]:
    return {"of all": round(100 * float(np.mean(shares)), 1), "after the first epoch": round(100 * float(np.mean(shares[1:])), 1)}


def write_small(place: Path, records: int) -> None:
    boxes, probs = np.array([[0, 0, 9, 9]], np.float32), np.array([[0.5, 0.5]], np.float32)
    regions = RegionRecord(boxes, np.ones((1, 2), np.float32), probs, 9, 9)
    with FeatureStoreWriter(place, StoreSchema(2, 2, ("__background__", "class"), "none"), batch_records=records) as writer:
        writer.add_all((image_id(number), regions) for number in range(records))
    seal_store(place)


def whole_shares(place: Path, processes: int, epochs: int, hosts: int | None) -> list[float]:
    """For each epoch, the share of its reads that were whole. None for ``hosts``: every process remembers for itself."""
    stores = [CountingStore(place) for _ in range(processes)]
    with ExitStack() as stack:
        for number, store in enumerate(stores):
            if hosts is not None and (reason := stack.enter_context(store.verified_together(f"{place} {number % hosts}"))) is not None:
                sys.exit(reason)
    size, shares = len(stores[0]), []
    for epoch in range(epochs):
        before = sum(store.wholes for store in stores)
        rows = permuted(0, epoch, np.arange(size), size)
        for step, first in enumerate(range(0, size, SMALL_STEP)):
            stores[step % processes].first_regions(rows[first : first + SMALL_STEP], MOST)
        shares.append((sum(store.wholes for store in stores) - before) / size)
    for store in stores:
        store.close()
    return shares


if __name__ == "__main__":
    sys.exit(main())
