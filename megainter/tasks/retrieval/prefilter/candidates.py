"""Which pairs of a large gallery are worth a careful look: the nearest images of every caption and captions of every image, exactly.

Vectors of two towers, their dot products block by block, and the best of each row kept: no more of the matrix is ever in memory.

Shape letters: Q queries, V vectors they are looked up among, D width of a vector, K nearest that are kept, C captions, I images, P pairs.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from megainter.progress import Progress
from megainter.tasks.retrieval.ranking import Ranks, best_candidates, rank_right

QUERIES_AT_ONCE = 1000
FEW_QUERIES = 16  # of so few all scores are kept, 64 MB for a million vectors: a key for each score takes several times as long
VECTORS_AT_ONCE = 16_384  # with so many queries 64 MiB of scores
_LOW_BITS = 0xFFFFFFFF
_MAGNITUDE = 0x7FFFFFFF


@dataclass(frozen=True)
class Nearest:
    """The K best of every query: ``numbers`` int32 [Q, K], ascending in each row, and their dot products float32 [Q, K]."""

    numbers: NDArray[np.int32]
    scores: NDArray[np.float32]


@dataclass(frozen=True)
class Candidates:
    """``images``: candidates of each caption, [C, K]; ``captions``: of each image, [I, K]. ``keys`` int64 [P]: all pairs that stand in
    either, as image * C + caption, ascending; what is scored."""

    images: Nearest
    captions: Nearest
    keys: NDArray[np.int64]

    def scores_of_captions(self, scores_P: NDArray[np.float32]) -> NDArray[np.float32]:
        """The scores of each caption's candidates, float32 [C, K], out of those of all pairs."""
        numbers_CK, captions = self.images.numbers.astype(np.int64), len(self.images.numbers)
        return scores_P[np.searchsorted(self.keys, numbers_CK * captions + np.arange(captions)[:, None])]

    def scores_of_images(self, scores_P: NDArray[np.float32]) -> NDArray[np.float32]:
        """The scores of each image's candidates, float32 [I, K]."""
        numbers_IK, captions = self.captions.numbers.astype(np.int64), len(self.images.numbers)
        return scores_P[np.searchsorted(self.keys, np.arange(len(numbers_IK))[:, None] * captions + numbers_IK)]


def choose_candidates(captions_CD: torch.Tensor, images_ID: torch.Tensor, keep: int) -> Candidates:
    """``candidates_among`` with progress, for a large gallery."""
    with Progress("choosing candidates", len(captions_CD) + len(images_ID), "queries") as progress:
        return candidates_among(captions_CD, images_ID, keep, progress)


def candidates_among(captions_CD: torch.Tensor, images_ID: torch.Tensor, keep: int, progress: Progress | None = None) -> Candidates:
    """The ``keep`` nearest images of every caption and captions of every image (all of fewer), and the union of these pairs."""
    captions, images = len(captions_CD), len(images_ID)
    images_of = nearest(captions_CD, images_ID, keep, progress)
    captions_of = nearest(images_ID, captions_CD, keep, progress)
    by_caption = images_of.numbers.astype(np.int64) * captions + np.arange(captions)[:, None]
    by_image = np.arange(images)[:, None] * captions + captions_of.numbers.astype(np.int64)
    return Candidates(images_of, captions_of, np.unique(np.concatenate([by_caption.ravel(), by_image.ravel()])))


def rank_candidates(
    candidates: Candidates,
    image_of_caption_C: NDArray[np.integer],
    scores_CK: NDArray[np.float32],
    scores_IK: NDArray[np.float32],
    top: int = 10,
) -> Ranks:
    """Ranks where every query has its candidates alone; one whose right answer is not among them is counted last of the gallery."""
    captions, images = candidates.images.numbers, candidates.captions.numbers
    right_CK = captions == image_of_caption_C[:, None]
    right_IK = image_of_caption_C[images] == np.arange(len(images))[:, None]
    caption_ranks = rank_right(scores_CK, right_CK, otherwise=len(images))
    image_ranks = rank_right(scores_IK, right_IK, otherwise=len(captions))
    return Ranks(caption_ranks, image_ranks, *best_candidates(captions, scores_CK, top))


def found_shares(candidates: Candidates, image_of_caption_C: NDArray[np.integer]) -> tuple[float, float]:
    """The share of captions whose own image is among their candidates, and of images with an own caption among theirs."""
    right_CK = candidates.images.numbers == image_of_caption_C[:, None]
    right_IK = image_of_caption_C[candidates.captions.numbers] == np.arange(len(candidates.captions.numbers))[:, None]
    return float(right_CK.any(axis=1).mean()), float(right_IK.any(axis=1).mean())


def nearest(queries_QD: torch.Tensor, vectors_VD: torch.Tensor, keep: int, progress: Progress | None = None) -> Nearest:
    """The ``keep`` vectors with the largest dot product for every query (all, where there are fewer); of equal ones the first.

    Both float32 on one device. Exact, in blocks of ``QUERIES_AT_ONCE`` x ``VECTORS_AT_ONCE``; ``FEW_QUERIES`` are answered sooner.
    """
    keep = min(keep, len(vectors_VD))
    numbers = np.empty((len(queries_QD), keep), dtype=np.int32)
    scores = np.empty((len(queries_QD), keep), dtype=np.float32)
    for start in range(0, len(queries_QD), QUERIES_AT_ONCE):
        rows = slice(start, min(start + QUERIES_AT_ONCE, len(queries_QD)))
        best_of = _best_of_few if len(queries_QD) <= FEW_QUERIES else _best_of_block
        best = best_of(queries_QD[rows], vectors_VD, keep)
        order = np.argsort(_numbers(best), axis=1)
        best = np.take_along_axis(best, order, axis=1)
        numbers[rows], scores[rows] = _numbers(best), _scores(best)
        if progress is not None:
            progress.update(len(best))
    return Nearest(numbers, scores)


def _best_of_block(queries_QD: torch.Tensor, vectors_VD: torch.Tensor, keep: int) -> NDArray[np.int64]:
    """Sort keys int64 [Q, keep] of the best, in no order."""
    best = np.empty((len(queries_QD), 0), dtype=np.int64)
    for start in range(0, len(vectors_VD), VECTORS_AT_ONCE):
        scores = (queries_QD @ vectors_VD[start : start + VECTORS_AT_ONCE].T).cpu().numpy()
        best = np.concatenate([best, _sort_keys(scores, np.arange(start, start + scores.shape[1]))], axis=1)
        if best.shape[1] > keep:
            best = np.partition(best, best.shape[1] - keep, axis=1)[:, -keep:]
    return best


def _best_of_few(queries_QD: torch.Tensor, vectors_VD: torch.Tensor, keep: int) -> NDArray[np.int64]:
    """As ``_best_of_block``: keys are made of the best scores alone, and of those that equal the last of them."""
    parts = [(queries_QD @ vectors_VD[start : start + VECTORS_AT_ONCE].T).cpu() for start in range(0, len(vectors_VD), VECTORS_AT_ONCE)]
    best = np.empty((len(queries_QD), keep), dtype=np.int64)
    for query, scores_V in enumerate(torch.cat(parts, dim=1).numpy()):
        last = np.partition(scores_V, len(scores_V) - keep)[-keep]
        numbers = np.flatnonzero(scores_V >= last)
        best[query] = np.sort(_sort_keys(scores_V[None, numbers], numbers)[0])[-keep:]
    return best


def _sort_keys(scores_QV: NDArray[np.float32], numbers_V: NDArray[np.int64]) -> NDArray[np.int64]:
    """One int64 for each score and number, in the order of the scores and, where these are equal, earlier numbers higher.

    The bits of floats sort like integers once those of negative ones are turned; so no two keys are equal, and no order of work matters.
    """
    bits = (scores_QV + np.float32(0)).view(np.int32).astype(np.int64)  # -0.0 becomes 0.0
    ordered = np.where(bits < 0, bits ^ _MAGNITUDE, bits)
    return (ordered << 32) | (_LOW_BITS - numbers_V)


def _numbers(keys: NDArray[np.int64]) -> NDArray[np.int32]:
    return (_LOW_BITS - (keys & _LOW_BITS)).astype(np.int32)


def _scores(keys: NDArray[np.int64]) -> NDArray[np.float32]:
    ordered = keys >> 32
    return np.where(ordered < 0, ordered ^ _MAGNITUDE, ordered).astype(np.int32).view(np.float32)
