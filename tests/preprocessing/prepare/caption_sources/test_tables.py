"""Captions in CSV, Parquet and Visual Genome's regions, against pairs written out by hand."""

import io
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from megainter.data.tables.pairs import read_pairs
from megainter.errors import TooManyBadInputsError, UsageError
from preprocessing.prepare.caption_sources.annotations import visual_genome
from preprocessing.prepare.captions import prepare
from preprocessing.prepare.reading import Fields


def rows(path: Path) -> list[tuple[str, ...]]:
    """(pair_id, image_id, image, caption, split) of every row."""
    return list(zip(*(column.to_pylist() for column in read_pairs(path).table.columns), strict=True))


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_csv_with_any_usual_delimiter(tmp_path: Path, delimiter: str) -> None:
    lines = ["\ufeffimage,caption,split", 'a.jpg,"红, ""狗""",train', 'b.jpg,"two\nlines",dev', "c.jpg,three,"]
    src = write(tmp_path / "x.csv", "\r\n".join(line.replace(",", delimiter) for line in lines))
    prepare("csv", src, tmp_path / "p.parquet")
    assert rows(tmp_path / "p.parquet") == [
        ("a#line2", "a", "a.jpg", f'红{delimiter.strip() or ""} "狗"', "train"),
        ("b#line4", "b", "b.jpg", "two lines", "val"),
        ("c#line5", "c", "c.jpg", "three", ""),
    ]


def test_columns_of_other_names(tmp_path: Path) -> None:
    src = write(tmp_path / "x.tsv", "nr\tfile\ttitle\tpart\n7\ta.jpg\t狗\ttest\n8\ta.jpg\t猫\ttest\n")
    fields = Fields(captions="title", image="file", split="part", pair_id="nr")
    prepare("csv", src, tmp_path / "p.parquet", fields=fields)
    expected = [("7", "a", "a.jpg", "狗", "test"), ("8", "a", "a.jpg", "猫", "test")]
    assert rows(tmp_path / "p.parquet") == expected
    pq.write_table(pa.table({"nr": [7, 8], "file": ["a.jpg"] * 2, "title": ["狗", "猫"], "part": ["test"] * 2}), tmp_path / "x.parquet")
    prepare("parquet", tmp_path / "x.parquet", tmp_path / "q.parquet", fields=fields)
    assert rows(tmp_path / "q.parquet") == expected
    lines = "\n".join(json.dumps({"nr": nr, "file": "a.jpg", "title": title, "part": "test"}) for nr, title in ((7, "狗"), (8, "猫")))
    prepare("jsonl", write(tmp_path / "x.jsonl", lines), tmp_path / "r.parquet", fields=fields)
    assert rows(tmp_path / "r.parquet") == expected


def test_bad_rows_of_csv_are_counted(tmp_path: Path) -> None:
    src = write(
        tmp_path / "x.csv", b'image,caption\na.jpg,one\nb.jpg\nc.jpg,two,three\n\nd.jpg,\xff\n,four\ne.jpg, \nf.jpg,"x"y\ng.jpg,ok\n'
    )
    report = prepare("csv", src, tmp_path / "p.parquet", max_bad=0.9)
    assert [row[3] for row in rows(tmp_path / "p.parquet")] == ["one", "ok"]
    assert report.dropped == {"malformed": 5, "blank caption": 1}
    assert report.examples["malformed"] == [
        "3: 1 columns, the header has 2",
        "4: 3 columns, the header has 2",
        "6: not UTF-8; perhaps --encoding cp1252",
        "7: field 'image' is ''",
        "9: ',' expected after '\"'",
    ]


def test_a_field_that_never_ends_is_named_and_bounded(tmp_path: Path) -> None:
    src = write(tmp_path / "x.csv", 'image,caption\na.jpg,one\nb.jpg,"' + "x\n" * 200_000)
    report = prepare("csv", src, tmp_path / "p.parquet", max_bad=1.0)
    assert report.kept == 1
    assert "field larger than field limit" in report.examples["malformed"][0]


def test_parquet_folders_with_lists_of_captions(tmp_path: Path) -> None:
    folder = tmp_path / "tables"
    folder.mkdir()
    for n in range(2):
        columns = {"image": [f"{n}.jpg"], "captions": [["one", "two"]], "extra": [n]}
        pq.write_table(pa.table(columns), folder / f"{n}.parquet")
    prepare("parquet", folder, tmp_path / "p.parquet", split="train")
    assert [row[0] for row in rows(tmp_path / "p.parquet")] == ["0#0", "0#1", "1#0", "1#1"]


def test_rows_of_parquet_without_a_value_are_counted(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": ["a.jpg", None, "c.jpg"], "caption": ["one", "two", None]}), tmp_path / "x.parquet")
    report = prepare("parquet", tmp_path / "x.parquet", tmp_path / "p.parquet", max_bad=0.9)
    assert rows(tmp_path / "p.parquet") == [("a#row1", "a", "a.jpg", "one", "")]
    assert report.examples["malformed"] == ["2: field 'image' is None", "3: field 'caption' is not a list of strings"]


@pytest.mark.parametrize(
    ("source", "content", "message"),
    [
        (
            "csv",
            "photo,caption\n",
            r"no column of images \(image, file, file_name, filename, filepath\); it has photo, caption: name yours with --image-field$",
        ),
        (
            "csv",
            "image,words\n",
            r"has no column of captions \(captions, caption, text, title\); it has image, words: name yours with --captions$",
        ),
        ("csv", "", r"has no column of images .* and no column of captions .*; it has no header line: .* --image-field, --captions$"),
        ("parquet", "PAR", "is not a Parquet file"),
    ],
)
def test_tables_without_the_columns_are_refused(tmp_path: Path, source: Any, content: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        prepare(source, write(tmp_path / "x", content), tmp_path / "p.parquet")


def genome(path: Path, images: int, regions: int = 2) -> Path:
    entries = [
        {"id": i, "regions": [{"region_id": 100 * i + r, "image_id": i, "phrase": f"thing {r}", "x": 1, "y": 2, "width": 3, "height": 4}
                              for r in range(regions)]} for i in range(1, images + 1)
    ]  # fmt: skip
    return write(path, json.dumps(entries))


def test_visual_genome_regions(tmp_path: Path) -> None:
    src = genome(tmp_path / "region_descriptions.json", 3)
    prepare("visual-genome", src, tmp_path / "p.parquet")
    assert rows(tmp_path / "p.parquet")[:3] == [
        ("100", "1", "1.jpg", "thing 0", ""),
        ("101", "1", "1.jpg", "thing 1", ""),
        ("200", "2", "2.jpg", "thing 0", ""),
    ]
    for name in ("VG_100K/1.jpg", "VG_100K_2/3.jpg"):
        (tmp_path / "vg" / name).parent.mkdir(parents=True)
        (tmp_path / "vg" / name).write_bytes(b"x")
    report = prepare("visual-genome", src, tmp_path / "p.parquet", images=tmp_path / "vg", max_bad=0.5)
    assert {row[2] for row in rows(tmp_path / "p.parquet")} == {"VG_100K/1.jpg", "VG_100K_2/3.jpg"}
    assert report.dropped == {"image file missing": 2}


def test_visual_genome_is_read_as_it_is_needed(tmp_path: Path) -> None:
    """2 MB of regions in a few hundred KB of memory."""
    src = genome(tmp_path / "region_descriptions.json", 400, 50)
    assert src.stat().st_size > 1.8e6
    tracemalloc.start()
    count = sum(len(item.captions) for item in visual_genome(src).items)  # type: ignore[union-attr]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 20_000
    assert peak < 0.7e6


def test_broken_and_other_documents_are_one_line(tmp_path: Path) -> None:
    content = genome(tmp_path / "x.json", 2).read_text()
    with pytest.raises(UsageError, match=r"x\.json is not valid JSON"):
        prepare("visual-genome", write(tmp_path / "x.json", content[:-30]), tmp_path / "p.parquet")
    with pytest.raises(TooManyBadInputsError, match=r"2 of 2 captions cannot be used.*no field 'regions'"):
        prepare("visual-genome", write(tmp_path / "y.json", '[{"id": 1}, {"id": 2}]'), tmp_path / "p.parquet")
    with pytest.raises(UsageError, match="no captions are left"):
        prepare("visual-genome", write(tmp_path / "z.json", '{"a": 1}'), tmp_path / "p.parquet")
    assert not list(tmp_path.glob("*.parquet"))


def test_regions_of_visual_genome_1_0_have_an_id_and_an_image(tmp_path: Path) -> None:
    """As its first release names them, in one file with the later names (github.com/ranjaykrishna/visual_genome_python_driver/pull/17)."""
    old = [{"id": 7 + n, "image": 1, "phrase": f"a clock {n}", "x": 1, "y": 1, "width": 3, "height": 3} for n in range(2)]
    new = [{"region_id": 9, "image_id": 2, "phrase": "a man", "x": 1, "y": 1, "width": 3, "height": 3}]
    (tmp_path / "r.json").write_text(json.dumps([{"id": 1, "regions": old}, {"image_id": 2, "regions": new}]))
    prepare("visual-genome", tmp_path / "r.json", tmp_path / "p")
    assert [row[:2] for row in rows(tmp_path / "p")] == [("7", "1"), ("8", "1"), ("9", "2")]


def picture(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 12), (number, 9, 9)).save(buffer, "JPEG" if number % 2 else "WEBP")
    return buffer.getvalue()


@pytest.mark.parametrize("column", ["jpg", "webp"])
def test_images_that_img2dataset_put_into_its_tables_are_written_out(tmp_path: Path, column: str) -> None:
    """Its output "parquet" (github.com/rom1504/img2dataset/issues/72); an image that it did not get is none."""
    (tmp_path / "x").mkdir()
    for shard in (0, 3):
        got = [
            {"url": f"http://a/{n}", "caption": f"caption {shard}{n}", "key": f"{shard:05}{n:04}", "status": status,
             column: picture(10 * shard + n) if status == "success" else None}
            for n, status in enumerate(("success", "failed_to_download", "success"))
        ]  # fmt: skip
        pq.write_table(pa.Table.from_pylist(got), tmp_path / "x" / f"{shard:05}.parquet")
    report = prepare("conceptual-captions", tmp_path / "x", tmp_path / "p", images=tmp_path / "images")
    assert report.dropped == {"not downloaded": 2}
    found = rows(tmp_path / "p")
    assert [row[1] for row in found] == [f"{shard:05}/{shard:05}{n:04}" for shard in (0, 3) for n in (0, 2)]
    assert [(tmp_path / "images" / row[2]).read_bytes() for row in found] == [picture(10 * shard + n) for shard in (0, 3) for n in (0, 2)]
    prepare("parquet", tmp_path / "x" / "00003.parquet", tmp_path / "q")
    assert [row[1] for row in rows(tmp_path / "q")] == ["00003/000030000", "00003/000030002"]


def test_an_address_without_caption_is_blank_and_no_fault(tmp_path: Path) -> None:
    """Of img2dataset's tables half may have none (issue 344); one picture under several captions keeps each (issue 244)."""
    (tmp_path / "x").mkdir()
    table = [
        {"url": "http://a/1", "caption": caption, "key": f"{n:09}", "status": "success"}
        for n, caption in enumerate((None, "", "a dog", "a cat", None))
    ]
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "x" / "00000.parquet")
    report = prepare("parquet", tmp_path / "x", tmp_path / "p")
    assert (report.kept, report.dropped) == (2, {"blank caption": 3})
