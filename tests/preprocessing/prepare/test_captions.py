"""Caption files of every supported form against pairs written out by hand; bad lines are counted, named, and never silent."""

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megainter.data.tables.pairs import read_pairs
from megainter.errors import TooManyBadInputsError, UsageError
from preprocessing.prepare.captions import normalise, prepare
from preprocessing.prepare.reading import Fields
from preprocessing.prepare.splits import Shares
from tests.places import SHARED

FLICKR8K = SHARED / "data" / "flickr8k"


def write_lines(path: Path, *values: Any) -> Path:
    path.write_text("\n".join(value if isinstance(value, str) else json.dumps(value) for value in values) + "\n", encoding="utf-8")
    return path


def rows(path: Path) -> list[tuple[str, str, str, str, str]]:
    """(pair_id, image_id, image, caption, split) of every row."""
    table = read_pairs(path).table
    return list(zip(*(column.to_pylist() for column in table.columns), strict=True))


def images_in(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    return folder


def test_jsonl_with_one_or_several_captions(tmp_path: Path) -> None:
    src = write_lines(
        tmp_path / "a.jsonl",
        {"image": "d/a.jpg", "caption": "one"},
        "",
        {"image": "d/a.jpg", "caption": "two"},
        {"image": "./b.png", "captions": ["three", "four"], "split": "validation"},
        {"image": "c.jpg", "caption": "five", "image_id": 7, "pair_id": "mine", "split": "test"},
    )
    report = prepare("jsonl", src, tmp_path / "p.parquet")
    assert rows(tmp_path / "p.parquet") == [
        ("d/a#line1", "d/a", "d/a.jpg", "one", ""),
        ("d/a#line3", "d/a", "d/a.jpg", "two", ""),
        ("b#0", "b", "b.png", "three", "val"),
        ("b#1", "b", "b.png", "four", "val"),
        ("mine", "7", "c.jpg", "five", "test"),
    ]
    assert (report.kept, report.images, report.splits) == (5, 3, {"": 2, "val": 2, "test": 1})


def test_another_caption_field_and_a_split(tmp_path: Path) -> None:
    src = write_lines(
        tmp_path / "a.jsonl",
        {"image": "a.jpg", "en": ["dog"], "zh": ["狗"], "split": "train"},
        {"image": "b.jpg", "en": ["cat"], "zh": ["猫"], "split": "val"},
        {"image": "c.jpg", "en": ["cow"], "zh": ["牛"]},
    )
    report = prepare("jsonl", src, tmp_path / "p.parquet", fields=Fields(captions="zh"), split="train")
    assert rows(tmp_path / "p.parquet") == [("a#0", "a", "a.jpg", "狗", "train"), ("c#0", "c", "c.jpg", "牛", "train")]
    assert report.dropped == {"another split": 1}
    with pytest.raises(TooManyBadInputsError, match=r"1: no field 'fr'; there are 'image', 'en', 'zh', 'split'"):
        prepare("jsonl", src, tmp_path / "q.parquet", fields=Fields(captions="fr"))


COCO = {
    "images": [{"id": 9, "file_name": "COCO_val2014_000009.jpg"}, {"id": 10, "file_name": "COCO_val2014_000010.jpg"}],
    "annotations": [
        {"id": 1, "image_id": 10, "caption": "A man\n rides. "},
        {"id": 2, "image_id": 9, "caption": "A dog."},
        {"id": 3, "image_id": 10, "caption": "Riding."},
    ],
}


def test_coco_caption_files_with_images_in_the_folder_or_one_below(tmp_path: Path) -> None:
    src = write_lines(tmp_path / "captions_val2014.json", COCO)
    prepare("coco", src, tmp_path / "p.parquet")
    assert rows(tmp_path / "p.parquet") == [
        ("1", "COCO_val2014_000010", "COCO_val2014_000010.jpg", "A man rides.", "val"),
        ("2", "COCO_val2014_000009", "COCO_val2014_000009.jpg", "A dog.", "val"),
        ("3", "COCO_val2014_000010", "COCO_val2014_000010.jpg", "Riding.", "val"),
    ]
    images = images_in(tmp_path / "coco", "val2014/COCO_val2014_000009.jpg", "val2014/COCO_val2014_000010.jpg")
    prepare("coco", src, tmp_path / "p.parquet", images=images)
    assert {row[2] for row in rows(tmp_path / "p.parquet")} == {"val2014/COCO_val2014_000010.jpg", "val2014/COCO_val2014_000009.jpg"}


def test_karpathy_splits_of_coco_and_flickr30k(tmp_path: Path) -> None:
    sentences = [{"raw": "A dog .", "sentid": 5}, {"raw": " ", "sentid": 6}]
    coco = {"images": [{"filepath": "val2014", "filename": "x.jpg", "split": "restval", "sentences": sentences}], "dataset": "coco"}
    report = prepare("coco", write_lines(tmp_path / "dataset_coco.json", coco), tmp_path / "c.parquet")
    assert rows(tmp_path / "c.parquet") == [("5", "val2014/x", "val2014/x.jpg", "A dog .", "train")]
    assert report.dropped == {"blank caption": 1}
    flickr = {"images": [{"filename": "1.jpg", "split": "test", "sentences": sentences}], "dataset": "flickr30k"}
    prepare("flickr30k", write_lines(tmp_path / "dataset_flickr30k.json", flickr), tmp_path / "f.parquet")
    assert rows(tmp_path / "f.parquet") == [("5", "1", "1.jpg", "A dog .", "test")]


def test_flickr30k_token_file_and_the_official_lines(tmp_path: Path) -> None:
    token = write_lines(tmp_path / "results_20130124.token", "1.jpg#0\tTwo men .", "1.jpg#1\tA garden .", "2.jpg#0\tA bus .")
    prepare("flickr30k", token, tmp_path / "t.parquet", split="train")
    assert rows(tmp_path / "t.parquet") == [
        ("1#0", "1", "1.jpg", "Two men .", "train"),
        ("1#1", "1", "1.jpg", "A garden .", "train"),
        ("2#0", "2", "2.jpg", "A bus .", "train"),
    ]
    official = write_lines(
        tmp_path / "all_data_final_test_set0_2014.jsonline", {"sentences": ["One.", "Two."], "id": "3", "img_path": "3.jpg"}
    )
    prepare("flickr30k", official, tmp_path / "o.parquet")
    assert rows(tmp_path / "o.parquet") == [("3#0", "3", "3.jpg", "One.", "test"), ("3#1", "3", "3.jpg", "Two.", "test")]


BAD_LINES = [
    ('{"image": "a.jpg", "caption": ', "not JSON"),
    ("[1, 2]", "not a JSON object"),
    ('{"caption": "x"}', "no field 'image'"),
    ('{"image": 1.5, "caption": "x"}', "field 'image' is 1.5"),
    ('{"image": "a.jpg"}', "no field 'caption'"),
    ('{"image": "a.jpg", "caption": 3}', "field 'caption' is not a list of strings"),
    ('{"image": "a.jpg", "captions": ["x", null]}', "field 'captions' is not a list of strings"),
    ('{"image": "../a.jpg", "caption": "x"}', "leaves the images folder"),
    ('{"image": "/a.jpg", "caption": "x"}', "leaves the images folder"),
    ('{"image": "a\\u0000.jpg", "caption": "x"}', "NUL"),
    ('{"image": "a\\ud800.jpg", "caption": "x"}', "not valid Unicode"),
    ('{"image": "a.jpg", "caption": "x", "split": "dev2"}', "split 'dev2'"),
    ("[" * 100_000, "recursion|not JSON"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES)
def test_a_malformed_line_is_counted_and_named(tmp_path: Path, line: str, reason: str) -> None:
    src = write_lines(tmp_path / "a.jsonl", *({"image": f"{n}.jpg", "caption": "x"} for n in range(3)), line)
    report = prepare("jsonl", src, tmp_path / "p.parquet", max_bad=0.25)
    assert (report.kept, report.dropped) == (3, {"malformed": 1})
    (example,) = report.examples["malformed"]
    assert example.startswith("4: ")
    assert any(part in example for part in reason.split("|"))
    assert json.loads((tmp_path / "p.parquet.report.json").read_text())["dropped"] == {"malformed": 1}


def test_bytes_that_are_not_utf8_and_a_byte_order_mark(tmp_path: Path) -> None:
    src = tmp_path / "a.jsonl"
    src.write_bytes(b'\xef\xbb\xbf{"image": "a.jpg", "caption": "x"}\r\n{"image": "b.jpg", "caption": "\xff"}\r\n')
    report = prepare("jsonl", src, tmp_path / "p.parquet", max_bad=0.5)
    assert [row[1] for row in rows(tmp_path / "p.parquet")] == ["a"]
    assert report.examples == {"malformed": ["2: not UTF-8; perhaps --encoding cp1252"]}


def test_too_many_bad_lines_leave_nothing(tmp_path: Path) -> None:
    src = write_lines(tmp_path / "a.jsonl", *({"image": f"{n}.jpg", "caption": "x"} for n in range(50)), "oops", "again")
    with pytest.raises(
        TooManyBadInputsError, match=r"2 of 52 captions cannot be used, more than --max-bad 0\.01: dropped 2: malformed, first line 51: not"
    ):
        prepare("jsonl", src, tmp_path / "p.parquet")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl"]
    with pytest.raises(TooManyBadInputsError, match="--max-bad 1 keeps the others"):
        prepare("jsonl", src, tmp_path / "p.parquet")
    with pytest.raises(TooManyBadInputsError) as error:
        prepare("jsonl", write_lines(tmp_path / "b.jsonl", "oops", "again"), tmp_path / "p.parquet")
    assert "the others" not in str(error.value)


def test_captions_without_image_are_dropped_and_limited(tmp_path: Path) -> None:
    src = write_lines(tmp_path / "a.jsonl", {"image": "a.jpg", "captions": ["x", "y"]}, {"image": "b.jpg", "captions": ["z"]})
    images = images_in(tmp_path / "images", "a.jpg")
    (images / "b.jpg").symlink_to(images_in(tmp_path, "outside.jpg") / "outside.jpg")  # a link out of the folder is no image of it
    report = prepare("jsonl", src, tmp_path / "p.parquet", images=images, max_bad=0.5)
    assert [row[0] for row in rows(tmp_path / "p.parquet")] == ["a#0", "a#1"]
    assert report.dropped == {"image file missing": 1}
    with pytest.raises(TooManyBadInputsError, match=r"image file missing, first line 2: 'b\.jpg'"):
        prepare("jsonl", src, tmp_path / "p.parquet", images=images, max_bad=0)
    with pytest.raises(UsageError, match=r"images folder .* does not exist"):
        prepare("jsonl", src, tmp_path / "p.parquet", images=tmp_path / "absent")


def test_pair_ids_that_come_twice_name_both_lines(tmp_path: Path) -> None:
    lines = [{"image": f"{n}.jpg", "captions": ["x", "y"]} for n in (1, 2, 3, 2)]
    src = write_lines(tmp_path / "a.jsonl", *lines)
    with pytest.raises(
        UsageError, match=r"a\.jsonl: pair id '2#0' comes in line 2 and again in line 4; .* put all captions of an image into one entry"
    ):
        prepare("jsonl", src, tmp_path / "p.parquet")
    src = write_lines(tmp_path / "x.token", "1.jpg#0\ta", "2.jpg#0\tb", "1.jpg#0\tc")
    with pytest.raises(UsageError, match="pair id '1#0' comes in line 1 and again in line 3"):
        prepare("flickr30k", src, tmp_path / "p.parquet")
    assert not (tmp_path / "p.parquet").exists()


def test_one_image_id_for_two_files_is_refused(tmp_path: Path) -> None:
    src = write_lines(tmp_path / "a.jsonl", {"image": "a.jpg", "caption": "x"}, {"image": "a.png", "caption": "y"})
    with pytest.raises(UsageError, match=r"image id 'a' has two files"):
        prepare("jsonl", src, tmp_path / "p.parquet")


def test_nothing_left_and_wrong_files(tmp_path: Path) -> None:
    src = write_lines(tmp_path / "a.jsonl", {"image": "a.jpg", "caption": " \n\t"})
    with pytest.raises(UsageError, match="no captions are left: dropped 1: blank caption, first line 1"):
        prepare("jsonl", src, tmp_path / "p.parquet")
    with pytest.raises(UsageError, match="does not exist"):
        prepare("jsonl", tmp_path / "absent.jsonl", tmp_path / "p.parquet")
    with pytest.raises(UsageError, match="is not a COCO caption file"):
        prepare("coco", src, tmp_path / "p.parquet")
    two = write_lines(tmp_path / "two.jsonl", {"image": "a.jpg", "caption": "x"}, {"image": "b.jpg", "caption": "x"})
    with pytest.raises(UsageError, match=r"is not one JSON document but looks like JSON Lines, .*: `megainter prepare jsonl` reads it"):
        prepare("coco", two, tmp_path / "p.parquet")
    with pytest.raises(UsageError, match="neither a COCO caption file nor a Karpathy split"):
        prepare("coco", write_lines(tmp_path / "x.json", {"info": 1}), tmp_path / "p.parquet")
    with pytest.raises(UsageError, match=r"has images but no captions"):
        prepare("coco", write_lines(tmp_path / "y.json", {"images": [{"id": 1}]}), tmp_path / "p.parquet")
    with pytest.raises(UsageError, match="is not valid JSON"):
        prepare("coco", write_lines(tmp_path / "z.json", "{"), tmp_path / "p.parquet")
    with pytest.raises(UsageError, match="not one of train, val, test"):
        prepare("jsonl", src, tmp_path / "p.parquet", split="dev")


def test_bad_entries_of_a_json_document_are_counted(tmp_path: Path) -> None:
    annotations = [*COCO["annotations"], {"id": 4, "image_id": 99, "caption": "x"}, {"id": 5, "caption": "y"}, "z"]
    src = write_lines(tmp_path / "captions.json", {**COCO, "annotations": annotations})
    report = prepare("coco", src, tmp_path / "p.parquet", max_bad=0.5)
    assert (report.kept, report.dropped) == (3, {"malformed": 3})
    assert report.examples["malformed"][:2] == ["4: image_id 99 is not among the images", "5: no field 'image_id'"]


@given(st.text(alphabet=st.characters(codec=None), max_size=40))
def test_normalised_captions_are_one_line_nfc_and_stable(text: str) -> None:
    caption = normalise(text)
    caption.encode()  # no lone surrogates are left
    assert caption == normalise(caption) == caption.strip()
    assert unicodedata.is_normalized("NFC", caption)
    assert not any(unicodedata.category(character) == "Cc" for character in caption)
    assert len(caption.splitlines()) <= 1
    assert [c for c in unicodedata.normalize("NFC", text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")) if c.isalpha()] == [
        c for c in caption if c.isalpha()
    ]


def test_terminal_escapes_do_not_survive() -> None:
    assert normalise("a \x1b[31mred\x1b[0m\r\nline\x00 cafe\u0301") == "a [31mred [0m line caf\u00e9"


@pytest.mark.skipif(not FLICKR8K.exists(), reason="the Flickr8k captions (shared/data) are not beside the repository")
def test_flickr8k_val_in_both_languages(tmp_path: Path) -> None:
    for language in ("en", "zh"):
        report = prepare(
            "jsonl", FLICKR8K / "val.jsonl", tmp_path / "p.parquet", fields=Fields(captions=language), images=FLICKR8K / "images"
        )
        assert (report.kept, report.images, report.splits, report.dropped) == (5000, 1000, {"val": 5000}, {})
        first = json.loads((FLICKR8K / "val.jsonl").open(encoding="utf-8").readline())
        assert read_pairs(tmp_path / "p.parquet", "val").caption(0) == normalise(first[language][0])


def ten_photos(folder: Path, *bad: str) -> Path:
    return write_lines(folder / "a.jsonl", *({"image": f"{n}.jpg", "captions": ["x", "y"]} for n in range(10)), *bad)


def test_one_bad_line_of_a_small_file_is_allowed_and_two_are_not(tmp_path: Path) -> None:
    assert prepare("jsonl", ten_photos(tmp_path, "oops"), tmp_path / "p.parquet").dropped == {"malformed": 1}
    with pytest.raises(TooManyBadInputsError, match=r"--max-bad 0\.01"):
        prepare("jsonl", ten_photos(tmp_path, "oops", "again"), tmp_path / "p.parquet")
    with pytest.raises(TooManyBadInputsError, match="--max-bad 0:"):
        prepare("jsonl", ten_photos(tmp_path, "oops"), tmp_path / "p.parquet", max_bad=0)


def test_one_missing_image_with_several_captions_is_one_bad_line(tmp_path: Path) -> None:
    images = images_in(tmp_path / "images", *(f"{n}.jpg" for n in range(9)))
    assert prepare("jsonl", ten_photos(tmp_path), tmp_path / "p.parquet", images=images).dropped == {"image file missing": 2}


def test_a_source_is_never_overwritten(tmp_path: Path) -> None:
    src = ten_photos(tmp_path)
    before = src.read_bytes()
    (tmp_path / "link.jsonl").symlink_to(src)
    for output in (src, tmp_path / "link.jsonl"):
        with pytest.raises(UsageError, match=r"would be overwritten, and it is what is read; give another --output"):
            prepare("jsonl", src, output)
    src.rename(tmp_path / "p.parquet.report.json")
    with pytest.raises(UsageError, match="would be overwritten"):
        prepare("jsonl", tmp_path / "p.parquet.report.json", tmp_path / "p.parquet")
    assert (tmp_path / "p.parquet.report.json").read_bytes() == before


def test_an_output_that_is_something_else_is_refused_and_a_manifest_is_replaced(tmp_path: Path) -> None:
    src, notes = ten_photos(tmp_path), tmp_path / "notes.txt"
    notes.write_text("do not lose me")
    with pytest.raises(UsageError, match=r"notes\.txt is there, and is another file"):
        prepare("jsonl", src, notes)
    assert notes.read_text() == "do not lose me"
    with pytest.raises(UsageError, match="is a folder"):
        prepare("jsonl", src, tmp_path)
    for split in ("train", "val"):
        prepare("jsonl", src, tmp_path / "p.parquet", split=split)
    assert {row[4] for row in rows(tmp_path / "p.parquet")} == {"val"}


def test_captions_without_a_split_are_said_to_be_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare("jsonl", ten_photos(tmp_path), tmp_path / "p.parquet")
    assert "20 have no split, and training takes split train: give --split train" in capsys.readouterr().out
    prepare("jsonl", ten_photos(tmp_path), tmp_path / "p.parquet", split="train")
    assert "note" not in capsys.readouterr().out


def test_shares_are_drawn_by_image_and_do_not_depend_on_what_else_is_there(tmp_path: Path) -> None:
    photos = [{"image": f"{n}.jpg", "captions": ["x", "y"]} for n in range(2000)]
    report = prepare("jsonl", write_lines(tmp_path / "a.jsonl", *photos), tmp_path / "a.parquet", shares=Shares(0.1, 0.2, seed=3))
    split_of = {row[1]: row[4] for row in rows(tmp_path / "a.parquet")}
    assert {(row[1], row[4]) for row in rows(tmp_path / "a.parquet")} == set(split_of.items())
    assert abs(report.splits["val"] / 4000 - 0.1) < 0.03  # 4 standard deviations of a binomial share
    assert abs(report.splits["test"] / 4000 - 0.2) < 0.04
    prepare("jsonl", write_lines(tmp_path / "b.jsonl", *photos[:500][::-1]), tmp_path / "b.parquet", shares=Shares(0.1, 0.2, seed=3))
    assert {row[1]: row[4] for row in rows(tmp_path / "b.parquet")}.items() <= split_of.items()
    prepare("jsonl", tmp_path / "a.jsonl", tmp_path / "c.parquet", shares=Shares(0.1, 0.2, seed=4))
    assert {row[1]: row[4] for row in rows(tmp_path / "c.parquet")} != split_of


def test_shares_that_cannot_be_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="leave some images for training"):
        Shares(0.5, 0.5)
    with pytest.raises(UsageError, match="either --split or --val-share"):
        prepare("jsonl", ten_photos(tmp_path), tmp_path / "p.parquet", split="train", shares=Shares(0.1, 0.1))
    named = write_lines(tmp_path / "n.jsonl", {"image": "a.jpg", "caption": "x", "split": "val"})
    with pytest.raises(UsageError, match=r"image 'a' is of split 'val'.*for sources without splits"):
        prepare("jsonl", named, tmp_path / "p.parquet", shares=Shares(0.1, 0.1))
    prepare("jsonl", ten_photos(tmp_path), tmp_path / "p.parquet", shares=Shares(1e-9, 0))
    assert "no image fell to val: give a larger share" in capsys.readouterr().out
