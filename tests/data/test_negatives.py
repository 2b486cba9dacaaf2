"""Negative captions: never of the same image, uniform over all others, half of the samples."""

import numpy as np
import pytest

from megainter.data.negatives import choose_captions, negative_rows, require_two_images
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
