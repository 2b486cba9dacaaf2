"""Negative captions: never of the same image, uniform over all others or over the hard ones, half of the samples."""

import hashlib
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megainter.data.stream.negatives import (
    HardNegatives,
    choose_captions,
    hard_rows,
    negative_rows,
    plain_text,
    read_hard_negatives,
    require_two_images,
    same_text,
    write_hard_negatives,
)
from megainter.data.tables.pairs import Pair, Pairs, read_pairs, write_pairs
from megainter.errors import UsageError


def captions_of_images(counts: list[int]) -> np.ndarray:
    return np.repeat(np.arange(len(counts)), counts).astype(np.int32)


def test_negatives_are_never_of_the_same_image_and_half_of_all() -> None:
    images = captions_of_images([5] * 40)
    n = np.arange(100_000)
    rows = n % len(images)
    captions, labels = choose_captions(images, rows, 0, 3, n, 0.5)
    assert abs(labels.mean() - 0.5) < 5 * 0.5 / np.sqrt(len(n))
    assert (captions[labels == 0] == rows[labels == 0]).all()
    assert (images[captions[labels == 1]] != images[rows[labels == 1]]).all()


def test_negatives_are_uniform_over_captions_of_other_images() -> None:
    images = captions_of_images([1, 2, 3, 10, 4])
    rng = np.random.default_rng(0)
    images = rng.permutation(images)  # captions of an image need not stand together
    draws = 60_000
    for row in (0, 5, 9):
        chosen = negative_rows(images, np.full(draws, row), 1, 0, np.arange(draws))
        allowed = np.flatnonzero(images != images[row])
        counts = np.bincount(chosen, minlength=len(images))
        assert counts.sum() == counts[allowed].sum() == draws
        expected = draws / len(allowed)
        assert ((counts[allowed] - expected) ** 2 / expected).sum() < len(allowed) - 1 + 6 * np.sqrt(2 * len(allowed))


def test_an_image_that_owns_nearly_all_captions_still_gets_uniform_negatives() -> None:
    images = captions_of_images([4000, 1, 2])
    rows = np.zeros(3000, dtype=np.int64)
    chosen = negative_rows(images, rows, 0, 0, np.arange(3000))
    counts = np.bincount(chosen, minlength=4003)[4000:]
    assert counts.sum() == 3000
    assert ((counts - 1000) ** 2 / 1000).sum() < 25


def test_choice_depends_on_the_sample_alone() -> None:
    images = captions_of_images([3] * 30)
    n = np.arange(500)
    captions, labels = choose_captions(images, n % 90, 7, 2, n, 0.5)
    some = np.array([400, 3, 77])
    again = choose_captions(images, some % 90, 7, 2, some, 0.5)
    assert (again[0] == captions[some]).all()
    assert (again[1] == labels[some]).all()
    other = choose_captions(images, n % 90, 7, 3, n, 0.5)
    assert (other[1] != labels).mean() > 0.4


def test_probabilities_zero_and_one() -> None:
    images, n = captions_of_images([2] * 10), np.arange(20)
    assert choose_captions(images, n, 0, 0, n, 0.0)[1].sum() == 0
    assert choose_captions(images, n, 0, 0, n, 1.0)[1].sum() == 20


@pytest.mark.parametrize("images", [np.zeros(0, np.int32), np.zeros(7, np.int32)])
def test_one_image_is_refused(images: np.ndarray) -> None:
    with pytest.raises(UsageError, match="at least two images"):
        require_two_images(images, "pairs.parquet")
    require_two_images(np.array([0, 0, 1], np.int32), "pairs.parquet")


def test_without_hard_negatives_the_stream_is_the_one_it_always_was() -> None:
    """Runs that were started before hard negatives existed have to go on with the same samples."""
    captions, labels = choose_captions(captions_of_images([3] * 700), (np.arange(2100) * 11) % 2100, 7, 2, np.arange(2100), 0.5)
    digest = hashlib.sha256(captions.tobytes() + labels.tobytes()).hexdigest()
    assert digest == "dc6f8b723fbc9e52f6b95708801f79f4643c4a559a47fb7171adb127762c370f"


LISTS = [[5, 9], [], [0], [7, 8, 0, 1], [9], [0, 1, 2, 3], [9], [0], [1], [4, 5, 6]]
TEN_IMAGES = captions_of_images([1] * 10)


def flat(lists: list[list[int]]) -> np.ndarray:
    return np.array([row for one in lists for row in one], np.int32)


def hard_of(lists: list[list[int]]) -> HardNegatives:
    return HardNegatives(np.cumsum([0, *map(len, lists)]), flat(lists), {})


def test_a_fifth_of_the_negatives_are_hard_and_uniform_over_their_list() -> None:
    draws, row = 100_000, 3
    found = hard_rows(hard_of(LISTS), 0.2, np.full(draws, row), 1, 2, np.arange(draws))
    counts = np.array([(found == other).sum() for other in LISTS[row]])
    assert counts.sum() == (found >= 0).sum()
    assert abs(counts.sum() / draws - 0.2) < 5 * np.sqrt(0.2 * 0.8 / draws)
    expected = counts.sum() / 4
    assert ((counts - expected) ** 2 / expected).sum() < 25  # 3 degrees of freedom, P < 2e-5


def test_hard_negatives_change_only_the_samples_that_get_them() -> None:
    n = np.arange(50_000)
    rows = n % 10
    plain = choose_captions(TEN_IMAGES, rows, 0, 1, n, 0.5)
    mixed = choose_captions(TEN_IMAGES, rows, 0, 1, n, 0.5, hard_of(LISTS), 0.2)
    assert (plain[1] == mixed[1]).all()
    hard = hard_rows(hard_of(LISTS), 0.2, rows, 0, 1, n)
    assert (mixed[0] == np.where((hard >= 0) & (mixed[1] == 1), hard, plain[0])).all()
    with_any = np.array([bool(LISTS[row]) for row in rows]) & (mixed[1] == 1)
    assert abs((hard[with_any] >= 0).mean() - 0.2) < 5 * np.sqrt(0.16 / with_any.sum())
    assert (TEN_IMAGES[mixed[0][mixed[1] == 1]] != TEN_IMAGES[rows[mixed[1] == 1]]).all()


@pytest.mark.parametrize(("share", "hard"), [(0.0, 0.0), (1.0, 0.9)])
def test_no_and_all_negatives_hard(share: float, hard: float) -> None:
    rows = np.arange(1000) % 10
    assert (hard_rows(hard_of(LISTS), share, rows, 0, 0, np.arange(1000)) >= 0).mean() == hard  # one of ten has no similar caption


def test_a_hard_choice_depends_on_the_sample_alone() -> None:
    n = np.arange(500)
    hard = hard_of(LISTS)
    whole = hard_rows(hard, 0.5, n % 10, 3, 4, n)
    some = np.array([499, 0, 77])
    assert (hard_rows(hard, 0.5, some % 10, 3, 4, some) == whole[some]).all()
    assert (hard_rows(hard, 0.5, n % 10, 3, 5, n) != whole).mean() > 0.2


def ten_pairs(folder: Path, change: str = "") -> Pairs:
    write_pairs(folder / "pairs.parquet", [Pair(f"p{i}", f"i{i}", f"{i}.jpg", f"caption {i}{change}", "train") for i in range(10)])
    return read_pairs(folder / "pairs.parquet", "train")


def written(folder: Path, pairs: Pairs, lists: list[list[int]] = LISTS) -> Path:
    parts = [lists[:4], lists[4:]]
    arrays = [(np.array([len(one) for one in part], np.int32), flat(part)) for part in parts]
    write_hard_negatives(folder / "hard.parquet", arrays, {"pairs_digest": pairs.digest, "split": "train"})
    return folder / "hard.parquet"


def test_hard_negatives_come_back_as_written(tmp_path: Path) -> None:
    pairs = ten_pairs(tmp_path)
    hard = read_hard_negatives(written(tmp_path, pairs), pairs)
    assert [hard.rows[a:b].tolist() for a, b in zip(hard.offsets[:-1], hard.offsets[1:], strict=True)] == LISTS
    assert pq.read_table(tmp_path / "hard.parquet").column("negatives").to_pylist() == LISTS
    assert hard.facts["split"] == "train"


def test_hard_negatives_of_other_pairs_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path, ten_pairs(tmp_path))
    with pytest.raises(UsageError, match=r"was made from other pairs \(10 captions of split train; these are 10\); run `megainter"):
        read_hard_negatives(path, ten_pairs(tmp_path, "!"))


@pytest.mark.parametrize(("entry", "message"), [(10, "that do not exist"), (-1, "that do not exist"), (3, "of the same image")])
def test_hard_negatives_with_impossible_rows_are_refused(tmp_path: Path, entry: int, message: str) -> None:
    pairs = ten_pairs(tmp_path)
    path = written(tmp_path, pairs, [*LISTS[:3], [entry], *LISTS[4:]])
    with pytest.raises(UsageError, match=message):
        read_hard_negatives(path, pairs)


def test_another_file_is_no_file_of_hard_negatives(tmp_path: Path) -> None:
    pairs = ten_pairs(tmp_path)
    pq.write_table(pa.table({"negatives": [[1]]}), tmp_path / "x.parquet")
    for path, message in (("x.parquet", "holds no hard negatives"), ("pairs.parquet", "holds no hard"), ("none", "does not exist")):
        with pytest.raises(UsageError, match=message):
            read_hard_negatives(tmp_path / path, pairs)


TITLES = ["新款 T恤 纯棉", "新款Ｔ恤，纯棉", "新款 t恤 纯棉！", "新款 T恤 男", "女鞋"]


def titles(folder: Path, captions: list[str]) -> Pairs:
    write_pairs(folder / "titles.parquet", [Pair(f"p{i}", f"i{i}", f"{i}.jpg", text, "train") for i, text in enumerate(captions)])
    return read_pairs(folder / "titles.parquet", "train")


def test_titles_are_compared_without_case_width_spaces_and_punctuation(tmp_path: Path) -> None:
    pairs = titles(tmp_path, [*TITLES, "Caf\u00e9 No. 3", "cafe\u0301 NO 3", "cafe no 3"])
    first, others = np.array([0, 0, 0, 0, 5, 5]), np.array([1, 2, 3, 4, 6, 7])
    assert same_text(pairs, first, others).tolist() == [True, True, False, False, True, False]
    assert plain_text("The Dog's 2 balls!") == plain_text("the dog s 2 BALLS") != plain_text("the dogs 3 balls")
    assert plain_text(" ☀ ") != plain_text("☂!")


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_caption_that_reads_the_same_is_never_a_mismatch(tmp_path: Path, share: float) -> None:
    """Five images, three with one title: the two others are drawn, each as often; a list of hard ones that names a twin is no help."""
    pairs, n = titles(tmp_path, TITLES), np.arange(40_000)
    twins = hard_of([[1, 2], [0], [0], [4], [3]])
    captions, labels = choose_captions(pairs.image_numbers, n % 5, 3, 0, n, 0.5, twins, share, partial(same_text, pairs))
    mismatched = labels == 1
    assert abs(mismatched.mean() - 0.5) < 5 * 0.5 / np.sqrt(len(n))
    of_three = mismatched & (n % 5 < 3)
    counts = np.bincount(captions[of_three], minlength=5)
    assert counts[:3].sum() == 0
    assert abs(counts[3] / counts.sum() - 0.5) < 5 * 0.5 / np.sqrt(counts.sum())
    assert set(captions[mismatched & (n % 5 == 4)].tolist()) == ({3} if share else {0, 1, 2, 3})


def test_without_twins_the_draws_are_what_they_were(tmp_path: Path) -> None:
    pairs, n = titles(tmp_path, [f"title {i}" for i in range(30)]), np.arange(2000)
    plain = choose_captions(pairs.image_numbers, n % 30, 3, 1, n, 0.5)
    asked = choose_captions(pairs.image_numbers, n % 30, 3, 1, n, 0.5, same=partial(same_text, pairs))
    assert (plain[0] == asked[0]).all()


def test_many_twins_leave_uniform_negatives_or_say_that_there_are_none(tmp_path: Path) -> None:
    pairs, n = titles(tmp_path, ["手机壳"] * 400 + ["女鞋", "男鞋"]), np.arange(2000)
    chosen = negative_rows(pairs.image_numbers, np.zeros(2000, np.int64), 0, 0, n, partial(same_text, pairs))
    counts = np.bincount(chosen, minlength=402)[400:]
    assert counts.sum() == 2000
    assert abs(counts[0] / 2000 - 0.5) < 5 * 0.5 / np.sqrt(2000)
    alone = titles(tmp_path, ["手机壳", " 手机壳。", "手机 壳"])
    with pytest.raises(UsageError, match="all other images read the same as caption 2"):
        negative_rows(alone.image_numbers, np.ones(1, np.int64), 0, 0, n[:1], partial(same_text, alone))
