"""The TSV formats, written as the original scripts do: csv.DictWriter with tabs, base64 cells, no header."""

import base64
import csv
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megainter.data.feature_store.writer import FeatureStoreWriter, seal_store
from megainter.errors import UsageError
from preprocessing.features.exporting import export_features
from preprocessing.features.formats import recognise, tsv
from tests.foreign import Image, assert_holds, assert_likeliest, b64, failures, imported, make_image
from tests.places import SHARED

REAL = SHARED / "data" / "region_features" / "train2014_obj36.tsv"
BUTD = ["image_id", "image_w", "image_h", "num_boxes", "boxes", "features"]
LXMERT = ["img_id", "img_h", "img_w", "objects_id", "objects_conf", "attrs_id", "attrs_conf", "num_boxes", "boxes", "features"]


@pytest.fixture(autouse=True, scope="module")
def long_fields() -> Iterator[None]:
    """The originals raise csv's limit for the whole process; here only as long as they run."""
    before = csv.field_size_limit(sys.maxsize)
    yield
    csv.field_size_limit(before)


def row_of(image: Image) -> dict[str, Any]:
    """All columns of all three formats."""
    sizes = {"image_w": image.width, "image_h": image.height, "img_w": image.width, "img_h": image.height}
    arrays = {"boxes": image.boxes, "features": image.features, "cls_prob": image.probs, **image.labels}
    cells = {name: b64(array) for name, array in arrays.items()}
    return {"image_id": image.image_id, "img_id": image.image_id, "num_boxes": len(image), **sizes, **cells}


def write_tsv(path: Path, columns: list[str], images: list[Image]) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, delimiter="\t", extrasaction="ignore")
        for image in images:
            writer.writerow(row_of(image))
    return path


IDS = ["1", "COCO_val2014_000000000042", "dir/..", "日本 語", 'a "quoted" one', '"', "🙂"]


def images() -> list[Image]:
    return [make_image(seed, image_id) for seed, image_id in enumerate(IDS)]


@pytest.mark.parametrize(("name", "columns"), [("butd-tsv", BUTD), ("vilbert-tsv", [*BUTD, "cls_prob"]), ("lxmert-tsv", LXMERT)])
def test_each_format_is_recognised_and_imported(tmp_path: Path, name: str, columns: list[str]) -> None:
    source = write_tsv(tmp_path / "x.tsv", columns, images())
    assert recognise(source) == name
    store, done = imported(source, tmp_path / "s", features="float32")
    assert (done.stored, done.bad, done.repeated) == (len(IDS), 0, 0)
    for image in images():
        record = store[image.image_id]
        assert_holds(record, image, probs=name == "vilbert-tsv", exact=True)
        if name == "lxmert-tsv":
            assert_likeliest(record, image.objects_id, image.objects_conf)
            assert {key: value.tobytes() for key, value in record.extras.items()} == {k: v.tobytes() for k, v in image.labels.items()}
        if name == "butd-tsv":
            np.testing.assert_allclose(record.class_probs, 1 / 1601, atol=1e-6)


def lxmert_reader(path: Path) -> dict[str, dict[str, Any]]:
    """As LXMERT's own loader decodes its file."""
    found = {}
    with open(path, encoding="utf-8", newline="") as file:
        for item in csv.DictReader(file, LXMERT, delimiter="\t"):
            row: dict[str, Any] = {key: int(item[key]) for key in ("img_h", "img_w", "num_boxes")}
            for key, dtype in [("objects_id", np.int64), ("attrs_id", np.int64), ("objects_conf", np.float32), ("attrs_conf", np.float32)]:
                row[key] = np.frombuffer(base64.b64decode(item[key]), dtype).reshape(row["num_boxes"])
            for key in ("boxes", "features"):
                row[key] = np.frombuffer(base64.b64decode(item[key]), np.float32).reshape(row["num_boxes"], -1)
            found[item["img_id"]] = row
    return found


def test_an_exported_lxmert_tsv_is_read_by_its_own_reader(tmp_path: Path) -> None:
    imported(write_tsv(tmp_path / "in.tsv", LXMERT, images()), tmp_path / "s", features="float32")
    assert export_features(tmp_path / "s", tmp_path / "out.tsv", "lxmert-tsv") == len(IDS)
    rows = lxmert_reader(tmp_path / "out.tsv")
    assert rows.keys() == set(IDS)
    for image in images():
        row = rows[image.image_id]
        assert (row["img_w"], row["img_h"]) == (image.width, image.height)
        for name, array in {"boxes": image.boxes, "features": image.features, **image.labels}.items():
            assert row[name].tobytes() == array.tobytes(), name


def test_labels_for_lxmert_come_from_the_probabilities_where_nothing_else_is_known(tmp_path: Path) -> None:
    imported(write_tsv(tmp_path / "in.tsv", [*BUTD, "cls_prob"], images()), tmp_path / "s")
    export_features(tmp_path / "s", tmp_path / "out.tsv", "lxmert-tsv")
    for image_id, row in lxmert_reader(tmp_path / "out.tsv").items():
        image = next(image for image in images() if image.image_id == image_id)
        np.testing.assert_array_equal(row["objects_id"], image.objects_id)
        np.testing.assert_allclose(row["objects_conf"], image.objects_conf, rtol=1e-3)
        assert not row["attrs_conf"].any()


@pytest.mark.skipif(not REAL.exists(), reason="the real LXMERT rows (shared/data) are not beside the repository")
def test_real_rows_come_back_byte_by_byte(tmp_path: Path) -> None:
    store, done = imported(REAL, tmp_path / "s", features="float32")
    assert (done.stored, done.bad, store.schema.feature_size) == (10, 0, 2048)
    assert list(store.damaged()) == []
    export_features(tmp_path / "s", tmp_path / "out.tsv", "lxmert-tsv")
    there, back = lxmert_reader(REAL), lxmert_reader(tmp_path / "out.tsv")
    assert there.keys() == back.keys()
    for image_id, row in there.items():
        for name, value in row.items():
            assert np.asarray(value).tobytes() == np.asarray(back[image_id][name]).tobytes(), (image_id, name)


def cell(column: str, change: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    """Changes one cell of a line of the format with cls_prob."""

    def on_line(line: bytes) -> bytes:
        cells = line.split(b"\t")
        place = [*BUTD, "cls_prob"].index(column)
        cells[place] = change(cells[place])
        return b"\t".join(cells)

    return on_line


def numbers(change: Callable[[np.ndarray], Any]) -> Callable[[bytes], bytes]:
    def on_cell(text: bytes) -> bytes:
        array = np.frombuffer(base64.b64decode(text), np.float32).copy()
        changed = change(array)
        return base64.b64encode(array if changed is None else changed)

    return on_cell


DAMAGE = {
    "half a line": (lambda line: line[:200], "columns"),
    "nearly a whole line": (lambda line: line[:-1], "cls_prob is not whole base64"),
    "one more column": (lambda line: line + b"\tx", "columns"),
    "torn base64": (cell("features", lambda text: text[:-7]), "features is not whole base64"),
    "other base64": (cell("boxes", lambda text: text[:4] + b"!" + text[5:]), "boxes is not whole base64"),
    "a row less": (cell("boxes", numbers(lambda array: array[:-4])), r"boxes \[4, 3\] .* do not belong"),
    "a number less": (cell("boxes", numbers(lambda array: array[:-1])), "boxes has 60 bytes"),
    "no regions": (cell("num_boxes", lambda text: b"0"), "no regions"),
    "a count in words": (cell("num_boxes", lambda text: b"many"), "num_boxes is b'many', not a number"),
    "NaN": (cell("features", numbers(lambda array: np.put(array, 3, np.nan))), "NaN"),
    "a box outside": (cell("boxes", numbers(lambda array: np.put(array, 2, 5000))), "not x1, y1, x2, y2 inside it"),
    "x, y, w, h boxes": (cell("boxes", numbers(lambda array: np.put(array, [0, 2], [30, 20]))), "not x1, y1, x2, y2 inside it"),
    "an image without size": (cell("image_w", lambda text: b""), "image_w"),
    "no probabilities": (cell("cls_prob", numbers(lambda array: 2 * array)), "not probabilities"),
    "fewer classes": (cell("cls_prob", numbers(lambda array: array[: -array.size // 1601])), "columns"),
    "an id that is no text": (lambda line: b"\xff\xfe" + line, "its id is not UTF-8"),
    "rubbish": (lambda line: b"\x93NUMPY" * 100, "columns"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_line_is_listed_and_the_others_are_imported(tmp_path: Path, name: str) -> None:
    change, reason = DAMAGE[name]
    at = [0, 3, 6][list(DAMAGE).index(name) % 3]
    source = write_tsv(tmp_path / "x.tsv", [*BUTD, "cls_prob"], [make_image(seed, str(seed), n=4) for seed in range(7)])
    lines = source.read_bytes().split(b"\r\n")[:-1]
    lines[at] = change(lines[at])
    source.write_bytes(b"\r\n".join(lines))  # the last line has no end, as after a kill
    store, done = imported(source, tmp_path / "s", format="vilbert-tsv", max_bad=0.2)
    assert (done.bad, list(store.ids)) == (1, [str(seed) for seed in range(7) if seed != at])
    found = failures(tmp_path / "s")
    assert list(found) == [f"line {at + 1}"]
    assert re.search(reason, found[f"line {at + 1}"])


def test_a_line_too_long_to_be_a_row_is_passed_over_without_being_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_tsv(tmp_path / "x.tsv", BUTD, images())
    lines = source.read_bytes().split(b"\r\n")
    monkeypatch.setattr(tsv, "MAX_LINE_BYTES", max(map(len, lines)) + 3)
    source.write_bytes(b"\r\n".join([lines[0], b"x" * 10**6, *lines[1:]]))
    store, _ = imported(source, tmp_path / "s", max_bad=0.5)
    assert (len(store), failures(tmp_path / "s")) == (len(IDS), {"line 2": "it is too long for a row"})


def test_ids_that_would_tear_a_line_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    store, _ = imported(write_tsv(tmp_path / "x.tsv", BUTD, [make_image(0, "good")]), tmp_path / "s")
    with FeatureStoreWriter(tmp_path / "s", store.schema) as writer:
        writer.add_all([(image_id, store["good"]) for image_id in ("a\tb", "a\nb", "a\rb", "a\0b")])
    seal_store(tmp_path / "s")
    with pytest.raises(UsageError, match=r"4 ids of .* cannot stand in lxmert-tsv"):
        export_features(tmp_path / "s", tmp_path / "out.tsv", "lxmert-tsv")
    assert not (tmp_path / "out.tsv").exists()


@pytest.mark.parametrize("cut", [0.3, 0.7, 0.97])
def test_a_row_that_was_torn_and_written_again_costs_nothing_but_itself(tmp_path: Path, cut: float) -> None:
    """As in bottom-up-attention's test2014 (github.com/peteanderson80/bottom-up-attention/issues/7): a killed process left part of a row,
    the next one wrote its first row behind it on the same line, and later the images again."""
    whole = [make_image(seed, f"{seed}") for seed in range(6)]
    lines = write_tsv(tmp_path / "x.tsv", BUTD, whole).read_text(encoding="utf-8").splitlines()
    torn = [lines[0], lines[1][: int(cut * len(lines[1]))] + lines[2], *lines[3:], lines[1], lines[2], lines[3]]
    (tmp_path / "x.tsv").write_text("".join(f"{line}\n" for line in torn) + lines[4][:40])
    store, done = imported(tmp_path / "x.tsv", tmp_path / "s", max_bad=0.3)
    assert sorted(store.ids) == [f"{seed}" for seed in range(6)]
    for image in whole:
        np.testing.assert_array_equal(store[image.image_id].boxes, image.boxes)
        np.testing.assert_allclose(store[image.image_id].features, image.features, atol=2e-3)
    assert done.bad == 2
    assert set(failures(tmp_path / "s")) >= {"line 2"}
