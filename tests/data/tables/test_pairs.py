"""Manifests: round trips, a digest that is the content's, and a clear refusal of everything a later stage would trip over."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megainter.data.tables.boxes import ImageBoxes, is_boxes_manifest, read_boxes, write_boxes
from megainter.data.tables.pairs import PAIRS_SCHEMA, DuplicatePairError, Pair, read_pairs, write_pairs
from megainter.data.tables.parquet import record_batch, write_batches
from megainter.errors import NoSpaceError, UsageError
from megainter.files import aside


def some_pairs(count: int = 50) -> list[Pair]:
    return [Pair(f"p{n}", f"im/{n // 5}", f"im/{n // 5}.jpg", f"caption {n} é中文 🙂", ("train", "val", "")[n % 3]) for n in range(count)]


def box_row(**changes: object) -> ImageBoxes:
    boxes = np.array([[0, 0, 100, 50], [1, 2, 3.5, 4]], np.float32)
    return replace(ImageBoxes("a", "a.jpg", 100, 50, boxes, ["dog", "cat"], "train"), **changes)  # type: ignore[arg-type]


def test_pairs_come_back_as_written_and_images_are_numbered_in_order_of_appearance(tmp_path: Path) -> None:
    rows = some_pairs()
    assert write_pairs(tmp_path / "p.parquet", rows) == 50
    pairs = read_pairs(tmp_path / "p.parquet")
    assert [(pairs.pair_id(n), pairs.image_id(n), pairs.caption(n)) for n in range(len(pairs))] == [
        (row.pair_id, row.image_id, row.caption) for row in rows
    ]
    assert pairs.image_ids == list(dict.fromkeys(row.image_id for row in rows))
    assert pairs.image_numbers.dtype == np.int32
    assert pairs.image_numbers.tolist() == [pairs.image_ids.index(row.image_id) for row in rows]


def test_a_split_keeps_its_rows_only(tmp_path: Path) -> None:
    write_pairs(tmp_path / "p.parquet", some_pairs())
    val = read_pairs(tmp_path / "p.parquet", "val")
    assert [val.pair_id(n) for n in range(len(val))] == [row.pair_id for row in some_pairs() if row.split == "val"]
    with pytest.raises(UsageError, match=r"no rows of split 'test'; it has .*train 17"):
        read_pairs(tmp_path / "p.parquet", "test")


def test_the_digest_is_of_the_content_not_of_the_encoding(tmp_path: Path) -> None:
    path, other = tmp_path / "p.parquet", tmp_path / "q.parquet"
    write_pairs(path, some_pairs())
    pairs = read_pairs(path)
    pq.write_table(pairs.table, other, row_group_size=7, compression=None, use_dictionary=False)
    assert read_pairs(other).digest == pairs.digest
    rows = some_pairs()
    for changed in ([replace(rows[0], caption="x"), *rows[1:]], rows[:-1], [rows[1], rows[0], *rows[2:]]):
        write_pairs(other, changed)
        assert read_pairs(other).digest != pairs.digest
    one, cut_elsewhere = (
        [replace(rows[0], pair_id="ab"), replace(rows[1], pair_id="c")],
        [replace(rows[0], pair_id="a"), replace(rows[1], pair_id="bc")],
    )
    digests = [write_pairs(other, both) and read_pairs(other).digest for both in (one, cut_elsewhere)]
    assert digests[0] != digests[1]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"pair_id": "p0"}, "pair id 'p0' stands in rows 1 and 7"),
        ({"pair_id": ""}, "row 7 has an empty pair_id"),
        ({"image": ""}, "row 7 has an empty image"),
        ({"split": "dev"}, "split 'dev' is not one of"),
        ({"image": "../x.jpg"}, "row 7: image '../x.jpg' leaves the images folder"),
        ({"image": "/etc/passwd"}, "row 7: image '/etc/passwd' leaves"),
        ({"image": "a/../../b.jpg"}, "leaves the images folder"),
        ({"image_id": "im/0", "image": "other.jpg"}, "image id 'im/0' has two files"),
        ({"caption": None}, "row 7 has no caption"),
    ],
)
def test_a_foreign_manifest_with_a_bad_row_is_refused_by_row(tmp_path: Path, changed: dict, message: str) -> None:
    rows = some_pairs()
    rows[6] = replace(rows[6], **changed)
    columns = {name: [getattr(row, name) for row in rows] for name in PAIRS_SCHEMA.names}
    pq.write_table(pa.table(columns, PAIRS_SCHEMA), tmp_path / "p.parquet")
    with pytest.raises(UsageError, match=message):
        read_pairs(tmp_path / "p.parquet")


def test_writing_refuses_a_pair_id_that_comes_twice_and_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(DuplicatePairError) as caught:
        write_pairs(tmp_path / "p.parquet", [*some_pairs(9), some_pairs(9)[3]])
    assert (caught.value.pair_id, caught.value.first, caught.value.second) == ("p3", 3, 9)
    assert list(tmp_path.iterdir()) == []


def test_writing_streams_and_an_error_on_the_way_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    write_pairs(path, some_pairs())
    before = path.read_bytes()

    def failing() -> Iterator[Pair]:
        yield from some_pairs(10)
        raise UsageError("the source broke")

    with pytest.raises(UsageError, match="the source broke"):
        write_pairs(path, failing())
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["p.parquet"]


@pytest.mark.parametrize("content", [b"", b"PAR1 but not really", b"<html>"])
def test_what_is_no_parquet_file_is_said_to_be_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "p.parquet").write_bytes(content)
    told = "is cut off: it begins as a Parquet file" if content.startswith(b"PAR1") else "is not a Parquet file"
    with pytest.raises(UsageError, match=told):
        read_pairs(tmp_path / "p.parquet")
    with pytest.raises(UsageError, match="does not exist"):
        read_pairs(tmp_path / "absent.parquet")


def test_another_table_is_refused_with_the_columns_it_lacks(tmp_path: Path) -> None:
    pq.write_table(pa.table({"caption": ["x"], "url": ["y"]}), tmp_path / "p.parquet")
    with pytest.raises(UsageError, match="no column pair_id, image_id, image, split"):
        read_pairs(tmp_path / "p.parquet")
    pq.write_table(pa.table({"url": ["y"]}), tmp_path / "q.parquet")
    with pytest.raises(UsageError, match="is no manifest"):
        is_boxes_manifest(tmp_path / "q.parquet")


def test_boxes_come_back_as_written(tmp_path: Path) -> None:
    rows = [box_row(), box_row(image_id="b", image="b.jpg", boxes=np.zeros((0, 4), np.float32), labels=[], split="")]
    assert write_boxes(tmp_path / "b.parquet", rows) == 2
    assert is_boxes_manifest(tmp_path / "b.parquet")
    back = read_boxes(tmp_path / "b.parquet")
    for row, other in zip(rows, back, strict=True):
        np.testing.assert_array_equal(row.boxes, other.boxes)
        assert {**vars(row), "boxes": None} == {**vars(other), "boxes": None}
    assert [row.image_id for row in read_boxes(tmp_path / "b.parquet", "train")] == ["a"]


@pytest.mark.parametrize("box", [[10, 10, 5, 20], [0, 0, 200, 10], [-5, 0, 10, 10], [0, 0, float("nan"), 1], [60, 30, 60, 70]])
def test_boxes_that_are_not_xyxy_inside_their_image_are_refused(tmp_path: Path, box: list[float]) -> None:
    with pytest.raises(UsageError, match=r"image 'a' \(100 x 50\) has box .* not x1, y1, x2, y2 inside it"):
        write_boxes(tmp_path / "b.parquet", [box_row(boxes=np.array([box], np.float32), labels=["dog"])])


def test_boxes_without_labels_and_images_twice_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="for 1 labels"):
        write_boxes(tmp_path / "b.parquet", [box_row(labels=["dog"])])
    with pytest.raises(UsageError, match="size 0 x 50"):
        write_boxes(tmp_path / "b.parquet", [box_row(width=0)])
    write_boxes(tmp_path / "b.parquet", [box_row(), box_row()])
    with pytest.raises(UsageError, match="image id 'a' stands in two rows"):
        read_boxes(tmp_path / "b.parquet")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full")
def test_a_full_disk_is_said_to_be_full(tmp_path: Path) -> None:
    columns = [[getattr(row, name) for row in some_pairs()] for name in PAIRS_SCHEMA.names]
    batch = record_batch(tmp_path / "p.parquet", columns, PAIRS_SCHEMA)
    with pytest.raises(NoSpaceError, match=r"p\.parquet cannot be written: no space left"), aside(tmp_path / "p.parquet"):
        write_batches(Path("/dev/full"), PAIRS_SCHEMA, [batch] * 1000)
    assert list(tmp_path.iterdir()) == []


def test_another_table_is_not_overwritten(tmp_path: Path) -> None:
    write_boxes(tmp_path / "t.parquet", [box_row()])
    with pytest.raises(UsageError, match=r"t\.parquet is there, and is another file than this command writes"):
        write_pairs(tmp_path / "t.parquet", some_pairs())
    assert len(read_boxes(tmp_path / "t.parquet")) == 1
