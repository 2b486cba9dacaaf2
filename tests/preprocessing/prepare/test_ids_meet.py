"""Ids of captions and of regions meet: by the rule, by a pattern, or by what a store calls its images."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from megainter.data.feature_store import FeatureStore
from megainter.data.image_ids import match
from megainter.data.tables.boxes import read_boxes
from megainter.data.tables.labelled import read_examples
from megainter.data.tables.pairs import read_pairs
from megainter.errors import UsageError
from preprocessing.features.importing import import_features
from preprocessing.images.listing import list_images
from preprocessing.prepare.boxes import prepare_boxes
from preprocessing.prepare.captions import prepare
from preprocessing.prepare.labelled import Options, prepare_examples
from preprocessing.prepare.labelled_images import ImageOptions
from tests.foreign import Image as Regions
from tests.foreign import b64, failures, make_image
from tests.preprocessing.features.formats.test_other_formats import mmf_row, write_mmf


def ids(manifest: Path) -> list[str]:
    return read_pairs(manifest).table.column("image_id").to_pylist()


def jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 24)).save(buffer, "JPEG")
    return buffer.getvalue()


def downloaded(folder: Path, tars: bool) -> Path:
    """As img2dataset: ten rows in two shards, of which eight were downloaded, in tar files or as files."""
    folder.mkdir()
    for shard in (0, 2):
        rows = []
        for n in range(5):
            key, there = f"{shard:05d}{n:04d}", n != 2
            rows.append({"url": f"http://a/{n}.jpg", "caption": f"caption {n}", "key": key, "status": "success" if there else "failed"})
        if tars:
            with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
                for row in rows:
                    if row["status"] == "success":
                        member = tarfile.TarInfo(f"{row['key']}.jpg")
                        member.size = len(jpeg())
                        tar.addfile(member, io.BytesIO(jpeg()))
        else:
            (folder / f"{shard:05d}").mkdir()
            for row in rows:
                if row["status"] == "success":
                    (folder / f"{shard:05d}" / f"{row['key']}.jpg").write_bytes(jpeg())
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{shard:05d}.parquet")
    return folder


@pytest.mark.parametrize("tars", [True, False])
@pytest.mark.parametrize("source", ["conceptual-captions", "parquet"])
def test_what_img2dataset_wrote_meets_without_an_option(tmp_path: Path, tars: bool, source: str) -> None:
    folder = downloaded(tmp_path / "x", tars)
    prepare(source, folder, tmp_path / "p")  # type: ignore[arg-type]
    found = {item.image_id for item in list_images(folder).items}
    assert len(ids(tmp_path / "p")) == 8
    assert set(ids(tmp_path / "p")) == found


def test_visual_genome_in_its_folders_meets_by_the_images_folder(tmp_path: Path) -> None:
    for name in ("VG_100K/1.jpg", "VG_100K_2/2.jpg"):
        (tmp_path / "images" / name).parent.mkdir(parents=True)
        (tmp_path / "images" / name).write_bytes(jpeg())
    regions = [
        {"id": n, "regions": [{"region_id": 10 * n, "image_id": n, "phrase": "a man", "x": 1, "y": 1, "width": 2, "height": 2}]}
        for n in (1, 2)
    ]
    (tmp_path / "region_descriptions.json").write_text(json.dumps(regions))
    prepare("visual-genome", tmp_path / "region_descriptions.json", tmp_path / "p", images=tmp_path / "images")
    assert set(ids(tmp_path / "p")) == {item.image_id for item in list_images(tmp_path / "images").items} == {"VG_100K/1", "VG_100K_2/2"}
    prepare("visual-genome", tmp_path / "region_descriptions.json", tmp_path / "q")
    assert ids(tmp_path / "q") == ["1", "2"]


def karpathy(path: Path, numbers: list[int]) -> Path:
    entries = [
        {
            "filename": f"COCO_val2014_{n:012d}.jpg",
            "filepath": "val2014",
            "split": "val",
            "sentences": [{"raw": f"caption {n}", "sentid": n}],
        }
        for n in numbers
    ]
    path.write_text(json.dumps({"images": entries, "dataset": "coco"}))
    return path


def butd(path: Path, images: list[Regions]) -> Path:
    lines = ["\t".join(map(str, (one.image_id, one.width, one.height, len(one), b64(one.boxes), b64(one.features)))) for one in images]
    path.write_text("\n".join(lines))
    return path


def test_captions_of_coco_meet_public_features_by_their_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    numbers = [391895, 522418, 12, 13]
    src, tsv = karpathy(tmp_path / "dataset_coco.json", numbers), butd(tmp_path / "f.tsv", [make_image(n, str(n)) for n in numbers[:3]])
    import_features(tsv, tmp_path / "s")
    report = prepare("coco", src, tmp_path / "p", store=tmp_path / "s")
    assert report.kept == 4
    assert ids(tmp_path / "p") == ["391895", "522418", "12", "val2014/COCO_val2014_000000000013"]
    told = (
        "3 of 4 images are in {} by their number; not 'val2014/COCO_val2014_000000000013' (the store has '12' and others); 1 captions of "
        "the others stay: --only-stored drops them, "
    )
    assert told.format(tmp_path / "s") in capsys.readouterr().out
    prepare("coco", src, tmp_path / "q", ids="{number}")
    assert ids(tmp_path / "q") == ["391895", "522418", "12", "13"]
    import_features(tsv, tmp_path / "t", ids="val2014/COCO_val2014_{number:012d}")
    prepare("coco", src, tmp_path / "r")
    with FeatureStore(tmp_path / "t") as store:
        assert sum(image_id in store for image_id in ids(tmp_path / "r")) == 3


def test_only_what_a_store_has_is_kept_where_that_is_asked_for(tmp_path: Path) -> None:
    """And a pair that comes twice behind what was dropped is still told by its own line."""
    import_features(butd(tmp_path / "f.tsv", [make_image(n, str(n)) for n in (1, 2)]), tmp_path / "s")
    lines = [{"image": f"{n}.jpg", "captions": ["x", "y"], "split": split} for n, split in ((3, "val"), (1, "train"), (2, "train"))]
    src = tmp_path / "x.jsonl"
    src.write_text("\n".join(map(json.dumps, lines)))
    report = prepare("jsonl", src, tmp_path / "p", store=tmp_path / "s", only_stored=True)
    assert ids(tmp_path / "p") == ["1", "1", "2", "2"]
    assert (report.kept, report.images, report.splits) == (4, 2, {"train": 4})
    assert (report.dropped, report.bad()) == ({"image not in the store": 2}, 0)
    assert report.examples["image not in the store"] == ["1: '3'", "1: '3'"]

    src.write_text("\n".join(map(json.dumps, [*lines, lines[1]])))
    with pytest.raises(UsageError, match="comes in line 2 and again in line 4"):
        prepare("jsonl", src, tmp_path / "q", store=tmp_path / "s", only_stored=True)
    with pytest.raises(UsageError, match="give it as --store"):
        prepare("jsonl", src, tmp_path / "q", only_stored=True)


def test_a_store_of_other_images_is_refused_with_an_id_of_each_side(tmp_path: Path) -> None:
    import_features(butd(tmp_path / "f.tsv", [make_image(n, f"beach {n}") for n in range(3)]), tmp_path / "s")
    src = karpathy(tmp_path / "d.json", [1, 2])
    with pytest.raises(
        UsageError, match=r"0 of 2 images are in .*; not 'val2014/COCO_val2014_0+1' \(the store has 'beach 0' and others\): name the images"
    ):
        prepare("coco", src, tmp_path / "p", store=tmp_path / "s")
    assert not (tmp_path / "p").exists()


def test_ids_that_a_pattern_does_not_fit_are_counted_and_named(tmp_path: Path) -> None:
    images = [make_image(n, name) for n, name in enumerate(("COCO_val2014_000000000007", "beach", "8"))]
    done = import_features(butd(tmp_path / "f.tsv", images), tmp_path / "s", ids="{number}", max_bad=0.5)
    assert (done.stored, done.bad) == (2, 1)
    assert failures(tmp_path / "s") == {"line 2": "id 'beach' has no number for --ids"}
    with FeatureStore(tmp_path / "s") as store:
        assert sorted(store.ids[:]) == ["7", "8"]
        np.testing.assert_array_equal(store["7"].boxes, images[0].boxes)
    (tmp_path / "x.jsonl").write_text('{"image": "1.jpg", "caption": "a"}\n{"image": "b.jpg", "captions": ["x", "y"]}\n')
    report = prepare("jsonl", tmp_path / "x.jsonl", tmp_path / "p", ids="{number}", max_bad=0.9)
    assert (report.kept, report.dropped) == (1, {"malformed": 2})


def test_questions_and_boxes_of_coco_meet_public_features_too(tmp_path: Path) -> None:
    import_features(butd(tmp_path / "f.tsv", [make_image(n, str(n)) for n in (7, 8)]), tmp_path / "s")
    questions = [{"image_id": n, "question": "Is it?", "question_id": n} for n in (7, 8)]
    answer = {"question_type": "is it", "answer_type": "yes/no", "multiple_choice_answer": "yes", "answers": [{"answer": "yes"}]}
    (tmp_path / "q_val2014.json").write_text(json.dumps({"questions": questions, "data_subtype": "val2014"}))
    (tmp_path / "a.json").write_text(json.dumps({"annotations": [answer | {"question_id": n} for n in (7, 8)]}))
    options = Options(images=ImageOptions((tmp_path / "a.json",), least=1))
    prepare_examples("vqa", [tmp_path / "q_val2014.json"], tmp_path / "e", options=options, store=tmp_path / "s")
    assert [read_examples(tmp_path / "e")[n].images for n in (0, 1)] == [("7",), ("8",)]
    images = [{"id": 7, "file_name": "COCO_val2014_000000000007.jpg", "width": 9, "height": 9}]
    boxes = [{"image_id": 7, "category_id": 1, "bbox": [1, 1, 5, 5]}]
    (tmp_path / "instances.json").write_text(json.dumps({"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "dog"}]}))
    prepare_boxes(tmp_path / "instances.json", tmp_path / "b", ids="{number}")
    assert [row.image_id for row in read_boxes(tmp_path / "b")] == ["7"]


def test_snli_ve_without_labels_is_kept_to_predict_and_without_agreement_left_out(tmp_path: Path) -> None:
    lines = [{"Flickr30K_ID": f"{n}", "pairID": f"p{n}", "sentence2": "A dog."} for n in range(4)]
    lines[1]["gold_label"], lines[2]["gold_label"], lines[3]["gold_label"] = "", "-", "neutral"
    (tmp_path / "snli_ve_test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    report = prepare_examples("snli-ve", [tmp_path / "snli_ve_test.jsonl"], tmp_path / "e")
    assert [read_examples(tmp_path / "e")[n].labels for n in range(3)] == [(), (), ("neutral",)]
    assert report.dropped == {"no gold label": 1}


@pytest.mark.parametrize("folder", ["train/", ""])
def test_keys_of_mmf_with_a_split_in_front_meet_captions_without(tmp_path: Path, folder: str) -> None:
    """As TextVQA's features of Open Images (github.com/facebookresearch/mmf/issues/1245)."""
    names = ["e1ad82ad7b00d0dc", "00a5aef54d6b1abc", "ffee9a5c1f0e0b11"]
    images = [make_image(n, f"{folder}{name}") for n, name in enumerate(names)]
    import_features(write_mmf(tmp_path / "x", [mmf_row(image, background=True) for image in images]), tmp_path / "s")
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"image": f"{name}.jpg", "caption": "a sign"}) + "\n" for name in names))
    prepare("jsonl", tmp_path / "c.jsonl", tmp_path / "p", store=tmp_path / "s")
    assert ids(tmp_path / "p") == [f"{folder}{name}" for name in names]


def test_keys_of_webdataset_with_named_parts_meet_captions_by_the_key(tmp_path: Path) -> None:
    """A sample of several files, KEY.input.jpg beside KEY.outputs.txt (github.com/mlfoundations/open_clip/issues/480)."""
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for n in range(4):
            for part, content in (("input.jpg", jpeg()), ("outputs.txt", b"a dog")):
                member = tarfile.TarInfo(f"sample{n:08}.{part}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    stored = [item.image_id for item in list_images(tmp_path / "s.tar").items]
    wanted = [f"sample{n:08}" for n in range(4)]
    found = match(wanted, stored)
    assert (found.form, [found.names[name] for name in wanted]) == ("file name up to its first dot", stored)
