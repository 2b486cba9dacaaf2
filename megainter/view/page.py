"""One self-contained HTML page for a run: no scripts, no outside resources, captions escaped."""

import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from megainter.data.feature_store import FeatureStore
from megainter.data.manifest import Pairs, read_pairs
from megainter.errors import UsageError
from megainter.files import inside, read_json, write_atomically
from megainter.view.pictures import curves, data_uri, thumbnail, with_regions

SHOWN = 5  # retrieved images of a caption


def write_page(
    output: Path, title: str, *, images: Path, pairs: Path, store: Path, metrics: Path | None = None, retrieval: Path | None = None, count: int = 12
) -> Path:
    """Write the page to ``output``: ``count`` images with regions, and where given the curves of ``metrics`` and ``count`` queries of ``retrieval``.

    ``retrieval`` is the JSON of ``evaluate retrieval``, with its ``.top.parquet`` beside it. Raises ``UsageError`` for missing files.
    """
    manifest = read_pairs(pairs)
    report = read_json(retrieval) if retrieval is not None else None
    split = report["split"] if report is not None else None
    if metrics is not None and not metrics.is_file():
        raise UsageError(f"{metrics} does not exist; give a run folder with metrics.jsonl")
    with FeatureStore(store) as features:
        values: dict[str, Any] = {
            "title": plain(title),
            "facts": f"{len(manifest):,} captions, {len(features):,} images with regions, detector {features.schema.detector}",
            "images": _images(manifest, features, images, split, count),
            "curves": curves(metrics) if metrics is not None else None,
            "recalls": None, "queries": None, "gallery": 0, "chance": 0.0,
        }  # fmt: skip
    if report is not None and retrieval is not None:
        both = [(name, report[key]) for name, key in (("text to image", "text_to_image"), ("image to text", "image_to_text"))]
        values |= {"recalls": both, "gallery": report["images"], "chance": report["text_to_image"]["chance_at_1"]}
        values["queries"] = _queries(retrieval.with_name(report["top"]), manifest, images, count)
    pages = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, pages.get_template("page.html").render(values))
    return output


def plain(text: str) -> str:
    """``text`` without control and direction characters, which could disguise what is shown."""
    return "".join(letter for letter in text if unicodedata.category(letter) not in ("Cc", "Cf"))


def _images(manifest: Pairs, store: FeatureStore, folder: Path, split: str | None, count: int) -> list[dict[str, Any]]:
    splits = manifest.table.column("split").to_pylist()
    shown: dict[str, dict[str, Any]] = {}
    for row in range(len(manifest)):
        image_id = manifest.image_id(row)
        if split is not None and splits[row] != split or image_id not in store:
            continue
        if image_id not in shown and len(shown) == count:
            break
        if image_id not in shown:
            path = inside(folder, manifest.table.column("image")[row].as_py())
            picture = with_regions(path, store[image_id], store.schema.class_names)
            shown[image_id] = {"id": plain(image_id), "picture": data_uri(picture), "captions": []}
        shown[image_id]["captions"].append(plain(manifest.caption(row)))
    return list(shown.values())


def _queries(top: Path, manifest: Pairs, folder: Path, count: int) -> list[dict[str, Any]]:
    """Captions spread evenly over the gallery, with the images found for them."""
    rows = pq.read_table(top).to_pylist()
    files = dict(zip(manifest.table.column("image_id").to_pylist(), manifest.table.column("image").to_pylist(), strict=True))
    queries = []
    for place in np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)):
        row = rows[place]
        found = [
            {"picture": data_uri(thumbnail(inside(folder, files[image]), 200)), "score": score, "right": image == row["image_id"]}
            for image, score in list(zip(row["images"], row["scores"], strict=True))[:SHOWN]
        ]
        queries.append({"caption": plain(row["caption"]), "rank": row["rank"], "found": found})
    return queries
