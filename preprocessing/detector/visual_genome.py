"""The network of bottom-up-attention: Faster R-CNN on ResNet-101, 1,600 object classes and 400 attributes of Visual Genome.

Weights exist in two dialects that order classes, code boxes and bound anchors differently: "caffe" (the original; MILVLG's conversion) and
"d2" (detectron2's: airsplay's and Hugging Face's conversions). In memory there is one form: classes with the background first, attributes
with "none" first, one logit per anchor, normalisation folded into the convolutions. What remains of a dialect is in ``Dialect``.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megainter.errors import DamagedError, UsageError
from preprocessing.detector.network import BACKGROUND

NORM_EPSILON = 1e-5
STAGES = ("backbone.res2", "backbone.res3", "backbone.res4", "roi_heads.res5")
RPN, PREDICTOR = "proposal_generator.rpn_head", "roi_heads.box_predictor"
ANCHORS = "proposal_generator.anchor_generator.cell_anchors.0"
POOLED = 14  # bins per side of a pooled region
EMBEDDING, ATTRIBUTE_HIDDEN = 256, 512


@dataclass(frozen=True)
class Dialect:
    """How boxes are counted, bounded and coded."""

    pixel: float  # 1 where the last pixel is inside a box: width = x2 - x1 + 1, and x ends at W - 1
    smallest: float  # a proposal's sides in the original image's pixels, at least
    small_first: bool  # small proposals leave before the cut to the best 6,000, or after it
    most_growth: float  # of log width and height in one regression
    box_divisors: tuple[float, float, float, float]  # of the class-wise regression


DIALECTS: Mapping[str, Dialect] = MappingProxyType(
    {
        "caffe": Dialect(1.0, 16.0, True, math.inf, (1.0, 1.0, 1.0, 1.0)),
        "d2": Dialect(0.0, 0.0, False, math.log(1000 / 16), (10.0, 10.0, 5.0, 5.0)),
    }
)


@dataclass(frozen=True)
class VgConfig:
    """Everything but the weights. ``class_names`` starts with the background, ``attribute_names`` may be empty (then there are none).

    ``blocks`` per stage res2 to res5 and ``width`` (channels of the stem) are those of ResNet-101.
    """

    class_names: tuple[str, ...]
    attribute_names: tuple[str, ...]
    dialect: str
    min_size: int = 600  # the image's shorter side is brought to this,
    max_size: int = 1000  # unless the longer one would exceed this
    proposals: int = 300
    proposals_before_nms: int = 6000
    blocks: tuple[int, int, int, int] = (3, 4, 23, 3)
    width: int = 64
    anchors: int = 12

    def __post_init__(self) -> None:
        if not self.class_names or self.class_names[0] != BACKGROUND:
            raise UsageError(f"class_names must start with {BACKGROUND!r}, but are {self.class_names[:3]}...")
        if self.dialect not in DIALECTS:
            raise UsageError(f"unknown dialect {self.dialect!r}: choose {' or '.join(DIALECTS)}")

    @property
    def feature_size(self) -> int:
        """Numbers per region."""
        return 32 * self.width

    def to_json(self) -> str:
        """One line of JSON, keys sorted: the form in the weights file."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "VgConfig":
        """The inverse of ``to_json``; unknown or missing keys are a ``DamagedError``."""
        values: dict[str, Any] = json.loads(text)
        if set(values) != {field.name for field in fields(cls)}:
            raise DamagedError(f"the detector's configuration has other keys than a Visual Genome detector's: {sorted(values)}")
        return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})  # type: ignore[arg-type]


# --- the weights as files hold them ------------------------------------------------------------------------------------------------


def file_shapes(config: VgConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a weights file by the name detectron2's conversions use, with its shape in ``config.dialect``."""
    shapes: dict[str, tuple[int, ...]] = _normalised("backbone.stem.conv1", config.width, 3, 7)
    for number, stage in enumerate(STAGES):
        for block in range(config.blocks[number]):
            shapes |= _block_shapes(f"{stage}.{block}", *_channels(config, number, block))
    caffe, hidden, classes = config.dialect == "caffe", 8 * config.width, len(config.class_names)
    shapes |= {ANCHORS: (config.anchors, 4)}
    shapes |= _linear(f"{RPN}.conv", hidden, 16 * config.width, 3, 3)
    shapes |= _linear(f"{RPN}.objectness_logits", (2 if caffe else 1) * config.anchors, hidden, 1, 1)
    shapes |= _linear(f"{RPN}.anchor_deltas", 4 * config.anchors, hidden, 1, 1)
    shapes |= _linear(f"{PREDICTOR}.cls_score", classes, config.feature_size)
    shapes |= _linear(f"{PREDICTOR}.bbox_pred", 4 * (classes if caffe else classes - 1), config.feature_size)
    if config.attribute_names:
        shapes |= {f"{PREDICTOR}.cls_embedding.weight": (classes, EMBEDDING)}
        shapes |= _linear(f"{PREDICTOR}.fc_attr", ATTRIBUTE_HIDDEN, config.feature_size + EMBEDDING)
        shapes |= _linear(f"{PREDICTOR}.attr_score", len(config.attribute_names) + 1, ATTRIBUTE_HIDDEN)
    return shapes


def _channels(config: VgConfig, stage: int, block: int) -> tuple[int, int, int]:
    """(inputs, inner, outputs) of a bottleneck."""
    outputs = config.width * 4 * 2**stage
    inputs = outputs if block else config.width if stage == 0 else outputs // 2
    return inputs, outputs // 4, outputs


def _block_shapes(name: str, inputs: int, inner: int, outputs: int) -> dict[str, tuple[int, ...]]:
    shapes = _normalised(f"{name}.conv1", inner, inputs, 1) | _normalised(f"{name}.conv2", inner, inner, 3)
    shapes |= _normalised(f"{name}.conv3", outputs, inner, 1)
    return shapes if inputs == outputs else shapes | _normalised(f"{name}.shortcut", outputs, inputs, 1)


def _normalised(name: str, outputs: int, inputs: int, side: int) -> dict[str, tuple[int, ...]]:
    norm = {f"{name}.norm.{part}": (outputs,) for part in ("weight", "bias", "running_mean", "running_var")}
    return {f"{name}.weight": (outputs, inputs, side, side), **norm}


def _linear(name: str, *shape: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def network_state(config: VgConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A file's tensors (those of ``file_shapes``) as ``VgNetwork`` holds them, float32."""
    ready = {name: value.float() for name, value in state.items() if ".norm." not in name}
    for stem in [name.removesuffix(".norm.weight") for name in state if name.endswith(".norm.weight")]:
        norm = (state[f"{stem}.norm.{part}"] for part in _NORM_PARTS)
        ready[f"{stem}.weight"], ready[f"{stem}.bias"] = folded(ready[f"{stem}.weight"], *norm)
    if config.dialect == "caffe":  # a pair of logits under softmax is their difference under a sigmoid
        for part in ("weight", "bias"):
            background, object_ = ready[f"{RPN}.objectness_logits.{part}"].chunk(2)
            ready[f"{RPN}.objectness_logits.{part}"] = object_ - background
            ready[f"{PREDICTOR}.bbox_pred.{part}"] = ready[f"{PREDICTOR}.bbox_pred.{part}"][4:]
    else:
        for head in ("cls_score.weight", "cls_score.bias", "cls_embedding.weight", "attr_score.weight", "attr_score.bias"):
            if f"{PREDICTOR}.{head}" in ready:
                ready[f"{PREDICTOR}.{head}"] = ready[f"{PREDICTOR}.{head}"].roll(1, dims=0)
    return {_short(name): value for name, value in ready.items()}


_NORM_PARTS = ("weight", "bias", "running_mean", "running_var")
_PREFIXES = ("backbone.stem.", "backbone.", "roi_heads.box_predictor.", "roi_heads.", "proposal_generator.rpn_head.")


def _short(name: str) -> str:
    if name == ANCHORS:
        return "cell_anchors"
    return next((name.removeprefix(prefix) for prefix in _PREFIXES if name.startswith(prefix)), name).replace("bbox_pred", "box_deltas")


def folded(weight: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """A convolution's weight and bias that include the frozen normalisation behind it."""
    factor = scale.double() / (variance.double() + NORM_EPSILON).sqrt()
    return (weight.double() * factor[:, None, None, None]).float(), (shift.double() - mean.double() * factor).float()


# --- the network ---------------------------------------------------------------------------------------------------------------------


class Bottleneck(nn.Module):
    """Stride on the first 1x1 convolution and on the shortcut, as in the original residual networks; normalisation is folded in."""

    def __init__(self, inputs: int, inner: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, inner, 1, stride)
        self.conv2 = nn.Conv2d(inner, inner, 3, padding=1)
        self.conv3 = nn.Conv2d(inner, outputs, 1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        """In half precision the shortcut of res5's first block stays float32, and so do its input and the sum behind it."""
        inner = F.relu_(self.conv2(F.relu_(self.conv1(x.to(self.conv1.weight.dtype)))))
        if self.shortcut is None:
            return F.relu_(self.conv3(inner).add_(x))
        return F.relu_(self.shortcut(x).add_(self.conv3(inner))).to(self.conv1.weight.dtype)


def _stage(config: VgConfig, number: int, stride: int) -> nn.Sequential:
    blocks = range(config.blocks[number])
    return nn.Sequential(*(Bottleneck(*_channels(config, number, block), 1 if block else stride) for block in blocks))


class VgNetwork(nn.Module):
    """The layers, one method per stage. R regions, C classes with the background first."""

    cell_anchors: Tensor

    def __init__(self, config: VgConfig) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, config.width, 7, 2, padding=3)
        self.res2, self.res3, self.res4, self.res5 = (_stage(config, number, stride) for number, stride in enumerate((1, 2, 2, 1)))
        hidden, classes = 8 * config.width, len(config.class_names)
        self.register_buffer("cell_anchors", torch.zeros(config.anchors, 4))
        self.conv = nn.Conv2d(16 * config.width, hidden, 3, padding=1)
        self.objectness_logits = nn.Conv2d(hidden, config.anchors, 1)
        self.anchor_deltas = nn.Conv2d(hidden, 4 * config.anchors, 1)
        self.cls_score = nn.Linear(config.feature_size, classes)
        self.box_deltas = nn.Linear(config.feature_size, 4 * (classes - 1))
        if config.attribute_names:
            self.cls_embedding = nn.Embedding(classes, EMBEDDING)
            self.fc_attr = nn.Linear(config.feature_size + EMBEDDING, ATTRIBUTE_HIDDEN)
            self.attr_score = nn.Linear(ATTRIBUTE_HIDDEN, len(config.attribute_names) + 1)

    def backbone(self, images: Tensor) -> Tensor:
        """Images [B,3,H,W] (BGR, means subtracted) to maps [B,1024,h,w] at stride 16."""
        stem = F.relu_(self.conv1(images))
        x = F.max_pool2d(stem, 3, 2, padding=0, ceil_mode=True)
        return self.res4(self.res3(self.res2(x)))

    def rpn(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B,h*w*A] and deltas [B,h*w*A,4] of all anchors, the anchor running fastest."""
        hidden = F.relu_(self.conv(maps))
        logits, deltas = self.objectness_logits(hidden), self.anchor_deltas(hidden)
        return logits.permute(0, 2, 3, 1).flatten(1), deltas.permute(0, 2, 3, 1).reshape(len(maps), -1, 4)

    def res5_mean(self, pooled: Tensor) -> Tensor:
        """Pooled regions [R,1024,14,14] to features [R,2048].

        The stage has stride 1 and 3x3 convolutions dilated by 2: on 14x14 bins that is four interleaved lattices of 7x7 bins which never
        meet, each under ordinary convolutions, which are faster.
        """
        regions, channels = pooled.shape[:2]
        lattices = pooled.view(regions, channels, POOLED // 2, 2, POOLED // 2, 2).permute(0, 3, 5, 2, 4, 1)  # channels run fastest
        x = lattices.reshape(4 * regions, POOLED // 2, POOLED // 2, channels).permute(0, 3, 1, 2)
        return self.res5(x).mean(dim=(2, 3), dtype=torch.float32).view(regions, 4, -1).mean(dim=1)

    def class_probs(self, features: Tensor) -> Tensor:
        """Features [R,2048] to probabilities [R,C]."""
        return self.cls_score(features).softmax(dim=1)

    def deltas_of(self, features: Tensor, labels: Tensor) -> Tensor:
        """Box regression [R,4] of one object class (0 is the first after the background) per region, without those of all others."""
        weight, bias = self.box_deltas.weight.view(-1, 4, features.shape[1]), self.box_deltas.bias.view(-1, 4)
        return torch.einsum("rf,rdf->rd", features, weight[labels]) + bias[labels]

    def attribute_logits(self, features: Tensor, class_probs: Tensor) -> Tensor:
        """Logits [R,401], "none" first, given each region's likeliest class, the background included."""
        embedded = self.cls_embedding(class_probs.argmax(dim=1))
        return self.attr_score(F.relu(self.fc_attr(torch.cat([features, embedded], dim=1))))


def build_vg_network(config: VgConfig, state: Mapping[str, Tensor]) -> VgNetwork:
    """The network in eval mode with a file's tensors, which must be those of ``file_shapes(config)``."""
    with torch.device("meta"):  # nothing is drawn and reserved that the file's weights replace at once
        network = VgNetwork(config)
    network.load_state_dict(network_state(config, state), assign=True)
    return network.eval().requires_grad_(False)
