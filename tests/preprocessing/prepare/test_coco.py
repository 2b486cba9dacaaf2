"""COCO's splits by what they mean, and its boxes where they go over the edge."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megainter.data.tables.boxes import read_boxes
from megainter.data.tables.labelled import read_examples
from megainter.errors import UsageError
from preprocessing.prepare.boxes import prepare_boxes
from preprocessing.prepare.caption_sources.annotations import coco_paths
from preprocessing.prepare.coco import images_of, split_of
from preprocessing.prepare.labelled import Options, prepare_examples
from preprocessing.prepare.labelled_images import ImageOptions
from preprocessing.prepare.reading import split_in_name


@pytest.mark.parametrize(
    ("name", "images"),
    [
        ("train2014", "train2014"),
        ("test-dev2015", "test2015"),
        ("test2015", "test2015"),
        ("test-challenge2015", "test2015"),
        ("v2_OpenEnded_mscoco_test-dev2015_questions.json", "test2015"),
        ("image_info_test-dev2017.json", "test2017"),
        ("instances_minival2014.json", "val2014"),
        ("instances_valminusminival2014.json", "val2014"),
        ("captions_val2017.json", "val2017"),
        ("all_data_final_train_2014.jsonline", "train2014"),
        ("trainval2014", ""),
        ("dataset_coco.json", ""),
        ("contest2015.json", ""),
    ],
)
def test_a_subset_tells_its_folder_and_its_split(name: str, images: str) -> None:
    assert images_of(name) == images
    assert split_of(name) == images[:-4]


def test_captions_of_a_subset_look_for_images_in_its_folder() -> None:
    assert coco_paths(Path("captions_minival2014.json"), "a.jpg") == ("a.jpg", "val2014/a.jpg")
    assert coco_paths(Path("image_info_test-dev2017.json"), "a.jpg") == ("a.jpg", "test2017/a.jpg")
    assert split_in_name(Path("captions_minival2014.json")) == "val"


def questions(path: Path, **more: Any) -> Path:
    path.write_text(json.dumps({"questions": [{"image_id": 262144, "question": "Is it?", "question_id": 2000}]} | more))
    return path


OPTIONS = Options(images=ImageOptions(least=1))


@pytest.mark.parametrize(
    ("name", "more", "image", "split"),
    [
        (
            "v2_OpenEnded_mscoco_test-dev2015_questions.json",
            {"data_type": "mscoco", "data_subtype": "test-dev2015"},
            "COCO_test2015",
            "test",
        ),
        ("OpenEnded_mscoco_test2015_questions.json", {"data_subtype": "test2015"}, "COCO_test2015", "test"),
        ("questions.json", {"data_subtype": "test-challenge2015"}, "COCO_test2015", ""),
        ("v2_OpenEnded_mscoco_val2014_questions.json", {}, "COCO_val2014", "val"),
        ("x_minival2014_questions.json", {"data_subtype": "minival2014"}, "COCO_val2014", "val"),
        (
            "OpenEnded_abstract_v002_val2015_questions.json",
            {"data_type": "abstract_v002", "data_subtype": "val2015"},
            "abstract_v002_val2015",
            "val",
        ),
    ],
)
def test_vqa_questions_are_about_images_that_exist(tmp_path: Path, name: str, more: dict[str, Any], image: str, split: str) -> None:
    src = questions(tmp_path / name, **more)
    answers = tmp_path / "a.json"
    one = {
        "question_id": 2000,
        "question_type": "is it",
        "answer_type": "yes/no",
        "multiple_choice_answer": "yes",
        "answers": [{"answer": "yes"}],
    }
    answers.write_text(json.dumps({"annotations": [one]}))
    prepare_examples("vqa", [src], tmp_path / "e", options=Options(images=ImageOptions((answers,), least=1)))
    example = read_examples(tmp_path / "e")[0]
    assert (example.images, example.split) == ((f"{image}_000000262144",), split)


def test_questions_that_do_not_tell_their_images_need_a_word(tmp_path: Path) -> None:
    src = questions(tmp_path / "questions.json", data_subtype="trainval2014")
    with pytest.raises(
        UsageError, match=r"does not tell which images it is about \(data_subtype is 'trainval2014'\): say how they are named"
    ):
        prepare_examples("vqa", [src], tmp_path / "e", options=OPTIONS)


def document(path: Path, boxes: dict[int, list[list[float]]], **image: Any) -> Path:
    images = [{"id": i, "file_name": f"{i}.jpg", "width": 320, "height": 240} | image for i in boxes]
    pairs = [(i, box) for i, found in boxes.items() for box in found]
    annotations = [{"id": n, "image_id": i, "category_id": 1, "bbox": box} for n, (i, box) in enumerate(pairs)]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "dog"}]}))
    return path


def test_boxes_over_the_edge_are_cut_and_nothing_is_dropped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    over = (0, 100, 200)
    src = document(
        tmp_path / "x.json", {i: [[10, 10, 50, 50], [250, 170, 73, 73] if i in over else [200, 100, 50, 50]] for i in range(300)}
    )
    report = prepare_boxes(src, tmp_path / "b")
    assert (report.kept, report.images, report.dropped) == (600, 300, {})
    rows = read_boxes(tmp_path / "b")
    assert [rows[i].boxes[1].tolist() for i in over] == [[250, 170, 320, 240]] * 3
    assert "note: 3 boxes were cut at the image's edge, first of image '0'" in capsys.readouterr().out


def test_a_bad_box_costs_that_box_and_names_its_image(tmp_path: Path) -> None:
    bad = [[400, 10, 5, 5], [10, 10, -5, 5], [10, 10, float("nan"), 5], [-90, 10, 50, 5]]
    src = document(tmp_path / "x.json", {0: [[-40, -30, 60, 50], *bad], 1: [[1, 1, 400, 400]]})
    report = prepare_boxes(src, tmp_path / "b", max_bad=0.9)
    rows = read_boxes(tmp_path / "b")
    assert [row.boxes.tolist() for row in rows] == [[[0, 0, 20, 20]], [[1, 1, 320, 240]]]
    assert report.dropped == {"malformed": 4}
    assert all("image '0' (320 x 240) has box" in example for example in report.examples["malformed"])


def test_an_image_that_cannot_be_used_is_counted_in_boxes_and_named(tmp_path: Path) -> None:
    src = document(tmp_path / "x.json", {0: [[1, 1, 9, 9]] * 3, 1: [[1, 1, 9, 9]] * 5})
    value = json.loads(src.read_text())
    del value["images"][0]["width"]
    src.write_text(json.dumps(value))
    report = prepare_boxes(src, tmp_path / "b", max_bad=0.9)
    assert report.dropped == {"malformed": 3}
    assert report.examples["malformed"] == ["1: image '0.jpg': no field 'width'"]
    src = document(tmp_path / "y.json", {0: [[1, 1, 9, 9]] * 3, 1: [[1, 1, 9, 9]] * 5})
    value = json.loads(src.read_text())
    value["images"][1]["height"] = 0
    src.write_text(json.dumps(value))
    report = prepare_boxes(src, tmp_path / "b", max_bad=0.9)
    assert report.dropped == {"malformed": 5}
    assert report.examples["malformed"] == ["2: image '1' has size 320 x 0"]


def test_lines_of_our_own_keep_their_good_boxes(tmp_path: Path) -> None:
    boxes = [[1, 2, 30, 40], [0, 0, 43, 20], [30, 20, 20, 10], [0, 0, 80, 20], [-3, -2, 10, 10]]
    line = {"image": "a.jpg", "width": 40, "height": 50, "boxes": boxes, "labels": ["dog"] * 5}
    (tmp_path / "b.jsonl").write_text(json.dumps(line))
    report = prepare_boxes(tmp_path / "b.jsonl", tmp_path / "b", source="jsonl", max_bad=0.9)
    np.testing.assert_array_equal(read_boxes(tmp_path / "b")[0].boxes, [[1, 2, 30, 40], [0, 0, 40, 20], [0, 0, 10, 10]])
    assert report.dropped == {"malformed": 2}
