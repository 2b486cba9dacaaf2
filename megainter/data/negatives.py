"""Negative captions for image-text matching: drawn uniformly from the captions of other images."""

import numpy as np
from numpy.typing import NDArray

from megainter.data.order import Int64s, Purpose, uniform
from megainter.errors import UsageError

_ATTEMPTS = 32  # an image that owns half of all captions still fails all of them only once in 2^32 samples


def require_two_images(image_numbers: NDArray[np.int32], where: str) -> None:
    """A ``UsageError`` where all captions belong to one image: no negative caption exists."""
    if len(image_numbers) == 0 or (image_numbers == image_numbers[0]).all():
        raise UsageError(f"{where}: matching needs captions of at least two images to draw negative captions from, this data has one")


def choose_captions(
    image_numbers: NDArray[np.int32], rows: Int64s, seed: int, epoch: int, n: Int64s, probability: float
) -> tuple[Int64s, Int64s]:
    """The caption that each sample is shown: its own, or with ``probability`` a random one of another image.

    ``image_numbers`` int32 [captions] gives the image of every caption; ``rows`` int64 [S] are the captions of samples ``n`` int64 [S] of
    ``epoch``. Returns caption rows int64 [S] and ITM labels int64 [S] (0 = matched, 1 = mismatched).
    """
    mismatched = uniform(seed, epoch, n, Purpose.MISMATCH) < probability
    chosen = np.array(rows, dtype=np.int64)
    chosen[mismatched] = negative_rows(image_numbers, chosen[mismatched], seed, epoch, np.asarray(n)[mismatched])
    return chosen, mismatched.astype(np.int64)


def negative_rows(image_numbers: NDArray[np.int32], rows: Int64s, seed: int, epoch: int, n: Int64s) -> Int64s:
    """For each caption in ``rows`` a row drawn uniformly from the captions of all other images: int64 [S].

    Needs at least two images (``require_two_images``). Rejection: attempts are hashes of (seed, epoch, n, attempt); what is left after
    the last attempt draws from the listed candidates, so that the choice stays uniform however unequal the images are.
    """
    found = np.full(len(rows), -1, dtype=np.int64)
    left = np.arange(len(rows))
    for attempt in range(_ATTEMPTS):
        if not len(left):
            break
        drawn = (uniform(seed, epoch, n[left], Purpose.NEGATIVE + attempt) * len(image_numbers)).astype(np.int64)
        good = image_numbers[drawn] != image_numbers[rows[left]]
        found[left[good]] = drawn[good]
        left = left[~good]
    for i in left:
        candidates = np.flatnonzero(image_numbers != image_numbers[rows[i]])
        u = uniform(seed, epoch, n[i : i + 1], Purpose.NEGATIVE + _ATTEMPTS)[0]
        found[i] = candidates[int(u * len(candidates))]
    return found
