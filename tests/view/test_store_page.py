"""The page of a store: boxes, classes and what failed are the store's, and filters hide what they say."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megainter.data.feature_store.record import RegionRecord, StoreSchema
from megainter.data.feature_store.writer import FeatureStoreWriter, seal_store
from megainter.data.tables.pairs import Pair, write_pairs
from megainter.errors import UsageError
from megainter.view.store_page import classes_of, histogram, read_failures, write_store_page
from preprocessing.failures import write_failures
from tests.view.test_view import HOSTILE, Tags

NAMES = ("__background__", "<b>cat</b>", "dog", "tree", "sky")


def write_store(folder: Path, images: int, regions: int, side: int = 40) -> tuple[Path, Path, Path]:
    """A store, its images (one file for all) and pairs that name it.

    Region j of image i is class 1 + (i + j) % 4, with a confidence of (j + 1) / (regions + 1).
    """
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    shades = rng.integers(0, 255, (side // 4, side // 4, 3), dtype=np.uint8)
    Image.fromarray(shades).resize((side, side)).save(folder / "images" / "all.jpg")
    with FeatureStoreWriter(folder / "store", StoreSchema(4, len(NAMES), NAMES, "tiny")) as writer:
        for i in range(images):
            corners = rng.uniform(0, side / 2, (regions, 2))
            boxes = np.concatenate([corners, corners + rng.uniform(4, side / 2, (regions, 2))], axis=1).astype(np.float32)
            probs = np.zeros((regions, len(NAMES)), np.float32)
            probs[:, 0] = 1 - (np.arange(regions) + 1) / (regions + 1)
            probs[np.arange(regions), 1 + (i + np.arange(regions)) % 4] = (np.arange(regions) + 1) / (regions + 1)
            writer.add(f"id{i:04d}", RegionRecord(boxes, np.ones((regions, 4), np.float16), probs, side, side))
    seal_store(folder / "store")
    write_pairs(folder / "pairs.parquet", [Pair(f"{i}", f"id{i:04d}", "all.jpg", "a caption", "train") for i in range(images)])
    return folder / "store", folder / "images", folder / "pairs.parquet"


def test_boxes_and_confidences_are_the_stores(tmp_path: Path) -> None:
    store, images, pairs = write_store(tmp_path, 10, 3)
    tags = Tags(write_store_page(tmp_path / "p.html", "t", store=store, images=images, pairs=pairs, count=4).read_text())
    figures, boxes = tags.of("figure"), tags.of("i")
    assert len(figures) == len(tags.of("img")) == 4
    assert len(boxes) == 4 * 3
    assert all(image["loading"] == "lazy" for image in tags.of("img"))
    for number, image in enumerate((0, 3, 6, 9)):  # spread over the store
        assert {f"k{1 + (image + j) % 4}" for j in range(3)} == set((figures[number]["class"] or "").split()) - {"card"}
        told = sorted(box["title"] or "" for box in boxes[3 * number : 3 * number + 3])
        assert told == sorted(f"{NAMES[1 + (image + j) % 4]} {(j + 1) / 4:.2f}" for j in range(3))
    for box in boxes:
        confidence = float((box["title"] or "").split()[-1])
        below = {k for k, level in enumerate((0.3, 0.5, 0.7, 0.9)) if confidence < level}
        assert set(re.findall(r"u(\d)", box["class"] or "")) == {str(k) for k in below}


def test_classes_are_counted_by_images_and_regions_by_bins() -> None:
    images = [{"classes": {1: "cat", 2: "dog"}}, {"classes": {2: "dog"}}, {"classes": {}}]
    assert classes_of(images) == [(2, "dog", 2), (1, "cat", 1)]
    assert histogram([3, 3, 5]) == [("3", 2, 1.0), ("4", 0, 0.0), ("5", 1, 0.5)]
    rng = np.random.default_rng(0)
    regions = rng.integers(10, 101, 500).tolist()
    bins = histogram(regions)
    assert len(bins) <= 12
    assert sum(number for _, number, _ in bins) == 500
    for label, number, _ in bins:
        first, _, last = label.partition(" to ")
        assert number == sum(int(first) <= count <= int(last or first) for count in regions)


def test_what_failed_is_listed_and_counted(tmp_path: Path) -> None:
    store, _, _ = write_store(tmp_path, 2, 1)
    assert read_failures(store / "failed.tsv") is None
    rows = [(f"a\t{i}", HOSTILE, "truncated" if i % 3 else "no image") for i in range(600)]
    write_failures(store / "failed.tsv", ("image_id", "path", "reason"), rows)
    found = read_failures(store / "failed.tsv")
    assert found is not None
    assert (found.total, found.reasons) == (600, [("truncated", 400), ("no image", 200)])
    assert [row[0] for row in found.rows[:2]] == ["a\\t0", "a\\t1"]
    page = write_store_page(tmp_path / "p.html", "<i>t</i>", store=store).read_text()
    tags = Tags(page)
    assert len(tags.of("tr")) == 1 + 500
    assert not {"script", "b", "link", "iframe"} & {tag for tag, _ in tags.found}
    assert "\x1b" not in page
    assert "400: truncated; 200: no image" in page


def test_files_are_found_by_ids_or_by_a_manifest_or_not_at_all(tmp_path: Path) -> None:
    store, images, pairs = write_store(tmp_path, 2, 1)
    with pytest.raises(UsageError, match="such as 'id0000'; give --pairs"):
        write_store_page(tmp_path / "p.html", "t", store=store, images=images)
    (images / "id0001.jpg").write_bytes((images / "all.jpg").read_bytes())
    page = write_store_page(tmp_path / "p.html", "t", store=store, images=images).read_text()
    assert [image["alt"] for image in Tags(page).of("img")] == ["id0001"]
    page = write_store_page(tmp_path / "p.html", "t", store=store, images=images, pairs=pairs).read_text()
    assert len(Tags(page).of("img")) == 2
    with pytest.raises(UsageError, match="--count is 0"):
        write_store_page(tmp_path / "p.html", "t", store=store, count=0)
