"""`megainter detector train`: from the options to the network's configuration by backbone."""

import signal
import sys
from dataclasses import replace
from pathlib import Path

from megainter.errors import UsageError
from megainter.process import StopRequest
from preprocessing.detector.backbones import packaged_efficientnet_weights
from preprocessing.detector.detector import DetectorConfig
from preprocessing.detector.settings import BackboneName, DetectorRun, DetectorTraining
from preprocessing.detector.training import train_detector

PACKAGED = "packaged"
RANDOM_RESNET = (
    "warning: resnet50 begins from random weights and learns little from them: name ImageNet's with --backbone-weights FILE, or leave "
    "--backbone out for efficientnet_lite0, whose weights come along"
)

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


def train(run: DetectorRun, training: DetectorTraining) -> None:
    """Train as the options say; raises as ``train_detector``."""
    backbone, weights = chosen_backbone(run.backbone, run.backbone_weights)
    sizes = {name: getattr(run, name) for name in ("feature_size", "min_size", "max_size", "proposals")}
    given = {name: value for name, value in sizes.items() if value is not None}
    if run.min_size is not None and run.max_size is None:
        given["max_size"] = max(run.min_size, DEFAULTS[backbone].max_size)
    request = StopRequest((signal.SIGINT, signal.SIGTERM))
    train_detector(
        boxes=run.boxes,
        images=run.images,
        output=run.output,
        configure=lambda names: replace(DEFAULTS[backbone], class_names=names, **given),
        training=training,
        validation=run.validation,
        validation_images=run.validation_images,
        backbone_weights=weights,
        workers=run.workers,
        device=run.device,
        checkpoint_every=run.checkpoint_every,
        evaluate_every=run.evaluate_every,
        half=run.half,
        split=run.split,
        validation_split=run.validation_split,
        stop=lambda: request.asked,
        ignore_unknown=run.ignore_unknown,
    )


def chosen_backbone(name: BackboneName | None, weights: str | None) -> tuple[BackboneName, Path | None]:
    """The backbone and its file of weights (None: random ones): where none is named, one that a CPU trains and that knows photos already.

    ``UsageError`` where the extra that brings these is not installed.
    """
    if name is None and weights is None:
        return "efficientnet_lite0", _usual_weights()
    name = name or ("efficientnet_lite0" if weights == PACKAGED else "resnet50")
    if name == "resnet50" and weights is None:
        print(RANDOM_RESNET, file=sys.stderr, flush=True)
    if weights == PACKAGED:
        return name, packaged_efficientnet_weights()
    return name, None if weights is None else Path(weights)


def _usual_weights() -> Path:
    try:
        weights = packaged_efficientnet_weights()
    except UsageError as error:
        raise UsageError(f"{error}; or name another --backbone: tiny (composed scenes), resnet50 with --backbone-weights FILE") from None
    print("backbone efficientnet_lite0 with its ImageNet weights, as none was named (--backbone)", flush=True)
    return weights
