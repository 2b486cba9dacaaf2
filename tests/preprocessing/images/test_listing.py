"""Where images come from: folders, Parquet manifests, tables of paths, tar files; each id once, each file inside its folder."""

import gzip
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megainter.data.tables.boxes import ImageBoxes, write_boxes
from megainter.data.tables.pairs import Pair, write_pairs
from megainter.errors import UsageError
from preprocessing.images.decode import UnreadableImageError, confined, image_size, load_image
from preprocessing.images.listing import ListedImage, list_images, renamed


def picture(number: int, format_: str = "PNG") -> bytes:
    """A small image whose pixels tell its number."""
    buffer = io.BytesIO()
    Image.fromarray(np.full((10 + number, 20, 3), number * 10, np.uint8)).save(buffer, format_)
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))
    return path


def names(source_items: list[ListedImage]) -> list[tuple[str, str]]:
    return [(item.image_id, item.path) for item in source_items]


def test_a_folder_of_images_is_sorted_by_id(tmp_path: Path) -> None:
    for name in ("b.png", "a/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(picture(1))
    assert list_images(tmp_path).items == [ListedImage("a/c", "a/c.png"), ListedImage("b", "b.png")]


def test_images_of_a_manifest_of_pairs_or_boxes(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    pairs = [Pair(f"{n}", f"id-{n // 2}", f"{n // 2}.jpg", "x", "") for n in (5, 4, 1, 0)]
    write_pairs(tmp_path / "pairs.parquet", pairs)
    assert names(list_images(tmp_path / "images", tmp_path / "pairs.parquet").items) == [("id-0", "0.jpg"), ("id-2", "2.jpg")]
    write_boxes(tmp_path / "boxes.parquet", [ImageBoxes("b", "d/b.jpg", 9, 9, np.zeros((0, 4), np.float32), [])])
    assert names(list_images(tmp_path / "images", tmp_path / "boxes.parquet").items) == [("b", "d/b.jpg")]
    with pytest.raises(UsageError, match="does not exist"):
        list_images(tmp_path / "absent", tmp_path / "pairs.parquet")


@pytest.mark.parametrize(
    ("content", "items"),
    [
        ("image\nb/2.jpg\na.jpg\n", [("a", "a.jpg"), ("b/2", "b/2.jpg")]),
        ("image_id,image\n7,a.jpg\n3,b.jpg\n", [("3", "b.jpg"), ("7", "a.jpg")]),
        ("image\tcaption\na, b.jpg\tTwo dogs, one cat\n", [("a, b", "a, b.jpg")]),
        ("image;image_id\r\na.jpg;日本\r\n", [("日本", "a.jpg")]),
        ('\ufeffimage,image_id\n"with, comma.jpg",x\n', [("x", "with, comma.jpg")]),
        ("image,image_id\na.jpg,1\na.jpg,1\n", [("1", "a.jpg")]),
    ],
)
def test_a_table_of_paths(tmp_path: Path, content: str, items: list[tuple[str, str]]) -> None:
    (tmp_path / "table").write_text(content, encoding="utf-8", newline="")
    assert names(list_images(tmp_path, tmp_path / "table").items) == items


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "neither a Parquet manifest nor a table with a column 'image'"),
        (b"path,caption\n", "neither a Parquet manifest nor a table with a column 'image'"),
        (b"image|image_id\na|b\n", "neither a Parquet manifest nor a table"),
        (b"image,image\na.jpg,b.jpg\n", "a column name twice"),
        (b"image\n", "has no rows"),
        (b"image,image_id\na.jpg\n", "line 2 has 1 cells for 2 columns"),
        (b"image\na.jpg\n../b.jpg\n", "line 3: image '../b.jpg' leaves the images folder"),
        (b"image\n/etc/passwd\n", "line 2: image '/etc/passwd' leaves"),
        (b"image,image_id\na.jpg,\n", "line 2 has an empty image_id"),
        (b"image,image_id\na.jpg,1\nc.jpg,2\nb.jpg,1\n", r"line 4: image id '1' has two files, 'a.jpg' \(line 2\) and 'b.jpg'"),
        (b'image\n"a.jpg\n', "cannot be read"),
        (b"image\na\xe9.jpg\n", "is not UTF-8"),
        (b"PAR1 but not really", "is cut off: it begins as a Parquet file"),
    ],
)
def test_a_table_that_cannot_be_right_is_refused_by_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "table").write_bytes(content)
    with pytest.raises(UsageError, match=message) as caught:
        list_images(tmp_path, tmp_path / "table")
    assert "\n" not in str(caught.value)


def test_a_repeated_row_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "table").write_text("image\na.jpg\nb.jpg\na.jpg\na.jpg\n")
    assert len(list_images(tmp_path, tmp_path / "table").items) == 2
    assert "2 rows name an image again" in capsys.readouterr().out


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A folder of two tar files with three images among captions, a link and names that would leave a folder."""
    folder = tmp_path / "shards"
    folder.mkdir()
    write_tar(folder / "0.tar", {"./b.png": picture(1), "b.txt": b"caption", "../../up.jpg": picture(2, "JPEG"), "._b.png": b"x"})
    write_tar(folder / "1.tar", {"c.cls": b"1", "d/c.webp": picture(3, "WEBP")})
    with tarfile.open(folder / "1.tar", "a") as archive:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    return folder


def test_members_of_tar_files_are_read_where_they_stand_in_their_order(shards: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    source = list_images(shards)
    assert names(source.items) == [("b", "0.tar"), ("../../up", "0.tar"), ("d/c", "1.tar")]
    for number, item in enumerate(source.items, 1):
        path = confined(source.root, item.path)
        assert image_size(path, item.part) == (20, 10 + number)
        pixels = np.asarray(load_image(path, part=item.part))
        np.testing.assert_allclose(pixels, number * 10, atol=2)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_glob_and_a_single_tar_file(shards: Path) -> None:
    assert list_images(Path(f"{shards}/*.tar")) == list_images(shards)
    assert names(list_images(shards / "1.tar").items) == [("d/c", "1.tar")]
    assert list_images(Path(f"{shards.parent}/sh*/?.tar")).items[0].path == "shards/0.tar"
    with pytest.raises(UsageError, match="no tar file matches"):
        list_images(Path(f"{shards}/*.tgz"))


def test_a_key_in_two_tar_files_is_refused_with_both(shards: Path) -> None:
    write_tar(shards / "2.tar", {"b.jpg": picture(4, "JPEG")})
    with pytest.raises(UsageError, match=r"image id 'b' stands in 0\.tar and in 2\.tar"):
        list_images(shards)


def test_images_beside_tar_files_are_ambiguous(shards: Path) -> None:
    (shards / "a.jpg").write_bytes(b"x")
    with pytest.raises(UsageError, match="holds both images and tar files"):
        list_images(shards)


def test_tar_files_that_are_cut_off_compressed_or_none(shards: Path) -> None:
    whole = (shards / "0.tar").read_bytes()
    tar = shards / "1.tar"
    images = [item.part for item in list_images(shards / "0.tar").items]
    boundary = 512 * 2 + 512  # after the first member: header, one block of data, and the next member's header is missing
    assert images[0] is not None
    for cut in (0, 1, 511, 513, boundary, len(whole) // 2 // 512 * 512, *range(512, 4096, 512)):
        tar.write_bytes(whole[: min(cut, len(whole.rstrip(b"\0")))])
        with pytest.raises(UsageError, match=r"1\.tar is not a whole, uncompressed tar file"):
            list_images(tar)
    tar.write_bytes(gzip.compress(whole))
    with pytest.raises(UsageError, match="unpack a compressed one"):
        list_images(tar)
    write_tar(tar, {"a.txt": b"x"})
    with pytest.raises(UsageError, match="holds no images"):
        list_images(tar)


def test_a_member_with_damaged_content_is_an_unreadable_image(shards: Path) -> None:
    tar = write_tar(shards / "1.tar", {"half.png": picture(1)[:45], "none.png": b"", "whole.png": picture(5)})
    source = list_images(tar)
    reasons = []
    for item in source.items[:2]:
        with pytest.raises(UnreadableImageError) as caught:
            load_image(tar, part=item.part)
        reasons.append(caught.value.reason)
    assert reasons[1] == "empty file"
    assert load_image(tar, part=source.items[2].part).size == (20, 15)


def test_ids_by_a_pattern_of_a_folder_a_table_and_tar_files(tmp_path: Path) -> None:
    for name in ("val2014/COCO_val2014_000000391895.png", "val2014/COCO_val2014_000000000012.png"):
        (tmp_path / "a" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "a" / name).write_bytes(picture(1))
    assert [item.image_id for item in renamed(list_images(tmp_path / "a"), "{number}").items] == ["12", "391895"]
    (tmp_path / "t.csv").write_text("image,image_id\nval2014/COCO_val2014_000000000012.png,beach/7\n")
    table = renamed(list_images(tmp_path / "a", tmp_path / "t.csv"), "vg-{number:04d}")
    assert table.items == [ListedImage("vg-0007", "val2014/COCO_val2014_000000000012.png")]
    (tmp_path / "tars").mkdir()
    for shard in range(2):
        write_tar(tmp_path / "tars" / f"{shard}.tar", {f"s{shard}/{n}.png": picture(n) for n in range(2)})
    plain, tars = list_images(tmp_path / "tars"), renamed(list_images(tmp_path / "tars"), "{folder}_{stem}")
    assert [item.image_id for item in tars.items] == ["s0_0", "s0_1", "s1_0", "s1_1"]
    assert [item[1:] for item in tars.items] == [item[1:] for item in plain.items], "files and places stay"


@pytest.mark.parametrize(
    ("names", "pattern", "told"),
    [
        (["a/1.png", "b/1.png", "b/2.png"], "{stem}", r"'a/1.png' and 'b/1.png' would both have the image id '1'; give"),
        (["VG_100K/7.png", "VG_100K_2/007.png", "x/07.png"], "{number}", r"would both have the image id '7', and 1 more; give"),
        (["a/1.png", "a/2.png"], "{folder}", r"'a/1.png' and 'a/2.png' would both have the image id 'a'"),
        (["1.png", "beach.png"], "{number}", r"'beach.png' in .*: id 'beach' has no number for --ids '{number}'"),
        (["1.png"], "{folder}", r"--ids '{folder}' makes an empty id of '1'"),
        (["1.png"], "{row}", r"its parts are {id}, {stem}, {folder} and {number}"),
    ],
)
def test_patterns_that_do_not_tell_images_apart_are_refused_with_both_files(
    tmp_path: Path, names: list[str], pattern: str, told: str
) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(picture(1))
    with pytest.raises(UsageError, match=told):
        renamed(list_images(tmp_path), pattern)


def test_members_of_tar_files_that_would_share_an_id_are_named_with_their_files(tmp_path: Path) -> None:
    for shard in range(2):
        write_tar(tmp_path / f"{shard}.tar", {f"s{shard}/beach.png": picture(1)})
    with pytest.raises(UsageError, match=r"'s0/beach' of '0.tar' and 's1/beach' of '1.tar' would both have the image id 'beach'"):
        renamed(list_images(tmp_path), "{stem}")
