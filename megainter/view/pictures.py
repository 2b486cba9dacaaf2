"""Images as ``data:`` URIs, and the regions to lay over them."""

import base64
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image, ImageOps

from megainter.data.feature_store.record import RegionRecord
from megainter.errors import UsageError
from megainter.files import inside
from preprocessing.images.decode import formats

COLOURS = ("#c2334d", "#23804a", "#2f5fd0", "#b8560f", "#8a35b5", "#0d7f86", "#8a5a1c", "#a3206f", "#5f6f12", "#39449c")
QUALITY = 85  # of JPEGs
BADGE = 4.6  # percent of an image's width that a region's number takes, on a page of usual width
OUTLINE = 9  # places for it along each side of a box
SURE = 0.5  # probability from which a region's class is written beside it


@dataclass(frozen=True)
class RegionBox:
    """A region to draw: its corner and size in percent of the image, its likeliest class by number and name with its probability, both
    together as ``label``, whether the detector is sure of it, and which row of the record it is."""

    left: float
    top: float
    width: float
    height: float
    label: str
    colour: str
    sure: bool
    row: int
    kind: int
    name: str
    confidence: float


def thumbnail(path: Path, longest: int) -> str:
    """The image upright, at most ``longest`` pixels on its longer side, as an embedded JPEG. ``UsageError`` if it cannot be read."""
    try:
        with Image.open(path, formats=formats()) as image:
            image.draft("RGB", (2 * longest, 2 * longest))  # JPEGs decode at a fraction of their size
            upright = ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UsageError(f"image {path} cannot be read: {error}; give the folder that the manifest's paths start from") from None
    return data_uri(small_jpeg(upright, longest), "image/jpeg")


def image_files(table: pa.Table, image_ids: list[str], folder: Path, asking: str) -> dict[str, Path]:
    """Where images lie below ``folder`` by a ``table`` of pairs; ``UsageError`` where it lacks one that ``asking`` has."""
    rows = pc.index_in(pa.array(image_ids, pa.string()), value_set=table.column("image_id").combine_chunks())
    if rows.null_count:
        image_id = image_ids[pc.index(pc.is_null(rows), True).as_py()]
        raise UsageError(f"image {image_id!r:.80} of {asking} is not in the manifest; give the one that was used there")
    images = table.column("image")
    return {image_id: inside(folder, images[row.as_py()].as_py()) for image_id, row in zip(image_ids, rows, strict=True)}


def spread(size: int, count: int) -> list[int]:
    """At most ``count`` numbers spread evenly over 0 .. size - 1."""
    return np.unique(np.linspace(0, size - 1, min(count, size)).astype(int)).tolist() if size else []


def small_jpeg(image: Image.Image, longest: int) -> bytes:
    """An RGB image, at most ``longest`` pixels on its longer side, as a JPEG of its pixels alone: no EXIF, no comment of the file's."""
    image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    image.info.clear()  # Pillow writes a comment from there
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def data_uri(content: bytes, kind: str) -> str:
    """``content`` as a URI that holds it."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def region_boxes(record: RegionRecord, names: tuple[str, ...]) -> list[RegionBox]:
    """All regions of a record, the surest last (drawn on top); a class has one colour everywhere. Background is no class here."""
    probs = record.class_probs[:, 1:]
    best, sureness = probs.argmax(axis=1) + 1, probs.max(axis=1)
    boxes = []
    for row in sureness.argsort(kind="stable").tolist():
        x1, y1, x2, y2 = (float(value) for value in record.boxes[row])
        box = RegionBox(
            left=round(100 * x1 / record.width, 2),
            top=round(100 * y1 / record.height, 2),
            width=round(100 * (x2 - x1) / record.width, 2),
            height=round(100 * (y2 - y1) / record.height, 2),
            label=f"{names[best[row]]} {sureness[row]:.2f}",
            colour=COLOURS[int(best[row]) % len(COLOURS)],
            sure=bool(sureness[row] >= SURE),
            row=row,
            kind=int(best[row]),
            name=names[best[row]],
            confidence=float(sureness[row]),
        )
        boxes.append(box)
    return boxes


def smallest_last(boxes: list[RegionBox]) -> list[RegionBox]:
    """The order to draw boxes in that are to be pointed at: none lies wholly under a larger one."""
    return sorted(boxes, key=lambda box: -box.width * box.height)


def badge_places(boxes: list[RegionBox], aspect: float, badge: float = BADGE) -> dict[int, tuple[float, float]]:
    """Where each region's number stands on an image of this width by height: row to left and top in percent, inside on the box's outline,
    or else just outside, where no other number stands if there is such a place. Small boxes choose first, having fewest places.
    ``badge``: percent of the image's width that a number takes."""
    width, height = badge, badge * 0.7 * aspect
    taken: list[tuple[float, float]] = []
    places = {}
    for box in reversed(smallest_last(boxes)):
        outline = list(_places(box, width, height))
        crowds = [sum(_overlap(place, other, width, height) for other in taken) for place in outline]
        places[box.row] = outline[int(np.argmin(crowds))]
        taken.append(places[box.row])
    return {row: (round(left, 2), round(top, 2)) for row, (left, top) in places.items()}


def _places(box: RegionBox, width: float, height: float) -> Iterator[tuple[float, float]]:
    """Corners of badges of this size on an image: those inside on the box's outline, the upper left one first, then those outside."""
    right, bottom = box.left + box.width, box.top + box.height
    within = (box.left, max(right - width, box.left), box.top, max(bottom - height, box.top))
    around = (box.left - width, right, box.top - height, bottom)
    for left, top in (*_frame(*within), *_frame(*around)):
        yield float(min(max(left, 0.0), 100 - width)), float(min(max(top, 0.0), 100 - height))


def _frame(left: float, right: float, top: float, bottom: float) -> list[tuple[float, float]]:
    """Points along four sides, from the upper left one on."""
    across, down = np.linspace(left, right, OUTLINE), np.linspace(top, bottom, OUTLINE)
    sides = [*((x, top) for x in across), *((left, y) for y in down), *((right, y) for y in down), *((x, bottom) for x in across)]
    return [(float(x), float(y)) for x, y in sides]


def _overlap(one: tuple[float, float], other: tuple[float, float], width: float, height: float) -> float:
    """Area that two badges of this size share, as a share of one."""
    across, down = width - abs(one[0] - other[0]), height - abs(one[1] - other[1])
    return max(across, 0.0) * max(down, 0.0) / (width * height)
