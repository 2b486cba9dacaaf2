"""Quotation marks in tables with a delimiter: no row behind an unbalanced one is lost, and fields with line breaks stay whole."""

import csv
import io
from pathlib import Path

import numpy as np
import pytest

from megainter.data.tables.pairs import read_pairs
from megainter.errors import TooManyBadInputsError, UsageError
from preprocessing.features.formats.complete import read_sizes
from preprocessing.images.listing import list_images
from preprocessing.prepare.captions import prepare
from preprocessing.prepare.delimited import Fault, Row, delimited_rows
from preprocessing.prepare.reading import Fields


def captions(path: Path) -> dict[str, str]:
    table = read_pairs(path).table
    return dict(zip(table.column("image").to_pylist(), table.column("caption").to_pylist(), strict=True))


def rows(text: str, delimiter: str = "\t", columns: int = 2, key: int = 0) -> list[Row | Fault]:
    return list(delimited_rows(io.StringIO(text, newline=""), delimiter, columns, key))


def test_an_unbalanced_mark_in_a_thousand_rows_loses_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [f"im{i}.jpg\ta caption number {i}" for i in range(1000)]
    lines[10] = 'im10.jpg\t"Stop right there'
    (tmp_path / "captions.tsv").write_text("filepath\ttitle\n" + "\n".join(lines) + "\n")
    report = prepare("csv", tmp_path / "captions.tsv", tmp_path / "p", fields=Fields(captions="title", image="filepath"))
    found = captions(tmp_path / "p")
    assert (report.kept, report.dropped, len(found)) == (1000, {}, 1000)
    assert (found["im10.jpg"], found["im11.jpg"]) == ('"Stop right there', "a caption number 11")
    assert "note: 1 rows have a quotation mark that does not close and were taken as they stand, first line 12" in capsys.readouterr().out


@pytest.mark.parametrize("delimiter", [",", "\t", ";", "|"])
@pytest.mark.parametrize("closing", ["never", 'size 5"', '"Stop" and go'])
def test_whatever_closes_the_mark_later_every_other_row_is_kept(tmp_path: Path, delimiter: str, closing: str) -> None:
    lines = [f"im{i}.jpg{delimiter}number {i}" for i in range(300)]
    lines[10], lines[200] = f'im10.jpg{delimiter}"Stop', f"im200.jpg{delimiter}{closing}"
    (tmp_path / "x.csv").write_text(f"image{delimiter}caption\n" + "\r\n".join(lines))
    report = prepare("csv", tmp_path / "x.csv", tmp_path / "p")
    assert report.kept + sum(report.dropped.values()) == 300
    assert report.kept >= 299
    assert captions(tmp_path / "p")["im10.jpg"] == '"Stop'


def test_rows_that_are_all_in_marks_but_one_are_all_kept(tmp_path: Path) -> None:
    lines = [f'"im{i}.jpg","number {i}, with a comma"' for i in range(50)]
    lines[7] = '"im7.jpg","number 7, open'
    (tmp_path / "x.csv").write_text("image,caption\n" + "\n".join(lines))
    assert prepare("csv", tmp_path / "x.csv", tmp_path / "p").kept == 50
    assert captions(tmp_path / "p")["im7.jpg"] == "number 7, open"


def test_ids_without_suffix_and_a_caption_in_the_first_column(tmp_path: Path) -> None:
    lines = [f"number {i}\t{1000 + i}" for i in range(40)]
    lines[3], lines[9] = '"number three\t1003', 'number "nine\t1009'
    (tmp_path / "x.tsv").write_text("caption\timage\n" + "\n".join(lines))
    assert prepare("csv", tmp_path / "x.tsv", tmp_path / "p").kept == 40
    assert captions(tmp_path / "p")["1003"] == '"number three'


def test_fields_with_line_breaks_stay_whole_as_the_csv_module_reads_them() -> None:
    rng = np.random.default_rng(3)
    pieces = ["two dogs", "\n", "\r\n", ", ", '"', "a", " running, fast", "\n\n", "x", ";"]
    for delimiter in ",\t;|":
        wanted = [[f"im{i}.jpg", "".join(rng.choice(pieces, rng.integers(0, 6)))] for i in range(200)]
        text = io.StringIO(newline="")
        csv.writer(text, delimiter=delimiter).writerows(wanted)
        found = rows(text.getvalue(), delimiter)
        assert [row.cells for row in found if isinstance(row, Row)] == wanted
        assert not any(isinstance(row, Fault) or row.literal for row in found)


def test_marks_inside_a_cell_of_a_tsv_are_text() -> None:
    assert rows('a.jpg\t"Stop" he said\nb.jpg\tsay "no"\n') == [Row(2, ["a.jpg", '"Stop" he said'], True), Row(3, ["b.jpg", 'say "no"'])]


def test_lines_that_a_mark_took_and_that_are_no_rows_are_each_a_fault(tmp_path: Path) -> None:
    found = rows('a.jpg,"one\ntwo\nthree\n', ",")
    assert [(row.number, type(row)) for row in found] == [(2, Fault), (3, Fault), (4, Fault)]
    assert isinstance(found[2], Fault)
    assert found[2].reason == "taken by the quotation mark of line 2"
    lines = "".join(f"{i}.jpg,caption {i}\n" for i in range(100))
    (tmp_path / "x.csv").write_text(f'image,caption\n{lines}z.jpg,"open\n' + "word\n" * 30)
    with pytest.raises(TooManyBadInputsError, match=r"31 of 131 captions cannot be used"):
        prepare("csv", tmp_path / "x.csv", tmp_path / "p")


def test_a_table_of_images_loses_none_and_says_what_it_took(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [f"a caption\t{i}.jpg" for i in range(20)]
    lines[4], lines[15] = '"open\t4.jpg', 'closed"\t15.jpg'
    (tmp_path / "t.tsv").write_text("caption\timage\n" + "\n".join(lines))
    assert len(list_images(tmp_path, tmp_path / "t.tsv").items) == 20
    assert "1 rows have a quotation mark that does not close" in capsys.readouterr().out


def test_sizes_with_a_stray_mark_are_whole_or_refused(tmp_path: Path) -> None:
    (tmp_path / "s.csv").write_text('image_id,width,height,note\n1,40,30,"open\n2,50,60,x\n3,70,80,5"\n')
    assert read_sizes(tmp_path / "s.csv") == {"1": (40, 30), "2": (50, 60), "3": (70, 80)}
    (tmp_path / "t.tsv").write_text("width\theight\timage_id\n40\t30\ta b\n")
    assert read_sizes(tmp_path / "t.tsv") == {"a b": (40, 30)}
    (tmp_path / "u.csv").write_text("image_id,width,height\n1,40\n")
    with pytest.raises(UsageError, match=r"gives no image sizes \(line 2: 2 columns\)"):
        read_sizes(tmp_path / "u.csv")
    (tmp_path / "v.csv").write_text(" image_id,w,h\n1,40,30\n")
    with pytest.raises(UsageError, match="no column width, height; it has image_id, w, h"):
        read_sizes(tmp_path / "v.csv")


def test_a_column_named_with_a_blank_is_shown_so_that_one_sees_it(tmp_path: Path) -> None:
    (tmp_path / "results.csv").write_text("image_name| comment_number| comment\n1.jpg| 0| a dog\n")
    with pytest.raises(UsageError, match="it has image_name, ' comment_number', ' comment': name yours"):
        prepare("csv", tmp_path / "results.csv", tmp_path / "p")
