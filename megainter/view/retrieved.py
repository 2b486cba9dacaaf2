"""What retrieval found: its recalls, captions with their images, and the hardest errors of both directions."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megainter.data.tables.pairs import Pairs
from megainter.errors import UsageError
from megainter.files import inside, read_json
from megainter.tasks.retrieval.ranking import rank_scores
from megainter.view.pages import counted, plain
from megainter.view.pictures import image_files, spread, thumbnail

SHOWN = 5  # retrieved images of a caption, and captions of an image
RECALLS = ("text_to_image", "image_to_text")
RECALL_KEYS = ("queries", "candidates", "median_rank", "mean_rank", *(f"{name}_at_{k}" for name in ("r", "chance") for k in (1, 5, 10)))
SMALL = 240  # pixels of the longer side of an image
LARGEST_MATRIX = 1 << 30  # bytes of all scores that are read


def read_report(path: Path) -> dict[str, Any]:
    """The JSON that ``evaluate retrieval`` wrote; ``UsageError`` where it is some other JSON."""
    report = read_json(path)
    fits = isinstance(report, dict) and isinstance(report.get("top"), str) and {"split", "images", "captions"} <= set(report)
    if not fits or not all(isinstance(report.get(name), dict) and set(RECALL_KEYS) <= set(report[name]) for name in RECALLS):
        raise UsageError(f"{path} is no report of retrieval; give the JSON file that `megainter evaluate retrieval` wrote by --output")
    return dict(report)


def recalls(report: dict[str, Any]) -> dict[str, Any]:
    """The table of recalls, and what was ranked: with a first stage by both stages, by matching among its candidates and by it alone."""
    first, rows = report.get("prefilter"), []
    orders = {"both stages": report["both_stages"], "matching": report, "first stage": first} if first else {"": report}
    for key in RECALLS:
        for order, figures in orders.items():
            recall = figures[key]
            shares = [(recall[f"r_at_{k}"], recall[f"chance_at_{k}"]) for k in (1, 5, 10)]
            rows.append({"name": key.replace("_", " ") + (f", {order}" if order else ""), "recalls": shares, **recall})

    split = f"split {report['split']}" if report["split"] else "whole manifest"
    scored = "every pair scored by the matching head"
    if first:
        pairs = f"{first['pairs']:,} of {report['captions'] * report['images']:,} pairs"
        scored = f"the {first['candidates']} nearest by vectors of each scored by the matching head ({pairs})"
    note = f"{counted(report['captions'], 'caption')} against {counted(report['images'], 'image')} ({split}), {scored}."
    return {"rows": rows, "note": note}


@dataclass(frozen=True)
class Retrieved:
    """Captions with the images found for them: some from everywhere in the gallery, and the ``hardest``, whose own image ranks worst;
    and the hardest ``images``, whose own captions all rank badly, where all scores are at hand."""

    everywhere: list[dict[str, Any]]
    hardest: list[dict[str, Any]]
    images: list[dict[str, Any]]


def retrieved(retrieval: Path, report: dict[str, Any], manifest: Pairs, folder: Path, count: int) -> Retrieved:
    """What the top file beside the report says; ``UsageError`` where it is missing, or the manifest is another."""
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
    images = _hardest_images(retrieval, report, table, manifest, folder, count)
    return Retrieved([_query(row, files) for row in everywhere], [_query(row, files) for row in hardest], images)


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


def _hardest_images(
    retrieval: Path, report: dict[str, Any], captions: pa.Table, manifest: Pairs, folder: Path, count: int
) -> list[dict[str, Any]]:
    """Images whose best own caption ranks worst, with the captions put before it; none without all scores beside the report."""
    path = retrieval.parent / Path(report["scores"]).name if isinstance(report.get("scores"), str) else None
    matrix = _matrix(path, retrieval, captions) if path is not None and path.is_file() else None
    if matrix is None:
        return []
    ids, scores_CI = matrix
    number = {image_id: i for i, image_id in enumerate(ids)}
    own_C = np.array([number[image_id] for image_id in captions.column("image_id").to_pylist()])

    ranks_I, texts = rank_scores(scores_CI.T, own_C).image_ranks, captions.column("caption")
    worst = [int(image) for image in np.argsort(-ranks_I, kind="stable")[:count] if ranks_I[image] > 1]
    files = image_files(manifest.table, [ids[image] for image in worst], folder, "the retrieval scores")
    return [
        {"id": plain(ids[image]), "picture": thumbnail(files[ids[image]], SMALL), "rank": int(ranks_I[image]),
         "found": _captions(scores_CI[:, image], own_C == image, texts)}
        for image in worst
    ]  # fmt: skip


def _matrix(path: Path, retrieval: Path, captions: pa.Table) -> tuple[list[str], np.ndarray] | None:
    """Image ids, and all scores float32 [C, I], captions in the order of the top file; None where only some pairs have scores, or there
    are too many to read. ``UsageError`` where the file is of other captions."""
    file = pq.ParquetFile(path)
    if "scores" not in file.schema_arrow.names:
        return None
    ids: list[str] = json.loads(file.schema_arrow.metadata[b"images"])
    if 4 * file.metadata.num_rows * len(ids) > LARGEST_MATRIX:
        return None
    table = file.read()
    if table.column("pair_id").to_pylist() != captions.column("pair_id").to_pylist():
        raise UsageError(f"{path} has the scores of other captions than {retrieval.name}; evaluate again, or move it away")
    scores = table.column("scores").combine_chunks().flatten().to_numpy()
    return ids, scores.astype(np.float32).reshape(len(table), len(ids))


def _captions(scores_C: np.ndarray, own_C: np.ndarray, texts: pa.ChunkedArray) -> list[dict[str, Any]]:
    """The captions that an image is given first, and the best of its own."""
    first = np.argsort(-scores_C, kind="stable")[:SHOWN].tolist()
    best = int(np.where(own_C, scores_C, -np.inf).argmax())
    rows = first if best in first else [*first, best]
    scores = {row: f"{_probability(float(scores_C[row])):.1%}" for row in rows}
    return [{"text": plain(texts[row].as_py()), "score": scores[row], "own": bool(own_C[row])} for row in rows]
