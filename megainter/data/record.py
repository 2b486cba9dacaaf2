"""One image's regions as bytes: a fixed little-endian header, the image id, raw arrays, a CRC-32 over all of it.

Layout: header (48 bytes), id in UTF-8 padded to 16 bytes, boxes float32 [n, 4], features float16 or float32 [n, F], then class
probabilities: dense float16 [n, C], or the k likeliest classes as uint16 ids [n, k] and float16 values [n, k], whose missing mass is
spread evenly over the other classes when read; then the schema's extras, one number per region each. Nothing is unpickled and no
length is believed before it is checked.
"""

import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from typing import Any, TypeVar

import numpy as np

from megainter.errors import DamagedError, UsageError

# magic, version, probs kind, features kind, n, width, height, F, C, k, id bytes, extras' bytes per region, 0, CRC-32
HEADER = struct.Struct("<4sHBB10I")
MAGIC, VERSION, ALIGNMENT = b"MIRR", 1, 16
PROBS_KINDS = {"dense": 0, "top-k": 1}
FEATURE_KINDS = {"float16": 0, "float32": 1}
EXTRA_DTYPES = ("int64", "float32", "float16")
MAX_ID_BYTES = 4096
BOX_TOLERANCE = 1.0  # pixels: rounding and the inclusive last pixel of some detectors; clipped when written
_FREE_WORDS = (3, 4, 10)  # of a header, as 32-bit words: width, height and the unused one may be anything
HALF_INFINITY, FLOAT_INFINITY = 0x7C00, 0x7F800000  # as bits; what is negative, infinite or no number has bits from here on
PROBS_TOLERANCE = 0.02  # float16 sums of some thousand classes stay well inside


@dataclass(frozen=True, eq=False)
class RegionRecord:
    """Regions of one image.

    ``boxes`` float32 [n, 4], xyxy in original pixels; ``features`` float16 or float32 [n, F]; ``class_probs`` float32 [n, C], background
    first; ``width`` and ``height`` of the image in pixels; ``extras`` what else the schema names, [n] each. Arrays that come out of a
    store are read-only.
    """

    boxes: np.ndarray
    features: np.ndarray
    class_probs: np.ndarray
    width: int
    height: int
    extras: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.boxes)


@dataclass(frozen=True)
class StoreSchema:
    """What every record of a store looks like and what made it.

    ``num_classes`` C counts the background, which is class 0; ``class_names`` has C names; ``detector`` is the detector's fingerprint;
    ``probs`` is "dense" or "top-k" (then ``top_k`` of the C probabilities are kept); ``settings`` are those of the extraction;
    ``feature_dtype`` is float16 or float32; ``extras`` names further numbers of each region and their dtypes.
    """

    feature_size: int
    num_classes: int
    class_names: tuple[str, ...]
    detector: str
    probs: str = "dense"
    top_k: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    feature_dtype: str = "float16"
    extras: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.feature_size <= 0 or not 2 <= self.num_classes <= 65536:
            raise UsageError(f"a store of {self.feature_size}-d features and {self.num_classes} classes is not possible")
        if len(self.class_names) != self.num_classes:
            raise UsageError(f"a store of {self.num_classes} classes was given {len(self.class_names)} class names")
        if self.class_names[0] != "__background__":
            raise UsageError(f"class 0 of a store is '__background__', not {self.class_names[0]!r}")
        if self.probs not in PROBS_KINDS or (self.probs == "top-k") != (0 < self.top_k < self.num_classes):
            raise UsageError(f"probs={self.probs!r} with top_k={self.top_k} is not possible: 'dense' with 0, or 'top-k' with 1 to C - 1")
        if self.feature_dtype not in FEATURE_KINDS:
            raise UsageError(f"features of a store are float16 or float32, not {self.feature_dtype!r}")
        if any(dtype not in EXTRA_DTYPES or not name.isidentifier() for name, dtype in self.extras.items()):
            raise UsageError(f"extras {self.extras!r} of a store are not names with one of {', '.join(EXTRA_DTYPES)}")

    @cached_property
    def feature_bytes(self) -> int:
        """Bytes of a region's feature."""
        return self.feature_size * np.dtype(self.feature_dtype).itemsize

    @cached_property
    def probs_bytes(self) -> int:
        """Bytes of a region's class probabilities."""
        return 2 * self.num_classes if self.probs == "dense" else 4 * self.top_k

    @cached_property
    def extra_bytes(self) -> int:
        """Bytes of a region's extras."""
        return sum(np.dtype(dtype).itemsize for dtype in self.extras.values())

    def to_json(self) -> dict[str, Any]:
        """As store.json holds it; what came later is left out where it is the default, so that earlier versions read such stores."""
        value = asdict(self) | {"class_names": list(self.class_names)}
        later = {"feature_dtype": "float16", "extras": {}}
        return {name: item for name, item in value.items() if name not in later or item != later[name]}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "StoreSchema":
        try:
            return cls(**(value | {"class_names": tuple(value["class_names"])}))
        except (TypeError, KeyError) as error:
            raise UsageError(f"the schema of a feature store is not complete: {error}") from None

    def difference(self, other: "StoreSchema") -> str:
        """What differs between two schemas, one field after the other; "" where nothing does."""
        mine, theirs = ({**schema.to_json(), **schema.settings, "settings": None} for schema in (self, other))
        names = [name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name)]
        return "; ".join(f"{n} differ" if n == "class_names" else f"{n} is {mine.get(n)!r}, not {theirs.get(n)!r}" for n in names)


def encode(image_id: str, record: RegionRecord, schema: StoreSchema) -> tuple[bytes, int]:
    """A record's bytes and their CRC-32. ``UsageError`` naming the id for shapes, boxes or numbers that may not enter a store."""
    name = encode_id(image_id)
    boxes, features, probs = _checked_arrays(image_id, record, schema)
    extras = _checked_extras(image_id, record, schema)
    n, width, height = len(boxes), int(record.width), int(record.height)
    numbers = (n, width, height, schema.feature_size, schema.num_classes, schema.top_k, len(name), schema.extra_bytes, 0)
    header = HEADER.pack(MAGIC, VERSION, PROBS_KINDS[schema.probs], FEATURE_KINDS[schema.feature_dtype], *numbers, 0)[:-4]
    body = b"".join([_padded(name), boxes.tobytes(), features.tobytes(), _encode_probs(probs, schema), *(e.tobytes() for e in extras)])
    crc = zlib.crc32(body, zlib.crc32(header))
    return b"".join([header, crc.to_bytes(4, "little"), body]), crc


Bytes = bytes | memoryview
Count = TypeVar("Count", int, np.ndarray)  # of one record, or int64 [S] of several
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
    return RegionRecord(views.boxes, views.features, probs, views.width, views.height, _decode_extras(data, len(views), schema))


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
    return RegionViews(boxes[:most], features[:most], width, height, regions, at, read, schema, image_id, where)


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
    wanted[:, _FREE_WORDS] = words[:, _FREE_WORDS]
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
    return HEADER.size + _padded_length(id_bytes)


def first_bytes(regions: Count, kept: Count, id_bytes: Count, schema: StoreSchema) -> Count:
    """Bytes from the beginning of a record of ``regions`` regions up to the end of the features of the first ``kept``."""
    return boxes_at(id_bytes) + 16 * regions + schema.feature_bytes * kept


def probs_span(regions: Count, kept: Count, id_bytes: Count, schema: StoreSchema) -> tuple[Count, Count]:
    """Where in a record of ``regions`` regions the class probabilities of the first ``kept`` begin, and their bytes."""
    at = first_bytes(regions, regions, id_bytes, schema)
    return at, schema.probs_bytes * (kept if schema.probs == "dense" else regions)


def check_record(image_id: str, record: RegionRecord, schema: StoreSchema) -> None:
    """``UsageError`` naming the id where ``encode`` would refuse the record."""
    encode_id(image_id)
    _checked_arrays(image_id, record, schema)
    _checked_extras(image_id, record, schema)


def record_size(n: Count, id_bytes: Count, schema: StoreSchema) -> Count:
    """Bytes of a record of ``n`` regions."""
    per_region = 16 + schema.feature_bytes + schema.probs_bytes + schema.extra_bytes
    return HEADER.size + _padded_length(id_bytes) + n * per_region


def encode_id(image_id: str) -> bytes:
    """An id as UTF-8. Any characters, 1 to 4096 bytes; ``UsageError`` otherwise."""
    try:
        name = image_id.encode()
    except UnicodeEncodeError:
        raise UsageError(f"image id {image_id!r} is not valid Unicode; rename the file") from None
    if not 0 < len(name) <= MAX_ID_BYTES:
        raise UsageError(f"image id {image_id[:40]!r} has {len(name)} bytes; 1 to {MAX_ID_BYTES} are possible")
    return name


def little(dtype: str) -> np.dtype:
    return np.dtype(dtype).newbyteorder("<")


def all_finite(numbers: np.ndarray) -> bool:
    """Whether all of them are, float16 or float32, any shape.

    The bits are several times as fast as NumPy's isfinite in half precision; their maximum alone tells where none is negative.
    """
    half = numbers.dtype.itemsize == 2
    bits, infinity = (numbers.view(np.uint16), HALF_INFINITY) if half else (numbers.view(np.uint32), FLOAT_INFINITY)
    return bool(np.maximum.reduce(bits, axis=None, initial=0) < infinity) or not (bits & infinity == infinity).any()


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


def _padded(name: bytes) -> bytes:
    return name + bytes(-len(name) % ALIGNMENT)


def _padded_length(id_bytes: Count) -> Count:
    return -(-id_bytes // ALIGNMENT) * ALIGNMENT


def damaged(image_id: str, where: object, what: str) -> DamagedError:
    return DamagedError(f"record {image_id!r} in {where} is damaged ({what}); extract the image again")


def not_finite(image_id: str, where: object) -> DamagedError:
    return DamagedError(f"record {image_id!r} in {where} holds NaN or Inf; extract the image again")


def _checked_arrays(image_id: str, record: RegionRecord, schema: StoreSchema) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    n = len(record.boxes)
    shapes = record.boxes.shape, record.features.shape, record.class_probs.shape
    if n == 0 or shapes != ((n, 4), (n, schema.feature_size), (n, schema.num_classes)):
        wanted = f"[n, 4], [n, {schema.feature_size}], [n, {schema.num_classes}] with n >= 1"
        raise UsageError(f"image {image_id!r}: boxes, features, class_probs have shapes {shapes}; the store takes {wanted}")
    boxes = _checked_boxes(image_id, np.asarray(record.boxes, "<f4"), record.width, record.height)
    with np.errstate(over="ignore"):
        features = np.asarray(record.features, little(schema.feature_dtype))
    if not np.isfinite(features).all():
        raise UsageError(f"image {image_id!r}: features hold NaN, Inf or values beyond {schema.feature_dtype}")
    probs = np.asarray(record.class_probs, np.float32)
    if not np.isfinite(probs).all() or probs.min() < 0 or np.abs(probs.sum(1) - 1).max() > PROBS_TOLERANCE:
        raise UsageError(f"image {image_id!r}: class_probs are not probabilities (each row sums to 1, none below 0)")
    return boxes, features, probs


def _checked_extras(image_id: str, record: RegionRecord, schema: StoreSchema) -> list[np.ndarray]:
    """The extras in the schema's order and dtypes."""
    shapes = {name: np.shape(value) for name, value in record.extras.items()}
    if shapes != {name: (len(record),) for name in schema.extras}:
        raise UsageError(f"image {image_id!r}: extras have shapes {shapes}; the store takes {[*schema.extras]}, [{len(record)}] each")
    extras = [np.asarray(record.extras[name]).astype(little(dtype), casting="same_kind") for name, dtype in schema.extras.items()]
    if not all(np.isfinite(value).all() for value in extras):
        raise UsageError(f"image {image_id!r}: extras hold NaN or Inf")
    return extras


def _checked_boxes(image_id: str, boxes: np.ndarray, width: int, height: int) -> np.ndarray:
    if width <= 0 or height <= 0:
        raise UsageError(f"image {image_id!r} has size {width} x {height}")
    limit = np.array([width, height, width, height], np.float32)
    inside = np.isfinite(boxes) & (boxes >= -BOX_TOLERANCE) & (boxes <= limit + BOX_TOLERANCE)
    bad = ~inside.all(1) | (boxes[:, 2:] < boxes[:, :2]).any(1)
    if bad.any():
        box = boxes[int(np.argmax(bad))].tolist()
        raise UsageError(f"image {image_id!r} ({width} x {height}): box {box} is not x1, y1, x2, y2 inside it")
    return np.clip(boxes, 0, limit)


def _encode_probs(probs: np.ndarray, schema: StoreSchema) -> bytes:
    if schema.probs == "dense":
        return probs.astype("<f2").tobytes()
    best = np.argsort(-probs, axis=1, kind="stable")[:, : schema.top_k]
    return best.astype("<u2").tobytes() + np.take_along_axis(probs, best, 1).astype("<f2").tobytes()


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
