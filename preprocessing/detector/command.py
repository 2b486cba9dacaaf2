"""`megainter detector train`: from the options to the network's configuration by backbone."""

import signal
from dataclasses import replace
from pathlib import Path

from megainter.process import StopRequest
from preprocessing.detector.backbones import packaged_efficientnet_weights
from preprocessing.detector.detector import DetectorConfig
from preprocessing.detector.settings import BackboneName, DetectorRun, DetectorTraining
from preprocessing.detector.training import train_detector

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
    sizes = {name: getattr(run, name) for name in ("feature_size", "min_size", "max_size", "proposals")}
    given = {name: value for name, value in sizes.items() if value is not None}
    if run.min_size is not None and run.max_size is None:
        given["max_size"] = max(run.min_size, DEFAULTS[run.backbone].max_size)
    request = StopRequest((signal.SIGINT, signal.SIGTERM))
    train_detector(
        boxes=run.boxes,
        images=run.images,
        output=run.output,
        configure=lambda names: replace(DEFAULTS[run.backbone], class_names=names, **given),
        training=training,
        validation=run.validation,
        validation_images=run.validation_images,
        backbone_weights=_backbone_weights(run.backbone_weights),
        workers=run.workers,
        device=run.device,
        checkpoint_every=run.checkpoint_every,
        evaluate_every=run.evaluate_every,
        half=run.half,
        split=run.split,
        validation_split=run.validation_split,
        stop=lambda: request.asked,
    )


def _backbone_weights(name: str | None) -> Path | None:
    if name == "packaged":
        return packaged_efficientnet_weights()
    return None if name is None else Path(name)
