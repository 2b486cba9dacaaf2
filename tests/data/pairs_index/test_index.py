"""Mapped pairs are the pairs of the manifest: the same rows, numbers, digests and samples, with next to no memory of a process's own."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megainter.data.feature_store import FeatureStore
from megainter.data.lookup import Lookup, string_hashes
from megainter.data.matching import drop_missing
from megainter.data.pairs_index.index import build_pairs_index, build_storage_order, open_pairs_index, open_storage_order
from megainter.data.tables.pairs import DuplicatePairError, Pair, Pairs, has_split, read_pairs, write_pairs
from megainter.data.text.token_table import build_token_table
from megainter.data.text.vocabulary import load_vocabulary, train_vocabulary
from megainter.errors import DamagedError, UsageError
from megainter.tasks.pretraining.batches import PretrainStream
from megainter.tasks.pretraining.sampling import Sampler, StreamSettings
from tests.synthetic import open_store, write_data

SETTINGS = StreamSettings(seed=3, global_batch=16, micro_batch=8, max_regions=4, masking="paper")


def rows_of(pairs: Pairs) -> list[tuple[str, str, str, int]]:
    columns = (pairs.table.column(name).to_pylist() for name in ("pair_id", "caption"))
    images = [pairs.image_id(row) for row in range(len(pairs))]
    return list(zip(*columns, images, pairs.image_numbers.tolist(), strict=True))


def indexed(manifest: Path, split: str, store: FeatureStore, folder: Path) -> Pairs:
    key, _ = build_pairs_index(manifest, split, store, folder, progress=False)
    return open_pairs_index(folder, key, store)


@pytest.fixture(params=[40, 31], ids=["all images", "some without regions"])
def data(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, FeatureStore]:
    manifest, _ = write_data(tmp_path / "data")
    rng = np.random.default_rng(5)
    rows = read_pairs(manifest).table.to_pylist()
    write_pairs(manifest, [Pair(**rows[i]) for i in rng.permutation(len(rows))])  # captions of an image apart, images in no order
    _, store = write_data(tmp_path / "of", images=request.param)
    return manifest, open_store(store)


@pytest.mark.parametrize("rows_per_part", [65536, 7])
def test_index_holds_what_reading_gives(data: tuple[Path, FeatureStore], tmp_path: Path, rows_per_part: int, monkeypatch) -> None:
    monkeypatch.setattr("megainter.data.tables.parquet.ROWS_PER_GROUP", rows_per_part)
    manifest, store = data
    for split in ("train", "val"):
        read = read_pairs(manifest, split)
        expected = read if (store.find(read.image_ids) >= 0).all() else drop_missing(read, store)
        if not len(expected):
            continue
        pairs = indexed(manifest, split, store, tmp_path / split)
        assert rows_of(pairs) == rows_of(expected)
        assert pairs.digest == expected.digest
        assert list(pairs.image_ids) == list(expected.image_ids)
        assert pairs.image_numbers.dtype == np.int32
        assert pairs.captions([1, 0, 1]) == expected.captions([1, 0, 1])
        assert [store.ids[row] for row in pairs.found.rows] == list(expected.image_ids)


def test_samples_are_those_of_the_manifest_in_memory(data: tuple[Path, FeatureStore], tmp_path: Path) -> None:
    manifest, store = data
    read = drop_missing(read_pairs(manifest, "train"), store)
    mapped = indexed(manifest, "train", store, tmp_path / "index")
    vocabulary = load_vocabulary(train_vocabulary(read.captions(range(len(read))), 60, tmp_path / "vocab.txt"))
    digests = []
    for name, pairs in (("read", read), ("mapped", mapped)):
        tokens = build_token_table(pairs, vocabulary, 12, tmp_path / f"{name}.arrow", progress=False)
        stream = PretrainStream(Sampler(pairs, store, tokens, vocabulary.facts, SETTINGS))
        digests.append([stream.digest(step) for step in range(6)])
    assert digests[0] == digests[1]


def test_an_index_is_used_again_until_something_changes(data: tuple[Path, FeatureStore], tmp_path: Path) -> None:
    manifest, store = data
    folder = tmp_path / "index"
    key, facts = build_pairs_index(manifest, "train", store, folder, progress=False)
    written = (folder / "index.json").stat().st_mtime_ns
    assert build_pairs_index(manifest, "train", store, folder, progress=False) == (key, facts)
    assert (folder / "index.json").stat().st_mtime_ns == written
    with pytest.raises(UsageError, match="made from other data"):
        open_pairs_index(folder, key + " ", store)
    (folder / "image_numbers").write_bytes(b"1234")
    with pytest.raises(DamagedError, match="not as it was written"):
        open_pairs_index(folder, key, store)
    assert build_pairs_index(manifest, "train", store, folder, progress=False)[1] == facts  # a damaged one is made again
    rows = [Pair(**row) for row in read_pairs(manifest).table.to_pylist()]
    write_pairs(manifest, [replace(rows[0], caption="something else", split="train"), *rows[1:]])
    assert build_pairs_index(manifest, "train", store, folder, progress=False)[1].digest != facts.digest
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_what_reading_refuses_the_index_refuses(tmp_path: Path) -> None:
    _, path = write_data(tmp_path / "of")
    store = open_store(path)
    good = [Pair(f"p{i}", f"image-{i % 9:03d}", f"image-{i % 9:03d}.jpg", "a cat", "train") for i in range(40)]
    bad = {
        "stands in rows 3 and 30": [*good[:29], replace(good[29], pair_id="p2"), *good[30:]],
        "has two files": [*good[:39], replace(good[39], image="other.jpg")],
        "leaves the images folder": [*good[:5], replace(good[5], image="../x.jpg"), *good[6:]],
        "has no rows of split 'train'": [replace(row, split="val") for row in good],
    }
    for told, rows in bad.items():
        manifest = tmp_path / "bad.parquet"
        table = pa.table({name: [getattr(row, name) for row in rows] for name in ("pair_id", "image_id", "image", "caption", "split")})
        pq.write_table(table, manifest, row_group_size=8)
        errors = []
        for refuse in (lambda: read_pairs(manifest, "train"), lambda: indexed(manifest, "train", store, tmp_path / "bad")):  # noqa: B023
            with pytest.raises(UsageError, match=told) as caught:
                refuse()
            errors.append(str(caught.value))
        assert errors[0] == errors[1]
        assert not (tmp_path / "bad").exists()
    assert issubclass(DuplicatePairError, UsageError)


def test_ids_are_found_exactly_even_where_hashes_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    ids = sorted({"".join(rng.choice(list("aé猫/"), rng.integers(0, 20))) for _ in range(3000)}, key=str.encode)
    wanted = [*rng.choice(ids, 500).tolist(), "", "nowhere", *(some + "a" for some in ids[:200])]
    place = {some: row for row, some in enumerate(ids)}
    expected = [place.get(some, -1) for some in wanted]
    column = pa.array(ids, pa.large_string())
    assert Lookup(column).find(pa.array(wanted)).tolist() == expected
    monkeypatch.setattr("megainter.data.lookup.string_hashes", lambda values: string_hashes(values) % np.uint64(7))
    assert Lookup(column).find(pa.array(wanted)).tolist() == expected
    assert Lookup(column.slice(0, 0)).find(pa.array(["x"])).tolist() == [-1]


def test_hashes_tell_strings_apart_and_do_not_depend_on_where_they_lie() -> None:
    strings = ["", "a", "a\0", "\0a", "ab", "ba", "a" * 7, "a" * 8, "a" * 9, "a" * 16, "b" + "a" * 15, "a" * 15 + "b", "猫", "狗"]
    strings += [f"image-{i:06d}.jpg" for i in range(20_000)]
    hashes = string_hashes(pa.array(strings))
    assert len(np.unique(hashes)) == len(strings)
    assert (string_hashes(pa.array(["x", *strings], pa.large_string()).slice(1)) == hashes).all()
    assert string_hashes(pa.array(["a" * 9]))[0] == hashes[8]
    bits = np.unpackbits(hashes.view(np.uint8)).reshape(len(hashes), 64)
    assert (np.abs(bits.mean(0) - 0.5) < 0.02).all()  # 5 standard deviations and more


def test_splits_are_found_by_what_the_file_says_of_itself(tmp_path: Path) -> None:
    for split, statistics in ((["train"] * 9 + ["val"], True), (["train"] * 9 + ["val"], False)):
        texts = {name: [f"{name}{i}" for i in range(10)] for name in ("pair_id", "image_id", "image", "caption")}
        table = pa.table(texts | {"split": split})
        pq.write_table(table, tmp_path / "p.parquet", row_group_size=3, write_statistics=statistics)
        assert [has_split(tmp_path / "p.parquet", name) for name in ("train", "val", "test", "")] == [True, True, False, False]


def test_memory_of_a_process_does_not_grow_with_the_pairs(data: tuple[Path, FeatureStore], tmp_path: Path) -> None:
    """Everything that grows with the pairs is a view of a mapped file."""
    manifest, store = data
    pairs = indexed(manifest, "train", store, tmp_path / "index")
    allocated = pa.total_allocated_bytes()
    again = indexed(manifest, "train", store, tmp_path / "index")
    assert pa.total_allocated_bytes() == allocated
    arrays = [again.image_numbers, again.found.rows]
    assert all(not array.flags.owndata and not array.flags.writeable for array in arrays)
    on_disk = sum(path.stat().st_size for path in (tmp_path / "index").iterdir() if path.suffix != ".json")
    ids = again.table.column("pair_id").to_pylist() + again.table.column("caption").to_pylist()
    assert on_disk == 4 * len(pairs) + 4 * len(pairs.image_ids) + 2 * 8 * (len(pairs) + 1) + sum(len(text.encode()) for text in ids)


def test_blocks_are_of_images_that_lie_together_in_the_store(data: tuple[Path, FeatureStore], tmp_path: Path) -> None:
    manifest, store = data
    pairs = indexed(manifest, "train", store, tmp_path / "index")
    by_storage, digest = open_storage_order(tmp_path / "order", build_storage_order(pairs, store, tmp_path / "order"))
    assert digest == open_storage_order(tmp_path / "order", build_storage_order(pairs, store, tmp_path / "order"))[1]
    rank = {image: place for place, image in enumerate(store.in_storage_order())}
    assert by_storage.tolist() == sorted(range(len(pairs)), key=lambda row: (rank[pairs.image_id(row)], row))
    vocabulary = load_vocabulary(train_vocabulary(pairs.captions(range(len(pairs))), 60, tmp_path / "vocab.txt"))
    tokens = build_token_table(pairs, vocabulary, 12, tmp_path / "tokens.arrow", progress=False)
    sampler = Sampler(pairs, store, tokens, vocabulary.facts, replace(SETTINGS, block=8), by_storage=by_storage)
    alone = Sampler(pairs, store, tokens, vocabulary.facts, replace(SETTINGS, block=8))
    numbers = np.arange(len(pairs))
    for epoch in range(3):
        rows = sampler.draws(np.full(len(pairs), epoch), numbers).rows
        assert sorted(rows.tolist()) == numbers.tolist()
        assert (alone.draws(np.full(len(pairs), epoch), numbers).rows == rows).all()
        place = np.argsort(by_storage)[rows]
        for first in range(0, len(pairs) // 8 * 8, 8):
            block = np.sort((place[first : first + 8] - place[first]) % len(pairs))
            gaps = np.diff(np.append(block, block[0] + len(pairs)))
            assert np.sort(gaps)[:-1].tolist() == [1] * 7  # eight neighbours on the circle of all rows
