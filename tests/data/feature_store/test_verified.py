"""Which records a host has verified: shared by forks and by ranks, never taken over from anybody else."""

import multiprocessing
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from benchmarks.reading_records import whole_shares, write_small
from megainter.data.feature_store import FeatureStore, verified
from megainter.data.feature_store.verified import SHARED_MEMORY, VerifiedRecords
from megainter.errors import DamagedError
from tests.data.feature_store.test_faults import python
from tests.data.feature_store.test_views import DENSE, make_store, noted_reads, overwrite, place_of
from tests.disks import mounting
from tests.places import ROOT

__all__ = ["mounting"]  # a fixture
TOKEN = "0123456789abcdef"


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before = set(SHARED_MEMORY.glob("megainter-*"))
    yield
    assert set(SHARED_MEMORY.glob("megainter-*")) <= before


def forked(action: Callable[[], object]) -> int:
    """Run ``action`` in a forked process; its exit code."""
    process = multiprocessing.get_context("fork").Process(target=action)
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def whole_reads(store: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many records the store reads whole when all are asked for."""
    with monkeypatch.context() as patch:
        asked = noted_reads(patch)
        store.first_regions(np.arange(len(store)), 2)
        places = {place_of(store, row)[1:] for row in range(len(store))}
    return len(places & set(asked))


@pytest.mark.parametrize("records", [0, 1, 7, 8, 9, 1000])
def test_the_bits_are_the_records_that_were_added(records: int) -> None:
    bits, added, rng = VerifiedRecords(records), set[int](), np.random.default_rng(records)
    for row in rng.integers(0, records, records // 2).tolist() if records else []:
        bits.add(row)
        added.add(row)
    assert bits.of(np.arange(records)).tolist() == [row in added for row in range(records)]
    some = rng.integers(0, max(1, records), 50 if records else 0)
    assert bits.of(some).tolist() == [row in added for row in some.tolist()]


def test_writers_at_once_never_set_a_bit_that_nobody_added() -> None:
    """Eight processes, each of which adds one record of every byte: a bit may be lost, and no other is ever there."""
    bits, groups = VerifiedRecords(8 * 5000), [0, 1, 2, 4, 5, 7]
    context = multiprocessing.get_context("fork")

    def add(group: int) -> None:
        for byte in range(5000):
            bits.add(8 * byte + group)

    processes = [context.Process(target=add, args=(group,)) for group in groups]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    found = bits.of(np.arange(8 * 5000)).reshape(5000, 8).mean(0)
    assert found[[3, 6]].tolist() == [0, 0]
    assert found[groups].min() > 0.5  # lost where two meet in a byte


def test_what_a_loader_process_verified_its_rank_and_the_other_loaders_read_in_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(tmp_path / "s", DENSE)
    assert forked(lambda: store.first_regions(np.array([1, 4]))) == 0
    assert store._seen.of(np.arange(7)).tolist() == [False, True, False, False, True, False, False]
    assert whole_reads(store, monkeypatch) == 5
    assert whole_reads(store, monkeypatch) == 0
    assert whole_reads(FeatureStore(tmp_path / "s"), monkeypatch) == 7  # opened anew: it takes nobody's word


def test_what_one_rank_verified_another_reads_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that are no forks of each other, as the ranks of a host; what was verified before they met counts, too."""
    store = make_store(tmp_path / "s", DENSE)
    store.at(6)
    code = f"""
        import sys, time
        import numpy as np
        from pathlib import Path
        from megainter.data.feature_store import FeatureStore
        store = FeatureStore({str(tmp_path / "s")!r})
        store.at(5)
        with store.verified_together({TOKEN!r}) as reason:
            assert reason is None, reason
            assert store._seen.of(np.array([6]))[0]
            print("entered", flush=True)
            sys.stdin.readline()
        store.at(2)
        print(int(store._seen.of(np.arange(7)).sum()), flush=True)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    with store.verified_together(TOKEN) as reason:
        assert reason is None
        rank = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        assert rank.stdout is not None
        assert rank.stdout.readline() == "entered\n"
    assert not list(SHARED_MEMORY.glob(f"megainter-{os.geteuid()}-*"))  # no name that anybody could open or cut
    store.at(0)
    assert rank.communicate("go\n", timeout=60)[0] == "4\n"
    assert store._seen.of(np.arange(7)).tolist() == [True, False, True, False, False, True, True]
    assert forked(lambda: store.at(3)) == 0
    assert whole_reads(store, monkeypatch) == 2


def copied(store: Path) -> Path:
    shutil.copytree(store, store.with_name("copy"))  # the same digest
    return store.with_name("copy")


def written_again(store: Path) -> Path:
    shard = next(store.glob("shard-*.lmdb"))
    os.utime(shard, ns=(0, shard.stat().st_mtime_ns + 1))
    return store


def moved_into_place(store: Path) -> Path:
    """Another file of the same size and time."""
    shard = next(store.glob("shard-*.lmdb"))
    shutil.copy2(shard, store / "aside")
    os.replace(store / "aside", shard)
    return store


@pytest.mark.parametrize("other", [copied, written_again, moved_into_place])
def test_the_bits_of_another_store_are_never_taken(tmp_path: Path, other: Callable[[Path], Path]) -> None:
    store = make_store(tmp_path / "s", DENSE)
    with ExitStack() as stack:
        assert stack.enter_context(store.verified_together(TOKEN)) is None
        for row in range(len(store)):
            store.at(row)
        again = FeatureStore(tmp_path / "s")
        assert stack.enter_context(again.verified_together(TOKEN)) is None
        assert again._seen.of(np.arange(7)).all()
        for path, token in ((tmp_path / "s", "another start"), (other(tmp_path / "s"), TOKEN)):
            another = FeatureStore(path)
            assert stack.enter_context(another.verified_together(token)) is None
            assert not another._seen.of(np.arange(7)).any()
            assert another.digest == store.digest


@pytest.mark.parametrize("processes", [1, 5, 16])
def test_after_the_first_epoch_no_number_of_processes_reads_a_record_whole_again(tmp_path: Path, processes: int) -> None:
    """Alone each would: with probability (1 - 1/n)^e in epoch e."""
    write_small(tmp_path / "s", 600)
    assert whole_shares(tmp_path / "s", processes, 4, hosts=1) == [1, 0, 0, 0]
    for share, epoch in zip(whole_shares(tmp_path / "s", processes, 4, hosts=None), range(4), strict=True):
        expected = (1 - 1 / processes) ** epoch
        assert abs(share - expected) <= 5 * np.sqrt(expected * (1 - expected) / 600)


@pytest.mark.parametrize("field", [0, 8, 32, 44])
def test_damage_after_another_process_verified_a_record_is_named(tmp_path: Path, field: int) -> None:
    """Header (its mark, region count, id length, checksum), id, a number that is none, and a cut."""
    store = make_store(tmp_path / "s", DENSE)
    shard, offset, _ = place_of(store, 6)
    assert forked(lambda: store.at(6)) == 0
    content = shard.read_bytes()
    values = content[offset + field] ^ 1, content[offset + 48] ^ 1
    for at, value in ((field, bytes([values[0]])), (48, bytes([values[1]])), (48 + 16 + 2, b"\xff\xff"), (48 + 16 + 16 * 7, b"\x00\x7c")):
        before = overwrite(shard, offset + at, value)
        with pytest.raises(DamagedError, match=rf"record '{store.ids[6]}' in {shard} "):
            store.at(6, 2)
        overwrite(shard, offset + at, before)
    os.truncate(shard, offset + 100)
    with pytest.raises(DamagedError, match=rf"record '{store.ids[6]}' in {shard} is damaged \(only 100 bytes"):
        store.at(6, 2)


def test_a_record_that_is_not_as_written_stays_unverified(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", DENSE)
    shard, offset, length = place_of(store, 3)
    before = overwrite(shard, offset + length - 1, bytes([shard.read_bytes()[offset + length - 1] ^ 1]))
    for _ in range(2):
        with pytest.raises(DamagedError, match="checksum"):
            store.first_regions(np.array([0, 3]), 1)
    assert store._seen.of(np.array([0, 3])).tolist() == [True, False]
    overwrite(shard, offset + length - 1, before)
    store.at(3)


def test_without_shared_memory_every_process_verifies_for_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "absent", tmp_path / "file"):
        monkeypatch.setattr(verified, "SHARED_MEMORY", place)
        store = make_store(tmp_path / f"of {place.name}", DENSE)
        store.at(1)
        with store.verified_together(TOKEN) as reason:
            assert reason is not None
            assert reason.startswith(f"{place}: ")
            assert store._seen.of(np.arange(3)).tolist() == [False, True, False]
        assert forked(lambda store=store: store.at(2)) == 0  # type: ignore[misc]
        assert whole_reads(store, monkeypatch) == 5


def test_a_link_in_the_place_of_the_bits_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verified, "SHARED_MEMORY", tmp_path)
    (tmp_path / "victim").write_bytes(b"\xff" * 9)
    (tmp_path / f"megainter-{os.geteuid()}-x").symlink_to(tmp_path / "victim")
    bits = VerifiedRecords(50)
    with bits.shared("x") as reason:
        assert reason is not None
    assert not bits.of(np.arange(50)).any()
    assert (tmp_path / "victim").read_bytes() == b"\xff" * 9


def test_a_file_of_bits_that_is_too_short_is_made_whole_before_it_is_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verified, "SHARED_MEMORY", tmp_path)
    (tmp_path / f"megainter-{os.geteuid()}-x").write_bytes(b"\x01")
    bits = VerifiedRecords(8 * 20_000)
    with bits.shared("x") as reason:
        assert reason is None
        bits.add(8 * 20_000 - 1)  # a page that is not in the file would be SIGBUS
        assert np.flatnonzero(bits.of(np.arange(8 * 20_000))).tolist() == [0, 8 * 20_000 - 1]


def test_full_shared_memory_is_told_and_no_sigbus(mounting: Path) -> None:
    code = f"""
        from megainter.data.feature_store import verified
        verified.SHARED_MEMORY = Path({str(mounting)!r})
        bits = verified.VerifiedRecords(8 * 100_000)
        with bits.shared("x") as reason:
            print(reason)
            for row in range(0, 8 * 100_000, 4096):
                bits.add(row)
        print(sorted(path.name for path in verified.SHARED_MEMORY.iterdir()))
    """
    run = python(code, f"mount -t tmpfs -o size=64k tmpfs {mounting}")
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == [f"{mounting}: No space left on device", "[]"]
