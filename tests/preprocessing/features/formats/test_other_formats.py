"""MMF's LMDB, MILVLG's npz files, VinVL's TSV and the export to Parquet."""

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from megainter.errors import UsageError
from preprocessing.features.exporting import export_features
from preprocessing.features.formats import recognise
from tests.foreign import F, Image, assert_holds, assert_likeliest, b64, failures, imported, make_image, write_lmdb

IMAGES = [make_image(seed, f"train2014/COCO_{seed}") for seed in range(5)]


def mmf_row(image: Image, background: bool, filled: int = 0) -> dict[str, Any]:
    """As MMF's lmdb_conversion.py; ``filled`` rows of confidence 0 stand behind the regions."""
    probs = image.probs if background else image.probs[:, 1:]
    objects = image.probs.argmax(1) if background else image.objects_id
    arrays = {"features": image.features, "bbox": image.boxes, "cls_prob": probs, "objects": objects}
    arrays = {name: np.concatenate([array, np.zeros((filled, *array.shape[1:]), array.dtype)]) for name, array in arrays.items()}
    return arrays | {"feature_path": image.image_id, "image_height": image.height, "image_width": image.width, "num_boxes": len(image)}


def write_mmf(path: Path, rows: list[dict[str, Any]]) -> Path:
    items = {row["feature_path"].encode(): pickle.dumps(row) for row in rows}
    return write_lmdb(path, items | {b"keys": pickle.dumps(list(items))})


@pytest.mark.parametrize("background", [True, False])
def test_mmf_with_and_without_background(tmp_path: Path, background: bool) -> None:
    source = write_mmf(tmp_path / "x", [mmf_row(image, background, filled=2) for image in IMAGES])
    assert recognise(source) == "mmf-lmdb"
    store, done = imported(source, tmp_path / "s")
    assert (done.stored, done.bad, store.schema.num_classes) == (len(IMAGES), 0, 1601)
    for image in IMAGES:
        record = store[image.image_id]
        assert_holds(record, image, probs=background)
        np.testing.assert_allclose(record.class_probs, image.probs, atol=5e-4)
        wanted = image.probs.argmax(1) - 1 if background else image.objects_id
        np.testing.assert_array_equal(record.extras["objects_id"], wanted)


def test_mmf_probabilities_of_a_detector_with_the_background_last(tmp_path: Path) -> None:
    rolled = [mmf_row(replace(image, probs=np.roll(image.probs, -1, axis=1)), background=True) for image in IMAGES]
    store, _ = imported(write_mmf(tmp_path / "x", rolled), tmp_path / "s", background="last")
    for image in IMAGES:
        assert_holds(store[image.image_id], image)
        np.testing.assert_array_equal(store[image.image_id].extras["objects_id"], image.probs.argmax(1) - 1)


def test_another_number_of_classes_needs_a_word(tmp_path: Path) -> None:
    rows = [mmf_row(replace(image, probs=np.full((len(image), 8), 1 / 8, np.float32)), background=True) for image in IMAGES]
    source = write_mmf(tmp_path / "x", rows)
    with pytest.raises(UsageError, match="8 columns; say with --background"):
        imported(source, tmp_path / "s")
    assert imported(source, tmp_path / "s", background="first")[0].schema.num_classes == 8
    (tmp_path / "names.txt").write_text("\n".join("abcdefgh"))
    store, _ = imported(source, tmp_path / "t", classes=tmp_path / "names.txt")
    assert store.schema.class_names == ("__background__", *"abcdefgh")


def write_milvlg(folder: Path, images: list[Image], last: bool = False) -> Path:
    """As bottom-up-attention.pytorch: labels are arguments of the maximum over all columns."""
    folder.mkdir()
    for image in images:
        labels = image.labels if last else image.labels | {"objects_id": image.objects_id + 1, "attrs_id": image.attrs_id + 1}
        info = {"image_id": image.image_id, "image_h": image.height, "image_w": image.width, "num_boxes": len(image), **labels}
        sizes = {"num_bbox": len(image), "image_h": image.height, "image_w": image.width}
        np.savez_compressed(folder / image.image_id.split("/")[1], x=image.features, bbox=image.boxes, **sizes, info=info)  # type: ignore[arg-type]
    return folder


@pytest.mark.parametrize("last", [False, True])
def test_milvlg_labels_in_both_dialects(tmp_path: Path, last: bool) -> None:
    source = write_milvlg(tmp_path / "x", IMAGES, last)
    assert recognise(source) == "milvlg-npz"
    store, done = imported(source, tmp_path / "s", features="float32", background="last" if last else "first")
    assert (done.stored, done.bad) == (len(IMAGES), 0)
    for image in IMAGES:
        record = store[image.image_id.split("/")[1]]
        assert_holds(record, image, probs=False, exact=True)
        assert_likeliest(record, image.objects_id, image.objects_conf)
        for name, array in image.labels.items():
            np.testing.assert_array_equal(record.extras[name], array)


def test_a_hostile_info_runs_nothing(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.mkdir, (tmp_path / "ran",)

    source = write_milvlg(tmp_path / "x", IMAGES)
    image = IMAGES[0]
    sizes = {"num_bbox": len(image), "image_h": image.height, "image_w": image.width}
    np.savez(source / "evil.npz", x=image.features, bbox=image.boxes, **sizes, info=np.array({"a": Hostile()}))  # type: ignore[arg-type]
    store, done = imported(source, tmp_path / "s", background="first")
    assert (done.stored, done.bad) == (len(IMAGES) + 1, 0)
    assert "refused" in failures(tmp_path / "s")["evil.npz"]
    assert_holds(store["evil"], image, probs=False)
    assert (store["evil"].extras["objects_id"] == -1).all()
    np.testing.assert_allclose(store["evil"].class_probs, 1 / 1601, atol=1e-6)
    assert not (tmp_path / "ran").exists()


def vinvl_line(image: Image, names: list[str]) -> str:
    """As scene_graph_benchmark's inference.py."""
    objects = []
    for row in range(len(image)):
        position = {"rect": image.boxes[row].tolist(), "bbox_id": row}
        label = {"class": names[image.objects_id[row]], "conf": float(image.objects_conf[row])}
        objects.append(position | label | {"feature": b64(image.features[row])})
    return f"{image.image_id}\t{json.dumps({'objects': objects, 'relations': None})}\n"


@pytest.mark.parametrize("labelmap", [True, False])
def test_vinvl_predictions(tmp_path: Path, labelmap: bool) -> None:
    names = [f"name {number}" for number in range(1600)]
    source, sizes, classes = tmp_path / "predictions.tsv", tmp_path / "hw.tsv", tmp_path / "classes"
    source.write_text("".join(vinvl_line(image, names) for image in IMAGES) + "torn\t{\n")
    sizes.write_text("".join(f'{image.image_id}\t[{{"height": {image.height}, "width": {image.width}}}]\n' for image in IMAGES))
    places = {name: number + 1 for number, name in enumerate(names)}
    classes.write_text(json.dumps({"label_to_idx": places}) if labelmap else "\n".join(f"{name},synonym" for name in names))
    assert recognise(source) == "vinvl-tsv"
    with pytest.raises(UsageError, match=r"\(--sizes\)"):
        imported(source, tmp_path / "s", classes=classes)
    with pytest.raises(UsageError, match=r"\(--classes\)"):
        imported(source, tmp_path / "s", sizes=sizes)
    store, done = imported(source, tmp_path / "s", sizes=sizes, classes=classes, max_bad=0.5)
    assert (done.stored, failures(tmp_path / "s").keys()) == (len(IMAGES), {"line 6"})
    for image in IMAGES:
        record = store[image.image_id]
        assert_holds(record, image, probs=False)
        assert_likeliest(record, image.objects_id, image.objects_conf)


def test_oscar_features_have_their_position_behind(tmp_path: Path) -> None:
    lines = []
    for image in IMAGES:
        shares = image.boxes / np.array([image.width, image.height] * 2, np.float32)
        both = np.hstack([image.features, shares, shares[:, 2:] - shares[:, :2]]).astype(np.float32)
        lines.append(f"{image.image_id}\t{json.dumps({'num_boxes': len(image), 'features': b64(both)})}\n")
    (tmp_path / "features.tsv").write_text("".join(lines))
    store, _ = imported(tmp_path / "features.tsv", tmp_path / "s")
    assert store.schema.feature_size == F
    for image in IMAGES:
        record = store[image.image_id]
        np.testing.assert_array_equal(record.features, image.features.astype(np.float16))
        np.testing.assert_allclose(record.boxes * np.array([image.width, image.height] * 2) / 1024, image.boxes, rtol=1e-4, atol=1e-3)


def test_parquet_holds_everything(tmp_path: Path) -> None:
    store, _ = imported(write_milvlg(tmp_path / "x", IMAGES), tmp_path / "s", features="float32")
    export_features(tmp_path / "s", tmp_path / "out.parquet", "parquet")
    table = pq.read_table(tmp_path / "out.parquet")
    rows = {row["image_id"]: row for row in table.to_pylist()}
    assert json.loads(table.schema.metadata[b"megainter feature store"]) == store.schema.to_json()
    for image_id in store.ids:
        record, row = store[image_id], rows[image_id]
        assert (row["width"], row["height"]) == (record.width, record.height)
        for name in ("boxes", "features", "class_probs"):
            np.testing.assert_allclose(np.array(row[name], np.float32), getattr(record, name), atol=1e-3 if name == "class_probs" else 0)
        for name, array in record.extras.items():
            np.testing.assert_array_equal(np.array(row[name], array.dtype), array)


@pytest.mark.parametrize("content", [b"", b"hello\n", b"a\tb\n" * 5, b"\x89PNG\r\n\x1a\n\0\0", b"{}\n"])
def test_other_files_are_no_features(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(UsageError, match="no format that is known"):
        recognise(tmp_path / "x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError, match="no format that is known"):
        recognise(tmp_path / "folder")
    with pytest.raises(UsageError, match="does not exist"):
        recognise(tmp_path / "absent")
