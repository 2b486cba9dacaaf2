"""What a first hour stumbles over: another format or encoding, names that are nearly those of files, a table that is there already."""

import gzip
import json
import os
import unicodedata
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megainter.cli import app
from megainter.data.tables.boxes import read_boxes
from megainter.data.tables.pairs import read_pairs
from megainter.errors import TooManyBadInputsError, UsageError
from preprocessing.prepare.boxes import prepare_boxes
from preprocessing.prepare.captions import prepare
from preprocessing.prepare.labelled import Columns, Options, prepare_examples
from preprocessing.prepare.reading import Fields

CSV = "image,caption\na.jpg,A dog.\nb.jpg,A cat.\n"
JSONL = '{"image": "a.jpg", "caption": "A dog."}\n{"image": "b.jpg", "caption": "A cat."}\n'
COCO = json.dumps({"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"id": 1, "image_id": 1, "caption": "A dog."}]})


def captions_of(path: Path) -> list[tuple[str, str]]:
    table = read_pairs(path).table
    return list(zip(table.column("image").to_pylist(), table.column("caption").to_pylist(), strict=True))


def run(*words: object) -> None:
    app([str(word) for word in words], exit_on_error=False, print_error=False, result_action="return_value")


# --- another format ----------------------------------------------------------------------------------------------------------------


def files_of_every_kind(folder: Path) -> dict[str, Path]:
    files = {name: folder / f"a.{name}" for name in ("csv", "jsonl", "coco", "parquet", "xlsx", "gz")}
    files["csv"].write_text(CSV)
    files["jsonl"].write_text(JSONL)
    files["coco"].write_text(json.dumps(json.loads(COCO), indent=1))
    pq.write_table(pa.table({"image": ["a.jpg"], "caption": ["A dog."]}), files["parquet"])
    with zipfile.ZipFile(files["xlsx"], "w") as book:
        book.writestr("xl/workbook.xml", "")
    files["gz"].write_bytes(gzip.compress(CSV.encode()))
    return files


WAYS = {
    "csv": "`megainter prepare csv` reads it",
    "jsonl": "`megainter prepare jsonl` reads it",
    "coco": "`megainter prepare coco` reads COCO's captions",
    "parquet": "`megainter prepare parquet` reads it",
    "xlsx": "save a workbook as CSV",
    "gz": "unpack it",
}


@pytest.mark.parametrize("source", ["jsonl", "csv", "parquet", "coco", "visual-genome"])
def test_a_file_of_another_format_is_refused_with_the_command_that_reads_it(tmp_path: Path, source: Any) -> None:
    own = {"visual-genome": "coco"}.get(source, source)
    for kind, path in files_of_every_kind(tmp_path).items():
        if kind == own:
            continue
        with pytest.raises(UsageError, match="but looks like") as error:
            prepare(source, path, tmp_path / "p.parquet")
        assert WAYS[kind] in str(error.value)
    assert not (tmp_path / "p.parquet").exists()


@pytest.mark.parametrize(
    ("source", "content", "kept"),
    [
        ("jsonl", "a comment\n" + JSONL, 2),
        ("jsonl", '{"image": "a.jpg", "captions": [' + ", ".join(['"A dog."'] * 9000) + "]}\n", 9000),
        ("csv", "image;caption\na.jpg;{braces}\n", 1),
        ("csv", "image\tcaption\na.jpg\t[brackets]\n", 1),
    ],
)
def test_a_file_of_the_right_format_is_never_taken_for_another(tmp_path: Path, source: Any, content: str, kept: int) -> None:
    (tmp_path / "x").write_text(content)
    assert prepare(source, tmp_path / "x", tmp_path / "p.parquet", max_bad=0.5).kept == kept


# --- encodings ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("encoding", "words"), [("cp1252", "Ein Bär läuft – schnell"), ("gb18030", "两只狗在海滩上跑")])
def test_another_encoding_is_guessed_in_the_refusal_and_read_when_named(tmp_path: Path, encoding: str, words: str) -> None:
    lines = {"csv": f"image,caption\na.jpg,{words}\nb.jpg,{words}\n", "jsonl": f'{{"image": "a.jpg", "captions": ["{words}"]}}\n' * 2}
    for source, content in lines.items():
        src = tmp_path / f"x.{source}"
        src.write_bytes(content.replace("a.jpg", "c.jpg", 1).encode(encoding))
        with pytest.raises(TooManyBadInputsError, match=f"not UTF-8; perhaps --encoding {encoding}"):
            prepare(source, src, tmp_path / "p.parquet")  # type: ignore[arg-type]
        run("prepare", source, src, "--output", tmp_path / f"{source}.parquet", "--encoding", encoding)
        assert {caption for _, caption in captions_of(tmp_path / f"{source}.parquet")} == {words}


def test_utf16_with_its_mark_is_read_without_being_named(tmp_path: Path) -> None:
    for source, content in (("csv", CSV), ("jsonl", JSONL)):
        (tmp_path / "x").write_bytes(content.encode("utf-16"))
        assert prepare(source, tmp_path / "x", tmp_path / "p.parquet").kept == 2  # type: ignore[arg-type]
        assert captions_of(tmp_path / "p.parquet") == [("a.jpg", "A dog."), ("b.jpg", "A cat.")]


def test_encodings_that_are_none_and_sources_that_have_one(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes("image,caption\na.jpg,Bär\n".encode("cp1252"))
    with pytest.raises(UsageError, match="--encoding 'klingon' is not known"):
        prepare("csv", tmp_path / "x.csv", tmp_path / "p.parquet", encoding="klingon")
    with pytest.raises(UsageError, match="--encoding 'base64' is not known"):
        prepare("csv", tmp_path / "x.csv", tmp_path / "p.parquet", encoding="base64")
    with pytest.raises(UsageError, match="is not in the encoding that was named"):
        prepare("csv", tmp_path / "x.csv", tmp_path / "p.parquet", encoding="utf-16")
    with pytest.raises(UsageError, match="coco is always UTF-8"):
        prepare("coco", tmp_path / "x.csv", tmp_path / "p.parquet", encoding="cp1252")
    (tmp_path / "t_train.tsv").write_bytes("text\tlabel\nBär\t1\nHund\t0\n".encode("cp1252"))
    options = Options(Columns("text", None, "label"))
    with pytest.raises(TooManyBadInputsError, match="perhaps --encoding cp1252"):
        prepare_examples("tsv", [tmp_path / "t_train.tsv"], tmp_path / "e.parquet", options=options, max_bad=0)
    done = prepare_examples("tsv", [tmp_path / "t_train.tsv"], tmp_path / "e.parquet", options=options, max_bad=0, encoding="cp1252")
    assert done.kept == 2


# --- names of columns --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image", ["image", "file", "file_name", "filename", "filepath", "File", " Image "])
@pytest.mark.parametrize("caption", ["caption", "text", "title", "Caption"])
def test_usual_names_of_columns_need_no_option(tmp_path: Path, image: str, caption: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.csv").write_text(f"nr,{image},{caption}\n1,a.jpg,A dog.\n")
    pq.write_table(pa.table({image: ["a.jpg"], caption: ["A dog."]}), tmp_path / "x.parquet")
    (tmp_path / "x.jsonl").write_text(json.dumps({image: "a.jpg", caption: "A dog."}))
    for source in ("csv", "parquet", "jsonl"):
        prepare(source, tmp_path / f"x.{source}", tmp_path / "p.parquet")  # type: ignore[arg-type]
        assert captions_of(tmp_path / "p.parquet") == [("a.jpg", "A dog.")]
    told = capsys.readouterr().out.count("--captions and --image-field name others")
    assert told == (0 if (image, caption) == ("image", "caption") else 2)  # of the tables, whose columns are known before


def test_a_name_that_is_given_goes_before_the_usual_ones(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("image,caption,en,path\na.jpg,wrong,right,b.jpg\n")
    for option in ("--captions", "--caption-field"):
        output = tmp_path / f"{option}.parquet"
        run("prepare", "csv", tmp_path / "x.csv", "--output", output, option, "en", "--image-field", "path")
        assert captions_of(output) == [("b.jpg", "right")]
    with pytest.raises(UsageError, match=r"has no column zh; it has image, caption, en, path: name yours with --captions$"):
        prepare("csv", tmp_path / "x.csv", tmp_path / "p.parquet", fields=Fields(captions="zh"))


# --- names of files ----------------------------------------------------------------------------------------------------------------


def folder_of(path: Path, *names: str) -> Path:
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(b"x")
    return path


NAMES = [
    ("Beach.JPG", "beach.jpg", "upper and lower case"),
    ("holiday\\beach.jpg", "holiday/beach.jpg", "backslashes"),
    ("Holiday\\beach.jpg", "holiday/beach.jpg", "backslashes, upper and lower case"),
    (unicodedata.normalize("NFD", "Bär.jpg"), unicodedata.normalize("NFC", "Bär.jpg"), "Unicode form"),
    (unicodedata.normalize("NFC", "Bär.jpg"), unicodedata.normalize("NFD", "Bär.jpg"), "Unicode form"),
]


@pytest.mark.parametrize(("named", "there", "difference"), NAMES)
def test_a_name_that_is_nearly_a_file_s_is_told_and_taken_on_request(tmp_path: Path, named: str, there: str, difference: str) -> None:
    images = folder_of(tmp_path / "photos", there, "other.jpg")
    (tmp_path / "x.jsonl").write_text(
        json.dumps({"image": named, "caption": "x"}) + "\n" + json.dumps({"image": "other.jpg", "caption": "y"})
    )
    with pytest.raises(TooManyBadInputsError) as error:
        prepare("jsonl", tmp_path / "x.jsonl", tmp_path / "p.parquet", images=images, max_bad=0)
    assert f"there ({difference}); --similar-names takes such files" in str(error.value)
    options = ["--images", images, "--output", tmp_path / "p.parquet", "--max-bad", "0"]
    run("prepare", "jsonl", tmp_path / "x.jsonl", *options, "--similar-names")
    assert [image for image, _ in captions_of(tmp_path / "p.parquet")] == [there, "other.jpg"]

    line = {"image": named, "width": 9, "height": 9, "boxes": [[1, 1, 5, 5]], "labels": ["dog"]}
    (tmp_path / "b.jsonl").write_text(json.dumps(line))
    with pytest.raises(TooManyBadInputsError, match="--similar-names takes such files"):
        prepare_boxes(tmp_path / "b.jsonl", tmp_path / "b.parquet", source="jsonl", images=images)
    prepare_boxes(tmp_path / "b.jsonl", tmp_path / "b.parquet", source="jsonl", images=images, similar_names=True)
    assert [image.image for image in read_boxes(tmp_path / "b.parquet")] == [there]


@pytest.mark.parametrize("kind", ["captions", "boxes"])
def test_files_taken_by_a_similar_name_are_counted_and_the_first_is_told(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    """Once for each path, however many captions it has, and not where the name is the file's."""
    images = folder_of(tmp_path / "photos", "a.jpg", "b.jpg", "c.jpg")
    box = {"width": 9, "height": 9, "boxes": [[1, 1, 5, 5]], "labels": ["dog"]}
    lines = [{"image": name, "captions": ["x", "y"], **box} for name in ("A.jpg", "b.jpg", "C.JPG")]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, lines)))
    output = tmp_path / "p.parquet"
    if kind == "captions":
        report = prepare("jsonl", tmp_path / "x.jsonl", output, images=images, similar_names=True)
    else:
        report = prepare_boxes(tmp_path / "x.jsonl", output, source="jsonl", images=images, similar_names=True)
    assert report.renamed == 2
    assert "note: 2 files taken by a similar name (--similar-names), first 'A.jpg' as 'a.jpg'" in capsys.readouterr().out
    written = json.loads((tmp_path / "p.parquet.report.json").read_text())
    assert (written["renamed"], written["examples"]) == (2, {"taken by a similar name": ["'A.jpg' as 'a.jpg'", "'C.JPG' as 'c.jpg'"]})


def test_the_folder_that_was_looked_in_is_named_and_doubted_where_nothing_of_the_table_is_there(tmp_path: Path) -> None:
    images, others = folder_of(tmp_path / "photos", "a.jpg"), folder_of(tmp_path / "others", "z.jpg")
    (tmp_path / "x.csv").write_text("image,caption\na.jpg,x\nb.jpg,y\nc.jpg,z\n")
    with pytest.raises(TooManyBadInputsError, match=rf"first line 3: 'b\.jpg'; looked for in {images}; --max-bad 1"):
        prepare("csv", tmp_path / "x.csv", tmp_path / "p.parquet", images=images)
    with pytest.raises(TooManyBadInputsError, match=rf"'a\.jpg'; nothing of this table is in {others}: is --images right\?$"):
        prepare("csv", tmp_path / "x.csv", tmp_path / "p.parquet", images=others)
    box = {"image": "a.jpg", "width": 9, "height": 9, "boxes": [[1, 1, 5, 5]], "labels": ["dog"]}
    (tmp_path / "b.jsonl").write_text(json.dumps(box))
    with pytest.raises(TooManyBadInputsError, match=rf"nothing of this table is in {others}: is --images right\?$"):
        prepare_boxes(tmp_path / "b.jsonl", tmp_path / "b.parquet", source="jsonl", images=others)
    with pytest.raises(UsageError, match=r"photo does not exist or is not a folder; did you mean .*photos\?"):
        prepare("csv", tmp_path / "x.csv", tmp_path / "p.parquet", images=tmp_path / "photo")


def test_a_short_reading_is_told_by_its_file_and_without_a_pace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.csv").write_text(CSV)
    prepare("csv", tmp_path / "x.csv", tmp_path / "p.parquet")
    size = len(CSV)
    assert capsys.readouterr().out.startswith(f"reading x.csv: {size}/{size} bytes in less than a second\n")


def test_two_files_of_nearly_one_name_are_never_guessed_between_and_links_out_never_followed(tmp_path: Path) -> None:
    images = folder_of(tmp_path / "photos", "a.jpg", "A.jpg", "c.jpg")
    folder_of(tmp_path, "secret.jpg")
    os.symlink(tmp_path / "secret.jpg", images / "b.jpg")
    (tmp_path / "x.csv").write_text("image,caption\na.JPG,x\nB.jpg,y\nC.jpg,z\n")
    report = prepare("csv", tmp_path / "x.csv", tmp_path / "p.parquet", images=images, similar_names=True, max_bad=1.0)
    assert captions_of(tmp_path / "p.parquet") == [("c.jpg", "z")]
    assert report.dropped == {"image file missing": 2}


def test_links_out_of_the_folder_are_told_as_such(tmp_path: Path) -> None:
    images = folder_of(tmp_path / "photos", "a.jpg")
    folder_of(tmp_path, "far.jpg")
    os.symlink(tmp_path / "far.jpg", images / "b.jpg")
    (tmp_path / "x.csv").write_text("image,caption\nb.jpg,y\n")
    with pytest.raises(TooManyBadInputsError, match=r"'b\.jpg' is a link to a file outside --images: give the folder it leads to"):
        prepare("csv", tmp_path / "x.csv", tmp_path / "p.parquet", images=images, max_bad=0)


def test_exchanged_columns_are_told(tmp_path: Path) -> None:
    images = folder_of(tmp_path / "photos", "a.jpg")
    (tmp_path / "x.csv").write_text("photo,says\na.jpg,a dog\na.jpg,a cat\n")
    with pytest.raises(TooManyBadInputsError, match="its caption is an image's name: --captions and --image-field may be exchanged"):
        prepare("csv", tmp_path / "x.csv", tmp_path / "p.parquet", images=images, fields=Fields(captions="photo", image="says"))
    others, right = folder_of(tmp_path / "others", "b.jpg"), Fields(captions="says", image="photo")
    with pytest.raises(TooManyBadInputsError) as caught:
        prepare("csv", tmp_path / "x.csv", tmp_path / "p.parquet", images=others, fields=right)
    assert "--captions" not in str(caught.value)


def test_a_path_with_the_images_folder_in_front_is_told_what_to_give(tmp_path: Path) -> None:
    images = folder_of(tmp_path / "photos", "a.jpg")
    (tmp_path / "x.csv").write_text("image,caption\nphotos/a.jpg,x\nphotos/a.jpg,y\n")
    with pytest.raises(TooManyBadInputsError, match=r"'a.jpg' is there: give --images the folder that 'photos' is in"):
        prepare("csv", tmp_path / "x.csv", tmp_path / "p.parquet", images=images)
    prepare("csv", tmp_path / "x.csv", tmp_path / "p.parquet", images=images.parent)


def test_backslashes_are_told_where_no_folder_is_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.csv").write_text("image,caption\nd\\a.jpg,x\n")
    prepare("csv", tmp_path / "x.csv", tmp_path / "p.parquet")
    assert "note: paths hold backslashes, first 'd\\\\a.jpg'; --similar-names makes slashes of them" in capsys.readouterr().out
    prepare("csv", tmp_path / "x.csv", tmp_path / "p.parquet", similar_names=True)
    assert captions_of(tmp_path / "p.parquet") == [("d/a.jpg", "x")]
    assert "note: 1 files taken by a similar name (--similar-names), first 'd\\\\a.jpg' as 'd/a.jpg'" in capsys.readouterr().out


# --- a table that is there already -------------------------------------------------------------------------------------------------


def test_a_command_typed_twice_goes_through_and_another_table_stays_unless_replaced(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(JSONL)
    pairs = tmp_path / "pairs.parquet"
    command = ["prepare", "jsonl", tmp_path / "x.jsonl", "--output", pairs]
    run(*command)
    first, report = pairs.read_bytes(), (tmp_path / "pairs.parquet.report.json").read_bytes()
    run(*command)
    assert pairs.read_bytes() == first

    (tmp_path / "x.jsonl").write_text(JSONL.replace("dog", "wolf"))
    with pytest.raises(UsageError, match=r"pairs\.parquet is there with other content, and stays: add --replace"):
        run(*command)
    assert (pairs.read_bytes(), (tmp_path / "pairs.parquet.report.json").read_bytes()) == (first, report)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pairs.parquet", "pairs.parquet.report.json", "x.jsonl"]
    run(*command, "--replace")
    assert captions_of(pairs)[0] == ("a.jpg", "A wolf.")


def test_every_table_of_prepare_stays_unless_replaced(tmp_path: Path) -> None:
    files = {"b.jsonl": {"image": "a.jpg", "width": 9, "height": 9, "boxes": [[1, 1, 5, 5]], "labels": ["dog"]}}
    (tmp_path / "b.jsonl").write_text(json.dumps(files["b.jsonl"]))
    (tmp_path / "t_train.tsv").write_text("text\tlabel\nOne\t1\nTwo\t0\n")
    (tmp_path / "x.jsonl").write_text(JSONL)
    run("prepare", "jsonl", tmp_path / "x.jsonl", "--split", "train", "--output", tmp_path / "pairs.parquet")
    commands: dict[str, list[object]] = {
        "boxes": ["boxes", tmp_path / "b.jsonl", "--format", "jsonl"],
        "examples": ["examples", "tsv", tmp_path / "t_train.tsv", "--text", "text", "--label", "label"],
        "negatives": ["negatives", tmp_path / "pairs.parquet", "--top", 1],
    }
    changed = {"boxes": ["--split", "val"], "examples": ["--split", "train", "--regression"], "negatives": ["--top", 2]}
    for name, command in commands.items():
        output = tmp_path / f"{name}.parquet"
        run("prepare", *command, "--output", output)
        content = output.read_bytes()
        run("prepare", *command, "--output", output)
        other = [*command[:-2], *changed[name]] if name == "negatives" else [*command, *changed[name]]
        with pytest.raises(UsageError, match="is there with other content"):
            run("prepare", *other, "--output", output)
        assert output.read_bytes() == content
        run("prepare", *other, "--output", output, "--replace")
        assert output.read_bytes() != content


@pytest.mark.parametrize("lines", ["{broken\n{broken\n", '{"image": "a.jpg", "caption": " "}\n'])
def test_a_refusal_leaves_no_file_behind(tmp_path: Path, lines: str) -> None:
    (tmp_path / "x.jsonl").write_text(lines)
    with pytest.raises((UsageError, TooManyBadInputsError)):
        prepare("jsonl", tmp_path / "x.jsonl", tmp_path / "new" / "p.parquet")
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["x.jsonl"]
