"""Tables whose images stand in them, and messages that stay short whatever a file holds."""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from megainter.data.tables.pairs import read_pairs
from megainter.errors import MegainterError
from preprocessing.prepare.boxes import prepare_boxes
from preprocessing.prepare.captions import prepare
from preprocessing.prepare.labelled import Columns, Options, prepare_examples
from preprocessing.prepare.reading import Fields
from tests.synthetic import environment

LONG = "x" * 100_000


def picture(seed: int, kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (24, 32, 3), dtype=np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def pairs(path: Path) -> list[tuple[str, str]]:
    table = read_pairs(path).table
    return list(zip(table.column("image").to_pylist(), table.column("caption").to_pylist(), strict=True))


def test_images_in_a_parquet_file_are_written_and_their_captions_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = [{"bytes": picture(i), "path": f"{i}.jpg"} for i in range(20)]
    pq.write_table(pa.table({"image": images, "text": [f"photo {i}" for i in range(20)]}), tmp_path / "train-00000-of-00001.parquet")
    fields = Fields(captions="text")
    report = prepare("parquet", tmp_path / "train-00000-of-00001.parquet", tmp_path / "p", fields=fields)
    assert (report.kept, report.images, report.dropped) == (20, 20, {})
    out = capsys.readouterr().out
    assert "the images stand in the table and were not written anywhere; give --images FOLDER" in out
    assert max(map(len, out.splitlines())) < 500
    for _ in range(2):
        report = prepare(
            "parquet", tmp_path / "train-00000-of-00001.parquet", tmp_path / "p", fields=fields, images=tmp_path / "new" / "photos"
        )
        assert (report.kept, report.images) == (20, 20)
    assert pairs(tmp_path / "p") == [(f"{i}.jpg", f"photo {i}") for i in range(20)]
    assert [(tmp_path / "new" / "photos" / f"{i}.jpg").read_bytes() for i in range(20)] == [picture(i) for i in range(20)]


def test_paths_that_repeat_leave_the_folder_or_are_missing_get_names_of_their_own(tmp_path: Path) -> None:
    cells = [
        {"bytes": picture(0), "path": "/root/cache/a.jpg"},
        {"bytes": picture(1, "PNG"), "path": None},
        {"bytes": picture(2), "path": "../a.jpg"},
        {"bytes": picture(0), "path": "a.jpg"},
        {"bytes": picture(3, "WEBP"), "path": "sub/b"},
        {"bytes": b"no image", "path": "c.jpg"},
        {"bytes": None, "path": "d.jpg"},
        None,
    ]
    pq.write_table(pa.table({"image": cells, "caption": [f"{n}" for n in range(len(cells))]}), tmp_path / "t.parquet")
    report = prepare("parquet", tmp_path / "t.parquet", tmp_path / "p", images=tmp_path / "photos", max_bad=0.9)
    assert pairs(tmp_path / "p") == [("a.jpg", "0"), ("t-00000002.png", "1"), ("t-00000003.jpg", "2"), ("a.jpg", "3"), ("sub/b.webp", "4")]
    assert report.dropped == {"malformed": 2, "image file missing": 1}
    assert report.examples["malformed"][0] == "6: its image of 8 bytes has a format that is not known"
    assert not (tmp_path / "a.jpg").exists()


def test_a_column_of_bytes_holds_images_too(tmp_path: Path) -> None:
    pq.write_table(pa.table({"jpg": [picture(0), picture(1)], "caption": ["one", "two"]}), tmp_path / "x.parquet")
    report = prepare("parquet", tmp_path / "x.parquet", tmp_path / "p", fields=Fields(image="jpg"), images=tmp_path / "photos")
    assert report.kept == 2
    assert (tmp_path / "photos" / "x-00000002.jpg").read_bytes() == picture(1)


def jsonl(path: Path, *values: Any) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


@pytest.mark.parametrize(
    "value",
    [
        {"image": {"a": LONG}, "caption": "x"},
        {"image": f"../{LONG}", "caption": "x"},
        {"image": "a.jpg", "caption": "x", "split": LONG},
        {"image": "a.jpg", LONG: "x"},
        {"image": "a.jpg", "captions": LONG, "image_id": [LONG]},
        {"image": "a.jpg"} | {f"{n}{LONG[:99]}": n for n in range(1000)},
        LONG,
    ],
)
def test_no_value_of_a_file_of_captions_is_printed_whole(tmp_path: Path, value: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(MegainterError) as error:
        prepare("jsonl", jsonl(tmp_path / "x.jsonl", value), tmp_path / "p", max_bad=0)
    assert len(str(error.value)) < 1000
    assert max(map(len, capsys.readouterr().out.splitlines()), default=0) < 500
    assert not list(tmp_path.glob("*.json"))


def test_no_value_of_other_tables_is_printed_whole(tmp_path: Path) -> None:
    box = {"image_id": LONG, "category_id": 1, "bbox": LONG}
    (tmp_path / "b.json").write_text(json.dumps({"images": [{"id": 1, "file_name": LONG}], "annotations": [box] * 3, "categories": []}))
    (tmp_path / "t.tsv").write_text("\t".join(f"{n}{LONG[:500]}" for n in range(500)) + "\n")
    (tmp_path / "l.tsv").write_text(f"a\tb\n1\t{LONG}\n2\t{LONG}\n")
    (tmp_path / "c.csv").write_text(f"{LONG},{LONG}\n1,2\n")
    (tmp_path / "q.jsonl").write_text(json.dumps({"identifier": LONG, "sentence": "a", "label": LONG}) + "\n")
    options = Options(Columns("a", None, "b"), regression=True)
    calls: list[Any] = [
        lambda: prepare_boxes(tmp_path / "b.json", tmp_path / "p", max_bad=0),
        lambda: prepare_examples("tsv", [tmp_path / "t.tsv"], tmp_path / "p", options=options),
        lambda: prepare_examples("tsv", [tmp_path / "l.tsv"], tmp_path / "p", options=options, max_bad=0),
        lambda: prepare_examples("nlvr2", [tmp_path / "q.jsonl"], tmp_path / "p", max_bad=0),
        lambda: prepare("csv", tmp_path / "c.csv", tmp_path / "p"),
    ]
    for call in calls:
        with pytest.raises(MegainterError) as error:
            call()
        assert len(str(error.value)) < 5000
    long = jsonl(tmp_path / "x.jsonl", *[{"image": LONG, "split": LONG, LONG: 1}] * 30, {"image": "a.jpg", "caption": "x"})
    assert prepare("jsonl", long, tmp_path / "p", max_bad=1.0).kept == 1
    assert (tmp_path / "p.report.json").stat().st_size < 8000


def test_a_message_of_any_error_is_cut_where_it_is_printed(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-c",
        "import sys; from megainter.cli import main; main(sys.argv[1:])",
        "prepare",
        LONG,
        "x",
        "--output",
        "y",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, env=environment())
    assert done.returncode == 2
    assert 3000 < len(done.stderr) < 5000
    assert "more characters" in done.stderr
