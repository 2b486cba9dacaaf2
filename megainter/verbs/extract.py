"""`megainter extract`: images into a feature store."""

from pathlib import Path
from typing import Any, Literal

from megainter.paths import require_there
from megainter.precision import AskedPrecision
from megainter.weights import check_name


def extract(
    *,
    images: Path,
    output: Path,
    weights: Path,
    manifest: Path | None = None,
    min_boxes: int = 10,
    max_boxes: int = 100,
    selection: Literal["caffe", "d2", "objectness"] | None = None,
    workers: int | None = None,
    batch_size: int = 8,
    min_size: int | None = None,
    max_size: int | None = None,
    max_bad: float = 0.01,
    device: str | None = None,
    precision: AskedPrecision = "auto",
    boxes: Path | None = None,
    ids: str | None = None,
    network_disk: bool = False,
    redo_changed: bool = False,
) -> None:
    """Extract region features of images into a feature store. The same command resumes; alone or under mpirun, one worker per rank.

    Parameters
    ----------
    images
        Folder of images, or of tar files (WebDataset); also one tar file, or a glob such as 'shards/*.tar'.
    output
        Feature store to write.
    weights
        Detector weights (safetensors), or a name: "photos" (COCO's 80 classes, comes along), "vg" (Visual Genome), "demo" (glyphs),
        torchvision:fasterrcnn_resnet50_fpn_v2, hf:OWNER/NAME[/FILE][@REVISION].
    manifest
        Take the images named here instead of all in the folder: a Parquet manifest (pairs or boxes), or a CSV or TSV file with a column
        "image" and, if ids are not to be the paths, "image_id".
    min_boxes
        Keep at least this many regions of an image, where the detector proposes as many.
    max_boxes
        Keep at most this many.
    selection
        Rule that picks regions: bottom-up-attention's ("caffe"), detectron2's ("d2") or what is least likely background ("objectness");
        default "objectness" for the detector "photos", else "caffe".
    workers
        Processes; default one per core or GPU.
    batch_size
        Images per pass, of equal size; on a CPU at most 8, and of a heavy detector 1, so that a stop loses little.
    min_size
        Shorter image side in pixels for the detector; default the detector's own.
    max_size
        Longer side at most.
    max_bad
        Share of unreadable images above which the command ends with exit code 3.
    device
        Torch device; default CUDA where there is one.
    precision
        Precision of most of the detector's arithmetic; proposals of Visual Genome detectors stay fp32. auto takes what the store was begun
        in; for a new one bf16 where all devices compute it, else fp16 on GPUs, else fp32.
    boxes
        Take the regions from this manifest of boxes (Parquet) instead of the detector's proposals.
    ids
        How an image's id is made of the usual one (its path without suffix, or its key): parts {id}, {stem} (its last part), {folder} and
        {number} (of COCO_val2014_000000391895: 391895), as in "{number}".
    network_disk
        Allow a store on NFS and the like, where a crash can damage what is being written.
    redo_changed
        Extract images anew whose files have another size or time of change than when they were extracted.
    """
    check_name(weights, "detector", "--weights")
    for option, path in (("--manifest", manifest), ("--boxes", boxes), ("--images", None if set("*?[") & set(str(images)) else images)):
        require_there(path, option)
    from preprocessing.extraction.extract import extract as extract_regions
    from preprocessing.extraction.mpi import extract_on_ranks, launched_rank

    arguments: dict[str, Any] = {
        "images": images, "output": output, "weights": weights, "manifest": manifest, "min_boxes": min_boxes, "max_boxes": max_boxes,
        "selection": selection, "workers": workers, "batch_size": batch_size, "min_size": min_size, "max_size": max_size,
        "max_bad": max_bad, "device": device, "precision": precision, "boxes": boxes, "ids": ids,
        "network_disk": network_disk, "redo_changed": redo_changed,
    }  # fmt: skip
    if launched_rank() is None:
        extract_regions(**arguments)
    else:
        extract_on_ranks(extract_regions, **arguments)
