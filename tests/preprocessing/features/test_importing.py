"""Imports, exports and merges under stops, repeats and mistakes, and what `features show` and `check` say."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megainter.data.feature_store import FeatureStore
from megainter.data.feature_store.record import StoreSchema
from megainter.data.feature_store.writer import FeatureStoreWriter, seal_store, stored_ids
from megainter.errors import DamagedError, LockedError, NoSpaceError, TooManyBadInputsError, UsageError
from megainter.verbs.features import features_app
from preprocessing.features import writing as transfer
from preprocessing.features.exporting import export_features
from preprocessing.features.formats import parquet
from preprocessing.features.importing import import_features
from preprocessing.features.merging import merge_stores
from preprocessing.features.show import check_store, describe_record, describe_store, require_whole
from tests.foreign import Image, b64, failures, make_image
from tests.places import ROOT


def write_tsv(path: Path, images: list[Image]) -> Path:
    """LXMERT's format."""
    with open(path, "w", encoding="utf-8") as file:
        for image in images:
            cells = [image.image_id, image.height, image.width, *(b64(array) for array in image.labels.values())]
            file.write("\t".join(map(str, [*cells, len(image), b64(image.boxes), b64(image.features)])) + "\n")
    return path


def make_store(path: Path, seeds: range, name: str = "in") -> FeatureStore:
    import_features(write_tsv(path.with_suffix(f".{name}"), [make_image(seed, f"{seed:03}") for seed in seeds]), path)
    return FeatureStore(path)


def test_the_same_command_does_not_do_anything_twice(tmp_path: Path) -> None:
    source = write_tsv(tmp_path / "x", [make_image(seed) for seed in range(20)])
    first = import_features(source, tmp_path / "s")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "s").iterdir() if "lock" not in path.name}
    assert import_features(source, tmp_path / "s") == first
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "s").iterdir() if "lock" not in path.name} == before


def test_an_import_that_was_killed_goes_on_and_ends_like_one_that_was_not(tmp_path: Path) -> None:
    source = write_tsv(tmp_path / "x", [make_image(seed, n=6) for seed in range(400)])
    whole = import_features(source, tmp_path / "whole")
    script = f"""
        import sys, time
        sys.path.insert(0, {str(ROOT)!r})
        from pathlib import Path
        from megainter.data.feature_store.writer import FeatureStoreWriter
        from preprocessing.features.importing import import_features
        commit = FeatureStoreWriter.commit
        def slow(writer):
            commit(writer)
            print(len(writer.done), flush=True)
            time.sleep(0.05)
        FeatureStoreWriter.commit = slow
        import_features(Path({str(source)!r}), Path({str(tmp_path / "s")!r}))
    """
    for _ in range(2):
        with subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            counts = (int(line) for line in process.stdout if line.strip().isdigit())
            acknowledged = max(next(counts), next(counts))
            process.send_signal(signal.SIGKILL)
        assert len(stored_ids(tmp_path / "s")) >= acknowledged
    assert len(stored_ids(tmp_path / "s")) < 400
    assert import_features(source, tmp_path / "s") == whole


@pytest.mark.parametrize("lost", ["shard-00000.lmdb", "index.arrow"])
def test_a_file_that_was_deleted_as_damaged_is_made_anew_by_the_same_import(tmp_path: Path, lost: str) -> None:
    source = write_tsv(tmp_path / "x", [make_image(seed) for seed in range(8)])
    whole = import_features(source, tmp_path / "s")
    (tmp_path / "s" / lost).unlink()
    with pytest.raises(DamagedError, match=f"{lost} is missing"):
        FeatureStore(tmp_path / "s")
    assert import_features(source, tmp_path / "s") == whole
    assert len(FeatureStore(tmp_path / "s")) == 8


def test_of_a_repeated_id_the_first_is_kept_and_the_rest_reported(tmp_path: Path) -> None:
    images = [make_image(0, "a"), make_image(1, "b"), make_image(2, "a"), make_image(3, "c"), make_image(0, "a")]
    done = import_features(write_tsv(tmp_path / "x", images), tmp_path / "s", max_bad=0)
    assert (done.stored, done.bad, done.repeated) == (3, 0, 2)
    assert failures(tmp_path / "s") == dict.fromkeys(["line 3", "line 5"], "its id came before, and the first is kept")
    np.testing.assert_array_equal(FeatureStore(tmp_path / "s")["a"].boxes, images[0].boxes)


def test_too_many_bad_entries_end_with_exit_code_3_and_keep_the_rest(tmp_path: Path) -> None:
    source = write_tsv(tmp_path / "x", [make_image(seed) for seed in range(8)])
    source.write_bytes(source.read_bytes() + b"rubbish\n" * 2)
    with pytest.raises(TooManyBadInputsError, match=r"2 of 10 entries cannot be used, listed in .*failed.tsv: more than --max-bad 0.1"):
        import_features(source, tmp_path / "s", max_bad=0.1)
    with pytest.raises(DamagedError, match="incomplete: 8 records"):
        FeatureStore(tmp_path / "s")
    assert import_features(source, tmp_path / "s", max_bad=0.2).stored == 8


def test_a_store_of_other_settings_is_not_mixed(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", range(3))
    with pytest.raises(UsageError, match="there feature_dtype is"):
        import_features(tmp_path / "s.in", store.path, features="float32")
    with pytest.raises(UsageError, match="there detector is"):
        import_features(tmp_path / "s.in", store.path, detector="my detector")


def test_a_large_store_has_several_shards_and_the_same_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = make_store(tmp_path / "one", range(200))
    monkeypatch.setattr(transfer, "SHARD_BYTES", 30_000)
    parts = make_store(tmp_path / "many", range(200))
    assert len(parts.shard_sizes()) > 2
    assert parts.digest == whole.digest
    assert f"shards: {len(parts.shard_sizes())}" in describe_store(tmp_path / "many")


def test_a_top_k_of_the_probabilities_may_be_kept(tmp_path: Path) -> None:
    make_store(tmp_path / "s", range(3))
    import_features(tmp_path / "s.in", tmp_path / "t", top_k=5)
    assert (FeatureStore(tmp_path / "t").schema.probs, FeatureStore(tmp_path / "t").schema.top_k) == ("top-k", 5)


def test_merging_gives_the_content_of_one_import(tmp_path: Path) -> None:
    one, two, whole = (make_store(tmp_path / name, seeds) for name, seeds in [("a", range(12)), ("b", range(8, 30)), ("w", range(30))])
    assert merge_stores([one.path, two.path], tmp_path / "c") == whole.digest
    assert merge_stores([two.path, one.path], tmp_path / "c") == whole.digest  # again, and the other way round


def test_stores_of_given_boxes_are_merged_whatever_their_tables(tmp_path: Path) -> None:
    parts = [make_store(tmp_path / name, seeds) for name, seeds in [("a", range(4)), ("b", range(4, 9))]]
    for part, table in zip(parts, ("1f", "0e"), strict=True):
        schema = replace(part.schema, settings=part.schema.settings | {"boxes": table})
        with FeatureStoreWriter(tmp_path / table, schema) as writer:
            writer.add_encoded([(image_id, *part.encoded(image_id)) for image_id in part.ids])
        seal_store(tmp_path / table)
    first, second = tmp_path / "1f", tmp_path / "0e"
    assert merge_stores([first, second], tmp_path / "c") == merge_stores([second, first], tmp_path / "d")
    with FeatureStore(tmp_path / "c") as merged:
        assert (merged.schema.settings["boxes"], len(merged)) == ("0e+1f", 9)
    with pytest.raises(UsageError, match="in the first boxes is"):
        merge_stores([first, parts[1].path], tmp_path / "e")


def test_a_merge_that_was_stopped_goes_on(tmp_path: Path) -> None:
    one, two, whole = (make_store(tmp_path / name, seeds) for name, seeds in [("a", range(9)), ("b", range(9, 20)), ("w", range(20))])
    with FeatureStoreWriter(tmp_path / "c", one.schema) as writer:
        writer.add_encoded([(image_id, *one.encoded(image_id)) for image_id in one.ids[:4]])
    assert merge_stores([one.path, two.path], tmp_path / "c") == whole.digest


def test_stores_that_do_not_belong_together_are_not_merged(tmp_path: Path) -> None:
    one, two = make_store(tmp_path / "a", range(5)), make_store(tmp_path / "b", range(5, 9))
    import_features(two.path.with_suffix(".in"), tmp_path / "other", detector="another")
    with pytest.raises(UsageError, match=r"cannot be merged: in the first detector is .*, not 'another'"):
        merge_stores([one.path, tmp_path / "other"], tmp_path / "c")
    import_features(write_tsv(tmp_path / "x", [make_image(99, "003")]), tmp_path / "same")
    with pytest.raises(UsageError, match="different records of 1 images, first '003'"):
        merge_stores([one.path, two.path, tmp_path / "same"], tmp_path / "c")
    for stores in ([one.path], [one.path, tmp_path / "c"]):
        with pytest.raises(UsageError, match="two stores or more"):
            merge_stores(stores, tmp_path / "c")
    assert not (tmp_path / "c").exists()


def damage(store: FeatureStore, image_id: str) -> None:
    """Flip a bit in the middle of a record."""
    row = store.ids.index(image_id)
    place = int(store._column["offset"][row] + store._column["length"][row] // 2)
    with open(store.path / "shard-00000.lmdb", "r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 4]))


def test_check_names_every_record_that_is_damaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = make_store(tmp_path / "s", range(12))
    assert check_store(store.path).records == 12
    for image_id in ("004", "009"):
        damage(store, image_id)
    capsys.readouterr()
    with pytest.raises(DamagedError, match="2 of 12 records of"):
        require_whole(store.path, check_store(store.path))
    said = capsys.readouterr().out
    assert [line.split("'")[1] for line in said.splitlines() if "checksum" in line] == ["004", "009"]


def test_a_damaged_record_is_neither_merged_nor_exported(tmp_path: Path) -> None:
    store, other = make_store(tmp_path / "a", range(5)), make_store(tmp_path / "b", range(5, 8))
    damage(store, "002")
    with pytest.raises(DamagedError, match="record '002'"):
        merge_stores([store.path, other.path], tmp_path / "c")
    with pytest.raises(DamagedError, match="record '002'"):
        export_features(store.path, tmp_path / "out", "parquet")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("format", ["lxmert-tsv", "vilbert-lmdb", "uniter-lmdb", "parquet"])
def test_an_export_replaces_nothing_and_leaves_nothing_when_it_fails(tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store(tmp_path / "s", range(5))
    (tmp_path / "there").write_text("mine")
    with pytest.raises(UsageError, match="exists; delete it"):
        export_features(store.path, tmp_path / "there", format)
    assert (tmp_path / "there").read_text() == "mine"
    (tmp_path / "out").mkdir()

    def interrupted(store: FeatureStore, image_id: str) -> None:
        if image_id == "003":
            raise KeyboardInterrupt
        return read(store, image_id)

    read = FeatureStore.__getitem__
    monkeypatch.setattr(FeatureStore, "__getitem__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_features(store.path, tmp_path / "out" / "x", format)
    assert os.listdir(tmp_path / "out") == []


def test_a_full_disk_during_an_export_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store(tmp_path / "s", range(3))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(parquet, "_batch", full)
    with pytest.raises(NoSpaceError, match=r"out cannot be written: no space left; free space"):
        export_features(store.path, tmp_path / "out", "parquet")


def test_odd_ids_are_keys_and_never_paths(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", range(1))
    ids = ["../../up", "/root", "a/b", "é" * 400, "keys", "__keys__", "日本語"]
    with FeatureStoreWriter(store.path, store.schema) as writer:
        writer.add_all([(image_id, store["000"]) for image_id in ids])
    seal_store(store.path)
    assert export_features(store.path, tmp_path / "out.parquet", "parquet") == len(ids) + 1
    with pytest.raises(UsageError, match=r"2 ids of .* cannot stand in vilbert-lmdb: 'keys' is the key of the list"):
        export_features(store.path, tmp_path / "out.lmdb", "vilbert-lmdb")
    with pytest.raises(UsageError, match=r"1 ids of .* cannot stand in uniter-lmdb: 'é.*has 804 bytes"):
        export_features(store.path, tmp_path / "out.lmdb", "uniter-lmdb")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.parquet", "s", "s.in"]


def test_show_tells_what_a_store_holds(tmp_path: Path) -> None:
    images = [make_image(seed, f"{seed:03}", n=4 + seed % 3) for seed in range(9)]
    import_features(write_tsv(tmp_path / "x", images), tmp_path / "s", detector="mine")
    said = describe_store(tmp_path / "s")
    for text in ("9 images, 45 regions", "detector: mine", "12 x float16", "1,601 with background", "attrs_id int64", "shards: 1"):
        assert text in said
    assert [line.split()[-1] for line in said.splitlines()[-3:]] == ["3", "3", "3"]
    record = describe_record(tmp_path / "s", "003")
    assert f"{images[3].width} x {images[3].height}, 4 regions" in record
    assert f"objects_id={images[3].objects_id[2]}" in record.splitlines()[4]


def test_show_describes_an_unfinished_store(tmp_path: Path) -> None:
    schema = StoreSchema(4, 2, ("__background__", "a"), "d")
    FeatureStoreWriter(tmp_path / "s", schema).close()
    assert "0 images, 0 regions (not sealed: incomplete)" in describe_store(tmp_path / "s")
    with pytest.raises(DamagedError, match="incomplete"):
        require_whole(tmp_path / "s", check_store(tmp_path / "s"))


def test_two_imports_into_one_store_do_not_meet(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", range(3))
    script = f"""
        import sys, time
        sys.path.insert(0, {str(ROOT)!r})
        from pathlib import Path
        from megainter.data.feature_store.reader import FeatureStore
        from megainter.data.feature_store.writer import FeatureStoreWriter
        with FeatureStoreWriter(Path({str(store.path)!r}), FeatureStore({str(store.path)!r}).schema):
            print("ready", flush=True)
            time.sleep(60)
    """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "ready\n"
        with pytest.raises(LockedError, match=f"in use by pid {other.pid}"):
            import_features(tmp_path / "s.in", store.path)
        other.kill()


def test_a_truncated_lmdb_is_an_error_and_no_crash(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", range(40))
    export_features(store.path, tmp_path / "x", "vilbert-lmdb")
    data = tmp_path / "x" / "data.mdb"
    for share in (0.9, 0.5, 0.1):
        os.truncate(data, int(data.stat().st_size * share))
        with pytest.raises((DamagedError, UsageError), match=r"truncated|not a readable LMDB file"):
            import_features(tmp_path / "x", tmp_path / "t")


def test_damaged_pages_of_a_foreign_lmdb_end_its_reader_and_not_the_import(tmp_path: Path) -> None:
    """Pages of the tree overwritten at random: LMDB itself may die of them (SIGBUS, SIGSEGV)."""
    store = make_store(tmp_path / "s", range(60))
    export_features(store.path, tmp_path / "x", "uniter-lmdb")
    data = next((tmp_path / "x").glob("feat_*")) / "data.mdb"
    whole, rng, told = data.read_bytes(), np.random.default_rng(0), 0
    tree = [page for page in range(2, len(whole) // 4096) if whole[page * 4096 + 10] & 3]  # branch and leaf pages, by their flags
    for number in range(6):
        content = bytearray(whole)
        for _ in range(30):
            content[int(rng.choice(tree)) * 4096 + int(rng.integers(16, 4096))] = int(rng.integers(256))
        data.write_bytes(content)
        try:
            done = import_features(data, tmp_path / f"t{number}", format="uniter-lmdb", max_bad=1)
            told += done.bad > 0
        except (DamagedError, UsageError):
            told += 1
    assert told > 0


def test_the_verbs_do_what_their_functions_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tsv(tmp_path / "x.tsv", [make_image(seed, f"{seed:03}") for seed in range(4)])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(*tokens: object) -> str:
        features_app([str(token) for token in tokens], exit_on_error=False, print_error=False, result_action="return_value")
        return capsys.readouterr().out

    try:
        assert "4 images, digest" in run("import", tmp_path / "x.tsv", tmp_path / "s", "--features", "float32")
        assert "all 4 records are as they were written" in run("check", tmp_path / "s")
        assert "features: 12 x float32" in run("show", tmp_path / "s")
        assert "'002':" in run("show", tmp_path / "s", "--image", "002")
        assert "4 images" in run("export", tmp_path / "s", tmp_path / "out.tsv", "--format", "lxmert-tsv")
        assert "4 images" in run("import", tmp_path / "out.tsv", tmp_path / "t", "--features", "float32")
        assert FeatureStore(tmp_path / "s").digest in run("merge", tmp_path / "s", tmp_path / "t", "--output", tmp_path / "u")
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_sigterm_commits_what_is_done_and_ends_with_75(tmp_path: Path) -> None:
    source = write_tsv(tmp_path / "x", [make_image(seed, n=6) for seed in range(1000)])
    script = f"""
        import sys, time
        sys.path.insert(0, {str(ROOT)!r})
        from megainter.data.feature_store.writer import FeatureStoreWriter
        add = FeatureStoreWriter.add_encoded
        def slow(writer, records):
            add(writer, records)
            time.sleep(0.005)
            if len(writer) == 100:
                print("hundred", flush=True)
        FeatureStoreWriter.add_encoded = slow
        from megainter.errors import StoppedEarly
        from megainter.verbs.features import features_app
        try:
            features_app(["import", {str(source)!r}, {str(tmp_path / "s")!r}], exit_on_error=False, result_action="return_value")
        except StoppedEarly as error:
            sys.exit(error.exit_code)
    """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert any(line == "hundred\n" for line in process.stdout)
        process.terminate()
        start = time.monotonic()
        assert process.wait(30) == 75
        assert time.monotonic() - start < 10
    assert len(stored_ids(tmp_path / "s")) >= 100


def test_a_schema_is_settled_by_most_of_the_first_entries(tmp_path: Path) -> None:
    odd = replace(make_image(0, "odd"), features=np.zeros((len(make_image(0)), 7), np.float32))
    source = write_tsv(tmp_path / "x", [odd, *(make_image(seed, str(seed)) for seed in range(1, 9))])
    assert import_features(source, tmp_path / "s", max_bad=0.2).stored == 8
    assert list(failures(tmp_path / "s")) == ["line 1"]
