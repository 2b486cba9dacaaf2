"""Reading the first regions of a record and a few class probabilities against reading all of it."""

import errno
import itertools
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megainter.data.feature_store import FeatureStore
from megainter.data.feature_store.record import RegionRecord, StoreSchema, record_size
from megainter.data.feature_store.views import _positive_halves, first_bytes, probs_span
from megainter.data.feature_store.writer import FeatureStoreWriter, seal_store
from megainter.errors import DamagedError

F, C, MOST_REGIONS = 6, 9, 7
DENSE = StoreSchema(F, C, ("__background__", *(f"class {n}" for n in range(1, C))), "d")
SCHEMAS = {
    "dense": DENSE,
    "single precision": replace(DENSE, feature_dtype="float32"),
    "top-k": replace(DENSE, probs="top-k", top_k=3),
    "extras": replace(DENSE, extras={"objects_id": "int64", "objects_conf": "float16"}),
}
IDS = ["a", "a longer id that has more than 16 bytes", "日本語"]


def make_record(schema: StoreSchema, n: int, seed: int) -> RegionRecord:
    rng = np.random.default_rng(seed)
    boxes = np.sort(rng.uniform(0, 50, (n, 2, 2)), axis=1).reshape(n, 4).astype(np.float32)
    extras = {name: rng.integers(0, 9, n).astype(dtype) for name, dtype in schema.extras.items()}
    probs = rng.dirichlet(np.full(C, 0.05), n).astype(np.float32)  # most are far below the smallest normal float16
    return RegionRecord(boxes, rng.standard_normal((n, F)).astype(np.float32), probs, 50, 60, extras)


def make_store(path: Path, schema: StoreSchema) -> FeatureStore:
    with FeatureStoreWriter(path, schema) as writer:
        for i, n in enumerate(range(1, MOST_REGIONS + 1)):
            writer.add(f"{IDS[i % 3]} {n}", make_record(schema, n, n))
    seal_store(path)
    return FeatureStore(path)


def place_of(store: FeatureStore, row: int) -> tuple[Path, int, int]:
    """A record's shard, and where in it the record begins and how long it is."""
    shard, offset, length = (int(store._column[name][row]) for name in ("shard", "offset", "length"))
    return store._shards[shard][0], offset, length


def overwrite(path: Path, at: int, value: bytes) -> bytes:
    """Put bytes into a file and return those that were there."""
    with open(path, "r+b") as file:
        file.seek(at)
        before = file.read(len(value))
        file.seek(at)
        file.write(value)
    return before


def noted_reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(offset in the shard, bytes) of every read from here on."""
    pread, preadv, asked = os.pread, os.preadv, list[tuple[int, int]]()

    def noted(descriptor: int, length: int, offset: int) -> bytes:
        asked.append((offset, length))
        return pread(descriptor, length, offset)

    def noted_into(descriptor: int, places: list[memoryview], offset: int) -> int:
        asked.append((offset, sum(place.nbytes for place in places)))
        return preadv(descriptor, places, offset)

    monkeypatch.setattr(os, "pread", noted)
    monkeypatch.setattr(os, "preadv", noted_into)
    return asked


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)
def test_every_number_of_regions_and_every_choice_of_them_is_what_the_whole_record_has(tmp_path: Path, schema: StoreSchema) -> None:
    store, given = make_store(tmp_path / "s", schema), []
    for row, image_id in enumerate(store.ids):
        whole = store[image_id]
        for most in [None, *range(1, len(whole) + 2)]:
            fresh = FeatureStore(tmp_path / "s")
            for views in (fresh.at(row, most), fresh.at(row, most)):  # all of it is read the first time, a part the second
                kept = min(len(whole), most or len(whole))
                assert (len(views), views.regions, views.width, views.height) == (kept, len(whole), 50, 60)
                assert views.boxes.tobytes() == whole.boxes[:kept].tobytes()
                assert views.features.tobytes() == whole.features[:kept].tobytes()
                assert views.features.dtype == whole.features.dtype
                given.append((views, whole, kept))
                for chosen in itertools.product([False, True], repeat=kept):
                    rows = np.flatnonzero(chosen)
                    probs = views.class_probs(rows)
                    assert probs.dtype == np.float32
                    assert probs.shape == (len(rows), C)
                    assert probs.tobytes() == whole.class_probs[rows].tobytes()
                    assert views.class_probs(np.array(chosen)).tobytes() == probs.tobytes()
                    assert views.class_probs(rows[::-1]).tobytes() == whole.class_probs[rows[::-1]].tobytes()
    for views, whole, kept in given:  # what came later has not written over it
        assert views.features.tobytes() == whole.features[:kept].tobytes()
        assert views.boxes.tobytes() == whole.boxes[:kept].tobytes()


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)
def test_what_is_given_stays_what_it_is_and_cannot_be_written_to(tmp_path: Path, schema: StoreSchema) -> None:
    with make_store(tmp_path / "s", schema) as store:
        store.at(6)
        views = store.at(6, 3)
        probs = views.class_probs(np.array([0, 2]))
        before = views.features.tobytes(), views.boxes.tobytes(), probs.tobytes()
        for row in range(len(store)):
            store.at(row, 3).class_probs(np.array([0]))
        for array in (views.features, views.boxes):
            with pytest.raises(ValueError, match="read-only"):
                array[0] = 1
    assert (views.features.tobytes(), views.boxes.tobytes(), probs.tobytes()) == before


def test_a_record_read_again_is_read_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store(tmp_path / "s", DENSE)
    row, size = 4, len(store.ids[4].encode())
    regions = len(store.at(row))
    asked = noted_reads(monkeypatch)
    views = store.at(row, 2)
    begin = place_of(store, row)[1]
    features_at = 48 + -(-size // 16) * 16 + regions * 16
    probs_at = features_at + regions * 2 * F
    assert asked == [(begin, features_at), (begin + features_at, 2 * 2 * F)]
    views.class_probs(np.array([1]))
    views.class_probs(np.zeros(0, np.int64))
    assert asked[2:] == [(begin + probs_at + 2 * C, 2 * C)]


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)
def test_what_is_announced_is_what_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, schema: StoreSchema) -> None:
    store = make_store(tmp_path / "s", schema)
    asked, told = noted_reads(monkeypatch), set[int]()
    monkeypatch.setattr(os, "posix_fadvise", lambda _, offset, length, advice: told.update(range(offset, offset + length)))
    rows = np.arange(len(store))
    for _ in range(2):  # at first all of each record, later its first three regions
        asked.clear()
        told.clear()
        store.announce(rows, 3)
        for row in rows.tolist():
            views = store.at(row, 3)
            views.class_probs(np.arange(len(views)))
        read = {byte for offset, length in asked for byte in range(offset, offset + length)}
        assert read <= told
        if schema.probs == "dense" and not schema.extras:
            assert read == told  # of top-k and of extras a little more is announced
    assert len(read) < sum(place_of(store, row)[2] for row in rows.tolist())


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)
def test_a_cut_is_found_by_what_it_took(tmp_path: Path, schema: StoreSchema) -> None:
    """A shard that is cut after the record was verified: an error for each missing byte that is asked for, and for no other."""
    store = make_store(tmp_path / "s", schema)
    row = int(np.argmax(store.regions_at(np.arange(len(store)))))
    shard, offset, length = place_of(store, row)
    image_id, whole, content = store.ids[row], store[store.ids[row]], shard.read_bytes()
    store.at(row)
    most = 2
    needed = first_bytes(len(whole), most, len(image_id.encode()), schema)
    at, size = probs_span(len(whole), most, len(image_id.encode()), schema)
    edges = (47, 48, 49, needed - 1, needed, at, at + size - 1, at + size)
    for cut in {*range(0, length, 17), *(edge for edge in edges if edge < length)}:
        os.truncate(shard, offset + cut)
        if cut < needed:
            with pytest.raises(DamagedError, match=rf"record '{image_id}' in .* is damaged \(only {cut} bytes[^\n]*\); delete that file"):
                store.at(row, most)
        else:
            views = store.at(row, most)
            assert views.features.tobytes() == whole.features[:most].tobytes()
            if cut < at + size and schema.probs == "dense":
                with pytest.raises(DamagedError, match=rf"record '{image_id}' in .* bytes of class probabilities where"):
                    views.class_probs(np.array([0, most - 1]))
            if cut >= at + size:
                assert views.class_probs(np.arange(most)).tobytes() == whole.class_probs[:most].tobytes()
        with pytest.raises(DamagedError, match=rf"record '{image_id}'"):
            store[image_id]
        shard.write_bytes(content)
    assert record_size(len(whole), len(image_id.encode()), schema) == length


def test_a_flipped_bit_anywhere_is_found_when_a_process_reads_a_record_first(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", DENSE)
    shard, offset, length = place_of(store, 5)
    rng = np.random.default_rng(0)
    for at in {*range(48), *rng.integers(0, length, 60).tolist(), length - 1}:
        before = overwrite(shard, offset + at, bytes([shard.read_bytes()[offset + at] ^ 1 << int(rng.integers(8))]))
        with FeatureStore(tmp_path / "s") as fresh, pytest.raises(DamagedError, match=f"record '{store.ids[5]}'"):
            fresh.at(5, 1)
        overwrite(shard, offset + at, before)


@pytest.mark.parametrize("field", [0, 4, 6, 7, 8, 20, 24, 28, 32, 36])
def test_a_header_that_is_no_longer_the_records_is_found_later_too(tmp_path: Path, field: int) -> None:
    store = make_store(tmp_path / "s", DENSE)
    shard, offset, _ = place_of(store, 5)
    store.at(5)
    overwrite(shard, offset + field, bytes([shard.read_bytes()[offset + field] ^ 1]))
    with pytest.raises(DamagedError, match=f"record '{store.ids[5]}'"):
        store.at(5, 2)


def test_another_record_in_the_place_of_one_that_was_verified_is_found(tmp_path: Path) -> None:
    with FeatureStoreWriter(tmp_path / "s", DENSE) as writer:
        writer.add_all([("a", make_record(DENSE, 3, 0)), ("b", make_record(DENSE, 3, 1))])
    seal_store(tmp_path / "s")
    store = FeatureStore(tmp_path / "s")
    store.at(0)
    (shard, a, length), (_, b, _) = place_of(store, 0), place_of(store, 1)
    overwrite(shard, a, shard.read_bytes()[b : b + length])
    with pytest.raises(DamagedError, match=r"record 'a' in .*it belongs to another image"):
        store.at(0, 2)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_what_is_no_number_is_never_given(tmp_path: Path, dtype: str) -> None:
    schema = replace(DENSE, feature_dtype=dtype)
    store = make_store(tmp_path / "s", schema)
    row = int(np.argmax(store.regions_at(np.arange(len(store)))))
    shard, offset, _ = place_of(store, row)
    start = 48 + -(-len(store.ids[row].encode()) // 16) * 16
    features_at, probs_at = start + 16 * MOST_REGIONS, start + (16 + schema.feature_bytes) * MOST_REGIONS
    store.at(row)
    for value in (np.nan, -np.nan, np.inf, -np.inf):
        for region in range(MOST_REGIONS):
            places = {
                "box": (start + 16 * region + 4, np.float32),
                "feature": (features_at + schema.feature_bytes * (region + 1) - np.dtype(dtype).itemsize, dtype),
                "probability": (probs_at + 2 * C * region + 6, np.float16),
            }
            for what, (at, kind) in places.items():
                before = overwrite(shard, offset + at, np.array([value], kind).tobytes())
                if region < 4 and what != "probability":
                    with pytest.raises(DamagedError, match="holds NaN or Inf"):
                        store.at(row, 4)
                else:
                    views = store.at(row, 4)
                    views.class_probs(np.delete(np.arange(4), [region] if region < 4 else []))  # it is not among what is given
                    if region < 4:
                        with pytest.raises(DamagedError, match="holds NaN or Inf"):
                            views.class_probs(np.array([region]))
                overwrite(shard, offset + at, before)


def test_a_passing_error_of_the_disk_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store(tmp_path / "s", DENSE)
    whole = store.at(5).features
    preadv, failures = os.preadv, [2]

    def failing(descriptor: int, places: list[memoryview], offset: int) -> int:
        if failures[0]:
            failures[0] -= 1
            raise OSError(errno.EIO, "Input/output error")
        return preadv(descriptor, places, offset)

    monkeypatch.setattr(os, "preadv", failing)
    assert store.at(5).features.tobytes() == whole.tobytes()
    failures[0] = 9
    with pytest.raises(DamagedError, match=rf"record '{store.ids[5]}' in .* cannot be read: Input/output error; check the disk"):
        store.at(5)


@pytest.mark.parametrize("rows", [np.array([2]), np.array([0, 6]), np.array([-1]), np.ones(7, np.bool_), np.ones(1, np.bool_)])
def test_class_probabilities_of_regions_that_are_not_there_are_refused(tmp_path: Path, rows: np.ndarray) -> None:
    store = make_store(tmp_path / "s", DENSE)
    row = int(np.argmax(store.regions_at(np.arange(len(store)))))
    for _ in range(2):
        with pytest.raises(IndexError):
            store.at(row, 2).class_probs(rows)


def test_halves_become_floats_exactly() -> None:
    """Every float16 from 0 to the largest, also where the processor takes subnormal numbers for zero."""
    bits = np.arange(0x7C00, dtype=np.uint16)
    wanted = bits.view(np.float16).astype(np.float32).tobytes()
    assert _positive_halves(bits).tobytes() == wanted
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormal numbers")
    try:
        assert _positive_halves(bits).tobytes() == wanted
    finally:
        torch.set_flush_denormal(False)


def test_a_negative_zero_is_read_as_it_was_written(tmp_path: Path) -> None:
    record = make_record(DENSE, 2, 0)
    probs = np.zeros((2, C), np.float32)
    probs[:, 0], probs[:, 1] = 1, -0.0
    with FeatureStoreWriter(tmp_path / "s", DENSE) as writer:
        writer.add("a", replace(record, class_probs=probs))
    seal_store(tmp_path / "s")
    store = FeatureStore(tmp_path / "s")
    for _ in range(2):
        assert store.at(0, 1).class_probs(np.array([0])).tobytes() == probs[:1].tobytes()
