"""From a matrix of scores to retrieval ranks and the figures that are reported. Pure numpy, no model.

Shape letters: I images of the gallery, C captions, K best candidates kept per caption.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RECALL_AT = (1, 5, 10)
BLOCK_BYTES = 64 << 20  # of scores looked at in one go, so that memory does not grow with the gallery


@dataclass(frozen=True)
class Ranks:
    """``caption_ranks`` int64 [C]: rank of a caption's own image among all images. ``image_ranks`` int64 [I]: rank of an image's best
    own caption among all captions. Ranks begin at 1. ``top_images`` int32 [C, K] and ``top_scores`` float32 [C, K]: the best images of
    each caption, best first, equal scores by image number."""

    caption_ranks: NDArray[np.int64]
    image_ranks: NDArray[np.int64]
    top_images: NDArray[np.int32]
    top_scores: NDArray[np.float32]


@dataclass(frozen=True)
class Recall:
    """One direction of retrieval. Recalls and chance levels are shares (0 to 1), in the order of ``RECALL_AT``.

    ``median_rank`` is rounded down, as in the official evaluation. ``chance_at_k`` is what a random order would reach on average.
    """

    queries: int
    candidates: int
    r_at_1: float
    r_at_5: float
    r_at_10: float
    median_rank: int
    mean_rank: float
    chance_at_1: float
    chance_at_5: float
    chance_at_10: float


@dataclass(frozen=True)
class Folds:
    """Means over ``count`` galleries, the folds: consecutive images, each with its own captions alone. Recalls are shares, 0 to 1."""

    count: int
    text_to_image: dict[str, float]
    image_to_text: dict[str, float]


def rank_scores(scores_IC: NDArray[np.float32], image_of_caption_C: NDArray[np.integer], top: int = 10) -> Ranks:
    """Ranks of all queries in both directions, in one pass over blocks of images (``scores_IC`` may be memory-mapped).

    Ties count against the model: a rank is 1 + the number of *wrong* candidates that score at least as high as the right one. So the
    result does not depend on any order of processing, and a model that gives every pair the same score never looks good. An
    image's rank is that of its best own caption; its other captions are not wrong candidates. Every image needs a caption.
    """
    images, captions = scores_IC.shape
    numbers = np.arange(captions)
    own_C = np.asarray(scores_IC[image_of_caption_C, numbers])
    best_own_I = np.full(images, -np.inf, dtype=np.float32)
    np.maximum.at(best_own_I, image_of_caption_C, own_C)
    ahead_C = np.zeros(captions, dtype=np.int64)
    ahead_I = np.empty(images, dtype=np.int64)
    best = _Best(captions, min(top, images))
    rows = max(1, BLOCK_BYTES // (4 * max(captions, 1)))
    for start in range(0, images, rows):
        block_BC = np.asarray(scores_IC[start : start + rows])
        mine_BC = image_of_caption_C[None, :] == np.arange(start, start + len(block_BC))[:, None]
        ahead_C += ((block_BC >= own_C) & ~mine_BC).sum(0)
        ahead_I[start : start + rows] = ((block_BC >= best_own_I[start : start + rows, None]) & ~mine_BC).sum(1)
        best.add(start, block_BC)
    return Ranks(1 + ahead_C, 1 + ahead_I, best.images_CK, best.scores_CK)


def rank_right(scores_QK: NDArray[np.float32], right_QK: NDArray[np.bool_], otherwise: int) -> NDArray[np.int64]:
    """Ranks int64 [Q] among K candidates each: 1 + the wrong ones that score at least as high as the best right one (as `rank_scores`).

    A query without a right candidate has the rank ``otherwise``.
    """
    best_Q = np.where(right_QK, scores_QK, -np.inf).max(axis=1)
    ahead_Q = ((scores_QK >= best_Q[:, None]) & ~right_QK).sum(axis=1)
    return np.where(right_QK.any(axis=1), 1 + ahead_Q, otherwise).astype(np.int64)


def best_candidates(
    images_CK: NDArray[np.int32], scores_CK: NDArray[np.float32], top: int = 10
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """The ``top`` best of each caption's candidates and their scores, best first; of equal ones the first, as they stand."""
    order = np.argsort(-scores_CK, axis=1, kind="stable")[:, :top]
    return np.take_along_axis(images_CK, order, axis=1), np.take_along_axis(scores_CK, order, axis=1)


class _Best:
    """The ``keep`` best images per caption seen so far."""

    def __init__(self, captions: int, keep: int) -> None:
        self.keep = keep
        self.images_CK = np.empty((captions, 0), dtype=np.int32)
        self.scores_CK = np.empty((captions, 0), dtype=np.float32)

    def add(self, first_image: int, block_BC: NDArray[np.float32]) -> None:
        """Take in the next images, numbered from ``first_image``; earlier ones win ties because the sort is stable."""
        numbers = np.arange(first_image, first_image + len(block_BC), dtype=np.int32)
        images = np.concatenate([self.images_CK, np.broadcast_to(numbers, block_BC.T.shape)], axis=1)
        scores = np.concatenate([self.scores_CK, block_BC.T], axis=1)
        order = np.argsort(-scores, axis=1, kind="stable")[:, : self.keep]
        self.images_CK = np.take_along_axis(images, order, axis=1)
        self.scores_CK = np.take_along_axis(scores, order, axis=1)


def text_to_image(ranks: Ranks) -> Recall:
    """Caption-based image retrieval: every caption is a query, its own image is right."""
    images = len(ranks.image_ranks)
    chances = [min(k, images) / images for k in RECALL_AT]
    return _recall(ranks.caption_ranks, images, chances)


def image_to_text(ranks: Ranks, image_of_caption_C: NDArray[np.integer]) -> Recall:
    """Every image is a query, any of its own captions is right."""
    captions = len(image_of_caption_C)
    own_I = np.bincount(image_of_caption_C, minlength=len(ranks.image_ranks))
    chances = [float(np.mean([chance_of_a_hit(captions, int(own), k) for own in own_I])) for k in RECALL_AT]
    return _recall(ranks.image_ranks, captions, chances)


def chance_of_a_hit(candidates: int, right: int, k: int) -> float:
    """Probability that at least one of ``right`` right candidates is among the first ``k`` of a random order."""
    orders = math.comb(candidates, min(k, candidates))
    return (orders - math.comb(candidates - right, min(k, candidates))) / orders


def mean_over_folds(scores_IC: NDArray[np.float32], image_of_caption_C: NDArray[np.integer], count: int) -> Folds:
    """Recalls of ``count`` parts of the gallery, each ranked for itself, averaged (COCO's five folds of 1,000 are its "1K" gallery).

    ``scores_IC`` float32 as `rank_scores` takes them; ``count`` must divide the number of images, and every image needs a caption.
    """
    size = len(scores_IC) // count
    found: tuple[list[Recall], list[Recall]] = ([], [])
    for first in range(0, count * size, size):
        (mine,) = np.nonzero((image_of_caption_C >= first) & (image_of_caption_C < first + size))
        images = image_of_caption_C[mine] - first
        ranks = rank_scores(np.ascontiguousarray(scores_IC[first : first + size][:, mine]), images, 1)
        found[0].append(text_to_image(ranks))
        found[1].append(image_to_text(ranks, images))
    return Folds(count, *({f"r_at_{k}": float(np.mean([getattr(one, f"r_at_{k}") for one in way])) for k in RECALL_AT} for way in found))


def _recall(ranks: NDArray[np.int64], candidates: int, chances: list[float]) -> Recall:
    recalls = {f"r_at_{k}": float(np.mean(ranks <= k)) for k in RECALL_AT}
    by_chance = {f"chance_at_{k}": chance for k, chance in zip(RECALL_AT, chances, strict=True)}
    median, mean = math.floor(np.median(ranks)), float(np.mean(ranks))
    return Recall(queries=len(ranks), candidates=candidates, median_rank=median, mean_rank=mean, **recalls, **by_chance)
