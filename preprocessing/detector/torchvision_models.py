"""Faster R-CNN on torchvision's parts: networks trained here, and torchvision's own ``fasterrcnn_resnet50_fpn`` and ``_v2``."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.models.detection import fasterrcnn_resnet50_fpn, fasterrcnn_resnet50_fpn_v2
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FasterRCNN, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.boxes import clip_boxes_to_image

from megainter.errors import DamagedError, UsageError
from preprocessing.detector.backbones import build_backbone
from preprocessing.detector.network import BACKGROUND, Input, Regions, Selection, whole
from preprocessing.detector.selection import OBJECT

FORMAT = "megainter-detector-1"
TORCHVISION_MODELS: Mapping[str, Callable[..., FasterRCNN]] = MappingProxyType(
    {"fasterrcnn_resnet50_fpn": fasterrcnn_resnet50_fpn, "fasterrcnn_resnet50_fpn_v2": fasterrcnn_resnet50_fpn_v2}
)


@dataclass(frozen=True)
class DetectorConfig:
    """Everything but the weights. ``class_names`` starts with the background; sizes are in pixels of the network's input."""

    class_names: tuple[str, ...]
    backbone: str = "resnet50"
    feature_size: int = 2048
    min_size: int = 600  # the image's shorter side is brought to this,
    max_size: int = 1000  # unless the longer one would exceed this
    anchor_sizes: tuple[tuple[int, ...], ...] = ((32,), (64,), (128,), (256,), (512,))  # per feature level
    aspect_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    pool_size: int = 7  # bins per side of a pooled region,
    pool_samples: int = 2  # and samples per side of a bin
    proposals: int = 300  # per image, after NMS
    proposals_before_nms: int = 1000  # per image and feature level
    image_mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    image_std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    antialias: bool = True  # when shrinking; torchvision's own weights were trained without
    norm_epsilon: float = 1e-5  # of the normalisation layers; torchvision's first COCO weights go with 0

    def __post_init__(self) -> None:
        if not self.class_names or self.class_names[0] != BACKGROUND or len(set(self.class_names)) != len(self.class_names):
            raise UsageError(f"class_names must be distinct and start with {BACKGROUND!r}, but are {self.class_names[:3]}...")
        if not 0 < self.min_size <= self.max_size:
            raise UsageError(f"min_size {self.min_size} must be positive and at most max_size {self.max_size}")

    def to_json(self) -> str:
        """One line of JSON, keys sorted: the form in the weights file."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "DetectorConfig":
        """The inverse of ``to_json``; unknown or missing keys are a ``DamagedError``."""
        values = json.loads(text)
        unknown = set(values) - {field.name for field in fields(cls)}
        if unknown or "class_names" not in values:
            raise DamagedError(f"the detector's configuration has unknown keys {sorted(unknown)} or no class_names")
        return cls(**{key: _tuples(value) for key, value in values.items()})  # type: ignore[arg-type]


def _tuples(value: object) -> object:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def build_model(config: DetectorConfig, backbone_weights: Path | None = None) -> FasterRCNN:
    """The network with random weights (and a pretrained backbone, if a path is given). Inputs are already resized: see ``to_input``."""
    if config.backbone in TORCHVISION_MODELS:
        return _torchvision_model(config)
    backbone = build_backbone(config.backbone, backbone_weights)
    levels = int(backbone.levels)  # type: ignore[arg-type]
    if len(config.anchor_sizes) != levels:
        raise UsageError(f"anchor_sizes has {len(config.anchor_sizes)} groups, but backbone {config.backbone} has {levels} feature levels")
    # the last level of resnet50's pyramid ("pool") proposes regions but is too coarse to read them from
    names = [str(level) for level in range(min(levels, 4))]
    pool = MultiScaleRoIAlign(names, output_size=config.pool_size, sampling_ratio=config.pool_samples)
    channels = int(backbone.out_channels)  # type: ignore[arg-type]
    model = FasterRCNN(
        backbone,
        rpn_anchor_generator=AnchorGenerator(config.anchor_sizes, (config.aspect_ratios,) * levels),
        rpn_pre_nms_top_n_train=2 * config.proposals_before_nms,
        rpn_pre_nms_top_n_test=config.proposals_before_nms,
        rpn_post_nms_top_n_train=2 * config.proposals,
        rpn_post_nms_top_n_test=config.proposals,
        box_roi_pool=pool,
        box_head=TwoMLPHead(channels * config.pool_size**2, config.feature_size),
        box_predictor=FastRCNNPredictor(config.feature_size, len(config.class_names)),
    )
    model.transform = _Normalise(config.min_size, config.max_size, list(config.image_mean), list(config.image_std))
    return model


def _torchvision_model(config: DetectorConfig) -> FasterRCNN:
    """torchvision's own network, as its weights files have it."""
    model = TORCHVISION_MODELS[config.backbone](
        weights=None,
        weights_backbone=None,
        num_classes=len(config.class_names),
        rpn_pre_nms_top_n_test=config.proposals_before_nms,
        rpn_post_nms_top_n_test=config.proposals,
    )
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = config.norm_epsilon
    model.transform = _Normalise(config.min_size, config.max_size, list(config.image_mean), list(config.image_std))
    return model


class _Normalise(GeneralizedRCNNTransform):
    """torchvision's normalising and padding, without its resizing: ``to_input`` does that with antialiasing."""

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor] | None]:
        return image, target


def network_size(width: int, height: int, min_size: int, max_size: int) -> tuple[int, int]:
    """(width, height) of the network's input: the shorter side becomes ``min_size`` unless the longer would exceed ``max_size``."""
    scale = min(min_size / min(width, height), max_size / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def to_input(image: Image.Image, min_size: int, max_size: int, antialias: bool = True) -> Tensor:
    """The image as float32 RGB [3,H,W] in 0..1, resized (bilinear, antialiased when shrinking).

    Without ``antialias`` by torchvision's own detection transform: sizes are cut, not rounded, and pixels are left out when shrinking.
    """
    if not antialias:
        return _resized_by_torchvision(image, min_size, max_size)
    size = network_size(image.width, image.height, min_size, max_size)
    resized = image.convert("RGB")
    if resized.size != size:
        resized = resized.resize(size, Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).float() / 255


def _resized_by_torchvision(image: Image.Image, min_size: int, max_size: int) -> Tensor:
    pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255
    return GeneralizedRCNNTransform(min_size, max_size, [0.0] * 3, [1.0] * 3).resize(pixels)[0]


@dataclass(frozen=True)
class _Maps:
    images: ImageList
    levels: dict[str, Tensor]


class TorchvisionDetection:
    """The network with its preprocessing (``network.Network``). In bf16 and fp16 the backbone and the box head are cast."""

    pixel = None
    selection: Selection = "caffe"
    object_from = OBJECT

    def __init__(
        self, config: DetectorConfig, model: FasterRCNN, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
    ) -> None:
        self.config, self.device, self.dtype = config, torch.device(device), dtype
        self.model = model.eval().to(self.device, memory_format=torch.channels_last)

    def prepare(self, image: Image.Image, min_size: int, max_size: int) -> Input:
        """RGB in 0..1; the network normalises by itself."""
        pixels = to_input(image, min_size, max_size, self.config.antialias)
        height, width = pixels.shape[-2:]
        return Input(pixels.to(self.device), (image.width / width, image.height / height))

    def maps(self, inputs: list[Input]) -> _Maps:
        """The feature pyramid of all inputs; smaller ones are padded to the largest."""
        images, _ = self.model.transform([value.pixels for value in inputs])
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            levels = self.model.backbone(images.tensors.contiguous(memory_format=torch.channels_last))
        return _Maps(images, {name: level.float() for name, level in levels.items()})

    def propose(self, maps: _Maps, inputs: list[Input]) -> list[Tensor]:
        """Proposals [R,4] of each input after NMS, by falling objectness; the whole image where there are none."""
        proposals, _ = self.model.rpn(maps.images, maps.levels)
        return [found if len(found) else whole(value.size, found) for found, value in zip(proposals, inputs, strict=True)]

    def read(self, maps: _Maps, inputs: list[Input], boxes: list[Tensor]) -> list[Regions]:
        """Features, class probabilities and box regression of boxes [R,4] of each input."""
        heads = self.model.roi_heads
        pooled = heads.box_roi_pool(maps.levels, boxes, maps.images.image_sizes)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            features = heads.box_head(pooled)
        features = features.float()
        logits, deltas = heads.box_predictor(features)
        counts = [len(found) for found in boxes]
        parts = (features.split(counts), logits.softmax(dim=1).split(counts), deltas.split(counts))
        return [Regions(*values) for values in zip(boxes, *parts, strict=True)]

    def regressed(self, found: Regions, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Boxes [R,4] regressed to each one's most probable object class and clipped, and that probability [R]."""
        assert found.deltas is not None
        top, label = found.class_probs[:, 1:].max(dim=1)
        decoded = self.model.roi_heads.box_coder.decode(found.deltas, [found.proposals])
        rows = torch.arange(len(label), device=label.device)
        return clip_boxes_to_image(decoded[rows, label + 1], size), top
