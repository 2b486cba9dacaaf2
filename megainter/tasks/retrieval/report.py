"""What an evaluation of retrieval finds: recalls, best pairs, scores."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from megainter.data.tables.parquet import write_parquet
from megainter.tasks.retrieval.gallery import Gallery
from megainter.tasks.retrieval.ranking import (
    BLOCK_BYTES,
    RECALL_AT,
    Folds,
    Ranks,
    Recall,
)

PAIRS_PER_GROUP = 1 << 20  # of scores written in one go


@dataclass(frozen=True)
class FirstStage:
    """What the dual encoder chose for InterBERT, and what that costs: see `evaluate`.

    ``bound_text_to_image``: share of captions whose own image is among their candidates; ``bound_image_to_text``: share of images with an
    own caption among theirs. No recall can be above these. ``text_to_image`` and ``image_to_text`` are the dual encoder's own recalls.
    ``candidates`` of each query, ``pairs`` in all; ``seconds`` for vectors and candidates. ``scale``: what a dot product of its vectors is
    multiplied by to be the logit it was trained with.
    """

    model: str
    model_digest: str
    candidates: int
    pairs: int
    bound_text_to_image: float
    bound_image_to_text: float
    text_to_image: Recall
    image_to_text: Recall
    scale: float
    seconds: float


@dataclass(frozen=True)
class BothStages:
    """Recalls where candidates are ranked by the sum of InterBERT's log-odds and the first stage's logit times ``weight``, over
    ``temperature``: as the model learned it (``both.py``), else both 1."""

    weight: float
    temperature: float
    text_to_image: Recall
    image_to_text: Recall


@dataclass(frozen=True)
class RetrievalReport:
    """What ``evaluate`` measured, as it stands in the JSON file.

    ``top`` and ``scores`` name Parquet files: the best images of each caption (beside the JSON), and all scores if asked for.
    ``seconds`` and ``pairs_per_second`` are of this run alone: pairs that an interrupted run had scored are not counted.
    """

    text_to_image: Recall
    image_to_text: Recall
    images: int
    captions: int
    missing_images: int
    split: str | None
    max_regions: int
    max_text_tokens: int
    precision: str
    model: str
    model_digest: str
    pairs: str
    pairs_digest: str
    store: str
    store_digest: str
    device: str
    processes: int
    seconds: float
    pairs_per_second: float
    top: str
    top_sha256: str
    scores: str | None
    prefilter: FirstStage | None
    both_stages: BothStages | None
    folds: Folds | None


def summary(report: RetrievalReport) -> str:
    """Two lines for people, one for each direction; and with a first stage three on what it did."""
    both = (("text to image", report.text_to_image), ("image to text", report.image_to_text))
    lines = []
    for name, recall in both:
        rank = f"median rank {recall.median_rank} of {recall.candidates:,}"
        lines.append(f"{name}: {_recalls(recall)}, {rank} ({recall.queries:,} queries; chance R@1 {recall.chance_at_1:.2%})")
    first = report.prefilter
    if first is not None:
        share = first.pairs / (report.images * report.captions)
        found = f"text to image {first.bound_text_to_image:.1%}, image to text {first.bound_image_to_text:.1%}"
        each = f"{first.candidates:,} candidates each" + (f" (all {report.images:,} images)" if first.candidates >= report.images else "")
        lines.append(f"first stage: {each}, {share:.1%} of all pairs; the right one is among them: {found}")
        lines.append(f"first stage alone: {_both_ways(first)}")
    if report.both_stages is not None:
        counts = "" if report.both_stages.weight == 1 else f" (the first counts {report.both_stages.weight:.3g} to 1)"
        lines.append(f"both stages together{counts}: {_both_ways(report.both_stages)}")
    if report.folds is not None:
        ways = (("text to image", report.folds.text_to_image), ("image to text", report.folds.image_to_text))
        means = "; ".join(f"{name} " + ", ".join(f"R@{k} {way[f'r_at_{k}']:.1%}" for k in RECALL_AT) for name, way in ways)
        lines.append(f"mean of {report.folds.count} folds of {report.images // report.folds.count:,} images: {means}")
    return "\n".join(lines)


def _both_ways(found: FirstStage | BothStages) -> str:
    return f"text to image {_recalls(found.text_to_image)}; image to text {_recalls(found.image_to_text)}"


def _recalls(recall: Recall) -> str:
    return ", ".join(f"R@{k} {getattr(recall, f'r_at_{k}'):.1%}" for k in RECALL_AT)


def write_top(path: Path, gallery: Gallery, ranks: Ranks) -> None:
    """One row per caption: pair_id, image_id (its own), rank of the own image, and the best images with their scores, best first."""
    flat = pa.array(gallery.image_ids).take(pa.array(ranks.top_images.ravel()))
    width = ranks.top_images.shape[1]
    columns = {
        "pair_id": gallery.pairs.table.column("pair_id").take(gallery.rows),
        "image_id": pa.array(gallery.image_ids).take(pa.array(gallery.image_of_caption)),
        "caption": gallery.pairs.table.column("caption").take(gallery.rows),
        "rank": pa.array(ranks.caption_ranks),
        "images": pa.FixedSizeListArray.from_arrays(flat, width),
        "scores": pa.FixedSizeListArray.from_arrays(pa.array(ranks.top_scores.ravel()), width),
    }
    table = pa.table(columns).combine_chunks()
    write_parquet(path, table.schema, table.to_batches())


def write_scores(path: Path, scores_IC: NDArray[np.float32], gallery: Gallery) -> None:
    """The whole matrix: one row per caption with pair_id, image_id (its own) and scores float32 [I], images as the metadata lists them."""
    images = len(gallery.image_ids)
    schema = pa.schema(
        [("pair_id", pa.string()), ("image_id", pa.string()), ("scores", pa.list_(pa.float32(), images))],
        metadata={"images": json.dumps(gallery.image_ids)},
    )
    own = pa.array(gallery.image_ids).take(pa.array(gallery.image_of_caption))
    pair_ids = gallery.pairs.table.column("pair_id").take(gallery.rows).combine_chunks()
    rows = max(1, BLOCK_BYTES // (4 * images))

    def batches() -> Iterator[pa.RecordBatch]:
        for start in range(0, len(gallery.rows), rows):
            block = np.ascontiguousarray(scores_IC[:, start : start + rows].T)
            values = pa.FixedSizeListArray.from_arrays(pa.array(block.ravel()), images)
            yield pa.record_batch([pair_ids[start : start + rows], own[start : start + rows], values], schema=schema)

    write_parquet(path, schema, batches())


def write_pair_scores(path: Path, scores_P: NDArray[np.float32], keys_P: NDArray[np.int64], gallery: Gallery) -> None:
    """One row per scored pair: pair_id (the caption), image_id and score float32, image by image."""
    image_ids = pa.array(gallery.image_ids)
    pair_ids = gallery.pairs.table.column("pair_id").take(gallery.rows).combine_chunks()
    schema = pa.schema([("pair_id", pa.string()), ("image_id", pa.string()), ("score", pa.float32())])

    def batches() -> Iterator[pa.RecordBatch]:
        for start in range(0, len(keys_P), PAIRS_PER_GROUP):
            images, captions = np.divmod(keys_P[start : start + PAIRS_PER_GROUP], len(gallery.rows))
            columns = [pair_ids.take(pa.array(captions)), image_ids.take(pa.array(images)), pa.array(scores_P[start : start + len(images)])]
            yield pa.record_batch(columns, schema=schema)

    write_parquet(path, schema, batches())
