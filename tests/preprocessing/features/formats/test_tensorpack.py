"""The Conceptual Captions LMDB, written as tensorpack's LMDBSerializer does, in both of its encodings."""

import pickle
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest

from preprocessing.features.formats import recognise
from tests.foreign import Image, assert_holds, failures, imported, make_image, write_lmdb

IMAGES = [make_image(seed, str(3_000_000_000 + seed)) for seed in range(5)]


def datapoint(image: Image, flat: bool) -> list[Any]:
    arrays = [array.ravel() if flat else array for array in (image.features, image.probs, image.boxes)]
    return [*arrays, str(len(image)), str(image.height), str(image.width), image.image_id, "a caption, ünicode"]


def msgpack_numpy(value: Any) -> Any:
    assert isinstance(value, np.ndarray)
    return {b"nd": True, b"type": value.dtype.str, b"kind": b"", b"shape": value.shape, b"data": value.tobytes()}


ENCODINGS = {
    "pickle": lambda value: pickle.dumps(value, protocol=-1),
    "pickle of python 3.6": lambda value: pickle.dumps(value, protocol=4),
    "msgpack": lambda value: msgpack.packb(value, default=msgpack_numpy, use_bin_type=True),
    "early msgpack": lambda value: msgpack.packb(value, default=msgpack_numpy, use_bin_type=False),
}


def write(path: Path, encoding: str, flat: bool = False) -> Path:
    encode = ENCODINGS[encoding]
    items = {f"{number:08}".encode(): encode(datapoint(image, flat)) for number, image in enumerate(IMAGES)}
    return write_lmdb(path, items | {b"__keys__": encode(list(items))}, subdir=False)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("flat", [False, True])
def test_both_encodings_are_recognised_and_imported(tmp_path: Path, encoding: str, flat: bool) -> None:
    source = write(tmp_path / "training_feat_all.lmdb", encoding, flat)
    assert recognise(source) == "tensorpack-lmdb"
    store, done = imported(source, tmp_path / "s")
    assert (done.stored, done.bad) == (len(IMAGES), 0)
    for image in IMAGES:
        assert_holds(store[image.image_id], image)


def test_hostile_and_damaged_datapoints_are_listed(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.mkdir, (tmp_path / "ran",)

    source = write(tmp_path / "x.lmdb", "msgpack")
    good = datapoint(IMAGES[0], False)
    objects = {b"nd": True, b"type": "|O", b"kind": b"O", b"shape": (1,), b"data": pickle.dumps(Hostile())}
    bad = {
        b"a": pickle.dumps([*good[:6], Hostile(), "x"]),
        b"b": msgpack.packb([objects] * 8),
        b"c": msgpack.packb([{b"nd": True, b"type": "<f4", b"shape": (10**9, 10**9), b"data": b"0000"}] * 8),
        b"d": ENCODINGS["msgpack"](good)[:-30],
        b"e": ENCODINGS["msgpack"](good[:7]),
        b"f": ENCODINGS["pickle"]([*good[:3], "1000", *good[4:6], "another", ""]),
        b"g": b"",
    }
    write_lmdb(source, bad, subdir=False)
    _, done = imported(source, tmp_path / "s", max_bad=0.9)
    assert (done.stored, done.bad) == (len(IMAGES), len(bad))
    assert not (tmp_path / "ran").exists()
    assert failures(tmp_path / "s").keys() == {f"key '{key.decode()}'" for key in bad}
