"""The first regions of several records, read together: what training takes of a micro-batch's records, straight into its own arrays.

Headers, ids and boxes are read first and checked for all records at once, since the masks need the boxes. Features are read when they are
asked for, into the place where they are wanted; class probabilities for the regions that are predicted alone.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from megainter.data.feature_store.record import HALF_INFINITY, Bytes, StoreSchema, all_finite, damaged, little, not_finite, record_size
from megainter.data.feature_store.views import RegionViews, boxes_at, doubtful_heads, first_bytes, head_sizes, refuse_head
from megainter.errors import DamagedError

Int64s = NDArray[np.int64]
ReadInto = Callable[[int, memoryview, int], int]  # record, where to, from which of its bytes on; gives how many bytes there were
Runs = Iterable[tuple[int, int, int, int]]  # first and end in the result, record, which of its regions is first


class FirstRegions:
    """The first ``most`` regions (None: all) of S records. ``DamagedError`` naming one that is not as the index says, here or when read.

    ``ids``: their ids in UTF-8; ``lengths``, ``regions`` int64 and ``crcs`` uint32 [S] are the index's; ``whole``: records that were read
    whole and verified just now, by their number here; ``read`` reads of the others; ``where(i)`` is the file of one, for errors.

    ``counts`` int64 [S] are the regions of each; ``boxes`` float32 [N, 4] those of all records end to end, read-only, in pixels of images
    of ``widths`` x ``heights``, int64 [S].
    """

    def __init__(
        self,
        ids: Sequence[bytes],
        lengths: Int64s,
        regions: Int64s,
        crcs: NDArray[np.uint32],
        most: int | None,
        schema: StoreSchema,
        whole: Mapping[int, bytes],
        read: ReadInto,
        where: Callable[[int], object],
    ) -> None:
        self.schema, self._ids, self._lengths, self._regions = schema, ids, lengths, regions
        self._whole, self._read, self._where, self._dtype = whole, read, where, little(schema.feature_dtype)
        self.counts = regions if most is None else regions.clip(max=most)
        self._boxes_at = boxes_at(np.array([len(image_id) for image_id in ids], np.int64))
        features_at = self._boxes_at + 16 * regions
        self._features_at, self._probs_at = features_at.tolist(), (features_at + schema.feature_bytes * regions).tolist()
        heads = self._heads(crcs)
        self.widths, self.heights = head_sizes(heads)
        self.boxes = self._boxes(heads)

    def __len__(self) -> int:
        return len(self._ids)

    def features(self, i: int, out: NDArray[np.floating]) -> NDArray[np.floating]:
        """Fill ``out`` with the features of record ``i``, [counts[i], F] in C order, of any floating dtype.

        Gives them as they are stored: ``out`` itself where it is of the store's dtype. ``DamagedError`` where they hold NaN or Inf, or are
        no longer there.
        """
        stored = out if out.dtype == self._dtype else np.empty(out.shape, self._dtype)
        if not stored.size:
            return stored  # nothing to read, and no bytes to look at
        at = self._features_at[i]
        got = self._fill(i, stored.data, at)
        if got != stored.nbytes:
            what = f"only {at + got} bytes of the first {at + stored.nbytes}"
            raise damaged(self._name(i), self._where(i), what)
        if not all_finite(stored):
            raise not_finite(self._name(i), self._where(i))
        if stored is not out:
            out[:] = stored
        return stored

    def class_probs(self, records: Int64s, rows: Int64s) -> NDArray[np.floating]:
        """[K, C]: the class probabilities of regions ``rows`` int64 [K] of records ``records`` int64 [K], as they are stored.

        float16 of a dense store, else float32; either way float32 holds them exactly. Regions that lie one behind the other are read at
        once. ``DamagedError`` and ``IndexError`` as for `RegionViews.class_probs`.
        """
        if (rows < 0).any() or (rows >= self.counts[records]).any():
            raise IndexError("class probabilities of regions that are not among these")
        breaks = np.flatnonzero((np.diff(records) != 0) | (np.diff(rows) != 1)) + 1
        firsts = np.concatenate([np.zeros(min(1, len(rows)), np.int64), breaks])
        runs = zip(firsts.tolist(), [*breaks.tolist(), len(rows)], records[firsts].tolist(), rows[firsts].tolist(), strict=False)
        return self._dense(runs, records) if self.schema.probs == "dense" else self._likeliest(runs)

    def views(self, i: int) -> RegionViews:
        """Record ``i`` alone."""
        features = np.empty((int(self.counts[i]), self.schema.feature_size), self._dtype)
        self.features(i, features)
        features.flags.writeable = False
        return self._views(i, features)

    def _views(self, i: int, features: NDArray[np.floating]) -> RegionViews:
        first = int(self.counts[:i].sum())
        boxes = self.boxes[first : first + int(self.counts[i])]
        numbers = int(self.widths[i]), int(self.heights[i]), int(self._regions[i]), self._probs_at[i]
        return RegionViews(boxes, features, *numbers, partial(self._part, i), self.schema, self._name(i), self._where(i))

    def _heads(self, crcs: NDArray[np.uint32]) -> NDArray[np.uint8]:
        """uint8 [S, B]: each record up to its features, checked."""
        sizes = self._features_at
        heads = np.empty((len(self), max(sizes, default=boxes_at(0))), np.uint8)
        places = heads.reshape(-1).data
        for i, size in enumerate(sizes):
            got = self._fill(i, places[i * heads.shape[1] : i * heads.shape[1] + size], 0)
            if got != size:
                self._refuse(i, heads[i, :got].tobytes())
        wrong = doubtful_heads(heads, self._ids, self._regions, crcs, self.schema)
        wrong |= self._lengths != record_size(self._regions, np.array([len(image_id) for image_id in self._ids], np.int64), self.schema)
        for i in np.flatnonzero(wrong).tolist():
            self._refuse(i, heads[i, : sizes[i]].tobytes())
        return heads

    def _refuse(self, i: int, head: Bytes) -> None:
        """``DamagedError`` with what is wrong with the beginning of record ``i``."""
        name, where, at = self._name(i), self._where(i), self._features_at[i]
        wanted = at if len(head) == at else first_bytes(int(self._regions[i]), int(self.counts[i]), len(self._ids[i]), self.schema)
        refuse_head(head, name, self.schema, where, int(self._lengths[i]), wanted)
        raise DamagedError(f"record {name!r} in {where} is not the one of the index; seal the store again")

    def _boxes(self, heads: NDArray[np.uint8]) -> NDArray[np.float32]:
        """float32 [N, 4]: all in a head lies at a multiple of 16 bytes, which is what a box has."""
        record = np.repeat(np.arange(len(self)), self.counts)
        begins = (np.arange(len(self)) * heads.shape[1] + self._boxes_at) // 16
        place = np.arange(len(record)) - (np.cumsum(self.counts) - self.counts)[record]
        boxes = heads.reshape(-1).view("<f4").reshape(-1, 4)[begins[record] + place]
        if not all_finite(boxes):
            first = int(record[~np.isfinite(boxes).all(1)][0])
            raise not_finite(self._name(first), self._where(first))
        boxes.flags.writeable = False
        return boxes

    def _dense(self, runs: Runs, records: Int64s) -> NDArray[np.floating]:
        probs = np.empty((len(records), self.schema.num_classes), "<f2")
        for first, end, record, row in runs:
            part = probs[first:end]
            got = self._fill(record, part.data, self._probs_at[record] + self.schema.probs_bytes * row)
            if got != part.nbytes:
                what = f"{got} bytes of class probabilities where {part.nbytes} belong"
                raise damaged(self._name(record), self._where(record), what)
        if np.maximum.reduce(probs.view("<u2"), axis=None, initial=0) >= HALF_INFINITY:
            for record in records[~np.isfinite(probs).all(1)].tolist():
                raise not_finite(self._name(record), self._where(record))
        return probs

    def _likeliest(self, runs: Runs) -> NDArray[np.floating]:
        none = np.zeros((0, self.schema.feature_size), np.float32)
        parts = [self._views(record, none).class_probs(row + np.arange(end - first)) for first, end, record, row in runs]
        return np.concatenate([np.zeros((0, self.schema.num_classes), np.float32), *parts])

    def _fill(self, i: int, out: memoryview, at: int) -> int:
        """Bytes of record ``i`` from byte ``at`` on into ``out``; how many there were."""
        if i not in self._whole:
            return self._read(i, out, at)
        place = out.cast("B")
        part = self._whole[i][at : at + len(place)]
        place[: len(part)] = part
        return len(part)

    def _part(self, i: int, at: int, size: int) -> Bytes:
        data = bytearray(size)
        return memoryview(data)[: self._fill(i, memoryview(data), at)]

    def _name(self, i: int) -> str:
        return self._ids[i].decode()
