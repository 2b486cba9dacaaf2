"""The feature store under the faults it promises to survive: kills, forks, flipped bits, truncation, two writers, full disks."""

import errno
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import lmdb
import numpy as np
import pyarrow as pa
import pytest

from megainter.data.feature_store import FeatureStore
from megainter.data.feature_store.record import RegionRecord, StoreSchema
from megainter.data.feature_store.shard import FIRST_MAP_BYTES, WriterLock, count_records, entries, scan_shards
from megainter.data.feature_store.writer import FeatureStoreWriter, seal_store, stored_ids
from megainter.errors import DamagedError, LockedError, NoSpaceError, UsageError
from tests.places import ROOT

F, C = 16, 7
NAMES = ("__background__", *(f"class {n}" for n in range(1, C)))
SCHEMA = StoreSchema(F, C, NAMES, "detector-1")
ODD_IDS = ["a", "dir/b.c", "../x", "日本語", "🙂", "é", "x" * 4000, " ", "new\nline", "nul\0"]


def make_record(seed: int, n: int | None = None, f: int = F, c: int = C) -> RegionRecord:
    rng = np.random.default_rng(seed)
    n = n or int(rng.integers(1, 9))
    corners = np.sort(rng.uniform(0, 100, (n, 2, 2)), axis=1).reshape(n, 4).astype(np.float32)
    features = rng.standard_normal((n, f)).astype(np.float16)
    return RegionRecord(corners, features, rng.dirichlet(np.ones(c), n).astype(np.float32), 101, 100)


def write_store(path: Path, ids: list[str], schema: StoreSchema = SCHEMA, shards: int = 1) -> str:
    for shard in range(shards):
        with FeatureStoreWriter(path, schema, f"shard-{shard:05d}") as writer:
            for seed, image_id in enumerate(ids):
                if seed % shards == shard:
                    writer.add(image_id, make_record(seed))
    return seal_store(path)


def assert_same(record: RegionRecord, seed: int) -> None:
    wanted = make_record(seed)
    np.testing.assert_array_equal(record.boxes, wanted.boxes)
    np.testing.assert_array_equal(record.features, wanted.features)
    np.testing.assert_array_equal(record.class_probs, wanted.class_probs.astype(np.float16).astype(np.float32))
    assert (record.width, record.height) == (101, 100)
    assert (record.boxes.dtype, record.features.dtype, record.class_probs.dtype) == (np.float32, np.float16, np.float32)


def test_records_of_any_id_come_back_from_several_shards(tmp_path: Path) -> None:
    ids = ODD_IDS + [str(n) for n in range(200)]
    digest = write_store(tmp_path / "s", ids, shards=3)
    with FeatureStore(tmp_path / "s") as store:
        assert store.schema == SCHEMA
        assert store.digest == digest
        assert list(store.ids) == sorted(ids)
        assert len(store) == len(ids)
        for seed, image_id in enumerate(ids):
            assert image_id in store
            assert_same(store[image_id], seed)
            assert store.region_count(image_id) == len(store[image_id])
        assert store.region_counts(ids).tolist() == [len(make_record(seed)) for seed in range(len(ids))]
        assert store.find(["5", "absent", "🙂"]).tolist() == [sorted(ids).index("5"), -1, sorted(ids).index("🙂")]
        assert list(store.damaged()) == []


def test_records_stay_valid_after_the_store_is_closed_and_cannot_be_written_to(tmp_path: Path) -> None:
    write_store(tmp_path / "s", ["a"])
    with FeatureStore(tmp_path / "s") as store:
        record = store["a"]
    assert_same(record, 0)
    assert not record.features.flags.writeable
    assert record.features.base is not None  # a view, no copy


def test_an_absent_id_is_a_usage_error_that_names_it(tmp_path: Path) -> None:
    write_store(tmp_path / "s", ["a"])
    store = FeatureStore(tmp_path / "s")
    assert "b" not in store
    with pytest.raises(UsageError, match="no regions for image 'b'"):
        store["b"]
    with pytest.raises(UsageError, match="2 of 3 images, first 'b'"):
        store.region_counts(["a", "b", "c"])


def test_top_k_keeps_the_likeliest_classes_and_spreads_the_rest(tmp_path: Path) -> None:
    with FeatureStoreWriter(tmp_path / "s", replace(SCHEMA, probs="top-k", top_k=3)) as writer:
        writer.add("a", make_record(0, n=8))
    seal_store(tmp_path / "s")
    full, kept = make_record(0, n=8).class_probs, FeatureStore(tmp_path / "s")["a"].class_probs
    for row, back in zip(full, kept, strict=True):
        best = np.argsort(-row)[:3]
        np.testing.assert_allclose(back[best], row[best], atol=5e-4)
        rest = np.delete(back, best)
        np.testing.assert_allclose(rest, np.delete(row, best).mean(), atol=1e-3)
        assert np.ptp(rest) == 0
        assert back.sum() == pytest.approx(1, abs=1e-6)


def test_the_digest_does_not_depend_on_shards_or_order(tmp_path: Path) -> None:
    ids = [str(n) for n in range(40)]
    digest = write_store(tmp_path / "one", ids)
    assert write_store(tmp_path / "three", ids, shards=3) == digest
    with FeatureStoreWriter(tmp_path / "back", SCHEMA) as writer:
        for seed in reversed(range(40)):
            writer.add(ids[seed], make_record(seed))
    assert seal_store(tmp_path / "back") == digest
    assert write_store(tmp_path / "other", ids[1:]) != digest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": np.full((2, F), np.nan, np.float16)}, "NaN, Inf or values beyond float16"),
        ({"features": np.full((2, F), 1e6, np.float32)}, "beyond float16"),
        ({"features": np.zeros((2, F + 1), np.float16)}, "have shapes"),
        ({"boxes": np.array([[0, 0, 5, 5], [9, 0, 5, 5]], np.float32)}, "is not x1, y1, x2, y2 inside it"),
        ({"boxes": np.array([[0, 0, 5, 5], [0, 0, 500, 5]], np.float32)}, "inside it"),
        ({"boxes": np.array([[0, 0, 5, 5], [0, 0, np.inf, 5]], np.float32)}, "inside it"),
        ({"class_probs": np.full((2, C), 0.5, np.float32)}, "are not probabilities"),
        ({"class_probs": np.full((2, C), np.nan, np.float32)}, "are not probabilities"),
        ({"width": 0}, "has size 0 x 100"),
    ],
)
def test_what_may_not_enter_a_store_is_refused_when_written(tmp_path: Path, change: dict, message: str) -> None:
    with FeatureStoreWriter(tmp_path / "s", SCHEMA) as writer:
        with pytest.raises(UsageError, match=message) as caught:
            writer.add("the image", replace(make_record(0, n=2), **change))
        assert "'the image'" in str(caught.value)
        writer.add("good", make_record(1))
    assert stored_ids(tmp_path / "s") == {"good"}


@pytest.mark.parametrize("image_id", ["", "x" * 5000, "\ud800"])
def test_impossible_ids_are_refused(tmp_path: Path, image_id: str) -> None:
    with FeatureStoreWriter(tmp_path / "s", SCHEMA) as writer, pytest.raises(UsageError, match="image id"):
        writer.add(image_id, make_record(0))


def test_boxes_a_rounding_error_outside_are_clipped(tmp_path: Path) -> None:
    boxes = np.array([[-0.4, 0, 101.0001, 100.5]], np.float32)
    with FeatureStoreWriter(tmp_path / "s", SCHEMA) as writer:
        writer.add("a", replace(make_record(0, n=1), boxes=boxes))
    seal_store(tmp_path / "s")
    assert FeatureStore(tmp_path / "s")["a"].boxes.tolist() == [[0, 0, 101, 100]]


def test_the_same_record_twice_is_one_and_another_one_is_refused(tmp_path: Path) -> None:
    with FeatureStoreWriter(tmp_path / "s", SCHEMA) as writer:
        writer.add("a", make_record(0))
        writer.add("a", make_record(0))
        with pytest.raises(UsageError, match="already has another record for image 'a'"):
            writer.add("a", make_record(1))
    with FeatureStoreWriter(tmp_path / "s", SCHEMA) as writer:
        assert "a" in writer
        writer.add("a", make_record(0))
        assert len(writer) == 1
    with FeatureStoreWriter(tmp_path / "s", SCHEMA, "shard-00001") as writer:
        writer.add("a", make_record(1))
    with pytest.raises(DamagedError, match=r"image 'a' has different records in shard-00000.lmdb and shard-00001.lmdb"):
        seal_store(tmp_path / "s")


def test_another_schema_is_refused_with_what_differs(tmp_path: Path) -> None:
    write_store(tmp_path / "s", ["a"], replace(SCHEMA, settings={"max_boxes": 36}))
    for schema, message in [
        (replace(SCHEMA, settings={"max_boxes": 100}), "max_boxes is 36, not 100"),
        (replace(SCHEMA, settings={"max_boxes": 36}, detector="detector-2"), "detector is 'detector-1', not 'detector-2'"),
    ]:
        with pytest.raises(UsageError, match=message):
            FeatureStoreWriter(tmp_path / "s", schema)


def test_folders_that_are_no_store(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"x")
    with pytest.raises(UsageError, match="holds other files"):
        FeatureStoreWriter(tmp_path / "photos", SCHEMA)
    for path, message in [(tmp_path / "photos", "not a feature store"), (tmp_path / "absent", "does not exist")]:
        with pytest.raises(UsageError, match=message):
            FeatureStore(path)
    assert sorted(os.listdir(tmp_path / "photos")) == ["a.jpg"]


def test_an_unsealed_store_is_read_only_on_request_and_adding_unseals(tmp_path: Path) -> None:
    digest = write_store(tmp_path / "s", ["0", "1"])
    with FeatureStoreWriter(tmp_path / "s", SCHEMA):
        pass  # nothing added
    assert FeatureStore(tmp_path / "s").digest == digest
    with FeatureStoreWriter(tmp_path / "s", SCHEMA, "shard-00001") as writer:
        writer.add("2", make_record(2))
        writer.commit()
        with pytest.raises(LockedError, match=f"in use by pid {os.getpid()}"):
            FeatureStore(tmp_path / "s", allow_partial=True)
    with pytest.raises(DamagedError, match="incomplete: 3 records, not sealed"):
        FeatureStore(tmp_path / "s")
    partial = FeatureStore(tmp_path / "s", allow_partial=True)
    assert_same(partial["2"], 2)
    assert seal_store(tmp_path / "s") == partial.digest
    FeatureStoreWriter(tmp_path / "empty", SCHEMA).close()
    with pytest.raises(UsageError, match="no records to seal"):
        seal_store(tmp_path / "empty")


def test_the_map_grows_without_losing_a_record(tmp_path: Path) -> None:
    """The usual "abort, double the map, retry the last put" loses the open transaction; here every record must be there."""
    schema = replace(SCHEMA, feature_size=2048)
    record = make_record(0, n=100, f=2048)
    count = FIRST_MAP_BYTES // record.features.nbytes + 30
    with FeatureStoreWriter(tmp_path / "s", schema, batch_records=50) as writer:
        for n in range(count):
            writer.add(str(n), record)
        writer.commit()
        assert writer.environment.info()["map_size"] > FIRST_MAP_BYTES
    seal_store(tmp_path / "s")
    with FeatureStore(tmp_path / "s") as store:
        assert len(store) == count
        assert list(store.damaged()) == []


def test_forked_readers_and_two_readers_of_one_store(tmp_path: Path) -> None:
    ids = [str(n) for n in range(100)]
    write_store(tmp_path / "s", ids, shards=2)
    store, second = FeatureStore(tmp_path / "s"), FeatureStore(tmp_path / "s")
    assert_same(second["0"], 0)
    _read_all(store)
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=_read_all, args=(store,)) for _ in range(3)]
    for child in children:
        child.start()
    _read_all(store)
    for child in children:
        child.join()
        assert child.exitcode == 0


def _read_all(store: FeatureStore) -> None:
    for seed in range(100):
        assert_same(store[str(seed)], seed)


def test_a_pickled_store_opens_its_own_files(tmp_path: Path) -> None:
    write_store(tmp_path / "s", ["0", "1"])
    store = FeatureStore(tmp_path / "s")
    store["0"]
    data = pickle.dumps(store)
    assert len(data) < 2000
    store.close()
    assert_same(pickle.loads(data)["1"], 1)


def test_every_flipped_bit_of_a_record_is_found_and_named(tmp_path: Path) -> None:
    write_store(tmp_path / "s", [str(n) for n in range(20)])
    shard, store = tmp_path / "s" / "shard-00000.lmdb", FeatureStore(tmp_path / "s")
    row = store._row("7")
    offset, length = (int(store._column[name][row]) for name in ("offset", "length"))
    rng = np.random.default_rng(0)
    for bit in {*rng.integers(0, length * 8, 200).tolist(), *range(48 * 8)}:
        flip(shard, offset * 8 + bit)
        with pytest.raises(DamagedError, match="record '7'"):
            FeatureStore(tmp_path / "s")["7"]
        flip(shard, offset * 8 + bit)
    assert_same(FeatureStore(tmp_path / "s")["7"], 7)
    flip(shard, offset * 8 + 1000)
    assert [image_id for image_id, _ in FeatureStore(tmp_path / "s").damaged()] == ["7"]


def flip(path: Path, bit: int) -> None:
    with open(path, "r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def test_a_flipped_bit_in_the_index_is_found(tmp_path: Path) -> None:
    write_store(tmp_path / "s", [str(n) for n in range(20)])
    index = tmp_path / "s" / "index.arrow"
    for bit in np.random.default_rng(1).integers(0, index.stat().st_size * 8, 50).tolist():
        flip(index, bit)
        with pytest.raises(DamagedError, match="is not the sealed one"):
            FeatureStore(tmp_path / "s")
        flip(index, bit)
    os.truncate(index, index.stat().st_size - 1)
    with pytest.raises(DamagedError, match="is not the sealed one"):
        FeatureStore(tmp_path / "s")


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
def test_a_truncated_shard_is_an_error_and_no_crash(tmp_path: Path, share: float) -> None:
    write_store(tmp_path / "s", [str(n) for n in range(200)])
    shard = tmp_path / "s" / "shard-00000.lmdb"
    before_truncation = FeatureStore(tmp_path / "s")
    os.truncate(shard, int(shard.stat().st_size * share))
    with pytest.raises(DamagedError, match=r"shard-00000.lmdb is truncated"):
        FeatureStore(tmp_path / "s")
    assert len(list(before_truncation.damaged())) > 0  # an error for each, and no SIGBUS
    if share:  # an empty file is a shard that was never written to
        with pytest.raises(DamagedError, match=r"shard-00000.lmdb is (truncated|not a readable shard)"):
            FeatureStoreWriter(tmp_path / "s", SCHEMA)
    shard.unlink()
    with pytest.raises(DamagedError, match="missing"):
        FeatureStore(tmp_path / "s")


def test_pages_of_a_shard_that_were_written_over_end_no_process(tmp_path: Path) -> None:
    write_store(tmp_path / "s", [str(n) for n in range(200)])
    shard = tmp_path / "s" / "shard-00000.lmdb"
    whole, rng = shard.read_bytes(), np.random.default_rng(0)
    said = set()
    trees = [page for page in range(2, len(whole) // 4096) if int.from_bytes(whole[page * 4096 + 10 : page * 4096 + 12], "little") & 3]
    for page in trees[:2] + trees[-8:]:  # branches and leaves, the newest last
        data = bytearray(whole)
        for place in rng.integers(0, 48, 8).tolist():  # the page's header and its first nodes
            data[page * 4096 + place] = rng.integers(256)
        shard.write_bytes(data)
        said.add(_outcome_of_reading(shard))
    assert said <= {0, 1}, "0: nothing that is read was hit; 1: named"
    assert 1 in said


def _outcome_of_reading(shard: Path) -> int:
    """0: all was read; 1: ``DamagedError``; 2: another error; below 0: the signal that ended the reader."""
    child = os.fork()
    if child == 0:
        try:
            count_records(shard)
            list(entries(shard))
            scan_shards([shard])
        except BaseException as error:
            os._exit(1 if isinstance(error, DamagedError) else 2)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_garbage_in_place_of_a_shard_is_named(tmp_path: Path) -> None:
    write_store(tmp_path / "s", ["a"])
    shard = tmp_path / "s" / "shard-00000.lmdb"
    shard.write_bytes(b"\0" * shard.stat().st_size)
    with pytest.raises(DamagedError, match=r"record 'a'.*no record stands there"):
        FeatureStore(tmp_path / "s")["a"]
    with pytest.raises(DamagedError, match="not a readable shard"):
        seal_store(tmp_path / "s")


def test_store_json_of_another_version_or_no_json(tmp_path: Path) -> None:
    write_store(tmp_path / "s", ["a"])
    path = tmp_path / "s" / "store.json"
    description = json.loads(path.read_text())
    path.write_text(json.dumps(description | {"version": 2}))
    with pytest.raises(UsageError, match="not a feature store of version 1"):
        FeatureStore(tmp_path / "s")
    path.write_text("{")
    with pytest.raises(UsageError, match="not valid JSON"):
        FeatureStore(tmp_path / "s")


def test_a_second_writer_of_a_shard_is_refused_within_two_seconds(tmp_path: Path) -> None:
    script = f"""
        import sys, time
        sys.path.insert(0, {str(ROOT)!r})
        from tests.data.feature_store.test_reader import *
        with FeatureStoreWriter(Path({str(tmp_path / "s")!r}), SCHEMA) as writer:
            print("ready", flush=True)
            time.sleep(60)
    """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "ready\n"
        start = time.monotonic()
        with pytest.raises(LockedError, match=rf"shard-00000.lmdb is in use by pid {other.pid} on .* since 20"):
            FeatureStoreWriter(tmp_path / "s", SCHEMA)
        assert time.monotonic() - start < 2
        with pytest.raises(LockedError):
            seal_store(tmp_path / "s")
        FeatureStoreWriter(tmp_path / "s", SCHEMA, "shard-00001").close()  # another shard is free
        other.kill()
    FeatureStoreWriter(tmp_path / "s", SCHEMA).close()  # the dead writer's lock is gone with it


def test_a_killed_writer_loses_at_most_its_open_transaction(tmp_path: Path) -> None:
    """SIGKILL at random moments, each time taken up again: nothing acknowledged is lost, and the end is as without kills."""
    ids = [str(n) for n in range(300)]
    script = f"""
        import sys
        sys.path.insert(0, {str(ROOT)!r})
        from tests.data.feature_store.test_reader import *
        with FeatureStoreWriter(Path({str(tmp_path / "s")!r}), SCHEMA, batch_records=4) as writer:
            print("have", len(writer.done), flush=True)
            for seed in range(300):
                if str(seed) not in writer:
                    writer.add(str(seed), make_record(seed))
                    print("safe", len(writer.done), flush=True)
        print("end", flush=True)
    """
    rng = np.random.default_rng(5)
    acknowledged, kills, finished = 0, 0, False
    while not finished:
        with subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True) as writer:
            stop_after = int(rng.integers(1, 90)) if kills < 5 else 10**6
            assert writer.stdout is not None
            for number, line in enumerate(writer.stdout):
                word, _, count = line.strip().partition(" ")
                assert word != "have" or int(count) >= acknowledged, f"{acknowledged} were acknowledged, {count} are there"
                acknowledged = int(count) if count else acknowledged
                finished |= word == "end"
                if number == stop_after:
                    writer.send_signal(signal.SIGKILL)
        kills += writer.returncode == -signal.SIGKILL
    assert kills == 5
    assert seal_store(tmp_path / "s") == write_store(tmp_path / "whole", ids)


def test_records_of_one_add_all_share_a_transaction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with FeatureStoreWriter(tmp_path / "s", SCHEMA, batch_records=3) as writer:
        writer.add_all([(str(n), make_record(n)) for n in range(2)])
        assert len(writer.done) == 0
        writer.add_all([(str(n), make_record(n)) for n in range(2, 7)])
        assert len(writer.done) == 7
        monkeypatch.setattr(writer, "batch_seconds", 0.0)
        writer.add("late", make_record(8))
        assert len(writer.done) == 8


def test_a_full_disk_is_told_as_such_and_keeps_what_was_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = namedtuple("Disk", "f_bavail f_frsize")(100, 4096)

    def fill_disk() -> None:
        with FeatureStoreWriter(tmp_path / "s", SCHEMA, batch_records=4) as writer:
            for seed in range(10):
                writer.add(str(seed), make_record(seed))
            monkeypatch.setattr(os, "statvfs", lambda path: disk)
            writer.commit()

    with pytest.raises(NoSpaceError, match="after 8 records, all of them kept"):
        fill_disk()
    monkeypatch.undo()
    assert len(stored_ids(tmp_path / "s")) == 8


def test_a_write_that_the_disk_refuses_keeps_what_was_committed(tmp_path: Path) -> None:
    """A real refusal inside LMDB's own write, by a file size limit: as on a full disk, LMDB reports an input/output error."""
    script = f"""
        import resource, sys
        sys.path.insert(0, {str(ROOT)!r})
        from tests.data.feature_store.test_reader import *
        try:
            with FeatureStoreWriter(Path({str(tmp_path / "s")!r}), SCHEMA, batch_records=10) as writer:
                resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
                for seed in range(10_000):
                    writer.add(str(seed), make_record(seed))
        except NoSpaceError as error:
            print(len(writer.done), error)
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 0, run.stderr
    kept = int(run.stdout.split()[0])
    assert kept > 0
    assert f"after {kept:,} records, all of them kept" in run.stdout
    digest = seal_store(tmp_path / "s")
    assert digest == write_store(tmp_path / "whole", [str(n) for n in range(kept)])


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_store_is_readable_and_says_so_to_writers(tmp_path: Path) -> None:
    write_store(tmp_path / "s", ["a"])
    for path in [*(tmp_path / "s").iterdir(), tmp_path / "s"]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    assert len(FeatureStore(tmp_path / "s")) == 1
    with pytest.raises(UsageError, match="cannot be written to"):
        FeatureStoreWriter(tmp_path / "s", SCHEMA)
    (tmp_path / "s").chmod(0o755)


def test_a_passing_read_error_is_tried_again_and_a_lasting_one_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_store(tmp_path / "s", ["a"])
    store, pread, failures = FeatureStore(tmp_path / "s"), os.pread, [2]

    def failing(descriptor: int, length: int, offset: int) -> bytes:
        if failures[0]:
            failures[0] -= 1
            raise OSError(errno.EIO, "Input/output error")
        return pread(descriptor, length, offset)

    monkeypatch.setattr(os, "pread", failing)
    assert_same(store["a"], 0)
    failures[0] = 9
    with pytest.raises(DamagedError, match=r"record 'a' in .*shard-00000.lmdb cannot be read: Input/output error"):
        store["a"]


def test_a_shard_is_a_plain_lmdb_file(tmp_path: Path) -> None:
    write_store(tmp_path / "s", [str(n) for n in range(50)])
    assert count_records(tmp_path / "s" / "shard-00000.lmdb") == 50
    with lmdb.open(str(tmp_path / "s" / "shard-00000.lmdb"), subdir=False, readonly=True, lock=False, max_dbs=2) as environment:
        with environment.begin(db=environment.open_db(b"records", create=False)) as transaction:
            values = [value for _, value in transaction.cursor()]
    assert len(values) == 50
    assert all(value.startswith(b"MIRR") for value in values)


def test_a_lock_is_free_again_after_release(tmp_path: Path) -> None:
    lock = WriterLock(tmp_path / "x.lock")
    with pytest.raises(LockedError):
        WriterLock(tmp_path / "x.lock")
    lock.release()
    WriterLock(tmp_path / "x.lock").release()


def test_a_record_read_again_is_not_checked_again_but_never_gives_what_is_no_number(tmp_path: Path) -> None:
    with FeatureStoreWriter(tmp_path / "s", SCHEMA) as writer:
        writer.add("a", make_record(0, n=5))
    seal_store(tmp_path / "s")
    whole = FeatureStore(tmp_path / "s")["a"]
    shard = next((tmp_path / "s").glob("shard-*.lmdb"))
    content = shard.read_bytes()
    at = content.find(whole.features.tobytes())
    probs_at = at + whole.features.nbytes

    def damage(place: int, value: bytes) -> None:
        with open(shard, "r+b") as file:
            file.seek(place)
            file.write(value)

    with FeatureStore(tmp_path / "s") as store:
        views = store.at(0)
        rows = np.array([3, 1])
        assert np.array_equal(views.class_probs(rows), whole.class_probs[rows])
        assert np.array_equal(views.class_probs(np.array([True, False, False, False, True])), whole.class_probs[[0, 4]])
        assert views.class_probs(np.zeros(0, np.int64)).shape == (0, C)
        assert np.array_equal(views.features, whole.features)
        damage(at, bytes([content[at] ^ 1]))
        store.at(0)  # verified before; a flipped bit that came later is still a number
        with pytest.raises(DamagedError, match="checksum"):
            store["a"]
        damage(at, np.array([np.inf], "<f2").tobytes())
        with pytest.raises(DamagedError, match="NaN or Inf"):
            store.at(0)
        damage(at, content[at : at + 2])
        damage(probs_at, np.array([np.nan], "<f2").tobytes())
        assert np.isfinite(store.at(0).class_probs(np.array([1]))).all()
        with pytest.raises(DamagedError, match="NaN or Inf"):
            store.at(0).class_probs(np.array([0]))
    with FeatureStore(tmp_path / "s") as fresh, pytest.raises(DamagedError, match="checksum"):
        fresh.at(0)


def test_the_index_of_a_sealed_store_is_mapped_and_not_copied(tmp_path: Path) -> None:
    with FeatureStoreWriter(tmp_path / "s", SCHEMA) as writer:
        for seed in range(50):
            writer.add(f"image {seed}", make_record(seed))
    seal_store(tmp_path / "s")
    allocated = pa.total_allocated_bytes()
    with FeatureStore(tmp_path / "s") as store:
        assert pa.total_allocated_bytes() == allocated
        assert store["image 7"].width == make_record(7).width
