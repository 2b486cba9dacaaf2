"""Ranks and recalls against a brute force that sorts one query at a time."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megainter.tasks.retrieval import ranking
from megainter.tasks.retrieval.ranking import chance_of_a_hit, image_to_text, rank_scores, text_to_image


def brute_force(scores: np.ndarray, own: np.ndarray) -> tuple[list[int], list[int]]:
    """Sort candidates by score, wrong ones before right ones where equal; the rank is the first right one's place."""
    images, captions = scores.shape
    text_ranks = []
    for c in range(captions):
        order = sorted(range(images), key=lambda i: (-scores[i, c], i == own[c]))
        text_ranks.append(order.index(own[c]) + 1)
    image_ranks = []
    for i in range(images):
        order = sorted(range(captions), key=lambda c: (-scores[i, c], own[c] == i))
        image_ranks.append(next(place for place, c in enumerate(order, 1) if own[c] == i))
    return text_ranks, image_ranks


@st.composite
def problems(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Galleries of 1 to 9 images with 1 to 3 captions each in any order, and scores of few values, so that ties are common."""
    images = draw(st.integers(1, 9))
    extra = draw(st.lists(st.integers(0, images - 1), max_size=12))
    own = np.array(draw(st.permutations([*range(images), *extra])), dtype=np.int32)
    values = draw(st.lists(st.integers(0, 4), min_size=images * len(own), max_size=images * len(own)))
    return np.array(values, dtype=np.float32).reshape(images, len(own)), own


@settings(max_examples=150, deadline=None)
@given(problems())
def test_ranks_equal_brute_force_whatever_the_block_size(problem: tuple[np.ndarray, np.ndarray]) -> None:
    scores, own = problem
    text_ranks, image_ranks = brute_force(scores, own)
    for block_rows in (1, 2, len(scores)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ranking, "BLOCK_BYTES", 4 * len(own) * block_rows)
            ranks = rank_scores(scores, own, top=3)
        assert ranks.caption_ranks.tolist() == text_ranks
        assert ranks.image_ranks.tolist() == image_ranks
        best = [sorted(range(len(scores)), key=lambda i: (-scores[i, c], i))[:3] for c in range(len(own))]
        assert ranks.top_images.tolist() == best
        assert ranks.top_scores.tolist() == [[scores[i, c] for i in top] for c, top in enumerate(best)]


def test_recalls_of_a_known_matrix() -> None:
    """Three images, four captions: the first two captions belong to image 0."""
    scores = np.array([[0.9, 0.1, 0.8, 0.2], [0.3, 0.2, 0.7, 0.1], [0.1, 0.4, 0.3, 0.6]], dtype=np.float32)
    own = np.array([0, 0, 1, 2], dtype=np.int32)
    ranks = rank_scores(scores, own)
    assert ranks.caption_ranks.tolist() == [1, 3, 2, 1]
    assert ranks.image_ranks.tolist() == [1, 1, 1]
    text = text_to_image(ranks)
    assert (text.r_at_1, text.r_at_5, text.median_rank, text.mean_rank) == (0.5, 1.0, 1, 1.75)
    assert (text.chance_at_1, text.chance_at_5, text.queries, text.candidates) == (1 / 3, 1.0, 4, 3)
    image = image_to_text(ranks, own)
    assert (image.r_at_1, image.queries, image.candidates) == (1.0, 3, 4)
    assert image.chance_at_1 == pytest.approx((2 / 4 + 1 / 4 + 1 / 4) / 3)


def test_a_model_that_scores_everything_alike_is_last() -> None:
    ranks = rank_scores(np.zeros((20, 40), dtype=np.float32), np.repeat(np.arange(20), 2))
    assert set(ranks.caption_ranks.tolist()) == {20}
    assert set(ranks.image_ranks.tolist()) == {39}


def test_the_median_of_an_even_number_of_ranks_is_rounded_down() -> None:
    scores = np.array([[1, 0], [2, 3]], dtype=np.float32)  # ranks 2 and 1
    assert text_to_image(rank_scores(scores, np.array([0, 1]))).median_rank == 1


@pytest.mark.parametrize(("candidates", "right", "k"), [(5, 1, 1), (6, 2, 3), (7, 5, 3), (4, 2, 10)])
def test_chance_is_the_share_of_orders_with_a_hit(candidates: int, right: int, k: int) -> None:
    orders = list(itertools.permutations(range(candidates)))
    hits = sum(min(order[:k]) < right for order in orders)
    assert chance_of_a_hit(candidates, right, k) == pytest.approx(hits / len(orders))
