"""The page of a feature store: a grid of its images with boxes, filtered by class and confidence without scripts, and what failed."""

from collections import Counter
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from megainter.data.feature_store.reader import FeatureStore
from megainter.data.feature_store.record import RegionRecord
from megainter.errors import UsageError
from megainter.files import inside, require_page_place
from megainter.view.page import detector_of
from megainter.view.pages import counted, plain, write_template
from megainter.view.pictures import RegionBox, image_files, region_boxes, smallest_last, spread, thumbnail
from preprocessing.images.listing import list_images

SIDE = 220  # pixels of a picture's longer side
LEVELS = (0.3, 0.5, 0.7, 0.9)  # confidences to filter by
NAMED = 4  # classes named below a picture
FAILURES = 500  # shown of the list
BINS = 12  # of the histogram of regions


@dataclass(frozen=True)
class Failures:
    """What an extraction could not use: ``reasons`` with how many images each, and the first rows as id, path and reason."""

    total: int
    reasons: list[tuple[str, int]]
    rows: list[tuple[str, str, str]]


def write_store_page(
    output: Path, title: str, *, store: Path, images: Path | None = None, pairs: Path | None = None, count: int = 200
) -> Path:
    """Write the page of ``count`` images, spread over the store, to ``output`` and return it.

    Pictures are those of the folder ``images``, by the paths of the manifest ``pairs``, else by ids as ``extract`` gives them; an image
    without a file has an empty frame. ``UsageError`` for a path that does not fit.
    """
    require_page_place(output, "--output")
    if count < 1:
        raise UsageError(f"--count is {count}; give at least 1")
    with FeatureStore(store) as features:
        ids = [features.ids[row] for row in spread(len(features), count)]
        files = _files(ids, images, pairs)
        names = tuple(plain(name) for name in features.schema.class_names)
        shown = [_shown(image_id, features[image_id], names, files.get(image_id)) for image_id in ids]
        regions = features.regions_at(features.find(ids))
        values = {
            "title": plain(title),
            "facts": f"{counted(len(features), 'image')} with regions, by {plain(detector_of(features))}; {len(ids):,} shown",
            "images": shown,
            "classes": classes_of(shown),
            "levels": LEVELS,
            "histogram": histogram(regions.tolist()),
            "failures": read_failures(store / "failed.tsv"),
        }
    write_template(output, "store.html", values)
    return output


def _files(ids: list[str], images: Path | None, pairs: Path | None) -> dict[str, Path]:
    if images is None:
        return {}
    if pairs is not None:
        table = pq.read_table(pairs, columns=["image_id", "image"], filters=[("image_id", "in", ids)])
        known = set(table.column("image_id").to_pylist())
        return image_files(table, [image_id for image_id in ids if image_id in known], images, "the store")
    wanted = set(ids)
    found = {
        item.image_id: inside(images, item.path) for item in list_images(images).items if item.part is None and item.image_id in wanted
    }
    if not found:
        raise UsageError(f"no file in {images} has the id of an image of the store, such as {ids[0]!r:.80}; give --pairs, or its folder")
    return found


def _shown(image_id: str, record: RegionRecord, names: tuple[str, ...], file: Path | None) -> dict[str, Any]:
    boxes = region_boxes(record, names)
    best = list(dict.fromkeys(box.label for box in reversed(boxes) if box.sure))[:NAMED]
    return {
        "id": plain(image_id), "picture": thumbnail(file, SIDE) if file is not None else None, "width": record.width,
        "height": record.height, "named": ", ".join(best) or "nothing surer than a half", "regions": len(record),
        "classes": {box.kind: box.name for box in boxes},
        "boxes": [{"place": box, "below": _below(box)} for box in smallest_last(boxes)],
    }  # fmt: skip


def _below(box: RegionBox) -> str:
    """The levels that the box does not reach, as classes of the style sheet."""
    return " ".join(f"u{number}" for number, level in enumerate(LEVELS) if box.confidence < level)


def classes_of(images: list[dict[str, Any]]) -> list[tuple[int, str, int]]:
    """(number, name, images) of every class that is the likeliest of some region, those of most images first."""
    counts = Counter(kind for image in images for kind in image["classes"])
    names = {kind: name for image in images for kind, name in image["classes"].items()}
    return [(kind, names[kind], count) for kind, count in sorted(counts.items(), key=lambda item: (-item[1], names[item[0]]))]


def histogram(regions: list[int]) -> list[tuple[str, int, float]]:
    """(regions, images, share of the fullest bin) in at most ``BINS`` bins of one width."""
    low, high = min(regions, default=0), max(regions, default=0)
    width = -(-(high - low + 1) // BINS)
    counts = Counter((number - low) // width for number in regions)
    bins = range((high - low) // width + 1)
    ends = [(low + k * width, min(low + (k + 1) * width - 1, high)) for k in bins]
    labels = [f"{first}" if first == last else f"{first} to {last}" for first, last in ends]
    return [(label, counts[k], counts[k] / max(counts.values())) for k, label in enumerate(labels)]


def read_failures(path: Path) -> Failures | None:
    """``failed.tsv`` of an extraction, as it lies beside a store; None where everything was stored."""
    if not path.is_file():
        return None
    reasons, rows = Counter[str](), list[tuple[str, str, str]]()
    with open(path, encoding="utf-8") as file:
        for line in islice(file, 1, None):
            cells = [plain(cell) for cell in line.rstrip("\n").split("\t")]
            image_id, image, reason = (*cells, "", "", "")[:3]
            reasons[reason] += 1
            if len(rows) < FAILURES:
                rows.append((image_id, image, reason))
    return Failures(reasons.total(), reasons.most_common(20), rows)
