"""Faster R-CNN on torchvision's parts, and what it says about an image: boxes, region features, class probabilities.

The weights file is safetensors; its header holds the whole ``DetectorConfig``, so one file is enough to extract with.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FasterRCNN, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.boxes import clip_boxes_to_image

from megainter.data.feature_store import RegionRecord, StoreSchema
from megainter.errors import DamagedError, UsageError
from megainter.files import write_atomically
from preprocessing.backbones import build_backbone
from preprocessing.selection import select_caffe, select_d2

FORMAT = "megainter-detector-1"
BACKGROUND = "__background__"
Selection = Literal["caffe", "d2"]


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


class _Normalise(GeneralizedRCNNTransform):
    """torchvision's normalising and padding, without its resizing: ``to_input`` does that with antialiasing."""

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor] | None]:
        return image, target


def network_size(width: int, height: int, min_size: int, max_size: int) -> tuple[int, int]:
    """(width, height) of the network's input: the shorter side becomes ``min_size`` unless the longer would exceed ``max_size``."""
    scale = min(min_size / min(width, height), max_size / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def to_input(image: Image.Image, min_size: int, max_size: int) -> Tensor:
    """The image as float32 RGB [3,H,W] in 0..1, resized (bilinear, antialiased when shrinking)."""
    size = network_size(image.width, image.height, min_size, max_size)
    resized = image.convert("RGB")
    if resized.size != size:
        resized = resized.resize(size, Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).float() / 255


@dataclass(frozen=True)
class Regions:
    """Everything the network says about one image, before boxes are chosen. In pixels of the network's input."""

    proposals: Tensor  # [R,4] xyxy, by falling objectness
    features: Tensor  # [R,F] what the classifier sees of each proposal
    class_probs: Tensor  # [R,C] background first
    deltas: Tensor  # [R,4*C] box regression, for torchvision's box coder


class Detector:
    """A trained network in eval mode. Build it with ``load_detector``."""

    def __init__(self, config: DetectorConfig, model: FasterRCNN, fingerprint: str, device: str | torch.device = "cpu") -> None:
        self.config, self.fingerprint, self.device = config, fingerprint, torch.device(device)
        self.model = model.eval().to(self.device, memory_format=torch.channels_last)

    def schema(self) -> StoreSchema:
        """What a feature store of this detector's records declares."""
        names = self.config.class_names
        return StoreSchema(self.config.feature_size, len(names), names, self.fingerprint, "dense")

    def extract(
        self,
        image: Image.Image,
        min_boxes: int = 10,
        max_boxes: int = 100,
        selection: Selection = "caffe",
        min_size: int | None = None,
        max_size: int | None = None,
    ) -> RegionRecord:
        """The regions of one image: boxes in its pixels (clipped), features, class probabilities with the background first.

        ``min_size`` and ``max_size`` replace those the detector was trained at. With fewer proposals than ``min_boxes`` there are fewer
        regions, and with none the whole image is the only one.
        """
        return self.extract_batch([image], min_boxes, max_boxes, selection, min_size, max_size)[0]

    @torch.inference_mode()
    def extract_batch(
        self,
        images: Sequence[Image.Image],
        min_boxes: int = 10,
        max_boxes: int = 100,
        selection: Selection = "caffe",
        min_size: int | None = None,
        max_size: int | None = None,
    ) -> list[RegionRecord]:
        """``extract`` of several images in one pass. Images of one size share it best: others are padded to the largest."""
        if not 0 < min_boxes <= max_boxes:
            raise UsageError(f"min_boxes {min_boxes} must be positive and at most max_boxes {max_boxes}")
        if selection not in ("caffe", "d2"):
            raise UsageError(f"unknown box selection {selection!r}: choose caffe or d2")
        sizes = (min_size or self.config.min_size, max_size or self.config.max_size)
        inputs = [to_input(image, sizes[0], max(sizes)).to(self.device) for image in images]
        regions = self.forward(inputs)
        return [
            self._record(found, image, tensor, min_boxes, max_boxes, selection)
            for found, image, tensor in zip(regions, images, inputs, strict=True)
        ]

    def forward(self, inputs: list[Tensor]) -> list[Regions]:
        """Proposals of each input [3,H,W] and what the classifier sees in them."""
        model = self.model
        images, _ = model.transform(inputs)
        maps = model.backbone(images.tensors.contiguous(memory_format=torch.channels_last))
        proposals, _ = model.rpn(images, maps)
        proposals = [found if len(found) else _whole(size, found) for found, size in zip(proposals, images.image_sizes, strict=True)]
        pooled = model.roi_heads.box_roi_pool(maps, proposals, images.image_sizes)
        features = model.roi_heads.box_head(pooled)
        logits, deltas = model.roi_heads.box_predictor(features)
        counts = [len(found) for found in proposals]
        parts = (features.split(counts), logits.softmax(dim=1).split(counts), deltas.split(counts))
        return [Regions(*values) for values in zip(proposals, *parts, strict=True)]

    def _record(
        self, found: Regions, image: Image.Image, tensor: Tensor, min_boxes: int, max_boxes: int, selection: Selection
    ) -> RegionRecord:
        height, width = tensor.shape[-2:]
        scale = torch.tensor([image.width / width, image.height / height] * 2, device=tensor.device)
        if selection == "caffe":
            boxes = found.proposals
            rows = select_caffe(boxes, found.class_probs, min_boxes, max_boxes)
        else:
            boxes, top = self._regressed(found, (height, width))
            rows = select_d2(boxes, top, min_boxes, max_boxes)
        boxes = clip_boxes_to_image(boxes[rows] * scale, (image.height, image.width))
        return RegionRecord(
            boxes=boxes.float().cpu().numpy(),
            features=found.features[rows].half().cpu().numpy(),
            class_probs=found.class_probs[rows].float().cpu().numpy(),
            width=image.width,
            height=image.height,
        )

    def _regressed(self, found: Regions, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Boxes [R,4] regressed to each proposal's most probable object class and clipped, and that probability [R]."""
        top, label = found.class_probs[:, 1:].max(dim=1)
        decoded = self.model.roi_heads.box_coder.decode(found.deltas, [found.proposals])
        rows = torch.arange(len(label), device=label.device)
        return clip_boxes_to_image(decoded[rows, label + 1], size), top


def _whole(size: tuple[int, int], like: Tensor) -> Tensor:
    return like.new_tensor([[0.0, 0.0, size[1], size[0]]])


# --- the weights file --------------------------------------------------------------------------------------------------------------


def save_detector(path: Path, config: DetectorConfig, model: nn.Module, half: bool = False) -> str:
    """Write the weights file (atomically) and return its fingerprint. ``half`` stores floating-point weights as float16."""
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    if half:
        state = {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
    write_atomically(path, save(state, metadata={"format": FORMAT, "config": config.to_json()}))
    return fingerprint_of(config.to_json(), state)


def fingerprint_of(config: str, state: dict[str, Tensor]) -> str:
    """16 hex digits of SHA-256 over the configuration and all weights: what a feature store remembers of its detector."""
    digest = hashlib.sha256(config.encode())
    for name in sorted(state):
        value = state[name].contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def load_detector(weights_path: Path | str, device: str | torch.device = "cpu") -> Detector:
    """The detector in a weights file, recognised by its content, not its name.

    Raises ``UsageError`` where the file is none of a detector's, ``DamagedError`` where tensors are missing, unexpected or misshapen.
    """
    path = Path(weights_path)
    metadata, state = _read_safetensors(path)
    if metadata.get("format") != FORMAT or "config" not in metadata:
        raise UsageError(
            f"{path} holds no megainter detector: its header has no configuration of format {FORMAT!r} "
            f"(format {metadata.get('format')!r}, {len(state)} tensors, first {sorted(state)[:3]})"
        )
    config = DetectorConfig.from_json(metadata["config"])
    model = build_model(config)
    _check_state(path, state, model.state_dict())
    model.load_state_dict({name: value.float() if value.is_floating_point() else value for name, value in state.items()})
    return Detector(config, model, fingerprint_of(metadata["config"], state), device)


def _read_safetensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    if not path.is_file():
        raise UsageError(f"detector weights {path} do not exist")
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise DamagedError(f"{path} is not a whole safetensors file: {error}") from None


def _check_state(path: Path, state: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    missing, unexpected = sorted(set(wanted) - set(state)), sorted(set(state) - set(wanted))
    shapes = [f"{k} {tuple(state[k].shape)} for {tuple(v.shape)}" for k, v in wanted.items() if k in state and state[k].shape != v.shape]
    problems = [("missing", missing), ("unexpected", unexpected), ("of another shape", shapes)]
    text = "; ".join(f"{len(names)} {what}: {', '.join(names[:5])}" for what, names in problems if names)
    if text:
        raise DamagedError(f"{path} does not fit its own configuration: tensors {text}")
