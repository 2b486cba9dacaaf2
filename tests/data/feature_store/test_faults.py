"""A feature store on disks that are full, read-only, shared by hosts or failing: an error for each, never a crash or a lost record."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from megainter.data.feature_store import FeatureStore, lock
from megainter.data.feature_store.lock import WriterLock, network_filesystem
from megainter.data.feature_store.writer import FeatureStoreWriter, seal_store, stored_ids
from megainter.errors import DamagedError, LockedError
from tests.data.feature_store.test_reader import SCHEMA, make_record, write_store
from tests.disks import mounting, run_python

__all__ = ["mounting"]  # a fixture
PRELUDE = """
    from tests.data.feature_store.test_reader import *
    from megainter.errors import MegainterError
    def ids_of(path):
        return stored_ids(path)
"""


def python(code: str, before: str = "") -> subprocess.CompletedProcess[str]:
    """``run_python`` with all that a store needs."""
    return run_python(textwrap.dedent(PRELUDE) + textwrap.dedent(code), before)


FILL = """
    store, told = Path({store!r}), ""
    try:
        with FeatureStoreWriter(store, SCHEMA, batch_records=16) as writer:
            for seed in range(100_000):
                writer.add(str(seed), make_record(seed, n=100))
    except MegainterError as error:
        told = type(error).__name__ + " " + str(error.exit_code) + " " + str(error)
    kept = len(writer.done)
    print(told)
    assert kept == len(stored_ids(store)), (kept, len(stored_ids(store)))
    assert "\\n" not in told
    partial = FeatureStore(store, allow_partial=True)
    assert list(partial.damaged()) == []
    assert_same_boxes = all((partial[str(n)].boxes == make_record(n, n=100).boxes).all() for n in range(kept))
    print(kept, assert_same_boxes)
"""


def test_a_full_disk_keeps_every_committed_record_and_says_so(mounting: Path) -> None:
    run = python(FILL.format(store=str(mounting / "s")), f"mount -t tmpfs -o size=12m tmpfs {mounting}")
    assert run.returncode == 0, run.stderr
    told, kept = run.stdout.splitlines()
    assert told.startswith(f"NoSpaceError 5 no space left for {mounting / 's' / 'shard-00000.lmdb'} after ")
    assert int(kept.split()[0]) > 500
    assert kept.endswith("True")
    assert f"after {int(kept.split()[0]):,} records, all of them kept" in told


def test_a_disk_filled_by_others_between_commits_is_no_sigbus(mounting: Path) -> None:
    """The space that was free at the check is gone when LMDB writes."""
    code = """
        import os
        writer = FeatureStoreWriter(Path({store!r}), SCHEMA, batch_records=16)
        writer.add_all([(str(n), make_record(n)) for n in range(16)])
        writer._require_space = lambda size: fill()
        def fill():
            with open({filler!r}, "wb", buffering=0) as file:
                try:
                    while file.write(bytes(4096)):
                        pass
                except OSError:
                    pass
        try:
            writer.add_all([(str(n), make_record(n)) for n in range(16, 600)])
        except NoSpaceError as error:
            print(error)
        writer.pending.clear()
        writer.close()
        print(len(stored_ids(Path({store!r}))))
    """.format(store=str(mounting / "s"), filler=str(mounting / "filler"))
    run = python(code, f"mount -t tmpfs -o size=8m tmpfs {mounting}")
    assert run.returncode == 0, run.stderr
    assert "no space left" in run.stdout
    assert run.stdout.splitlines()[-1] == "16"


@pytest.mark.parametrize("size", ["4k", "64k"])
def test_a_disk_too_small_to_begin_with_is_told_as_full(mounting: Path, size: str) -> None:
    code = f"""
        try:
            with FeatureStoreWriter(Path({str(mounting / "s")!r}), SCHEMA) as writer:
                writer.add("a", make_record(0))
        except NoSpaceError as error:
            print("told", error)
    """
    run = python(code, f"mount -t tmpfs -o size={size} tmpfs {mounting} && cat /dev/zero > {mounting}/filler; true")
    assert run.returncode == 0, run.stderr
    assert re.match(rf"told (no space left for {mounting}/s/shard|{mounting}/s/[a-z.]+ cannot be written: no space left;)", run.stdout)


def test_a_read_only_disk_is_readable_and_says_so_to_writers(mounting: Path) -> None:
    write_store(mounting / "s", ["a", "b"])
    code = f"""
        path = Path({str(mounting / "s")!r})
        assert len(FeatureStore(path)) == 2
        assert len(FeatureStore(path)["a"]) > 0
        assert len(stored_ids(path)) == 2
        for attempt in (lambda: FeatureStoreWriter(path, SCHEMA), lambda: seal_store(path), lambda: create(path.parent / "new")):
            try:
                attempt()
            except UsageError as error:
                print(error)
    """
    prelude = "\n        from megainter.data.feature_store.writer import create_store\n"
    prelude += "        create = lambda path: create_store(path, SCHEMA)\n"
    run = python(prelude + code, f"mount --bind {mounting} {mounting} && mount -o remount,ro,bind {mounting}")
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("Read-only file system") == 3


SCAN = """
    path = Path({store!r})
    for bit in {bits}:
        flip(path / "shard-00000.lmdb", bit)
        try:
            stored_ids(path), seal_store(path)
            with FeatureStoreWriter(path, SCHEMA) as writer:
                writer.add("new", make_record(999))
            with FeatureStore(path, allow_partial=True) as store:
                found = list(store.damaged())
            print("read", bit, len(store), len(found), flush=True)
        except MegainterError as error:
            assert error.exit_code == 4, error
            print("told", bit, flush=True)
        (path / "shard-00000.lmdb").write_bytes(Path({whole!r}).read_bytes())
"""


def flips(tmp_path: Path, count: int, seed: int) -> dict[str, int]:
    """Flip single bits of a shard, one after the other, and take the store up again in other processes; counts of what happened."""
    path, whole = tmp_path / "s", tmp_path / "whole"
    write_store(path, [str(n) for n in range(60)])
    shutil.copy(path / "shard-00000.lmdb", whole)
    bits = np.random.default_rng(seed).choice(whole.stat().st_size * 8, count, replace=False).tolist()
    counts = {"read": 0, "told": 0, "crashed": 0}
    while bits:
        shutil.copy(whole, path / "shard-00000.lmdb")
        run = python(SCAN.format(store=str(path), bits=bits, whole=str(whole)))
        lines = run.stdout.splitlines()
        for line in lines:
            counts[line.split()[0]] += 1
        bits = bits[len(lines) :]
        if run.returncode:
            print(run.returncode, bits[0], run.stderr[-2000:])
            counts["crashed"] += 1
            bits = bits[1:]
    return counts


def test_flipped_bits_in_an_unfinished_shard_do_not_crash_what_takes_it_up(tmp_path: Path) -> None:
    counts = flips(tmp_path, 40, seed=3)
    assert counts["crashed"] == 0, counts
    assert counts["read"] + counts["told"] == 40


def test_truncation_at_every_page_is_told_and_no_sigbus(tmp_path: Path) -> None:
    write_store(tmp_path / "s", [str(n) for n in range(60)])
    size = (tmp_path / "s" / "shard-00000.lmdb").stat().st_size
    cuts = [*range(4096, size, max(4096, size // 30)), 1, 100, 4095, 5000, 8191, size - 1]
    code = f"""
        path = Path({str(tmp_path / "s")!r})
        shard = path / "shard-00000.lmdb"
        whole, index = shard.read_bytes(), path / "index.arrow"
        for cut in {cuts}:
            shard.write_bytes(whole[:cut])
            for attempt in (lambda: stored_ids(path), lambda: seal_store(path), lambda: FeatureStore(path),
                            lambda: FeatureStoreWriter(path, SCHEMA), lambda: FeatureStore(path, allow_partial=True)):
                try:
                    attempt()
                    print("unseen", cut)
                except MegainterError as error:
                    assert error.exit_code == 4, error
    """
    run = python(code)
    assert run.returncode == 0, (run.returncode, run.stderr[-3000:])
    assert run.stdout == ""


# --- several hosts -----------------------------------------------------------------------------------------------------------------

MOUNTINFO = r"""
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
30 22 0:25 / /data rw - nfs4 server:/export rw,vers=4.2
31 30 0:26 / /data/scratch rw - lustre mgs@tcp:/scratch rw
32 30 254:1 / /data/with\040space rw - xfs /dev/vdb rw
33 22 0:27 / /data2 rw - tmpfs tmpfs rw
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", None),
        ("/data", "nfs4"),
        ("/data/a/store", "nfs4"),
        ("/data/scratch/x", "lustre"),
        ("/data/with space/x", None),
        ("/data2/x", None),
    ],
)
def test_network_disks_are_known_by_the_longest_mount_above(tmp_path: Path, path: str, kind: str | None) -> None:
    (tmp_path / "mountinfo").write_text(MOUNTINFO.strip())
    assert network_filesystem(Path(path), tmp_path / "mountinfo") == kind


def test_without_a_mount_table_every_disk_counts_as_local(tmp_path: Path) -> None:
    assert network_filesystem(tmp_path, tmp_path / "absent") is None


@pytest.fixture
def shared_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that counts as NFS, with a heartbeat of 50 ms; ``flock`` does not reach from one host to another there."""
    table = tmp_path / "mountinfo"
    table.write_text(f"30 22 0:25 / {tmp_path} rw - nfs4 server:/export rw")
    monkeypatch.setattr(lock, "network_filesystem", lambda path: network_filesystem(path, table))
    for name, seconds in {"BEAT_SECONDS": 0.05, "SILENCE_SECONDS": 1.0, "SETTLE_SECONDS": 0.2}.items():
        monkeypatch.setattr(lock, name, seconds)
    return tmp_path


def other_host(lock: Path) -> None:
    lock.write_text(json.dumps({"pid": 17, "host": "another-host", "since": "2026-01-01 00:00:00"}))


def test_a_beating_writer_on_another_host_is_refused(shared_disk: Path) -> None:
    lock = shared_disk / "x.lock"
    other_host(lock)
    beat = subprocess.Popen(["sh", "-c", f"while :; do touch {lock}; sleep 0.05; done"])
    try:
        with pytest.raises(LockedError, match="x is in use by pid 17 on another-host since 2026"):
            WriterLock(lock)
    finally:
        beat.kill()
        beat.wait()


def test_a_silent_writer_on_another_host_is_taken_over_with_a_note(shared_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other_host(shared_disk / "x.lock")
    start = time.monotonic()
    with WriterLock(shared_disk / "x.lock"):
        assert time.monotonic() - start >= 1.0
        assert json.loads((shared_disk / "x.lock").read_text())["host"] == socket.gethostname()
    assert "its owner (pid 17 on another-host) is silent; the lock is taken over" in capsys.readouterr().err
    assert (shared_disk / "x.lock").read_text() == ""


def test_of_two_hosts_that_take_over_at_once_one_gives_way(shared_disk: Path) -> None:
    """The other host signs while this one lets its own name settle."""
    lock = shared_disk / "x.lock"
    other_host(lock)
    script = f"""
        import time
        while {str(os.getpid())!r} not in open({str(lock)!r}).read():
            time.sleep(0.01)
        open({str(lock)!r}, "w").write('{{"pid": 18, "host": "third-host", "since": "now"}}')
    """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)]), pytest.raises(LockedError, match="pid 18 on third-host"):
        WriterLock(lock)


def test_an_owner_on_a_network_disk_beats_and_a_released_lock_is_taken_at_once(shared_disk: Path) -> None:
    lock = WriterLock(shared_disk / "x.lock")
    before = (shared_disk / "x.lock").stat().st_mtime_ns
    time.sleep(0.3)
    assert (shared_disk / "x.lock").stat().st_mtime_ns > before
    lock.release()
    start = time.monotonic()
    WriterLock(shared_disk / "x.lock").release()
    assert time.monotonic() - start < 0.5


def test_a_store_is_written_and_sealed_on_a_network_disk(shared_disk: Path) -> None:
    with FeatureStoreWriter(shared_disk / "s", SCHEMA) as writer:
        writer.add("a", make_record(0))
    seal_store(shared_disk / "s")
    assert stored_ids(shared_disk / "s") == {"a"}
    with FeatureStore(shared_disk / "s") as store:
        assert list(store.ids) == ["a"]


def test_what_is_no_full_disk_is_not_told_as_one(tmp_path: Path) -> None:
    writer = FeatureStoreWriter(tmp_path / "s", SCHEMA)
    writer.add("a", make_record(0))
    writer.environment.close()  # LMDB's own error: neither a full map nor a full disk
    with pytest.raises(DamagedError, match="cannot be written after 0 records, all of them kept"):
        writer.commit()
    writer.lock.release()
