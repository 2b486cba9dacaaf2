"""`megainter extract`: images into a feature store."""

from pathlib import Path
from typing import Literal


def extract(
    *,
    images: Path,
    output: Path,
    weights: Path,
    manifest: Path | None = None,
    min_boxes: int = 10,
    max_boxes: int = 100,
    selection: Literal["caffe", "d2"] = "caffe",
    workers: int | None = None,
    batch_size: int = 8,
    min_size: int | None = None,
    max_size: int | None = None,
    max_bad: float = 0.01,
    device: str | None = None,
) -> None:
    """Extract region features of images into a feature store. The same command resumes.

    Parameters
    ----------
    images
        Folder of images.
    output
        Feature store to write.
    weights
        Detector weights (safetensors).
    manifest
        Take the images named in this Parquet manifest (pairs or boxes) instead of all in the folder.
    min_boxes
        Keep at least this many regions of an image, where the detector proposes as many.
    max_boxes
        Keep at most this many.
    selection
        Rule that picks regions: bottom-up-attention's ("caffe") or detectron2's ("d2").
    workers
        Processes; default one per core or GPU.
    batch_size
        Images per forward, of equal size.
    min_size
        Shorter image side in pixels for the detector; default the detector's own.
    max_size
        Longer side at most.
    max_bad
        Share of unreadable images above which the command ends with exit code 3.
    device
        Torch device; default CUDA where there is one.
    """
    from preprocessing.extract import extract as extract_regions

    extract_regions(
        images, output, weights, manifest=manifest, min_boxes=min_boxes, max_boxes=max_boxes, selection=selection, workers=workers,
        batch_size=batch_size, min_size=min_size, max_size=max_size, max_bad=max_bad, device=device,
    )  # fmt: skip
