"""Networks that say what is in a region: the mean of their last map over its box. One knows ImageNet, and one beside it COCO's objects."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torchvision.ops import roi_align

from megainter.files import sha256_of
from megainter.weights import packaged_weights
from preprocessing.detector.backbones import efficientnet_lite0, load_body, packaged_efficientnet_weights
from preprocessing.detector.nanodet import NanoDet, normalised

BINS = 3  # per side of a region, each the mean of 2 x 2 samples of the map
STRIDE = 32  # pixels of the network's input per place of its map


class Describer(nn.Module):
    """What a network sees at every place: RGB in 0..1 [S, 3, H, W] -> its last map [S, ``out_channels``, H / 32, W / 32]."""

    out_channels: int


class EfficientNetLite0Describer(Describer):
    """EfficientNet-Lite0 with the 1,280 channels that its ImageNet classifier reads; inputs are brought to -1..1 as it was trained."""

    out_channels = 1280

    def __init__(self, weights: Path | None) -> None:
        super().__init__()
        self.body = efficientnet_lite0()
        if weights is not None:
            load_body(self.body, weights, ignored=("_fc.",))
        _fold_normalisation(self.body)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.body.extract_features((images * 255 - 127) / 128)
        return features


def _fold_normalisation(body: Any) -> None:
    """Put the normalisation of an EfficientNet that is not trained further into its convolutions: a fifth of the time was spent there."""
    pairs = [(body, "_conv_stem", "_bn0"), (body, "_conv_head", "_bn1")]
    for block in body._blocks:
        names = [("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")]
        pairs += [(block, conv, norm) for conv, norm in names if hasattr(block, conv)]

    for owner, conv_name, norm_name in pairs:
        conv, norm = getattr(owner, conv_name), getattr(owner, norm_name)
        conv.weight, conv.bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        setattr(owner, norm_name, nn.Identity())


class NanoDetDescriber(Describer):
    """The backbone of NanoDet-g, which the detector for photos has its boxes from: it was trained on COCO's scenes and their objects."""

    out_channels = 512

    def __init__(self, weights: Path) -> None:
        super().__init__()
        self.body = NanoDet()
        self.body.load_state_dict({name: value.float() for name, value in load_file(weights).items()})

    def forward(self, images: Tensor) -> Tensor:
        return self.body.levels(normalised(images))[-1]


class SideBySide(Describer):
    """The maps of several networks over the same places, their channels one after the other."""

    def __init__(self, parts: Sequence[Describer]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.out_channels = sum(part.out_channels for part in parts)

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([part(images) for part in self.parts], dim=1)


def _imagenet() -> tuple[Describer, tuple[Path, ...]]:
    weights = packaged_efficientnet_weights()
    return EfficientNetLite0Describer(weights), (weights,)


def _imagenet_and_coco() -> tuple[Describer, tuple[Path, ...]]:
    describer, weights = _imagenet()
    nanodet = packaged_weights("photos")
    return SideBySide([describer, NanoDetDescriber(nanodet)]), (*weights, nanodet)


# name -> function that gives a network with its weights, and the files they came from
DESCRIBERS: dict[str, Callable[[], tuple[Describer, tuple[Path, ...]]]] = {
    "efficientnet_lite0": _imagenet,
    "efficientnet_lite0+nanodet": _imagenet_and_coco,
}


def digest_of(weights: Sequence[Path]) -> str:
    """SHA-256 of each file, with a plus between them."""
    return "+".join(sha256_of(path) for path in weights)


def region_means(map_SCHW: Tensor, boxes: list[Tensor]) -> Tensor:
    """The mean of a map [S, C, H, W] over each image's boxes [n, 4] (xyxy, pixels of the network's input): [boxes of all images, C].

    A mean is a weighted sum of the map's places, with weights that depend on the box alone: these are pooled, from H x W channels instead
    of C, and multiplied with the map.
    """
    height, width = map_SCHW.shape[-2:]
    places = torch.eye(height * width, device=map_SCHW.device).view(1, height * width, height, width)
    weights = roi_align(places, [torch.cat(boxes).float()], BINS, 1 / STRIDE, sampling_ratio=2, aligned=True).mean((2, 3))

    counts = [len(mine) for mine in boxes]
    maps = map_SCHW.float().flatten(2).transpose(1, 2)
    return torch.cat([own @ seen for own, seen in zip(weights.split(counts), maps, strict=True)])
