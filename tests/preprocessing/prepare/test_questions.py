"""VCR's lines against the table made of them: object references stay indices, and what is wrong is counted."""

import json
from pathlib import Path
from typing import Any

import pytest

from megainter.data.tables.boxes import read_boxes
from megainter.data.tables.questions import read_questions
from megainter.errors import TooManyBadInputsError, UsageError
from preprocessing.prepare.questions import prepare_vcr
from tests.places import SHARED

SAMPLE = SHARED / "data" / "vcr_sample"


def line(number: int, **changes: Any) -> dict[str, Any]:
    choices = [["Yes", [0], "."], ["No", "."], [[0, 1], "do"], ["Maybe"]]
    return {
        "annot_id": f"val-{number}", "img_id": f"val-{number // 2}", "img_fn": f"movie/{number // 2}@0.jpg",
        "metadata_fn": f"movie/{number // 2}@0.json",
        "objects": ["person", "person", "car"], "question": ["Is", [0, 1], "in", [2], "?"],
        "answer_choices": choices, "answer_label": 2, "rationale_choices": choices[::-1], "rationale_label": 0, **changes,
    }  # fmt: skip


def write(path: Path, *lines: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in lines))
    return path


def images(folder: Path, count: int) -> Path:
    (folder / "movie").mkdir(parents=True)
    boxes = [[0, 0, 10.5, 20, 0.9], [1, 2, 30, 45, 0.8], [5, 5, 64.4, 48, 0.7]]
    for n in range(count):
        (folder / f"movie/{n}@0.jpg").write_bytes(b"x")
        value = {"boxes": boxes, "segms": [[], [], []], "names": ["person", "person", "car"], "width": 64, "height": 48}
        (folder / f"movie/{n}@0.json").write_text(json.dumps(value))
    return folder


def test_questions_come_back_with_their_references(tmp_path: Path) -> None:
    src = write(tmp_path / "val.jsonl", line(0), line(1))
    report = prepare_vcr(src, tmp_path / "q.parquet")
    questions = read_questions(tmp_path / "q.parquet", "val")
    assert (len(questions), report.kept, report.images) == (2, 2, 1)
    one = questions[1]
    assert (one.question_id, one.image_id, one.image, one.metadata) == ("val-1", "movie/0@0", "movie/0@0.jpg", "movie/0@0.json")
    assert one.objects == ("person", "person", "car")
    assert one.question == ("Is", (0, 1), "in", (2,), "?")
    assert one.answers == (("Yes", (0,), "."), ("No", "."), ((0, 1), "do"), ("Maybe",))
    assert one.rationales == one.answers[::-1]
    assert (one.answer_label, one.rationale_label) == (2, 0)


def test_the_test_split_has_no_labels(tmp_path: Path) -> None:
    hidden = {key: value for key, value in line(0).items() if not key.endswith("label")}
    prepare_vcr(write(tmp_path / "test.jsonl", hidden), tmp_path / "q.parquet")
    question = read_questions(tmp_path / "q.parquet")[0]
    assert (question.split, question.answer_label, question.rationale_label) == ("test", -1, -1)


def test_boxes_of_the_images_for_extraction(tmp_path: Path) -> None:
    src = write(tmp_path / "train.jsonl", line(0), line(1), line(2), line(4))
    report = prepare_vcr(src, tmp_path / "q.parquet", images=images(tmp_path / "vcr1images", 2), boxes=tmp_path / "b.parquet", max_bad=0.3)
    assert report.dropped == {"image file missing": 1}
    boxes = read_boxes(tmp_path / "b.parquet", "train")
    assert [(one.image_id, one.width, one.height, one.labels) for one in boxes] == [
        (f"movie/{n}@0", 64, 48, ["person", "person", "car"]) for n in range(2)
    ]
    assert boxes[0].boxes.tolist() == [[0, 0, 10.5, 20], [1, 2, 30, 45], [5, 5, 64, 48]]


BAD = [
    ({"question": ["Is", [3], "?"]}, "token (3,), with 3 objects"),
    ({"question": ["Is", [-1], "?"]}, "token (-1,)"),
    ({"question": ["Is", [True], "?"]}, "is not a list of words"),
    ({"question": ["Is", [], "?"]}, "is not a list of words"),
    ({"question": None}, "None is not a list of words"),
    ({"question": "Is it?"}, "is not a list of words"),
    ({"question": ["", "?"]}, "token ''"),
    ({"answer_choices": [["a"]] * 3}, "has 3 answers"),
    ({"rationale_choices": 4}, "field 'rationale_choices' is not a list of 4"),
    ({"answer_label": 4}, "labels 4 and 0"),
    ({"rationale_label": "x"}, "invalid literal"),
    ({"objects": [1]}, "field 'objects' is not a list of strings"),
    ({"img_fn": "../x.jpg"}, "leaves the images folder"),
    ({"metadata_fn": "/etc/passwd"}, "leaves the images folder"),
    ({"annot_id": None}, "field 'annot_id' is None"),
]


@pytest.mark.parametrize(("changes", "reason"), BAD)
def test_a_bad_line_is_counted_and_named(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    src = write(tmp_path / "val.jsonl", line(0), line(1, **changes))
    report = prepare_vcr(src, tmp_path / "q.parquet", max_bad=0.5)
    assert report.dropped == {"malformed": 1}
    assert report.examples["malformed"][0].startswith("2: ")
    assert reason in report.examples["malformed"][0]


def test_wrong_calls_are_one_line(tmp_path: Path) -> None:
    src = write(tmp_path / "val.jsonl", line(0, question=None))
    with pytest.raises(TooManyBadInputsError, match="1 of 1 questions cannot be used"):
        prepare_vcr(src, tmp_path / "q.parquet")
    with pytest.raises(UsageError, match="its name tells no split"):
        prepare_vcr(write(tmp_path / "x.jsonl", line(0)), tmp_path / "q.parquet")
    with pytest.raises(UsageError, match="give --images"):
        prepare_vcr(src, tmp_path / "q.parquet", boxes=tmp_path / "b.parquet")
    with pytest.raises(UsageError, match="does not exist"):
        prepare_vcr(tmp_path / "train.jsonl", tmp_path / "q.parquet")
    prepare_vcr(write(tmp_path / "x.jsonl", line(0)), tmp_path / "q.parquet", split="train")
    with pytest.raises(UsageError, match="no rows of split 'val'"):
        read_questions(tmp_path / "q.parquet", "val")
    with pytest.raises(IndexError):
        read_questions(tmp_path / "q.parquet")[1]


@pytest.mark.skipif(not SAMPLE.exists(), reason="VCR's sample rows (shared/data/vcr_sample) are not beside the repository")
def test_real_rows(tmp_path: Path) -> None:
    lines = [json.loads(text) for text in (SAMPLE / "vcr_rows.jsonl").open(encoding="utf-8")]
    prepare_vcr(SAMPLE / "vcr_rows.jsonl", tmp_path / "q.parquet", split="train")
    questions = read_questions(tmp_path / "q.parquet")
    for row, value in enumerate(lines):
        back = [list(token) if isinstance(token, tuple) else token for token in questions[row].question]
        assert back == value["question"]
        assert questions[row].answer_label == value["answer_label"]
