"""One self-contained HTML page for a run: no scripts, no outside resources, captions escaped."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megainter.data.feature_store.reader import FeatureStore
from megainter.data.tables.pairs import Pairs, read_pairs
from megainter.errors import UsageError
from megainter.files import inside, read_json, require_file_place
from megainter.view.curves import draw_curves
from megainter.view.pages import plain, write_template
from megainter.view.pictures import SURE, image_files, region_boxes, thumbnail
from megainter.weights import origin_name

SHOWN = 5  # retrieved images of a caption
RECALLS = ("text_to_image", "image_to_text")
RECALL_KEYS = ("queries", "candidates", "median_rank", "mean_rank", *(f"{name}_at_{k}" for name in ("r", "chance") for k in (1, 5, 10)))
LARGE, SMALL = 480, 240  # pixels of the longer side of an image with regions, and of a retrieved one


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
    require_file_place(output, "--output")
    report = read_report(retrieval) if retrieval is not None else None
    manifest = read_pairs(pairs, report["split"] if report is not None else None)
    with FeatureStore(store) as features:
        values: dict[str, Any] = {
            "title": plain(title),
            "facts": f"{len(features):,} images with regions, by {plain(detector_of(features))}",
            "curves": draw_curves(metrics) if metrics is not None else None,
            "retrieval": _recalls(report) if report is not None else None,
            "retrieved": _retrieved(retrieval, report, manifest, images, count) if report is not None and retrieval is not None else None,
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
    return f"a detector of {schema.num_classes - 1:,} classes ({classes}), {schema.detector}"


def read_report(path: Path) -> dict[str, Any]:
    """The JSON that ``evaluate retrieval`` wrote; ``UsageError`` where it is some other JSON."""
    report = read_json(path)
    fits = isinstance(report, dict) and isinstance(report.get("top"), str) and {"split", "images", "captions"} <= set(report)
    if not fits or not all(isinstance(report.get(name), dict) and set(RECALL_KEYS) <= set(report[name]) for name in RECALLS):
        raise UsageError(f"{path} is no report of retrieval; give the JSON file that `megainter evaluate retrieval` wrote by --output")
    return dict(report)


def spread(size: int, count: int) -> list[int]:
    """At most ``count`` numbers spread evenly over 0 .. size - 1."""
    return np.unique(np.linspace(0, size - 1, min(count, size)).astype(int)).tolist() if size else []


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


def _recalls(report: dict[str, Any]) -> dict[str, Any]:
    rows = []
    for name, key in (("text to image", "text_to_image"), ("image to text", "image_to_text")):
        recall = report[key]
        rows.append({"name": name, "recalls": [(recall[f"r_at_{k}"], recall[f"chance_at_{k}"]) for k in (1, 5, 10)], **recall})
    split = f"split {report['split']}" if report["split"] else "whole manifest"
    note = f"{report['captions']:,} captions against {report['images']:,} images ({split}), every pair scored by the matching head."
    return {"rows": rows, "note": note}


@dataclass(frozen=True)
class Retrieved:
    """Captions with the images found for them: ``spread`` evenly over the gallery, and the ``hardest``, whose own image ranks worst."""

    spread: list[dict[str, Any]]
    hardest: list[dict[str, Any]]


def _retrieved(retrieval: Path, report: dict[str, Any], manifest: Pairs, folder: Path, count: int) -> Retrieved:
    path = inside(retrieval.parent, report["top"])
    if not path.is_file():
        raise UsageError(f"{path} is missing; `megainter evaluate retrieval` writes it beside {retrieval.name}")
    table = pq.read_table(path)
    everywhere = [row for place in spread(len(table), count) for row in table.slice(place, 1).to_pylist()]
    ranks = table.column("rank").to_numpy()
    worst = [int(place) for place in np.argsort(-ranks, kind="stable")[:count] if ranks[place] > 1]
    hardest = table.take(pa.array(worst, pa.int64())).to_pylist()
    wanted = sorted({image for row in [*everywhere, *hardest] for image in [row["image_id"], *row["images"]]})
    files = image_files(manifest.table, wanted, folder, "the retrieval scores")
    return Retrieved(*([_query(row, files) for row in rows] for rows in (everywhere, hardest)))


def _query(row: dict[str, Any], files: dict[str, Path]) -> dict[str, Any]:
    """A caption with its best images, and its own where that is not among them."""
    return {"caption": plain(row["caption"]), "rank": row["rank"], "found": _found(row, files)}


def _found(row: dict[str, Any], files: dict[str, Path]) -> list[dict[str, Any]]:
    best = list(zip(row["images"], row["scores"], strict=True))[:SHOWN]
    found = [_tile(image, place, f"{_probability(score):.1%}", row, files) for place, (image, score) in enumerate(best, start=1)]
    if row["image_id"] not in row["images"][:SHOWN]:
        found.append(_tile(row["image_id"], row["rank"], "own image", row, files) | {"late": True})
    return found


def _tile(image: str, rank: int, score: str, row: dict[str, Any], files: dict[str, Path]) -> dict[str, Any]:
    own = image == row["image_id"]
    return {"id": plain(image), "picture": thumbnail(files[image], SMALL), "rank": rank, "score": score, "own": own, "late": False}


def _probability(log_odds: float) -> float:
    return 1 / (1 + math.exp(-max(log_odds, -50.0)))
