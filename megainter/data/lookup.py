"""Finding many ids among many: exact, and made for streams of batches against hundreds of millions of ids."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from megainter.data.integers import Int64s, UInt64s, mixed
from megainter.data.mapped import string_buffers

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_AT_ONCE = 1 << 16  # ids hashed at once: what is made of them stays in the processor's cache
_WORD = 8  # bytes


def string_hashes(values: pa.Array) -> UInt64s:
    """uint64 [n]: a hash of each string (``pa.string`` or ``pa.large_string``, no nulls), the same in every process.

    Sums of a random-looking number for each (place, eight bytes), with the length mixed in: two given strings agree with probability
    2^-64. No defence against strings made to collide.
    """
    parts = [_hashes(values.slice(start, _AT_ONCE)) for start in range(0, len(values), _AT_ONCE)]
    return np.concatenate([np.zeros(0, np.uint64), *parts])


def _hashes(values: pa.Array) -> UInt64s:
    offsets, content = string_buffers(values)
    lengths = np.diff(offsets)
    words = -(-lengths // _WORD)
    firsts = np.concatenate([np.zeros(1, np.int64), np.cumsum(words)])  # of each string, among all words
    places = np.arange(firsts[-1]) - np.repeat(firsts[:-1], words)
    starts = np.repeat(offsets[:-1] - offsets[0], words) + _WORD * places
    padded = np.concatenate([content, np.zeros(_WORD, np.uint8)])
    everywhere = np.ndarray(len(content) + 1, "<u8", padded, strides=(1,))  # the eight bytes from each place on
    over = (_WORD * (places + 1) - np.repeat(lengths, words)).clip(min=0).astype(np.uint64)  # bytes of a last word beyond its string
    values_of_words = everywhere[starts] << (np.uint64(8) * over)  # drops them: little-endian, so they are the highest
    with np.errstate(over="ignore"):
        terms = mixed(values_of_words ^ mixed((places.astype(np.uint64) + np.uint64(1)) * _GOLDEN))
        sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(terms, dtype=np.uint64)])  # wraps, and differences wrap back
        return mixed((sums[firsts[1:]] - sums[firsts[:-1]]) + lengths.astype(np.uint64) * _GOLDEN)


class Lookup:
    """Places of ids in a sorted column of ids, by their hashes; what these leave open is compared as text.

    Takes 12 to 16 bytes of memory for each id of the column while it is there.
    """

    def __init__(self, ids: pa.LargeStringArray) -> None:
        self.ids = ids
        hashes = string_hashes(ids)
        order = np.argsort(hashes)
        self._hashes, self._rows = hashes[order], order.astype(np.int32 if len(ids) < 2**31 else np.int64)

    def find(self, wanted: pa.Array) -> Int64s:
        """int64 [n]: place of each wanted id, -1 where it is not in the column."""
        if not len(self.ids) or not len(wanted):
            return np.full(len(wanted), -1, np.int64)
        hashes = string_hashes(wanted)
        order = np.argsort(hashes)  # sorted questions walk the sorted answers in one direction
        places = np.empty(len(wanted), np.int64)
        places[order] = np.searchsorted(self._hashes, hashes[order]).clip(max=len(self.ids) - 1)
        rows = self._rows[places].astype(np.int64)
        same = self._hashes[places] == hashes
        same[same] = self._read_the_same(rows[same], wanted.filter(pa.array(same)))
        rows[~same] = -1
        for i in np.flatnonzero(~same & (self._hashes[places] == hashes)):  # one hash, two ids: hardly ever
            rows[i] = self._among_equals(int(places[i]), wanted[int(i)].as_py())
        return rows

    def _read_the_same(self, rows: Int64s, wanted: pa.Array) -> NDArray[np.bool_]:
        found = self.ids.take(pa.array(rows))
        return pc.equal(found, wanted.cast(pa.large_string())).to_numpy(zero_copy_only=False).astype(np.bool_)

    def _among_equals(self, place: int, wanted: str) -> int:
        """Of the ids whose hash is that at ``place``, the first of its run, the row of the one that reads ``wanted``; else -1."""
        for i in range(place, len(self._hashes)):
            if self._hashes[i] != self._hashes[place]:
                return -1
            if self.ids[int(self._rows[i])].as_py() == wanted:
                return int(self._rows[i])
        return -1
