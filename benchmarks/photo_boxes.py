"""``python -m benchmarks.photo_boxes FLICKR8K``: what share of the boxes that people drew has one of a detector's near it, and how fast.

FLICKR8K holds ``images`` and ``val.jsonl``, one photo a line: ``image``, ``orig_width``, ``orig_height``, ``objects`` with ``box`` (xyxy in
original pixels) and ``phrases``. Photos have their original aspect again before they are looked at; files of another size are stretched to
it. A box is found where one of the detector's overlaps it by half (IoU). The rate is that of resizing, both networks and the choice of
boxes in one thread, in batches of up to 8 photos of one size; reading and storing are not in it. It is given by the clock and by processor
time, which other work beside it disturbs less. Prints one JSON object.
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.timing import machine
from megainter.files import inside
from preprocessing.detector import load_detector
from preprocessing.images.decode import load_image

BATCH = 8
FOUND = 0.5  # IoU


@dataclass(frozen=True)
class Photo:
    """A photo in its original aspect, boxes [n, 4] xyxy in its pixels, and what kinds of things they are around."""

    image: Image.Image
    boxes: np.ndarray
    kinds: list[list[str]]


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("flickr8k", type=Path)
    options.add_argument("--weights", type=Path, default=Path("photos"))
    options.add_argument("--boxes", type=int, default=36, help="boxes a photo")
    options.add_argument("--photos", type=int, default=1000)
    options.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    options.add_argument("--max-size", type=int, help="longer side that the detector sees; default its own")
    given = options.parse_args()
    torch.set_num_threads(1)

    detector = load_detector(given.weights, precision=given.precision)
    detector.extract(Image.new("RGB", (500, 375)))  # the first one is slow
    hits, seconds, processor, photos = list[bool](), 0.0, 0.0, 0
    stream = annotated_photos(given.flickr8k / "val.jsonl", given.flickr8k / "images", given.photos)
    for batch in batches(stream):
        began, ran = time.perf_counter(), time.process_time()
        records = detector.extract_batch([photo.image for photo in batch], given.boxes, given.boxes, max_size=given.max_size)
        seconds, processor = seconds + time.perf_counter() - began, processor + time.process_time() - ran
        photos += len(batch)
        for photo, record in zip(batch, records, strict=True):
            hits += (overlaps(photo.boxes, record.boxes).max(axis=1) >= FOUND).tolist()

    print(json.dumps(result(given, hits, photos, seconds, processor), indent=2))


def result(given: argparse.Namespace, hits: list[bool], photos: int, seconds: float, processor: float) -> dict[str, Any]:
    """What is printed."""
    return {
        "date": date.today().isoformat(), "machine": machine(), "torch": torch.__version__, "weights": str(given.weights),
        "precision": given.precision, "boxes_a_photo": given.boxes, "photos": photos, "human_boxes": len(hits),
        "recall": round(float(np.mean(hits)), 4), "photos_per_second": round(photos / seconds, 2),
        "photos_per_processor_second": round(photos / processor, 2),
    }  # fmt: skip


def batches(photos: Iterator[Photo]) -> Iterator[list[Photo]]:
    """Photos of one size together, up to ``BATCH``, as they come."""
    waiting: dict[tuple[int, int], list[Photo]] = {}
    for photo in photos:
        mine = waiting.setdefault(photo.image.size, [])
        mine.append(photo)
        if len(mine) == BATCH:
            yield waiting.pop(photo.image.size)
    yield from waiting.values()


def annotated_photos(annotations: Path, images: Path, limit: int) -> Iterator[Photo]:
    """The first ``limit`` photos that have boxes."""
    with open(annotations, encoding="utf-8") as file:
        rows = (row for line in file if (row := json.loads(line))["objects"])
        for _, row in zip(range(limit), rows, strict=False):
            image = load_image(inside(images, row["image"])).resize((row["orig_width"], row["orig_height"]), Image.Resampling.BICUBIC)
            boxes = np.array([thing["box"] for thing in row["objects"]], dtype=np.float32)
            yield Photo(image, boxes, [thing["types"] for thing in row["objects"]])


def overlaps(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """IoU [n, m] of boxes [n, 4] and [m, 4]."""
    low, high = np.maximum(boxes[:, None, :2], others[None, :, :2]), np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    shared = (high - low).clip(0).prod(axis=2)
    mine, theirs = ((some[:, 2:] - some[:, :2]).prod(axis=1) for some in (boxes, others))
    return shared / (mine[:, None] + theirs[None] - shared)


if __name__ == "__main__":
    main()
