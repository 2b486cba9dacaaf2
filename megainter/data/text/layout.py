"""Token ids as the model takes a text: [CLS] a [SEP], or [CLS] a [SEP] b [SEP]; and how a pair that is too long is cut."""

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from megainter.data.integers import Int64s

PAIR_MARKS = 3  # [CLS] a [SEP] b [SEP]
Number = TypeVar("Number", bound=np.integer)


def marked(first: NDArray[Number], second: NDArray[Number] | None, cls: int, sep: int) -> NDArray[Number]:
    """``cls`` first ``sep``, and second ``sep`` where there is one: [n + 2], or [n + m + 3], of the dtype of ``first``."""
    marks = np.array([cls, sep], first.dtype)
    one = np.concatenate([marks[:1], first, marks[1:]])
    return one if second is None else np.concatenate([one, second, marks[1:]])


def marked_end_to_end(tokens: NDArray[np.int32], lengths: Int64s, cls: int, sep: int) -> Int64s:
    """int64 [N + 2 S]: S texts of ``lengths`` tokens, given end to end [N], each between ``cls`` and ``sep``."""
    ends = np.cumsum(lengths + 2)
    ids = np.empty(len(tokens) + 2 * len(lengths), dtype=np.int64)
    ids[marked_places(lengths)] = tokens
    ids[ends - lengths - 2], ids[ends - 1] = cls, sep
    return ids


def marked_places(lengths: Int64s) -> Int64s:
    """int64 [N]: where ``marked_end_to_end`` puts each token of texts of ``lengths`` [S]."""
    text = np.repeat(np.arange(len(lengths)), lengths)  # of each token
    return np.arange(len(text)) + 2 * text + 1


def cut_pair(first: int, second: int, room: int) -> tuple[int, int]:
    """Lengths of two texts in ``room`` tokens, of which the longer one is cut first (BERT's rule; of equals the second).

    >>> cut_pair(5, 3, 10), cut_pair(9, 3, 10), cut_pair(9, 8, 10), cut_pair(9, 8, 9)
    ((5, 3), (7, 3), (5, 5), (5, 4))
    """
    if first + second <= room:
        return first, second
    half = room // 2
    if second <= half:
        return room - second, second
    return (first, room - first) if first <= room - half else (room - half, half)
