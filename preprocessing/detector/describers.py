"""Networks that know ImageNet and say what is in a region: the mean of their last map over its box."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torchvision.ops import roi_align

from preprocessing.detector.backbones import efficientnet_lite0, load_body, packaged_efficientnet_weights

BINS = 3  # per side of a region, each the mean of 2 x 2 samples of the map
STRIDE = 32  # pixels of the network's input per place of its map


class Describer(nn.Module):
    """What an ImageNet network sees at every place: RGB in 0..1 [S, 3, H, W] -> its last map [S, ``out_channels``, H / 32, W / 32]."""

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


def _packaged_describer() -> tuple[Describer, Path]:
    weights = packaged_efficientnet_weights()
    return EfficientNetLite0Describer(weights), weights


# name -> function that gives a network with its ImageNet weights, and the file they came from
DESCRIBERS: dict[str, Callable[[], tuple[Describer, Path]]] = {"efficientnet_lite0": _packaged_describer}


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
