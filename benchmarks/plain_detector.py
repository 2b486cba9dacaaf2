"""The Visual Genome detector as people write it down in PyTorch: fp32, normalisation layers, dilated convolutions, all boxes regressed.

From the tensors of a weights file in detectron2's dialect. The yardstick of `benchmarks.extract`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import nms, roi_pool

from preprocessing.detector.visual_genome import ANCHORS, DIALECTS, PREDICTOR, RPN, STAGES, VgConfig
from preprocessing.detector.visual_genome_regions import clipped, decoded, shifted_anchors

State = dict[str, Tensor]


@torch.inference_mode()
def detect(state: State, config: VgConfig, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Proposals [R,4], features [R,2048] and class probabilities [R,1601] (background first) of an image [3,H,W] (BGR less the means)."""
    maps = _backbone(state, config, image[None])
    boxes = _proposals(state, config, maps, (image.shape[1], image.shape[2]))
    pooled = roi_pool(maps, [boxes], 14, 1 / 16)
    features = _stage(state, STAGES[3], config.blocks[3], pooled, stride=1, dilation=2).mean((2, 3))
    probs = _linear(state, f"{PREDICTOR}.cls_score", features).softmax(1)
    _linear(state, f"{PREDICTOR}.bbox_pred", features)
    return boxes, features, probs.roll(1, dims=1)


def select(boxes: Tensor, probs: Tensor, least: int, most: int) -> Tensor:
    """Bottom-up-attention's choice as its script has it: NMS class by class at 0.3 on boxes that count their last pixel."""
    widened = boxes + boxes.new_tensor([0, 0, 1, 1])
    confidence = torch.zeros(len(boxes), device=boxes.device)
    for number in range(1, probs.shape[1]):
        kept = nms(widened, probs[:, number], 0.3)
        confidence[kept] = torch.maximum(confidence[kept], probs[kept, number])
    chosen = (confidence >= 0.2).nonzero()[:, 0]
    if least <= len(chosen) <= most:
        return chosen
    return confidence.argsort(descending=True)[: least if len(chosen) < least else most]


def _backbone(state: State, config: VgConfig, x: Tensor) -> Tensor:
    x = F.max_pool2d(F.relu(_convolved(state, "backbone.stem.conv1", x, 2, 3)), 3, 2, 0, ceil_mode=True)
    for number, stage in enumerate(STAGES[:3]):
        x = _stage(state, stage, config.blocks[number], x, stride=1 if number == 0 else 2, dilation=1)
    return x


def _stage(state: State, name: str, blocks: int, x: Tensor, stride: int, dilation: int) -> Tensor:
    for block in range(blocks):
        step = stride if block == 0 else 1
        inner = F.relu(_convolved(state, f"{name}.{block}.conv1", x, step, 0))
        inner = F.relu(_convolved(state, f"{name}.{block}.conv2", inner, 1, dilation, dilation))
        shortcut = _convolved(state, f"{name}.{block}.shortcut", x, step, 0) if block == 0 else x
        x = F.relu(_convolved(state, f"{name}.{block}.conv3", inner, 1, 0) + shortcut)
    return x


def _convolved(state: State, name: str, x: Tensor, stride: int, padding: int, dilation: int = 1) -> Tensor:
    mean, variance, scale, shift = (state[f"{name}.norm.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
    x = F.conv2d(x, state[f"{name}.weight"], None, stride, padding, dilation)
    return F.batch_norm(x, mean, variance, scale, shift, eps=1e-5)


def _proposals(state: State, config: VgConfig, maps: Tensor, size: tuple[int, int]) -> Tensor:
    hidden = F.relu(F.conv2d(maps, state[f"{RPN}.conv.weight"], state[f"{RPN}.conv.bias"], padding=1))
    logits, deltas = (
        F.conv2d(hidden, state[f"{RPN}.{head}.weight"], state[f"{RPN}.{head}.bias"]).permute(0, 2, 3, 1)
        for head in ("objectness_logits", "anchor_deltas")
    )
    dialect = DIALECTS["d2"]
    best = logits.flatten().topk(min(config.proposals_before_nms, logits.numel()))
    anchors = shifted_anchors(state[ANCHORS], maps.shape[2], maps.shape[3])[best.indices]
    boxes = clipped(decoded(deltas.reshape(-1, 4)[best.indices], anchors, dialect), size, dialect)
    real = (boxes[:, 2:] > boxes[:, :2]).all(1)  # not those clipped to nothing
    boxes, logits = boxes[real], best.values[real]
    return boxes[nms(boxes, logits, 0.7)[: config.proposals]]


def _linear(state: State, name: str, x: Tensor) -> Tensor:
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])
