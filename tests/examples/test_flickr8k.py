"""Phrases to head nouns, and annotations to a boxes manifest in the pixels of the files."""

import json
from pathlib import Path

import pytest
from PIL import Image

from examples.flickr8k.boxes import head_noun, main, singular
from megainter.data.tables.boxes import read_boxes
from megainter.errors import UsageError


@pytest.mark.parametrize(
    ("phrase", "noun"),
    [
        ("A little girl", "girl"),
        ("the edge of a lake", "edge"),
        ("Two brown dogs", "dog"),
        ("a man in a hat", "man"),
        ("several people", "person"),
        ("sunglasses", "sunglasses"),
        ("the beaches", "beach"),
        ("three bikes", "bicycle"),
        ("a set of stairs", "set"),
        ("grass .", "grass"),
        ("", ""),
    ],
)
def test_the_head_is_the_last_noun_before_a_preposition(phrase: str, noun: str) -> None:
    if phrase.endswith("."):
        phrase = phrase[:-2]
    assert head_noun(phrase) == noun


def test_singular_leaves_words_alone_that_only_look_plural() -> None:
    assert [singular(word) for word in ("bus", "glass", "dress", "shorts", "boxes", "parties", "ass")] == [
        "bus",
        "glass",
        "dress",
        "shorts",
        "box",
        "party",
        "ass",
    ]


def annotation(name: str, things: list[tuple[list[float], list[str]]]) -> str:
    objects = [{"box": box, "phrases": phrases} for box, phrases in things]
    return json.dumps({"image": name, "orig_width": 400, "orig_height": 200, "split": "train", "objects": objects}) + "\n"


def test_boxes_are_scaled_per_axis_and_labels_are_voted(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpg"):
        Image.new("RGB", (100, 100)).save(tmp_path / name)
    dog = ([0.0, 0.0, 200.0, 100.0], ["a dog", "the puppy", "a hat"])
    hat = ([100.0, 50.0, 480.0, 150.0], ["a hat"])  # beyond the image's right side
    rare = ([0.0, 0.0, 50.0, 50.0], ["a zither"])
    thin = ([10.0, 10.0, 11.0, 100.0], ["a dog"])
    source = tmp_path / "train.jsonl"
    source.write_text(annotation("a.jpg", [dog, hat, rare, thin]) + annotation("b.jpg", [rare]), encoding="utf-8")
    main(source, images=tmp_path, output=tmp_path / "boxes.parquet", classes=2)
    rows = read_boxes(tmp_path / "boxes.parquet")
    # dog, hat and zither occur in two objects each: of a tie the alphabet decides, so the zither is no class and b.jpg has no box left
    assert [(row.image, row.width, row.height, row.split) for row in rows] == [("a.jpg", 100, 100, "train")]
    assert rows[0].labels == ["dog", "hat"]
    assert rows[0].boxes.tolist() == [[0, 0, 50, 50], [25, 25, 100, 75]]


def test_missing_or_malformed_annotations_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        main(tmp_path / "none.jsonl", images=tmp_path, output=tmp_path / "boxes.parquet")
    (tmp_path / "bad.jsonl").write_text("{}\n{", encoding="utf-8")
    with pytest.raises(UsageError, match="line 2 is not valid JSON"):
        main(tmp_path / "bad.jsonl", images=tmp_path, output=tmp_path / "boxes.parquet")
