"""UNITER's npz files and LMDBs, written as its scripts do with numpy and msgpack (msgpack-numpy's encoding spelled out)."""

import io
import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import lmdb
import msgpack
import numpy as np
import pytest

from preprocessing.features.exporting import export_features
from preprocessing.features.formats import recognise
from tests.foreign import Image, failures, imported, make_image, write_lmdb

IMAGES = [make_image(seed, f"nlvr2_dev-{seed}-0-img0") for seed in range(5)]


def arrays_of(image: Image) -> dict[str, np.ndarray]:
    shares = image.boxes / np.array([image.width, image.height] * 2, np.float32)
    norm_bb = np.hstack([shares, shares[:, 2:] - shares[:, :2]])
    arrays = {"norm_bb": norm_bb, "features": image.features, "conf": image.objects_conf[:, None], "soft_labels": image.probs}
    return {name: array.astype(np.float16) for name, array in arrays.items()}


def new_encode(value: Any) -> Any:
    return {b"nd": True, b"type": value.dtype.str, b"kind": b"", b"shape": value.shape, b"data": value.tobytes()}


def old_encode(value: Any) -> Any:
    return {"nd": True, "type": value.dtype.str, "shape": value.shape, "data": value.tobytes()}


def npz_bytes(arrays: dict[str, Any]) -> bytes:
    with io.BytesIO() as stream:
        np.savez_compressed(stream, **arrays, allow_pickle=True)  # UNITER's script stores this argument as one more array
        return stream.getvalue()


ENCODINGS = {
    "msgpack": lambda arrays: msgpack.packb(arrays, default=new_encode, use_bin_type=True),
    "early msgpack": lambda arrays: msgpack.packb(arrays, default=old_encode, use_bin_type=True),
    "compressed": npz_bytes,
}


def write(path: Path, encoding: str) -> Path:
    items = {f"{image.image_id}.npz".encode(): ENCODINGS[encoding](arrays_of(image)) for image in IMAGES}
    return write_lmdb(path, items | {b"__keys__": json.dumps([key.decode() for key in items]).encode()})


def write_sizes(path: Path) -> Path:
    path.write_text("image_id,width,height\n" + "".join(f"{image.image_id},{image.width},{image.height}\n" for image in IMAGES))
    return path


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_an_lmdb_is_recognised_and_imported_with_sizes(tmp_path: Path, encoding: str) -> None:
    source = write(tmp_path / "feat_th0.2_max100_min10", encoding)
    assert recognise(source) == "uniter-lmdb"
    store, done = imported(source, tmp_path / "s", sizes=write_sizes(tmp_path / "sizes.csv"))
    assert (done.stored, done.bad, store.schema.settings["image_sizes"]) == (len(IMAGES), 0, "given")
    for image in IMAGES:
        record, arrays = store[image.image_id], arrays_of(image)
        assert (record.width, record.height) == (image.width, image.height)
        np.testing.assert_allclose(record.boxes, image.boxes, atol=0.5)
        np.testing.assert_array_equal(record.features, arrays["features"])
        np.testing.assert_array_equal(record.class_probs, arrays["soft_labels"].astype(np.float32))
        np.testing.assert_array_equal(record.extras["objects_conf"], arrays["conf"][:, 0])


def test_without_sizes_relative_positions_are_exact(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store, _ = imported(write(tmp_path / "x", "msgpack"), tmp_path / "s")
    assert "has no image sizes" in capsys.readouterr().out
    for image in IMAGES:
        record = store[image.image_id]
        np.testing.assert_array_equal(record.boxes / record.width, arrays_of(image)["norm_bb"][:, :4].astype(np.float32))
    assert store.schema.settings["image_sizes"] == "nominal"


def test_a_folder_of_npz_files_gives_the_same_store_content(tmp_path: Path) -> None:
    for image in IMAGES:
        (tmp_path / "in" / "dev").mkdir(parents=True, exist_ok=True)
        np.savez_compressed(tmp_path / "in" / "dev" / f"{image.image_id}.npz", **arrays_of(image))
    assert recognise(tmp_path / "in") == "uniter-npz"
    folder, _ = imported(tmp_path / "in" / "dev", tmp_path / "one")
    other, _ = imported(write(tmp_path / "x", "compressed"), tmp_path / "two")
    assert folder.digest == other.digest
    assert next(iter(imported(tmp_path / "in", tmp_path / "three")[0].ids)).startswith("dev/")


def test_an_export_is_read_as_uniter_reads_it(tmp_path: Path) -> None:
    imported(write(tmp_path / "x", "msgpack"), tmp_path / "s")
    export_features(tmp_path / "s", tmp_path / "out", "uniter-lmdb")
    counts = json.loads((tmp_path / "out" / "nbb_th0.2_max100_min10.json").read_text())
    assert counts == {f"{image.image_id}.npz": len(image) for image in IMAGES}

    def decode(value: dict[Any, Any]) -> Any:
        if b"nd" not in value:
            return value
        return np.frombuffer(value[b"data"], np.dtype(value[b"type"])).reshape(value[b"shape"])

    with lmdb.open(str(tmp_path / "out" / "feat_th0.2_max100_min10"), readonly=True, lock=False) as environment:
        with environment.begin(buffers=True) as transaction:
            assert sorted(json.loads(bytes(transaction.get(b"__keys__")).decode())) == sorted(counts)
            for image in IMAGES:
                dump = msgpack.loads(transaction.get(f"{image.image_id}.npz".encode()), raw=False, object_hook=decode)
                for name, array in arrays_of(image).items():
                    atol = 1e-3 if name == "norm_bb" else 0  # widths and heights are differences of rounded corners
                    np.testing.assert_allclose(dump[name], array, atol=atol, rtol=0)
                    assert dump[name].dtype == np.float16
                np.testing.assert_array_equal(dump["norm_bb"][:, :4], arrays_of(image)["norm_bb"][:, :4])


def bomb(shape: str) -> bytes:
    """An .npz whose array claims another shape than it has."""
    header = f"{{'descr': '<f2', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    content = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(100)
    with io.BytesIO() as stream:
        with zipfile.ZipFile(stream, "w") as archive:
            archive.writestr("features.npy", content)
        return stream.getvalue()


class Hostile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (self.path,)


def test_damaged_and_hostile_files_are_listed(tmp_path: Path) -> None:
    for image in IMAGES:
        np.savez(tmp_path / f"{image.image_id}.npz", **arrays_of(image))
    whole, good = (tmp_path / f"{IMAGES[0].image_id}.npz").read_bytes(), arrays_of(IMAGES[1])
    objects = np.array([Hostile(tmp_path / "ran")], object)
    bad = {
        "cut": whole[: len(whole) // 2],
        "empty": b"",
        "text": b"<html>404</html>",
        "claims": bomb("(1000000000, 1000000000)"),
        "negative": bomb("(-1, 2)"),
        "objects": npz_bytes(good | {"features": objects}),
        "pickle": pickle.dumps(Hostile(tmp_path / "ran")),
        "lacks": npz_bytes({name: good[name] for name in good if name != "norm_bb"}),
        "zero": npz_bytes({name: array[:0] for name, array in good.items()}),
        "infinite": npz_bytes(good | {"features": np.full_like(good["features"], np.inf)}),
    }
    for name, content in bad.items():
        (tmp_path / f"{name}.npz").write_bytes(content)
    _, done = imported(tmp_path, tmp_path / "s", format="uniter-npz", max_bad=0.9)
    assert (done.stored, failures(tmp_path / "s").keys()) == (len(IMAGES), {f"{name}.npz" for name in bad})
    assert not (tmp_path / "ran").exists()
