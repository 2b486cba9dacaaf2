"""Formats in the forms that their projects released, beside the usual ones: what differs is told by evidence, or read as it is."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megainter.errors import UsageError
from preprocessing.features.formats import recognise
from tests.foreign import FOREGROUND, F, Image, assert_holds, assert_likeliest, b64, failures, imported, make_image, write_lmdb

IMAGES = [make_image(seed, f"{seed:06}", n=12) for seed in range(6)]
KINDS = ("objects_id", "objects_conf", "attrs_id", "attrs_conf")


def write_npz(folder: Path, image: Image, info: Any, **more: Any) -> None:
    folder.mkdir(exist_ok=True)
    sizes = {"num_bbox": len(image), "image_h": image.height, "image_w": image.width}
    np.savez(folder / image.image_id, x=image.features, bbox=image.boxes, info=info, **(sizes | more))  # type: ignore[arg-type]


def write_caffe(folder: Path, offset: int = 0, backgrounds: int = 0) -> Path:
    """MILVLG's caffe mode; ``backgrounds`` regions of each image are likeliest to be none, which is number 0 of the older count."""
    for image in IMAGES:
        ids = image.objects_id + offset
        ids[:backgrounds] = 0
        write_npz(folder, image, image.labels | {"image_id": image.image_id, "objects_id": ids, "attrs_id": image.attrs_id + offset})
    return folder


def test_labels_of_milvlg_caffe_are_counted_without_background_as_it_writes_them_now(tmp_path: Path, capsys: Any) -> None:
    store, done = imported(write_caffe(tmp_path / "x"), tmp_path / "s", features="float32")
    assert (done.stored, done.bad) == (len(IMAGES), 0)
    assert "labels are counted without background, as only 0% of the first ones are number 0 (--background first" in capsys.readouterr().out
    for image in IMAGES:
        assert_holds(store[image.image_id], image, probs=False, exact=True)
        assert_likeliest(store[image.image_id], image.objects_id, image.objects_conf)
        for name in KINDS:
            np.testing.assert_array_equal(store[image.image_id].extras[name], image.labels[name])


def test_labels_of_milvlg_caffe_of_before_september_2020_show_the_background(tmp_path: Path, capsys: Any) -> None:
    store, _ = imported(write_caffe(tmp_path / "x", offset=1, backgrounds=4), tmp_path / "s")
    assert "labels are counted with background, as 33% of the first ones are number 0 (--background none" in capsys.readouterr().out
    for image in IMAGES:
        wanted = np.where(np.arange(12) < 4, -1, image.objects_id)
        np.testing.assert_array_equal(store[image.image_id].extras["objects_id"], wanted)
        np.testing.assert_array_equal(store[image.image_id].extras["attrs_id"], image.attrs_id)
        assert_likeliest(store[image.image_id], wanted, image.objects_conf)


def test_the_last_class_counted_with_background_tells_it_too_and_the_users_word_is_above_all(tmp_path: Path, capsys: Any) -> None:
    source = write_caffe(tmp_path / "x", offset=1)
    last = IMAGES[0].objects_id + 1
    last[3] = FOREGROUND
    write_npz(source, IMAGES[0], IMAGES[0].labels | {"objects_id": last})
    store, _ = imported(source, tmp_path / "s")
    assert "as id 1600 is none of 1,600 classes counted from 0" in capsys.readouterr().out
    assert store[IMAGES[0].image_id].extras["objects_id"][3] == FOREGROUND - 1
    plain = write_caffe(tmp_path / "y", offset=1)
    store, _ = imported(plain, tmp_path / "t", background="first")
    assert "labels are counted with background, as --background first says\n" in capsys.readouterr().out
    np.testing.assert_array_equal(store[IMAGES[1].image_id].extras["objects_id"], IMAGES[1].objects_id)
    with pytest.raises(UsageError, match="labels"):
        imported(plain, tmp_path / "t")


@pytest.mark.parametrize("attributes", [False, True])
def test_milvlg_d2_gives_its_classes_and_tensors_beside_them_are_left_out(tmp_path: Path, attributes: bool, capsys: Any) -> None:
    for image in IMAGES:
        info: dict[str, Any] = {"objects": image.objects_id, "cls_prob": image.probs[:, 1:]}
        if attributes:
            info |= {"attrs_id": torch.rand(12, 401), "attrs_scores": torch.rand(300, 401)}
        write_npz(tmp_path / "x", image, info, image_h_inner=600, image_w_inner=800)
    store, done = imported(tmp_path / "x", tmp_path / "s", features="float32")
    assert (done.stored, done.bad) == (len(IMAGES), 0)
    assert (
        "attrs_id is left out where it is like this: attrs_id is refused: its pickle asks for torch" in capsys.readouterr().out
    ) == attributes
    for image in IMAGES:
        record = store[image.image_id]
        assert_holds(record, image, probs=False, exact=True)
        np.testing.assert_allclose(record.class_probs, image.probs, atol=1e-3)
        np.testing.assert_array_equal(record.extras["objects_id"], image.objects_id)


def test_milvlg_d2_of_given_boxes_has_the_background_as_its_last_number(tmp_path: Path) -> None:
    for image in IMAGES:
        ids = np.where(np.arange(12) == 5, FOREGROUND, image.objects_id)
        write_npz(tmp_path / "x", image, {"objects": ids, "cls_prob": image.probs[:, 1:]})
    store, _ = imported(tmp_path / "x", tmp_path / "s")
    np.testing.assert_array_equal(store["000000"].extras["objects_id"], np.where(np.arange(12) == 5, -1, IMAGES[0].objects_id))


def test_an_entry_without_a_member_that_others_have_is_kept_and_named(tmp_path: Path, capsys: Any) -> None:
    source = write_caffe(tmp_path / "x")
    write_npz(source, IMAGES[4], IMAGES[4].labels | {"attrs_id": torch.rand(12), "objects_conf": np.ones(7)})
    write_npz(source, IMAGES[5], [1, 2, 3])
    store, done = imported(source, tmp_path / "s", features="float32")
    assert (done.stored, done.bad, done.repeated) == (len(IMAGES), 0, 0)
    assert "2 entries lack a member that others have; they are kept" in capsys.readouterr().out
    reasons = failures(tmp_path / "s")
    assert reasons["000004.npz"].startswith("kept without attrs_id, objects_conf; attrs_id is refused: its pickle asks for torch")
    assert reasons["000004.npz"].endswith("; objects_conf has shape [7] for 12 regions")
    assert reasons["000005.npz"] == "kept without attrs_conf, attrs_id, objects_conf, objects_id; info is a ndarray, not a dict"
    for image in IMAGES[4:]:
        assert_holds(store[image.image_id], image, probs=False, exact=True)
    np.testing.assert_array_equal(store["000004"].extras["objects_id"], IMAGES[4].objects_id)
    assert (store["000005"].extras["attrs_id"] == -1).all()


def positioned(image: Image) -> np.ndarray:
    shares = image.boxes / np.array([image.width, image.height] * 2, np.float32)
    return np.hstack([image.features, shares, shares[:, 2:] - shares[:, :2]]).astype(np.float32)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_vinvl_features_in_three_columns(tmp_path: Path, end: str) -> None:
    lines = [f"{image.image_id}\t{len(image)}\t{b64(positioned(image))}{end}" for image in IMAGES]
    (tmp_path / "features.tsv").write_bytes("".join([*lines[:3], f"torn\t12\t{lines[3][20:]}", *lines[3:]]).encode())
    sizes = "".join(f'{image.image_id}\t[{{"height": {image.height}, "width": {image.width}}}]\n' for image in IMAGES)
    (tmp_path / "hw.tsv").write_text(sizes)
    assert recognise(tmp_path / "features.tsv") == "vinvl-tsv"
    store, done = imported(tmp_path / "features.tsv", tmp_path / "s", sizes=tmp_path / "hw.tsv", features="float32", max_bad=0.2)
    assert (done.stored, done.bad, store.schema.feature_size) == (len(IMAGES), 1, F)
    for image in IMAGES:
        np.testing.assert_array_equal(store[image.image_id].features, image.features)
        np.testing.assert_allclose(store[image.image_id].boxes, image.boxes, rtol=1e-5, atol=1e-3)


def test_vinvl_features_without_position_are_refused_and_not_cut(tmp_path: Path) -> None:
    lines = [f"{image.image_id}\t{len(image)}\t{b64(image.features + 2)}\n" for image in IMAGES]
    (tmp_path / "features.tsv").write_text("".join(lines))
    with pytest.raises(UsageError, match="12 numbers, of which the last 6 are no position in the image"):
        imported(tmp_path / "features.tsv", tmp_path / "s")


@pytest.mark.parametrize("bare", [False, True])
def test_vinvl_predictions_with_the_size_beside_them_or_as_a_list(tmp_path: Path, bare: bool) -> None:
    names = [f"name {number}" for number in range(FOREGROUND)]
    (tmp_path / "classes").write_text("\n".join(names))
    lines = []
    for image in IMAGES:
        objects = [
            {
                "rect": image.boxes[n].tolist(),
                "class": names[image.objects_id[n]],
                "conf": float(image.objects_conf[n]),
                "feature": b64(image.features[n]),
            }
            for n in range(len(image))
        ]
        value = objects if bare else {"objects": objects, "image_h": image.height, "image_w": image.width}
        lines.append(f"{image.image_id}\t{json.dumps(value)}\n")
    (tmp_path / "predictions.tsv").write_text("".join(lines))
    (tmp_path / "s.csv").write_text("image_id,width,height\n" + "".join(f"{one.image_id},{one.width},{one.height}\n" for one in IMAGES))
    store, _ = imported(
        tmp_path / "predictions.tsv", tmp_path / "s", classes=tmp_path / "classes", sizes=tmp_path / "s.csv" if bare else None
    )
    for image in IMAGES:
        assert_holds(store[image.image_id], image, probs=False)
        assert_likeliest(store[image.image_id], image.objects_id, image.objects_conf)


def mmf_info(image: Image, probs: bool) -> dict[str, Any]:
    """As MMF's extract_features_vmb.py once wrote it: probabilities with background, objects without."""
    sizes = {"image_width": image.width, "image_height": image.height}
    return {"bbox": image.boxes, "num_boxes": len(image), "objects": image.objects_id, **sizes} | (
        {"cls_prob": image.probs} if probs else {}
    )


@pytest.mark.parametrize("probs", [True, False])
def test_mmf_npy_folders(tmp_path: Path, probs: bool) -> None:
    for image in IMAGES:
        folder = tmp_path / "x" / "train"
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / image.image_id, image.features)
        np.save(folder / f"{image.image_id}_info", mmf_info(image, probs))  # type: ignore[arg-type]
    np.save(tmp_path / "x" / "alone", IMAGES[0].features)
    assert recognise(tmp_path / "x") == "mmf-npy"
    store, done = imported(tmp_path / "x", tmp_path / "s", features="float32", max_bad=0.2)
    assert (done.stored, done.bad) == (len(IMAGES), 1)
    assert failures(tmp_path / "s")["alone.npy"] == "alone_info.npy cannot be read: No such file or directory"
    for image in IMAGES:
        record = store[f"train/{image.image_id}"]
        assert_holds(record, image, probs=probs, exact=True)
        np.testing.assert_array_equal(record.extras["objects_id"], image.objects_id)


def test_mmf_npy_of_vinvl_has_the_position_behind_features(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    for image in IMAGES:
        both = positioned(image)
        info = {
            "bbox": both[:, -6:],
            "image_width": image.width,
            "image_height": image.height,
            "scores": image.objects_conf,
            "labels": image.objects_id,
        }
        np.save(tmp_path / "x" / image.image_id, both)
        np.save(tmp_path / "x" / f"{image.image_id}_info", info)  # type: ignore[arg-type]
    store, _ = imported(tmp_path / "x", tmp_path / "s", features="float32")
    for image in IMAGES:
        np.testing.assert_array_equal(store[image.image_id].features, image.features)
        np.testing.assert_allclose(store[image.image_id].boxes, image.boxes, rtol=1e-5, atol=1e-3)


def test_npy_of_vilbert_multi_task_is_one_dict(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    for image in IMAGES:
        row = {
            "image_id": image.image_id,
            "image_h": image.height,
            "image_w": image.width,
            "num_boxes": 12,
            "boxes": image.boxes,
            "features": image.features,
        }
        np.save(tmp_path / "x" / image.image_id, row)  # type: ignore[arg-type]
    store, _ = imported(tmp_path / "x", tmp_path / "s")
    assert_holds(store[IMAGES[2].image_id], IMAGES[2], probs=False)


def test_mmf_objects_beside_probabilities_with_background_are_told_apart_by_them(tmp_path: Path, capsys: Any) -> None:
    rows = {image.image_id: mmf_info(image, True) | {"features": image.features, "feature_path": image.image_id} for image in IMAGES}
    store, _ = imported(write_lmdb(tmp_path / "x", {name.encode(): pickle.dumps(row) for name, row in rows.items()}), tmp_path / "s")
    assert "labels are counted without background, as the probabilities beside them show" in capsys.readouterr().out
    for image in IMAGES:
        assert_holds(store[image.image_id], image)
        np.testing.assert_array_equal(store[image.image_id].extras["objects_id"], image.objects_id)


def volta_item(image: Image) -> dict[str, Any]:
    short = zip(("obj_id", "obj_conf", "attr_id", "attr_conf"), image.labels.values(), strict=True)
    return {
        "img_id": image.image_id,
        "img_w": np.int64(image.width),
        "img_h": np.int64(image.height),
        "boxes": image.boxes,
        "features": image.features,
        **dict(short),
    }


@pytest.mark.parametrize("dataflow", [False, True])
def test_volta_lmdb(tmp_path: Path, dataflow: bool) -> None:
    keys = [f"{number:08}" if dataflow else image.image_id for number, image in enumerate(IMAGES)]
    items = {key.encode(): pickle.dumps(volta_item(image)) for key, image in zip(keys, IMAGES, strict=True)}
    index = {b"__keys__" if dataflow else b"keys": pickle.dumps([key.encode() for key in keys])}
    source = write_lmdb(tmp_path / "x", items | index)
    assert recognise(source) == ("tensorpack-lmdb" if dataflow else "vilbert-lmdb")
    store, done = imported(source, tmp_path / "s", features="float32")
    assert (done.stored, done.bad) == (len(IMAGES), 0)
    for image in IMAGES:
        record = store[image.image_id]
        assert_holds(record, image, probs=False, exact=True)
        assert_likeliest(record, image.objects_id, image.objects_conf)
        for name in KINDS:
            np.testing.assert_array_equal(record.extras[name], image.labels[name])


BUTD = ("image_id", "image_w", "image_h", "num_boxes", "boxes", "features")


def test_volta_tsv_and_its_lmdb_of_rows(tmp_path: Path) -> None:
    rows = []
    for image in IMAGES:
        cells = [
            image.image_id,
            image.height,
            image.width,
            *map(b64, image.labels.values()),
            len(image),
            b64(image.boxes),
            b64(image.features),
        ]
        rows.append([str(cell) for cell in [*cells, b64(image.probs), b64(np.zeros((12, 401), np.float32)), b64(image.probs)]])
    (tmp_path / "x.tsv").write_text("".join("\t".join(row) + "\r\n" for row in rows))
    assert recognise(tmp_path / "x.tsv") == "volta-tsv"
    names = ("img_id", "img_h", "img_w", *KINDS, "num_boxes", "boxes", "features", "cls_prob", "attrs", "classes")
    items = {row[0].encode(): pickle.dumps(dict(zip(names, row, strict=True))) for row in rows}
    write_lmdb(tmp_path / "x", items | {b"keys": pickle.dumps(list(items))})
    for source in (tmp_path / "x.tsv", tmp_path / "x"):
        store, _ = imported(source, tmp_path / f"{source.name}.s", features="float32")
        for image in IMAGES:
            assert_holds(store[image.image_id], image, exact=True)
            np.testing.assert_array_equal(store[image.image_id].extras["objects_id"], image.objects_id)


@pytest.mark.parametrize("order", [BUTD, BUTD[::-1]])
def test_a_tsv_under_a_header_line_is_read_by_its_names(tmp_path: Path, order: tuple[str, ...]) -> None:
    lines = ["\t".join(order)]
    for image in IMAGES:
        row = dict(zip(BUTD, (image.image_id, image.width, image.height, 12, b64(image.boxes), b64(image.features)), strict=True))
        lines.append("\t".join(str(row[name]) for name in order))
    (tmp_path / "x.tsv").write_text("\n".join(lines))
    assert recognise(tmp_path / "x.tsv") == "butd-tsv"
    store, done = imported(tmp_path / "x.tsv", tmp_path / "s", features="float32")
    assert (done.stored, done.bad) == (len(IMAGES), 0)
    assert_holds(store[IMAGES[3].image_id], IMAGES[3], probs=False, exact=True)


def test_the_users_sizes_come_before_those_of_the_format_and_that_is_told(tmp_path: Path, capsys: Any) -> None:
    source = write_caffe(tmp_path / "x")
    (tmp_path / "s.csv").write_text(
        "image_id,width,height\n" + "".join(f"{one.image_id},{one.width + 7},{one.height}\n" for one in IMAGES[:4])
    )
    store, done = imported(source, tmp_path / "s", sizes=tmp_path / "s.csv")
    assert (done.stored, done.bad) == (len(IMAGES), 0)
    for place, image in enumerate(IMAGES):
        assert (store[image.image_id].width, store[image.image_id].height) == (image.width + 7 * (place < 4), image.height)
    out, first = capsys.readouterr().out, IMAGES[0]
    assert "image sizes are those of --sizes, not of milvlg-npz, for images that are in both; the first to differ, '000000', is" in out
    assert f"{first.width + 7} x {first.height} there and {first.width} x {first.height} here" in out


def test_a_size_that_does_not_hold_the_boxes_costs_its_entry_and_is_named(tmp_path: Path) -> None:
    source = write_caffe(tmp_path / "x")
    (tmp_path / "s.csv").write_text(f"image_id,width,height\n{IMAGES[0].image_id},10,10\n")
    _, done = imported(source, tmp_path / "s", sizes=tmp_path / "s.csv", max_bad=0.3)
    assert (done.stored, done.bad) == (len(IMAGES) - 1, 1)
    assert "000000.npz" in failures(tmp_path / "s")
