"""LMDBs of pickled dicts, written as ViLBERT's and vilbert-multi-task's scripts do, hostile ones among them."""

import base64
import os
import pickle
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest

from megainter.errors import UsageError
from preprocessing.features.exporting import export_features
from preprocessing.features.formats import recognise
from tests.foreign import Image, assert_holds, b64, failures, imported, make_image, write_lmdb

IMAGES = [make_image(seed, str(1_000_000 + seed)) for seed in range(6)]


def task_row(image: Image, probs: bool = True) -> dict[str, str]:
    """A row of csv.DictReader: every value is text."""
    sizes = {"image_id": image.image_id, "image_w": str(image.width), "image_h": str(image.height), "num_boxes": str(len(image))}
    return sizes | {"boxes": b64(image.boxes), "features": b64(image.features)} | ({"cls_prob": b64(image.probs)} if probs else {})


def multi_task_row(image: Image) -> dict[str, Any]:
    sizes = {"image_id": image.image_id, "image_w": image.width, "image_h": image.height, "num_boxes": len(image)}
    return {**sizes, "boxes": image.boxes, "features": image.features}


def write(path: Path, rows: list[dict[str, Any]], protocol: int = 3) -> Path:
    items = {row["image_id"].encode(): pickle.dumps(row, protocol) for row in rows}
    return write_lmdb(path, items | {b"keys": pickle.dumps(list(items), protocol)})


@pytest.mark.parametrize("protocol", [0, 2, 3, 4, 5])
def test_a_task_lmdb_is_recognised_and_imported(tmp_path: Path, protocol: int) -> None:
    source = write(tmp_path / "x", [task_row(image) for image in IMAGES], protocol)
    assert recognise(source) == recognise(source / "data.mdb") == "vilbert-lmdb"
    store, done = imported(source, tmp_path / "s")
    assert (done.stored, done.bad) == (len(IMAGES), 0)
    for image in IMAGES:
        assert_holds(store[image.image_id], image)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_multi_task_lmdb_of_arrays_has_no_probabilities(tmp_path: Path, protocol: int) -> None:
    store, _ = imported(write(tmp_path / "x", [multi_task_row(image) for image in IMAGES], protocol), tmp_path / "s")
    for image in IMAGES:
        assert_holds(store[image.image_id], image, probs=False)
        np.testing.assert_allclose(store[image.image_id].class_probs, 1 / 1601, atol=1e-6)


def test_records_without_the_list_of_keys_are_found(tmp_path: Path) -> None:
    source = write(tmp_path / "x", [task_row(image) for image in IMAGES])
    with lmdb.open(str(source)) as environment, environment.begin(write=True) as transaction:
        transaction.delete(b"keys")
    assert imported(source, tmp_path / "s")[1].stored == len(IMAGES)


class Hostile:
    """Creates a file where it is unpickled without care."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("place", ["value", "field", "keys"])
def test_a_hostile_pickle_runs_nothing(tmp_path: Path, place: str) -> None:
    bomb = Hostile(tmp_path / "ran")
    source = write(tmp_path / "x", [task_row(image) for image in IMAGES])
    broken: Any = task_row(IMAGES[2]) | {"num_boxes": bomb} if place == "field" else bomb
    key = b"keys" if place == "keys" else IMAGES[2].image_id.encode()
    write_lmdb(source, {key: pickle.dumps(broken)})
    store, done = imported(source, tmp_path / "s", max_bad=0.5)
    assert not (tmp_path / "ran").exists()
    if place == "keys":
        assert done.stored == len(IMAGES)
    else:
        assert IMAGES[2].image_id not in store
        assert "refused" in failures(tmp_path / "s")[f"key '{IMAGES[2].image_id}'"]


def test_an_lmdb_of_nothing_but_hostile_pickles_is_refused(tmp_path: Path) -> None:
    source = write_lmdb(tmp_path / "x", {b"a": pickle.dumps(Hostile(tmp_path / "ran"))})
    with pytest.raises(UsageError, match="no format that is known"):
        imported(source, tmp_path / "s")
    with pytest.raises(UsageError, match=r"nothing in .* can be read: key 'a': .*refused"):
        imported(source, tmp_path / "s", format="vilbert-lmdb")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (b"", "not a whole pickle"),
        (pickle.dumps(task_row(IMAGES[1]))[:-100], "not a whole pickle"),
        (pickle.dumps([1]), "a pickled list, not a dict"),
        (pickle.dumps({}), "num_boxes"),
        (pickle.dumps(task_row(IMAGES[1]) | {"boxes": "AAAA"}), "boxes has 3 bytes"),
        (pickle.dumps(multi_task_row(IMAGES[1]) | {"boxes": IMAGES[1].boxes.astype(object)}), "boxes is missing or is no array"),
        (pickle.dumps(multi_task_row(IMAGES[1]) | {"features": IMAGES[1].features[None]}), "features has shape"),
    ],
)
def test_a_damaged_value_is_listed(tmp_path: Path, value: bytes, reason: str) -> None:
    source = write(tmp_path / "x", [task_row(image, probs=False) for image in IMAGES])
    write_lmdb(source, {b"bad": value})
    assert imported(source, tmp_path / "s", max_bad=0.5)[1].stored == len(IMAGES)
    assert reason in failures(tmp_path / "s")["key 'bad'"]


def test_an_export_is_read_as_vilbert_reads_it(tmp_path: Path) -> None:
    imported(write(tmp_path / "x", [task_row(image) for image in IMAGES]), tmp_path / "s", features="float32")
    export_features(tmp_path / "s", tmp_path / "out", "vilbert-lmdb")
    with lmdb.open(str(tmp_path / "out"), readonly=True, lock=False, max_readers=1) as environment, environment.begin() as transaction:
        ids = pickle.loads(transaction.get(b"keys"))
        items = {image_id: pickle.loads(transaction.get(image_id)) for image_id in ids}
    assert sorted(items) == [image.image_id.encode() for image in IMAGES]
    for image in IMAGES:
        item = items[image.image_id.encode()]
        assert {type(value) for value in item.values()} == {str}
        assert (item["image_id"], int(item["image_w"]), int(item["image_h"])) == (image.image_id, image.width, image.height)
        wanted = {"boxes": image.boxes, "features": image.features, "cls_prob": image.probs.astype(np.float16).astype(np.float32)}
        for name, array in wanted.items():
            assert base64.b64decode(item[name]) == array.tobytes()
