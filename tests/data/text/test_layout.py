"""Marks around texts, and how pairs are cut, against one token at a time."""

import numpy as np
import pytest

from megainter.data.text.layout import cut_pair, marked, marked_end_to_end, marked_places


def test_the_longer_text_is_cut_first() -> None:
    def token_by_token(first: int, second: int, room: int) -> tuple[int, int]:
        while first + second > room:
            first, second = (first - 1, second) if first > second else (first, second - 1)
        return first, second

    for first in range(25):
        for second in range(25):
            for room in range(0, 30):
                assert cut_pair(first, second, room) == token_by_token(first, second, room)


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_marks_stand_where_bert_has_them(dtype: type) -> None:
    first, second, none = np.array([5, 6], dtype), np.array([7], dtype), np.array([], dtype)
    assert marked(first, None, 1, 2).tolist() == [1, 5, 6, 2]
    assert marked(first, second, 1, 2).tolist() == [1, 5, 6, 2, 7, 2]
    assert marked(none, none, 1, 2).tolist() == [1, 2, 2]
    assert marked(first, second, -1, -1).dtype == dtype


def test_texts_end_to_end_are_each_texts_own() -> None:
    rng = np.random.default_rng(0)
    texts = [rng.integers(10, 99, size=length).astype(np.int32) for length in (3, 0, 7, 1, 0)]
    lengths = np.array([len(text) for text in texts])
    together = marked_end_to_end(np.concatenate(texts), lengths, 1, 2)
    assert together.dtype == np.int64
    assert together.tolist() == [token for text in texts for token in marked(text, None, 1, 2).tolist()]
    assert (together[marked_places(lengths)] == np.concatenate(texts)).all()
