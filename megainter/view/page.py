"""One self-contained HTML page for a run: no scripts, no outside resources, captions escaped."""

from pathlib import Path
from typing import Any

import numpy as np

from megainter.data.feature_store.reader import FeatureStore
from megainter.data.tables.pairs import Pairs, read_pairs
from megainter.errors import UsageError
from megainter.files import inside, require_page_place
from megainter.view.curves import draw_curves
from megainter.view.pages import counted, plain, write_template
from megainter.view.pictures import SURE, region_boxes, spread, thumbnail
from megainter.view.retrieved import SHOWN, read_report, recalls, retrieved
from megainter.weights import origin_name

LARGE = 480  # pixels of the longer side of an image


def write_page(
    output: Path,
    title: str,
    *,
    images: Path,
    pairs: Path,
    store: Path,
    metrics: Path | None = None,
    retrieval: Path | None = None,
    count: int = 12,
) -> Path:
    """Write the page to ``output`` and return it.

    It shows ``count`` images with their regions, spread over the manifest; with ``metrics`` (metrics.jsonl) the curves; with ``retrieval``
    (the JSON of ``evaluate retrieval``, its top file beside it) its table, ``count`` captions with the images found, and as many whose own
    image ranks worst. With ``retrieval`` all images are of the split that was evaluated.

    ``images`` is the folder that the manifest's paths start from. Raises ``UsageError`` for files that are missing or do not fit.
    """
    if count < 1:
        raise UsageError(f"--count is {count}; give at least 1")
    require_page_place(output, "--output")
    report = read_report(retrieval) if retrieval is not None else None
    manifest = read_pairs(pairs, report["split"] if report is not None else None)
    with FeatureStore(store) as features:
        values: dict[str, Any] = {
            "title": plain(title),
            "facts": f"{counted(len(features), 'image')} with regions, by {plain(detector_of(features))}",
            "curves": draw_curves(metrics) if metrics is not None else None,
            "retrieval": recalls(report) if report is not None else None,
            "retrieved": retrieved(retrieval, report, manifest, images, count) if report is not None and retrieval is not None else None,
            "images": _images(manifest, features, images, count),
            "shown": SHOWN,
            "sure": SURE,
        }
    write_template(output, "page.html", values)
    return output


def detector_of(store: FeatureStore) -> str:
    """A detector by its name, or by its classes where it has none."""
    schema, name = store.schema, origin_name(store.path)
    if name is not None:
        return f"the detector {name}"
    classes = ", ".join(schema.class_names[1:4]) + ", ..." * (schema.num_classes > 4)
    return f"a detector of {schema.num_classes - 1:,} class{'es' * (schema.num_classes != 2)} ({classes}), {schema.detector}"


def _images(manifest: Pairs, store: FeatureStore, folder: Path, count: int) -> list[dict[str, Any]]:
    present = np.flatnonzero(store.find(manifest.image_ids) >= 0)
    found = []
    for number in (int(present[place]) for place in spread(len(present), count)):
        rows, image_id = np.flatnonzero(manifest.image_numbers == number), manifest.image_ids[number]
        path = inside(folder, manifest.table.column("image")[int(rows[0])].as_py())
        boxes = region_boxes(store[image_id], tuple(plain(name) for name in store.schema.class_names))
        captions = [plain(manifest.caption(int(row))) for row in rows]
        found.append({"id": plain(image_id), "picture": thumbnail(path, LARGE), "boxes": boxes, "captions": captions})
    return found
