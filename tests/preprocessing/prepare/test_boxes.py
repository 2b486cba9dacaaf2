"""Labelled boxes of COCO's form and of ours against boxes written out by hand; what cannot be used is counted and named."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megainter.data.tables.boxes import ImageBoxes, read_boxes
from megainter.data.tables.pairs import read_pairs
from megainter.errors import TooManyBadInputsError, UsageError
from preprocessing.prepare.boxes import prepare_boxes
from preprocessing.prepare.captions import prepare
from preprocessing.prepare.splits import Shares
from tests.places import ROOT
from tests.synthetic import environment

DOCUMENT = ROOT / "docs" / "manifests.md"
IMAGES = [{"id": 7, "file_name": "a.jpg", "width": 100, "height": 50}, {"id": 8, "file_name": "d/b.jpg", "width": 64, "height": 48}]
ANNOTATIONS = [
    {"id": 1, "image_id": 7, "category_id": 3, "bbox": [10, 20, 30, 25.5]},
    {"id": 2, "image_id": 7, "category_id": 5, "bbox": [0, 0, 100.5, 50], "iscrowd": 0},
    {"id": 3, "image_id": 7, "category_id": 5, "bbox": [0, 0, 9, 9], "iscrowd": 1},
    {"id": 4, "image_id": 7, "category_id": 5, "bbox": [4, 4, 0, 9]},
]
CATEGORIES = [{"id": 3, "name": "dog"}, {"id": 5, "name": "cat"}]


def coco(path: Path, images: Any = IMAGES, annotations: Any = ANNOTATIONS, categories: Any = CATEGORIES) -> Path:
    path.write_text(json.dumps({"annotations": annotations, "images": images, "categories": categories}))
    return path


def lines(path: Path, *values: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def line(number: int = 0, **changes: Any) -> dict[str, Any]:
    return {"image": f"{number}.jpg", "width": 40, "height": 30, "boxes": [[1, 2, 3, 4]], "labels": ["dog"]} | changes


def as_tuple(row: ImageBoxes) -> tuple[Any, ...]:
    return row.image_id, row.image, row.width, row.height, row.boxes.tolist(), row.labels, row.split


def test_coco_instances(tmp_path: Path) -> None:
    report = prepare_boxes(coco(tmp_path / "instances_val2017.json"), tmp_path / "b.parquet")
    assert [as_tuple(row) for row in read_boxes(tmp_path / "b.parquet")] == [
        ("a", "a.jpg", 100, 50, [[10, 20, 40, 45.5], [0, 0, 100, 50]], ["dog", "cat"], "val"),
        ("d/b", "d/b.jpg", 64, 48, [], [], "val"),
    ]
    assert (report.kept, report.images, report.splits) == (2, 2, {"val": 2})
    assert report.dropped == {"box around a crowd": 1, "box without area": 1}


def test_lines_of_our_own(tmp_path: Path) -> None:
    src = lines(tmp_path / "b.jsonl", line(0), line(1, image_id="one", split="validation", boxes=[], labels=[]))
    prepare_boxes(src, tmp_path / "b.parquet", source="jsonl")
    assert [as_tuple(row) for row in read_boxes(tmp_path / "b.parquet")] == [
        ("0", "0.jpg", 40, 30, [[1, 2, 3, 4]], ["dog"], ""),
        ("one", "1.jpg", 40, 30, [], [], "val"),
    ]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"boxes": [[10, 10, 5, 5]]}, "is not x1, y1, x2, y2 inside it"),
        ({"boxes": [[0, 0, 50, 20]]}, "is not x1, y1, x2, y2 inside it"),
        ({"boxes": [[0, 0, float("nan"), 20]]}, "is not x1, y1, x2, y2 inside it"),
        ({"boxes": [[0, 0, 5]]}, "are not lists of four numbers"),
        ({"boxes": [[0, 0, 5, 5], [1]]}, "are not lists of four numbers"),
        ({"boxes": [0, 0, 5, 5]}, "are not lists of four numbers"),
        ({"boxes": "all"}, "are not lists of four numbers"),
        ({"boxes": None}, "are not lists of four numbers"),
        ({"labels": ["dog", "cat"]}, "for 2 labels"),
        ({"labels": "dog"}, "field 'labels' is not a list of strings"),
        ({"width": 0}, "has size 0 x 30"),
        ({"height": "tall"}, "tall"),
        ({"image": "../x.jpg"}, "leaves the images folder"),
        ({"split": "dev2"}, "dev2"),
    ],
)
def test_a_bad_line_is_counted_and_named(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    report = prepare_boxes(lines(tmp_path / "b.jsonl", line(0), line(1, **changes)), tmp_path / "b.parquet", source="jsonl")
    assert report.dropped == {"malformed": 1}
    assert report.examples["malformed"][0].startswith("2: ")
    assert reason in report.examples["malformed"][0]


@pytest.mark.parametrize(
    ("annotation", "reason"),
    [
        ({"image_id": 99, "category_id": 3, "bbox": [1, 1, 2, 2]}, "image_id 99 is not among the images"),
        ({"image_id": 7, "category_id": 99, "bbox": [1, 1, 2, 2]}, "category_id 99 is not among the categories"),
        ({"image_id": 7, "category_id": 3}, "no field 'bbox'"),
        ({"image_id": 7, "category_id": 3, "bbox": []}, "is not four numbers"),
        ({"image_id": [7], "category_id": 3, "bbox": [1, 1, 2, 2]}, "unhashable"),
        ("x", ""),
    ],
)
def test_a_bad_annotation_is_counted_and_named(tmp_path: Path, annotation: Any, reason: str) -> None:
    src = coco(tmp_path / "x.json", annotations=[*ANNOTATIONS, annotation])
    report = prepare_boxes(src, tmp_path / "b.parquet", max_bad=0.5)
    assert (report.kept, report.dropped["malformed"]) == (2, 1)
    assert report.examples["malformed"][0].startswith("5: of the annotations: ")
    assert reason in report.examples["malformed"][0]


def test_images_that_are_not_there_and_too_many_of_them(tmp_path: Path) -> None:
    (tmp_path / "photos" / "val2017").mkdir(parents=True)
    (tmp_path / "photos" / "val2017" / "a.jpg").write_bytes(b"x")
    report = prepare_boxes(coco(tmp_path / "instances_val2017.json"), tmp_path / "b.parquet", images=tmp_path / "photos")
    assert [row.image for row in read_boxes(tmp_path / "b.parquet")] == ["val2017/a.jpg"]
    assert report.dropped["image file missing"] == 1
    src = lines(tmp_path / "b.jsonl", *(line(n) for n in range(3)))
    with pytest.raises(TooManyBadInputsError, match=r"3 of 3 boxes cannot be used, more than --max-bad 0\.01: .* first line 1: '0\.jpg'"):
        prepare_boxes(src, tmp_path / "c.parquet", source="jsonl", images=tmp_path / "photos")
    assert not (tmp_path / "c.parquet").exists()


def test_an_image_in_two_lines_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="image '0' comes in line 1 and again in line 3; put all boxes of an image into one line"):
        prepare_boxes(lines(tmp_path / "b.jsonl", line(0), line(1), line(0)), tmp_path / "b.parquet", source="jsonl")


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs the lists 'images', 'annotations' and 'categories'"):
        prepare_boxes(lines(tmp_path / "b.json", line()), tmp_path / "b.parquet")
    with pytest.raises(UsageError, match=r"is not one JSON document but looks like JSON Lines, .*: --format jsonl reads it"):
        prepare_boxes(lines(tmp_path / "c.json", line(), line(1)), tmp_path / "b.parquet")
    with pytest.raises(UsageError, match=r"is not JSON Lines but looks like one JSON document, .*: --format coco reads COCO's"):
        prepare_boxes(coco(tmp_path / "d.jsonl"), tmp_path / "b.parquet", source="jsonl")
    captions = coco(tmp_path / "captions.json", annotations=[{"image_id": 7, "caption": "x"}])
    with pytest.raises(UsageError, match="has annotations but no boxes"):
        prepare_boxes(captions, tmp_path / "b.parquet")
    with pytest.raises(UsageError, match="would be overwritten"):
        prepare_boxes(captions, captions)
    with pytest.raises(UsageError, match="does not exist"):
        prepare_boxes(tmp_path / "absent.json", tmp_path / "b.parquet")


def test_the_same_shares_give_boxes_and_captions_the_same_split(tmp_path: Path) -> None:
    shares = Shares(0.2, 0.3, seed=5)
    prepare_boxes(lines(tmp_path / "b.jsonl", *(line(n) for n in range(50))), tmp_path / "b.parquet", source="jsonl", shares=shares)
    src = lines(tmp_path / "c.jsonl", *({"image": f"{n}.jpg", "caption": "x"} for n in range(50)))
    prepare("jsonl", src, tmp_path / "p.parquet", shares=shares)
    table = read_pairs(tmp_path / "p.parquet").table
    of_captions = dict(zip(table.column("image_id").to_pylist(), table.column("split").to_pylist(), strict=True))
    assert {row.image_id: row.split for row in read_boxes(tmp_path / "b.parquet")} == of_captions
    assert set(of_captions.values()) == {"train", "val", "test"}


def test_the_documented_python_writes_manifests(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(tmp_path / "photos" / "beach.jpg")
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", DOCUMENT.read_text(), flags=re.DOTALL | re.MULTILINE))
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=60, env=environment())
    assert len(read_pairs(tmp_path / "pairs.parquet")) == 2
    assert [(row.image, row.width, row.height) for row in read_boxes(tmp_path / "boxes.parquet")] == [("beach.jpg", 40, 30)]
