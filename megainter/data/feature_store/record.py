"""One image's regions as bytes: a fixed little-endian header, the image id, raw arrays, a CRC-32 over all of it.

Layout: header (48 bytes), id in UTF-8 padded to 16 bytes, boxes float32 [n, 4], features float16 or float32 [n, F], then class
probabilities: dense float16 [n, C], or the k likeliest classes as uint16 ids [n, k] and float16 values [n, k], whose missing mass is
spread evenly over the other classes when read; then the schema's extras, one number per region each. Nothing is unpickled and no
length is believed before it is checked.
"""

import struct
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
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
AGAIN = "run the same extraction or import again: only its images are made anew"  # what to do where a shard is damaged or gone
BOX_TOLERANCE = 1.0  # pixels: rounding and the inclusive last pixel of some detectors; clipped when written
FREE_WORDS = (3, 4, 10)  # of a header, as 32-bit words: width, height and the unused one may be anything
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
        if not 0 < self.feature_size < 2**31 or not 2 <= self.num_classes <= 65536:
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
    def described_by(self) -> str:
        """Whose features these are: the detector, and where another network described its regions, that one."""
        network = self.settings.get("feature_network")
        return self.detector if network is None else f"{self.detector}, described by {network} {self.settings['feature_network_sha256']}"

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
        except (TypeError, KeyError, AttributeError) as error:
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


def check_record(image_id: str, record: RegionRecord, schema: StoreSchema) -> None:
    """``UsageError`` naming the id where ``encode`` would refuse the record."""
    encode_id(image_id)
    _checked_arrays(image_id, record, schema)
    _checked_extras(image_id, record, schema)


def record_size(n: Count, id_bytes: Count, schema: StoreSchema) -> Count:
    """Bytes of a record of ``n`` regions."""
    per_region = 16 + schema.feature_bytes + schema.probs_bytes + schema.extra_bytes
    return HEADER.size + padded_length(id_bytes) + n * per_region


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


def _padded(name: bytes) -> bytes:
    return name + bytes(-len(name) % ALIGNMENT)


def padded_length(id_bytes: Count) -> Count:
    return -(-id_bytes // ALIGNMENT) * ALIGNMENT


def damaged(image_id: str, where: object, what: str) -> DamagedError:
    return DamagedError(f"record {image_id!r} in {where} is damaged ({what}); delete that file and {AGAIN}")


def not_finite(image_id: str, where: object) -> DamagedError:
    return DamagedError(f"record {image_id!r} in {where} holds NaN or Inf; delete that file and {AGAIN}")


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
