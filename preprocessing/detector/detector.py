"""What a detector says about an image: boxes, region features, class probabilities. ``load_detector`` is the one door to all networks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save
from torch import Tensor, nn
from torchvision.ops.boxes import clip_boxes_to_image

from megainter.data.feature_store.record import RegionRecord, StoreSchema
from megainter.errors import UsageError
from megainter.files import write_atomically
from megainter.precision import Precision
from preprocessing.detector.network import BACKGROUND, Input, Network, Regions, Selection
from preprocessing.detector.photos import FORMAT as PHOTO_FORMAT
from preprocessing.detector.photos import PhotoConfig, PhotoDetection, build_nanodet, packaged_describer
from preprocessing.detector.selection import select_caffe, select_d2, select_objects
from preprocessing.detector.torchvision_models import FORMAT, DetectorConfig, TorchvisionDetection, build_model, network_size, to_input
from preprocessing.detector.visual_genome import VgConfig, build_vg_network
from preprocessing.detector.visual_genome_regions import VgDetection
from preprocessing.detector.weights import VG_FORMAT, AnyConfig, Weights, fingerprint_of, read_weights

__all__ = [
    "BACKGROUND", "Detector", "DetectorConfig", "Labels", "Regions", "build_detector", "build_model", "load_detector", "network_size",
    "save_detector", "to_input",
]  # fmt: skip
_FORMATS: Mapping[type, str] = MappingProxyType({DetectorConfig: FORMAT, VgConfig: VG_FORMAT, PhotoConfig: PHOTO_FORMAT})
AT_ONCE_ON_A_CPU = 8  # images per pass of a light network: more gain nothing there, and what is not finished is lost in a stop
LIGHT = ("tiny", "efficientnet_lite0")  # backbones that see an image in a fraction of a second on a CPU core; the others take seconds
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, eq=False)
class Labels:
    """The likeliest object class and attribute of each region, and their probabilities.

    ``*_ids`` int64 [n], 0 the first name (background and "none" have no id); ``*_confidences`` float32 [n].
    """

    class_ids: np.ndarray
    class_confidences: np.ndarray
    attribute_ids: np.ndarray
    attribute_confidences: np.ndarray


@dataclass(frozen=True)
class _Choice:
    """Rows of the chosen regions and all boxes, in original pixels."""

    rows: Tensor
    boxes: Tensor


class Detector:
    """A network and the choice of regions from what it says. Build it with ``load_detector``."""

    def __init__(self, network: Network, fingerprint: str) -> None:
        self.network, self.fingerprint = network, fingerprint

    @property
    def config(self) -> Any:
        """``DetectorConfig``, ``VgConfig`` or ``PhotoConfig``."""
        return self.network.config

    @property
    def is_light(self) -> bool:
        """Whether a CPU core sees an image in a fraction of a second, and not in several."""
        return isinstance(self.config, PhotoConfig) or getattr(self.config, "backbone", "") in LIGHT

    @property
    def at_once_on_a_cpu(self) -> int:
        """Images per pass on a CPU: one of a heavy network, which gains nothing from more, so that each is finished by itself."""
        return AT_ONCE_ON_A_CPU if self.is_light else 1

    def schema(self) -> StoreSchema:
        """What a feature store of this detector's records declares."""
        names = self.config.class_names
        return StoreSchema(self.config.feature_size, len(names), names, self.fingerprint, "dense")

    def extract(
        self,
        image: Image.Image,
        min_boxes: int = 10,
        max_boxes: int = 100,
        selection: Selection | None = None,
        min_size: int | None = None,
        max_size: int | None = None,
    ) -> RegionRecord:
        """The regions of one image: boxes in its pixels (clipped), features, class probabilities with the background first.

        ``min_size`` and ``max_size`` replace those the detector was trained at. With fewer proposals than ``min_boxes`` there are fewer
        regions, and with none the whole image is the only one. ``selection`` None is the network's own rule.
        """
        return self.extract_batch([image], min_boxes, max_boxes, selection, min_size, max_size)[0]

    @torch.inference_mode()
    def extract_batch(
        self,
        images: Sequence[Image.Image],
        min_boxes: int = 10,
        max_boxes: int = 100,
        selection: Selection | None = None,
        min_size: int | None = None,
        max_size: int | None = None,
    ) -> list[RegionRecord]:
        """``extract`` of several images in one pass, which images of one size share best."""
        _check_settings(min_boxes, max_boxes, selection)
        inputs = self.inputs(images, min_size, max_size)
        return [
            _record(image, found, self.choose(found, image, value, min_boxes, max_boxes, selection))
            for image, value, found in zip(images, inputs, self.forward(inputs), strict=True)
        ]

    @torch.inference_mode()
    def extract_at(
        self, images: Sequence[Image.Image], boxes: Sequence[np.ndarray], min_size: int | None = None, max_size: int | None = None
    ) -> list[RegionRecord]:
        """The regions of images at given boxes, float32 [n,4] xyxy in each image's pixels, instead of at the detector's proposals."""
        inputs = self.inputs(images, min_size, max_size)
        frames = [
            torch.from_numpy(mine).to(value.pixels.device) / value.pixels.new_tensor(value.ratio * 2)
            for mine, value in zip(boxes, inputs, strict=True)
        ]
        regions = self.network.read(self.network.maps(inputs), inputs, frames)
        return [
            replace(_record(image, found, _Choice(torch.arange(len(mine)), found.proposals)), boxes=mine)
            for image, found, mine in zip(images, regions, boxes, strict=True)
        ]

    @torch.inference_mode()
    def describe(
        self,
        image: Image.Image,
        min_boxes: int = 10,
        max_boxes: int = 100,
        selection: Selection | None = None,
        min_size: int | None = None,
        max_size: int | None = None,
    ) -> tuple[RegionRecord, Labels]:
        """``extract``, and the likeliest class and attribute of each region. ``UsageError`` where the weights know no attributes."""
        _check_settings(min_boxes, max_boxes, selection)
        if not isinstance(self.network, VgDetection):
            raise UsageError("this detector knows no attributes; Visual Genome detectors do")
        inputs = self.inputs([image], min_size, max_size)
        found = self.forward(inputs)[0]
        choice = self.choose(found, image, inputs[0], min_boxes, max_boxes, selection)
        attributes, confidences = self.network.attributes(found)
        top, classes = found.class_probs[:, 1:].max(dim=1)
        values = (value[choice.rows].cpu().numpy() for value in (classes, top.float(), attributes, confidences.float()))
        return _record(image, found, choice), Labels(*values)

    def inputs(self, images: Sequence[Image.Image], min_size: int | None = None, max_size: int | None = None) -> list[Input]:
        """The images as the network takes them."""
        smallest, largest = min_size or self.config.min_size, max_size or self.config.max_size
        return [self.network.prepare(image, smallest, max(smallest, largest)) for image in images]

    @torch.inference_mode()
    def forward(self, inputs: list[Input]) -> list[Regions]:
        """Proposals of each input and what the classifier sees in them."""
        maps = self.network.maps(inputs)
        return self.network.read(maps, inputs, self.network.propose(maps, inputs))

    def choose(
        self, found: Regions, image: Image.Image, value: Input, min_boxes: int, max_boxes: int, selection: Selection | None
    ) -> _Choice:
        """Which regions of an image are kept, by a rule (None: the network's own)."""
        scale = torch.tensor(value.ratio * 2, device=found.proposals.device)
        rule = selection or self.network.selection
        if rule == "objectness":
            boxes, rows = found.proposals, select_objects(found.class_probs, min_boxes, max_boxes, self.network.object_from)
        elif rule == "d2":
            boxes, top = self.network.regressed(found, value.size)
            rows = select_d2(boxes, top, min_boxes, max_boxes)
        else:
            boxes, pixel = found.proposals, self.network.pixel
            compared = (boxes, 0.0) if pixel is None else (boxes * scale, pixel)
            rows = select_caffe(compared[0], found.class_probs, min_boxes, max_boxes, compared[1]).to(boxes.device)
        return _Choice(rows, clip_boxes_to_image(boxes * scale, (image.height, image.width)))


def _check_settings(min_boxes: int, max_boxes: int, selection: str | None) -> None:
    if not 0 < min_boxes <= max_boxes:
        raise UsageError(f"min_boxes {min_boxes} must be positive and at most max_boxes {max_boxes}")
    if selection is not None and selection not in get_args(Selection):
        raise UsageError(f"unknown box selection {selection!r}: choose {', '.join(get_args(Selection))}")


def _record(image: Image.Image, found: Regions, choice: _Choice) -> RegionRecord:
    return RegionRecord(
        boxes=choice.boxes[choice.rows].float().cpu().numpy(),
        features=found.features[choice.rows].half().cpu().numpy(),
        class_probs=found.class_probs[choice.rows].float().cpu().numpy(),
        width=image.width,
        height=image.height,
    )


def load_detector(
    weights_path: Path | str, device: str | torch.device = "cpu", precision: Precision = "fp32", class_names: Path | None = None
) -> Detector:
    """The detector in a weights file, recognised by its content, or one by its name ("photos", "vg", ``megainter.weights.locate``).

    See ``preprocessing.detector.weights.read_weights``.

    In ``bf16`` and ``fp16`` the larger part of the arithmetic is in half precision; the fingerprint is that of the weights as stored.
    Raises ``UsageError`` where the file is none of a detector's, ``DamagedError`` where tensors are missing, unexpected or misshapen.
    """
    return build_detector(read_weights(Path(weights_path), class_names), device, precision)


def build_detector(weights: Weights, device: str | torch.device = "cpu", precision: Precision = "fp32") -> Detector:
    """The detector of weights that have been read."""
    if precision not in PRECISIONS:
        raise UsageError(f"unknown precision {precision!r}: choose {', '.join(PRECISIONS)}")
    if isinstance(weights.config, VgConfig):
        vg = build_vg_network(weights.config, weights.state)
        return Detector(VgDetection(weights.config, vg, device, PRECISIONS[precision]), weights.fingerprint)
    if isinstance(weights.config, PhotoConfig):
        nanodet, describer = build_nanodet(weights.config, weights.state), packaged_describer(weights.config)
        return Detector(PhotoDetection(weights.config, nanodet, describer, device, PRECISIONS[precision]), weights.fingerprint)
    model = build_model(weights.config)
    model.load_state_dict({name: value.float() if value.is_floating_point() else value for name, value in weights.state.items()})
    return Detector(TorchvisionDetection(weights.config, model, device, PRECISIONS[precision]), weights.fingerprint)


def save_detector(path: Path, config: DetectorConfig, model: nn.Module, half: bool = False) -> str:
    """Write a trained network's weights file (atomically) and return its fingerprint. ``half`` stores floating-point weights as float16."""
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    if half:
        state = {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
    return save_weights(path, config, state)


def save_weights(path: Path, config: AnyConfig, state: dict[str, Tensor], about: Mapping[str, str] = MappingProxyType({})) -> str:
    """Write tensors and configuration as one safetensors file, atomically, and return its fingerprint.

    ``about``, where the weights come from and the like, stands in the header and does not count for the fingerprint.
    """
    header = {**about, "format": _FORMATS[type(config)], "config": config.to_json()}
    write_atomically(path, save({name: value.contiguous() for name, value in state.items()}, metadata=header))
    return fingerprint_of(header["config"], state)
