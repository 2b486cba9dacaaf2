"""What is said where captions, examples or questions are of images that a store does not have under their names."""

from itertools import count
from pathlib import Path

import numpy as np
import pytest

from megainter.data.feature_store import FeatureStore
from megainter.data.feature_store.writer import FeatureStoreWriter, seal_store
from megainter.data.matching import SAMPLE, some, with_regions
from megainter.data.pairs_index.index import build_pairs_index
from megainter.data.tables.labelled import Example, TaskFacts, read_examples, write_examples
from megainter.data.tables.pairs import Pair, read_pairs, write_pairs
from megainter.errors import TooManyBadInputsError
from megainter.tasks.classification import batches
from megainter.tasks.retrieval.gallery import read_gallery
from megainter.tolerance import tolerated
from tests.data.feature_store.test_reader import SCHEMA, make_record


def store_of(path: Path, ids: list[str]) -> FeatureStore:
    with FeatureStoreWriter(path, SCHEMA) as writer:
        writer.add_all([(image_id, make_record(n)) for n, image_id in enumerate(ids)])
    seal_store(path)
    return FeatureStore(path)


def pairs_of(path: Path, ids: list[str]) -> Path:
    write_pairs(path, [Pair(f"{n}", image_id, f"{image_id}.jpg", "a dog", "train") for n, image_id in enumerate(ids)])
    return path


# Ids of captions, ids of a store, and what is said; every list is of three images.
FORMS = [
    (
        "val2014/COCO_val2014_{:012d}",
        "{}",
        "by their number 3 of 3 images would meet ('val2014/COCO_val2014_000000000007' is there as '7')",
    ),
    ("VG_100K/{}", "vg_{}", "by their number 3 of 3 images would meet ('VG_100K/7' is there as 'vg_7')"),
    ("photos/beach-{}", "beach-{}", "by their file name without folder and suffix 3 of 3 images would meet"),
    ("beach-{}", "beach-{}.jpg", "by their id without suffix 3 of 3 images would meet ('beach-7' is there as 'beach-7.jpg')"),
]


@pytest.mark.parametrize(("wanted", "stored", "told"), FORMS)
def test_captions_that_would_meet_by_another_form_are_told_which(tmp_path: Path, wanted: str, stored: str, told: str) -> None:
    numbers = (7, 80, 900)
    store = store_of(tmp_path / "s", [stored.format(n) for n in numbers])
    pairs = pairs_of(tmp_path / "p", [wanted.format(n) for n in numbers])
    for read in (
        lambda: with_regions(read_pairs(pairs), store, 0.5, pairs),
        lambda: read_gallery(pairs, store, None, None, None, 0.5),
    ):
        with pytest.raises(TooManyBadInputsError) as error:
            read()
        assert told in str(error.value)
        assert f"(the store has {store.ids[0]!r} and others); by" in str(error.value)
        assert str(error.value).endswith(f": run `megainter prepare` again with --store {store.path}")
        assert "\n" not in str(error.value)
    _, facts = build_pairs_index(pairs, "train", store, tmp_path / "cache", progress=False)
    assert (facts.rows, facts.lacking, facts.missing) == (0, len(numbers), [wanted.format(n) for n in numbers])


def test_of_captions_that_meet_in_part_the_others_are_looked_for(tmp_path: Path) -> None:
    """Two sources in one manifest: one as the store has it, the other by other names; few of all are missing, above the limit."""
    store = store_of(tmp_path / "s", [*(f"a/{n}" for n in range(20)), "391895", "522418"])
    pairs = pairs_of(tmp_path / "p", [*(f"a/{n}" for n in range(20)), "COCO_val2014_000000391895", "COCO_val2014_000000522418"])
    with pytest.raises(TooManyBadInputsError, match=r"2 of 22 captions .*; by their number 2 of 2 images would meet .* --store"):
        with_regions(read_pairs(pairs), store, 0.01, pairs)
    assert len(with_regions(read_pairs(pairs), store, 0.1, pairs)) == 20


def test_captions_of_other_images_are_told_what_the_limit_would_have_to_be(tmp_path: Path) -> None:
    store, pairs = store_of(tmp_path / "s", ["a", "b"]), pairs_of(tmp_path / "p", ["a", "c", "d"])
    with pytest.raises(TooManyBadInputsError, match=r"first 'c' \(the store has 'a' and others\); extract .* --data.max_bad 0.667$"):
        with_regions(read_pairs(pairs), store, 0.1, pairs)
    strangers = pairs_of(tmp_path / "q", ["x", "y"])
    with pytest.raises(TooManyBadInputsError, match=r"2 of 2 captions .*; they meet in no form of their names: extract .*--ids`\)$"):
        with_regions(read_pairs(strangers), store, 1.0, strangers)


def test_examples_of_two_images_name_the_one_that_is_missing(tmp_path: Path) -> None:
    store = store_of(tmp_path / "s", ["dev/dev-1-0-img0.png", "dev/dev-1-0-img1.png"])
    rows = [Example(f"dev-1-0-{n}", "left", images=("dev-1-0-img0", "dev-1-0-img1"), labels=("True",), targets=(1.0,)) for n in range(3)]
    write_examples(tmp_path / "e", rows, TaskFacts("nlvr2", "single_label", ("False", "True"), "accuracy"))
    told = r"3 of 3 examples .* 'dev-1-0-img0' .*; by their file name without folder and suffix 2 of 2 images would meet"
    with pytest.raises(TooManyBadInputsError, match=told):
        batches.with_regions(read_examples(tmp_path / "e"), store, 0.0, tmp_path / "e")


def test_of_many_images_some_are_looked_at(tmp_path: Path) -> None:
    assert some(["a", "b", "a"]) == ("a", "b")
    assert len(some(f"{n}" for n in count())) == SAMPLE, "of a list without end"
    store = store_of(tmp_path / "s", [f"COCO_train2014_{n:012d}" for n in range(2 * SAMPLE)])
    pairs = pairs_of(tmp_path / "p", [f"{n}" for n in np.random.default_rng(0).permutation(2 * SAMPLE)])
    with pytest.raises(TooManyBadInputsError, match=rf"by their number {SAMPLE} of {SAMPLE} images that were looked at would meet"):
        with_regions(read_pairs(pairs), store, 0.0, pairs)


def test_one_bad_photo_of_many_captions_is_one(tmp_path: Path) -> None:
    """What `extract` lets pass is in the way nowhere: images count, not their captions, and one is never too many unless none may be."""
    store = store_of(tmp_path / "s", [f"{n}" for n in range(9)])
    pairs = pairs_of(tmp_path / "p", [*(f"{n}" for n in range(9)), *["bad"] * 5])
    facts = build_pairs_index(pairs, "train", store, tmp_path / "cache", progress=False)[1]
    assert (facts.rows, facts.images, facts.lacking) == (9, 9, 1)
    for limit in (0.001, 0.01, 0.2):
        assert len(with_regions(read_pairs(pairs), store, limit, pairs)) == 9
        assert len(read_gallery(pairs, store, None, None, None, limit).image_ids) == 9
    with pytest.raises(TooManyBadInputsError, match=r"5 of 14 captions .* \(1 of 10 images\)"):
        with_regions(read_pairs(pairs), store, 0.0, pairs)


@pytest.mark.parametrize("total", [1, 2, 60, 99, 150, 1000])
def test_what_is_tolerated_is_the_share_in_whole_ones_and_one_of_several(total: int) -> None:
    for thousandths in (0, 1, 10, 70, 500, 1000):
        allowed = total * thousandths // 1000  # in whole numbers
        least = 1 if thousandths and total > 1 else 0
        assert tolerated(thousandths / 1000, total) == max(allowed, least)
