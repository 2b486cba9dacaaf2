"""Captions that come with addresses: Conceptual Captions, SBU, img2dataset's tables; files under the names downloaders give."""

import binascii
import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megainter.data.tables.pairs import read_pairs
from megainter.errors import TooManyBadInputsError, UsageError
from preprocessing.prepare.caption_sources.addresses import Address, names_of
from preprocessing.prepare.captions import prepare
from preprocessing.prepare.reading import Fields

URLS = ["http://a.com/x/one.jpg?size=2", "https://b.org/two", "http://c.net/bär/three.png"]
CAPTIONS = ["a dog runs", "the sea", "ein Bär"]


def crc(url: str) -> str:
    return str(binascii.crc32(url.encode("utf-8")) & 0xFFFFFFFF)


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    return folder


def found(path: Path) -> list[tuple[str, str, str]]:
    """(image, caption, split) of every row."""
    table = read_pairs(path).table
    return list(zip(*(table.column(name).to_pylist() for name in ("image", "caption", "split")), strict=True))


def tsv(path: Path, rows: list[tuple[str, ...]]) -> Path:
    path.write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_conceptual_captions_under_the_crc32_of_the_address(tmp_path: Path) -> None:
    src = tsv(tmp_path / "Train_GCC-training.tsv", list(zip(CAPTIONS, URLS, strict=True)))
    images = touch(tmp_path / "images", f"training/{crc(URLS[0])}", f"{crc(URLS[2])}.jpg")
    report = prepare("conceptual-captions", src, tmp_path / "p.parquet", images=images, max_bad=0.5)
    assert found(tmp_path / "p.parquet") == [
        (f"training/{crc(URLS[0])}", CAPTIONS[0], "train"),
        (f"{crc(URLS[2])}.jpg", CAPTIONS[2], "train"),
    ]
    assert report.dropped == {"image file missing": 1}
    assert report.examples["image file missing"] == [f"2: {crc(URLS[1])!r}"]


def test_columns_the_other_way_round_and_further_ones(tmp_path: Path) -> None:
    src = tsv(tmp_path / "cc12m.tsv", [(URLS[0], CAPTIONS[0]), (URLS[1], CAPTIONS[1])])
    prepare("conceptual-captions", src, tmp_path / "p.parquet")
    assert found(tmp_path / "p.parquet") == [(crc(URLS[0]), CAPTIONS[0], ""), (crc(URLS[1]), CAPTIONS[1], "")]
    src = tsv(tmp_path / "Validation_GCC-1.1.0-Validation.tsv", [(CAPTIONS[0], URLS[0], "label,label", "0.9")])
    prepare("conceptual-captions", src, tmp_path / "p.parquet")
    assert found(tmp_path / "p.parquet") == [(crc(URLS[0]), CAPTIONS[0], "val")]


PATTERNS = [
    ("{row:09d}.jpg", "000000001.jpg"),
    ("{line}.png", "2.png"),
    ("{crc32}.jpg", crc(URLS[2]) + ".jpg"),
    ("{md5}", hashlib.md5(URLS[2].encode()).hexdigest()),
    ("d/{name}", "d/three.png"),
    ("{stem}.webp", "three.webp"),
    ("{shard}/{key}.jpg", "00003/000030001.jpg"),
]


@pytest.mark.parametrize(("pattern", "path"), PATTERNS)
def test_patterns_of_file_names(pattern: str, path: str) -> None:
    address = Address(2, URLS[2], shard="00003", key="000030001")
    assert names_of(f"x{{row}}, {pattern}")(address) == ("x1", path)


@pytest.mark.parametrize(
    "pattern", ["", "a.jpg", "{url}", "{row.real}", "{row!r:{line}}", "{", "{}", "{row:q}", "{crc32},", "{row[0]}", "{name:9d}"]
)
def test_patterns_that_name_nothing_are_refused(pattern: str) -> None:
    with pytest.raises(UsageError, match="image names"):
        names_of(pattern)


def test_an_address_cannot_leave_the_images_folder(tmp_path: Path) -> None:
    src = tsv(tmp_path / "x.tsv", [("a", "http://a.com/.."), ("b", "http://a.com/b.jpg"), ("c", "http://a.com/c/")])
    report = prepare("conceptual-captions", src, tmp_path / "p.parquet", fields=Fields(image_names="{name}"), max_bad=1.0)
    assert [image for image, _, _ in found(tmp_path / "p.parquet")] == ["b.jpg"]
    assert report.dropped == {"malformed": 2}


def test_files_that_two_addresses_share_are_left_out(tmp_path: Path) -> None:
    """One address twice is one image with two captions; two addresses of one name are one file of which nobody knows whose it is."""
    rows = [("one", "http://a/1.jpg"), ("two", "http://a/2.jpg"), ("again", "http://a/1.jpg"), ("other", "http://b/2.jpg")]
    src = tsv(tmp_path / "x.tsv", rows)
    report = prepare("conceptual-captions", src, tmp_path / "p.parquet", fields=Fields(image_names="{name}"))
    assert found(tmp_path / "p.parquet") == [("1.jpg", "one", ""), ("1.jpg", "again", "")]
    assert report.dropped == {"file name shared by several addresses": 2}


def test_bad_lines_of_a_list_are_counted(tmp_path: Path) -> None:
    (tmp_path / "x.tsv").write_bytes(b"a\thttp://a/1\n\nno address\n\thttp://a/2\n\xff\thttp://a/3\n")
    report = prepare("conceptual-captions", tmp_path / "x.tsv", tmp_path / "p.parquet", max_bad=0.9)
    assert (report.kept, report.dropped) == (1, {"malformed": 2, "blank caption": 1})
    assert report.examples["malformed"] == ["3: not 'caption<tab>address'", "5: not UTF-8"]


def sbu_files(folder: Path, captions: list[str], urls: list[str]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "SBU_captioned_photo_dataset_captions.txt").write_text("\n".join(captions) + "\n")
    (folder / "SBU_captioned_photo_dataset_urls.txt").write_text("\n".join(urls) + "\n")
    return folder


def test_sbu_as_two_text_files_and_as_one_document(tmp_path: Path) -> None:
    urls = [f"http://static.flickr.com/27{n}/43850{n}_b0f2.jpg" for n in range(3)]
    folder = sbu_files(tmp_path / "sbu", CAPTIONS, urls)
    expected = [(f"43850{n}_b0f2.jpg", CAPTIONS[n], "") for n in range(3)]
    document = tmp_path / "sbu-captions-all.json"
    document.write_text(json.dumps({"image_urls": urls, "captions": CAPTIONS}))
    for src in (folder, folder / "SBU_captioned_photo_dataset_captions.txt", document):
        prepare("sbu", src, tmp_path / "p.parquet")
        assert found(tmp_path / "p.parquet") == expected
    images = touch(tmp_path / "images", "dataset/438501_b0f2.jpg")
    prepare("sbu", folder, tmp_path / "p.parquet", images=images, max_bad=0.9)
    assert found(tmp_path / "p.parquet") == [("dataset/438501_b0f2.jpg", CAPTIONS[1], "")]


def test_sbu_files_of_different_lengths_are_refused(tmp_path: Path) -> None:
    folder = sbu_files(tmp_path / "sbu", CAPTIONS, URLS[:2])
    with pytest.raises(UsageError, match="not equally long"):
        prepare("sbu", folder, tmp_path / "p.parquet")
    (folder / "SBU_captioned_photo_dataset_urls.txt").unlink()
    with pytest.raises(UsageError, match="does not exist; SBU's captions and addresses stand in two files"):
        prepare("sbu", folder, tmp_path / "p.parquet")


def img2dataset(folder: Path) -> Path:
    """Two shards as its "files" output format leaves them."""
    folder.mkdir()
    for shard in range(2):
        keys = [f"{shard:05d}{n:04d}" for n in range(3)]
        columns = {
            "url": [f"http://a/{key}" for key in keys],
            "caption": [f"caption {key}" for key in keys],
            "key": keys,
            "status": ["success", "failed_to_download", "success"],
            "width": [256, None, 256],
        }
        pq.write_table(pa.table(columns), folder / f"{shard:05d}.parquet")
        touch(folder, *(f"{shard:05d}/{key}.jpg" for key in keys[::2]))
    return folder


@pytest.mark.parametrize("source", ["parquet", "conceptual-captions", "sbu"])
def test_tables_of_img2dataset(tmp_path: Path, source: str) -> None:
    folder = img2dataset(tmp_path / "cc3m")
    report = prepare(source, folder, tmp_path / "p.parquet", images=folder, split="train")  # type: ignore[arg-type]
    keys = ["000000000", "000000002", "000010000", "000010002"]
    assert found(tmp_path / "p.parquet") == [(f"{key[:5]}/{key}.jpg", f"caption {key}", "train") for key in keys]
    assert report.dropped == {"not downloaded": 2}
    assert report.examples["not downloaded"][1] == "5: 'http://a/000010001' failed_to_download"


def test_one_shard_of_img2dataset_in_a_tar(tmp_path: Path) -> None:
    folder = img2dataset(tmp_path / "cc3m")
    prepare("parquet", folder / "00001.parquet", tmp_path / "p.parquet", fields=Fields(image_names="{key}.jpg"))
    assert [image for image, _, _ in found(tmp_path / "p.parquet")] == ["000010000.jpg", "000010002.jpg"]


def test_names_that_a_source_has_no_use_for_are_refused(tmp_path: Path) -> None:
    src = tsv(tmp_path / "x.tsv", [("a", "http://a/1")])
    with pytest.raises(UsageError, match="conceptual-captions has no captions to name, but 'en' was given"):
        prepare("conceptual-captions", src, tmp_path / "p.parquet", fields=Fields(captions="en"))
    with pytest.raises(UsageError, match="coco has no image names to name"):
        prepare("coco", src, tmp_path / "p.parquet", fields=Fields(image_names="{row}"))
    with pytest.raises(TooManyBadInputsError, match="not 'caption<tab>address'"):
        prepare("conceptual-captions", tsv(tmp_path / "y.tsv", [("a", "b")]), tmp_path / "p.parquet")
