"""The golden Visual Genome detector's weights, drawn by the recipe of shared/golden/README.md, and a small one of the same kind."""

import zlib
from functools import cache

import numpy as np
import torch
from torch import Tensor

from preprocessing.detector.visual_genome import BACKGROUND, VgConfig, file_shapes
from tests.places import SHARED

GOLDEN, KEYS = SHARED / "golden" / "frcnn_small.npz", SHARED / "facts" / "frcnn_keys.txt"
GAINS = {"objectness_logits": 4.0, "anchor_deltas": 0.3, "cls_score": 8.0, "bbox_pred": 1.0, "attr_score": 3.0, "fc_attr": 1.0}
FULL = VgConfig((BACKGROUND, *(f"class {n}" for n in range(1, 1601))), tuple(f"attribute {n}" for n in range(1, 401)), "d2", proposals=48)
SMALL = VgConfig((BACKGROUND, "cat", "dog", "tree", "sky"), ("red", "wet", "old"), "d2", 96, 160, 24, 200, blocks=(3, 4, 6, 3), width=8)


def drawn(key: str, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(zlib.crc32(key.encode())).standard_normal(shape, dtype=np.float64).astype(np.float32)


def anchors_of_d2() -> np.ndarray:
    """Size by size, heights over widths 1/2, 1, 2, around the origin."""
    rows = []
    for size in (64, 128, 256, 512):
        for ratio in (0.5, 1.0, 2.0):
            width = (size**2 / ratio) ** 0.5
            rows.append([-width / 2, -width * ratio / 2, width / 2, width * ratio / 2])
    return np.array(rows, np.float32)


def anchors_of_caffe() -> np.ndarray:
    """Ratio by ratio, whole numbers around (7.5, 7.5)."""
    rows = []
    for ratio in (0.5, 1.0, 2.0):
        width = np.round(np.sqrt(256 / ratio))
        height = np.round(width * ratio)
        for scale in (4, 8, 16, 32):
            x, y = 0.5 * (width * scale - 1), 0.5 * (height * scale - 1)
            rows.append([7.5 - x, 7.5 - y, 7.5 + x, 7.5 + y])
    return np.array(rows, np.float32)


def drawn_weight(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """One tensor by the recipe."""
    if "cell_anchors" in key:
        return anchors_of_d2()
    x = drawn(key, shape)
    if key.endswith("norm.weight"):
        return (0.25 if key.endswith("conv3.norm.weight") else 1.0) * (1 + 0.1 * np.clip(x, -2, 2))
    if key.endswith("running_mean"):
        return 0.05 * x
    if key.endswith("running_var"):
        return (5000.0 if "stem" in key else 1.0) * (1 + 0.1 * np.clip(x, -2, 2))
    if key.endswith("bias"):
        return 0.1 * x
    if "cls_embedding" in key:
        return 0.5 * x
    fan_in = int(np.prod(shape[1:]))
    gain = next((gain for part, gain in GAINS.items() if part in key), None)
    if gain is None:
        return x * np.float32(np.sqrt(2 / fan_in))
    rows = x.reshape(len(x), -1)
    return ((rows - rows.mean(axis=1, keepdims=True)) * gain / np.sqrt(fan_in)).reshape(shape)


def drawn_state(config: VgConfig) -> dict[str, Tensor]:
    """A weights file's tensors in detectron2's dialect."""
    return {key: torch.from_numpy(np.asarray(drawn_weight(key, shape), np.float32)) for key, shape in file_shapes(config).items()}


@cache
def golden_state() -> dict[str, Tensor]:
    return drawn_state(FULL)


@cache
def small_state() -> dict[str, Tensor]:
    return drawn_state(SMALL)


def as_caffe(state: dict[str, Tensor], anchors: Tensor | None = None) -> dict[str, Tensor]:
    """The same detector in the caffe dialect: background and "none" first, a pair of logits per anchor, box rows for the background."""
    out = dict(state)
    predictor, rpn = "roi_heads.box_predictor", "proposal_generator.rpn_head"
    for head in ("cls_score", "cls_embedding", "attr_score"):
        for part in ("weight", "bias"):
            if f"{predictor}.{head}.{part}" in out:
                out[f"{predictor}.{head}.{part}"] = torch.cat(
                    [state[f"{predictor}.{head}.{part}"][-1:], state[f"{predictor}.{head}.{part}"][:-1]]
                )
    for part in ("weight", "bias"):
        logits = state[f"{rpn}.objectness_logits.{part}"]
        out[f"{rpn}.objectness_logits.{part}"] = torch.cat([-0.5 * logits, 0.5 * logits])
        rows = state[f"{predictor}.bbox_pred.{part}"]
        divided = rows / torch.tensor([10.0, 10.0, 5.0, 5.0]).repeat(len(rows) // 4).view(-1, *[1] * (rows.dim() - 1))
        out[f"{predictor}.bbox_pred.{part}"] = torch.cat([torch.randn(4, *rows.shape[1:]), divided])
    if anchors is not None:
        out["proposal_generator.anchor_generator.cell_anchors.0"] = anchors
    return out
