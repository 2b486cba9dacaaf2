"""A record's bytes read: whole, or as views of the parts that are asked for."""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from megainter.data.feature_store.record import (
    FEATURE_KINDS,
    FREE_WORDS,
    HALF_INFINITY,
    HEADER,
    MAGIC,
    PROBS_KINDS,
    VERSION,
    Bytes,
    Count,
    RegionRecord,
    StoreSchema,
    all_finite,
    damaged,
    little,
    not_finite,
    padded_length,
    record_size,
)

Read = Callable[[int, int], Bytes]  # bytes of a record: from which one on, and how many


@dataclass(frozen=True, eq=False)
class RegionViews:
    """The first regions of a record as they lie in its bytes: what `RegionRecord` has, but class probabilities are read and decoded for
    the regions asked for alone.

    ``regions`` are those of the whole record, ``probs_at`` is where its class probabilities begin; ``image_id`` and ``where`` are for
    errors.
    """

    boxes: np.ndarray
    features: np.ndarray
    width: int
    height: int
    regions: int
    probs_at: int
    read: Read
    schema: StoreSchema
    image_id: str
    where: object

    def __len__(self) -> int:
        return len(self.boxes)

    def class_probs(self, rows: np.ndarray) -> np.ndarray:
        """float32 [rows, C] of some of these regions, int64 [rows] or bool [len(self)].

        ``DamagedError`` where they hold NaN or Inf, or are no longer there; ``IndexError`` for a region that is not among these.
        """
        if rows.dtype == np.bool_:
            if len(rows) != len(self):
                raise IndexError(f"{len(rows)} choices for {len(self)} regions")
            rows = np.flatnonzero(rows)
        if not len(rows):
            return np.zeros((0, self.schema.num_classes), np.float32)
        if self.schema.probs == "dense":
            return self._floats(self._bits(self.probs_at, self.schema.num_classes, rows))
        ids = self._bits(self.probs_at, self.schema.top_k, rows).astype(np.int64)
        values = self._floats(self._bits(self.probs_at + 2 * self.regions * self.schema.top_k, self.schema.top_k, rows))
        return self._spread(ids, values)

    def _bits(self, at: int, width: int, rows: np.ndarray) -> np.ndarray:
        """uint16 [rows, width] of a table of ``regions`` such rows that begins at byte ``at``.

        From the first to the last row asked for in one go: a call for every row takes longer than the bytes between them.
        """
        places = rows.tolist()  # so few that Python's minimum is faster than NumPy's
        first, last = min(places), max(places)
        if first < 0 or last >= len(self):
            raise IndexError(f"regions {first} to {last} of {len(self)}")
        size = 2 * width * (last + 1 - first)
        data = self.read(at + 2 * width * first, size)
        if len(data) != size:
            raise damaged(self.image_id, self.where, f"{len(data)} bytes of class probabilities where {size} belong")
        return np.frombuffer(data, "<u2").reshape(-1, width)[rows - first]

    def _floats(self, bits: np.ndarray) -> np.ndarray:
        if np.maximum.reduce(bits, axis=None) < HALF_INFINITY:
            return _positive_halves(bits)
        halves = bits.view("<f2").astype(np.float32)
        if not np.isfinite(halves).all():
            raise not_finite(self.image_id, self.where)
        return halves

    def _spread(self, ids: np.ndarray, values: np.ndarray) -> np.ndarray:
        """float32 [rows, C] from the likeliest classes, int64 and float32 [rows, k]."""
        if ids.max() >= self.schema.num_classes:
            raise not_finite(self.image_id, self.where)
        rest = np.maximum(0, 1 - values.sum(1, keepdims=True)) / (self.schema.num_classes - self.schema.top_k)
        probs = np.repeat(rest.astype(np.float32), self.schema.num_classes, 1)
        np.put_along_axis(probs, ids, values, 1)
        return probs


def decode(data: Bytes, image_id: str, schema: StoreSchema, where: object) -> RegionRecord:
    """The record in ``data``; boxes and features are views of it. ``DamagedError`` naming the id where anything is not as written."""
    views = decode_views(data, image_id, schema, where)
    probs = views.class_probs(np.arange(len(views)))
    return RegionRecord(
        boxes=views.boxes,
        features=views.features,
        class_probs=probs,
        width=views.width,
        height=views.height,
        extras=_decode_extras(data, len(views), schema),
    )


def decode_views(data: Bytes, image_id: str, schema: StoreSchema, where: object, most: int | None = None) -> RegionViews:
    """The first ``most`` regions (None: all) of the record in ``data``, as views of it; ``DamagedError`` as for ``decode``."""
    regions, width, height = _checked_header(data, len(data), image_id, schema, where, verify=True)
    at = boxes_at(len(image_id.encode()))
    boxes = np.frombuffer(data, "<f4", regions * 4, at).reshape(regions, 4)
    at += 16 * regions
    features = np.frombuffer(data, little(schema.feature_dtype), regions * schema.feature_size, at).reshape(regions, schema.feature_size)
    if not all_finite(features) or not all_finite(boxes):
        raise not_finite(image_id, where)
    at += schema.feature_bytes * regions
    read = partial(_part_of, memoryview(data))
    return RegionViews(
        boxes=boxes[:most],
        features=features[:most],
        width=width,
        height=height,
        regions=regions,
        probs_at=at,
        read=read,
        schema=schema,
        image_id=image_id,
        where=where,
    )


def _part_of(data: memoryview, at: int, size: int) -> memoryview:
    return data[at : at + size]


def refuse_head(data: Bytes, image_id: str, schema: StoreSchema, where: object, size: int, wanted: int) -> None:
    """``DamagedError`` where ``data``, up to ``wanted`` bytes from the beginning of a record of ``size`` bytes, are not the record's."""
    _checked_header(data, size, image_id, schema, where, verify=False)
    if len(data) != wanted:
        raise damaged(image_id, where, f"only {len(data)} bytes of the first {wanted}")


def doubtful_heads(heads: np.ndarray, ids: Sequence[bytes], regions: np.ndarray, crcs: np.ndarray, schema: StoreSchema) -> np.ndarray:
    """bool [S]: which of S records' beginnings are not what the index says: header, id, region count and checksum, for all at once.

    ``heads`` uint8 [S, B], each row a record's beginning (header and id at least); ``regions`` [S] and ``crcs`` [S] are the index's.
    """
    lengths = np.array([len(image_id) for image_id in ids], np.int64)
    kinds = VERSION | PROBS_KINDS[schema.probs] << 16 | FEATURE_KINDS[schema.feature_dtype] << 24
    words = heads[:, : HEADER.size].view("<u4")
    wanted = np.zeros(words.shape, np.uint32)
    wanted[:] = (int.from_bytes(MAGIC, "little"), kinds, 0, 0, 0, schema.feature_size, schema.num_classes, schema.top_k, 0, 0, 0, 0)
    wanted[:, 2], wanted[:, 8], wanted[:, 9], wanted[:, 11] = regions, lengths, schema.extra_bytes, crcs
    wanted[:, FREE_WORDS] = words[:, FREE_WORDS]
    doubtful = (words != wanted).any(1)
    record = np.repeat(np.arange(len(ids)), lengths)
    place = np.arange(len(record)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    doubtful[record[heads[record, HEADER.size + place] != np.frombuffer(b"".join(ids), np.uint8)]] = True
    return doubtful


def head_sizes(heads: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Widths and heights of images, int64 [S] each, from the beginnings of their records, uint8 [S, B]."""
    words = heads[:, : HEADER.size].view("<u4")
    return words[:, 3].astype(np.int64), words[:, 4].astype(np.int64)


def boxes_at(id_bytes: Count) -> Count:
    """Where in a record the boxes begin; the features begin 16 bytes a region behind."""
    return HEADER.size + padded_length(id_bytes)


def first_bytes(regions: Count, kept: Count, id_bytes: Count, schema: StoreSchema) -> Count:
    """Bytes from the beginning of a record of ``regions`` regions up to the end of the features of the first ``kept``."""
    return boxes_at(id_bytes) + 16 * regions + schema.feature_bytes * kept


def probs_span(regions: Count, kept: Count, id_bytes: Count, schema: StoreSchema) -> tuple[Count, Count]:
    """Where in a record of ``regions`` regions the class probabilities of the first ``kept`` begin, and their bytes."""
    at = first_bytes(regions, regions, id_bytes, schema)
    return at, schema.probs_bytes * (kept if schema.probs == "dense" else regions)


def _positive_halves(bits: np.ndarray) -> np.ndarray:
    """float32 of float16 numbers from 0 on, given as bits, exactly; several times as fast as NumPy's cast.

    The bits with the exponent's offset of float32 are the number where it is normal. They are 2^-15 (1 + m / 1024) where it is m / 1024
    times 2^-14, which twice as much, less 2^-14, gives; that is more than the number everywhere else. No step meets a subnormal float32.
    """
    shifted = bits.astype(np.uint32)
    shifted <<= 13
    shifted += (127 - 15) << 23
    normal = shifted.view(np.float32)
    small = normal + normal
    small -= np.float32(2.0**-14)
    return np.minimum(normal, small, out=normal)


def _decode_extras(data: Bytes, n: int, schema: StoreSchema) -> dict[str, np.ndarray]:
    at, extras = len(data) - n * schema.extra_bytes, {}
    for name, dtype in schema.extras.items():
        extras[name] = np.frombuffer(data, little(dtype), n, at)
        at += extras[name].nbytes
    return extras


def _checked_header(data: Bytes, size: int, image_id: str, schema: StoreSchema, where: object, verify: bool) -> tuple[int, int, int]:
    """Regions, width and height of the record of ``size`` bytes that ``data`` begins; ``verify`` its checksum (``data`` is all of it)."""
    if len(data) < HEADER.size:
        raise damaged(image_id, where, f"only {len(data)} bytes")
    magic, version, probs, features, n, width, height, floats, classes, top_k, id_bytes, extras, _, crc = HEADER.unpack_from(data)
    if (magic, version) != (MAGIC, VERSION):
        raise damaged(image_id, where, "no record stands there")
    kinds = PROBS_KINDS[schema.probs], FEATURE_KINDS[schema.feature_dtype]
    sizes = schema.feature_size, schema.num_classes, schema.top_k, schema.extra_bytes
    if (probs, features, floats, classes, top_k, extras) != kinds + sizes:
        raise damaged(image_id, where, "its sizes are not the store's")
    if n == 0 or size != record_size(n, id_bytes, schema):
        raise damaged(image_id, where, f"{size} bytes for {n} regions")
    if len(data) < HEADER.size + id_bytes:
        raise damaged(image_id, where, f"only {len(data)} bytes")
    view = memoryview(data)
    if verify and zlib.crc32(view[HEADER.size :], zlib.crc32(view[: HEADER.size - 4])) != crc:
        raise damaged(image_id, where, "checksum")
    if bytes(view[HEADER.size : HEADER.size + id_bytes]) != image_id.encode():
        raise damaged(image_id, where, "it belongs to another image")
    return n, width, height
