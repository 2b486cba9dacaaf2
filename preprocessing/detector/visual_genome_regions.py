"""Images into the Visual Genome network and proposals out of it, by the rules of either dialect."""

import torch
from PIL import Image
from torch import Tensor
from torchvision.ops import nms, roi_pool
from torchvision.transforms.functional import pil_to_tensor

from megainter.errors import UsageError
from preprocessing.detector.network import Input, Regions, Selection, whole
from preprocessing.detector.selection import OBJECT
from preprocessing.detector.visual_genome import DIALECTS, POOLED, Dialect, VgConfig, VgNetwork

STRIDE = 16  # pixels per cell of the maps
PROPOSAL_NMS = 0.7
SMALLEST_INPUT = 5  # pixels: below this no cell is left behind the stem
REGIONS_AT_ONCE = 64  # through res5: bounds memory (at 64 about 100 MB per tensor in float32) and keeps it in reach of the caches
MEAN_BGR = (102.9801, 115.9465, 122.7717)


class VgDetection:
    """The network with what stands before and between its layers (``preprocessing.detector.network.Network``).

    In bf16 and fp16 only res5, nine tenths of the arithmetic, runs in half precision: proposals stay those of float32.
    """

    pixel = 1.0  # bottom-up-attention's rule counts the last pixel, whichever conversion of its weights proposes
    selection: Selection = "caffe"
    object_from = OBJECT

    def __init__(self, config: VgConfig, network: VgNetwork, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> None:
        self.config, self.dialect, self.device = config, DIALECTS[config.dialect], torch.device(device)
        self.network = network.to(self.device).to(memory_format=torch.channels_last)
        self.dtype = dtype or torch.float32
        self.network.res5.to(self.dtype)
        self.network.res5[0].shortcut.float()  # the one rounding that moved class logits most

    def prepare(self, image: Image.Image, min_size: int, max_size: int) -> Input:
        """BGR, means subtracted, resized without antialiasing as the weights were trained."""
        (width, height), scale = input_size(image.width, image.height, min_size, max_size, self.config.dialect)
        pixels = pil_to_tensor(image.convert("RGB")).to(self.device).flip(0).float()
        pixels -= torch.tensor(MEAN_BGR, device=self.device)[:, None, None]
        if pixels.shape[1:] != (height, width):
            pixels = torch.ops.aten.upsample_bilinear2d(pixels[None], [height, width], False, scale, scale)[0]
        return Input(pixels, (1 / scale, 1 / scale) if scale else (image.width / width, image.height / height))

    def maps(self, inputs: list[Input]) -> list[Tensor]:
        """[1,1024,h,w] of each input. Inputs of one size share a pass; none is padded, which would change its features."""
        maps: dict[int, Tensor] = {}
        for size in dict.fromkeys(value.size for value in inputs):
            rows = [row for row, value in enumerate(inputs) if value.size == size]
            images = torch.stack([inputs[row].pixels for row in rows]).contiguous(memory_format=torch.channels_last)
            maps |= zip(rows, self.network.backbone(images).split(1), strict=True)
        return [maps[row] for row in range(len(inputs))]

    def propose(self, maps: list[Tensor], inputs: list[Input]) -> list[Tensor]:
        """The best proposals [R,4] of each input after NMS, by falling objectness; the whole image where there are none."""
        return [self._propose(map_, value) for map_, value in zip(maps, inputs, strict=True)]

    def _propose(self, map_: Tensor, value: Input) -> Tensor:
        logits, deltas = self.network.rpn(map_)
        anchors = shifted_anchors(self.network.cell_anchors, map_.shape[-2], map_.shape[-1])
        boxes = best_proposals(logits[0], deltas[0], anchors, value, self.dialect, self.config)
        return boxes if len(boxes) else whole(value.size, boxes)

    def pool(self, map_: Tensor, boxes: Tensor) -> Tensor:
        """RoIPool (maximum in quantised bins): boxes [R,4] on a map [1,1024,h,w] to [R,1024,14,14]."""
        return roi_pool(map_.contiguous(), [boxes], POOLED, 1 / STRIDE)

    def features(self, map_: Tensor, boxes: Tensor) -> Tensor:
        """The features [R,2048] float32 of boxes [R,4]."""
        return torch.cat([self.network.res5_mean(self.pool(map_, part)) for part in boxes.split(REGIONS_AT_ONCE)])

    def read(self, maps: list[Tensor], inputs: list[Input], boxes: list[Tensor]) -> list[Regions]:
        """Features and class probabilities of boxes [R,4] of each input."""
        features = [self.features(map_, mine) for map_, mine in zip(maps, boxes, strict=True)]
        return [Regions(mine, found, self.network.class_probs(found)) for mine, found in zip(boxes, features, strict=True)]

    def regressed(self, found: Regions, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Boxes [R,4] regressed to each one's likeliest object class and clipped, and its probability [R]."""
        top, label = found.class_probs[:, 1:].max(dim=1)
        deltas = self.network.deltas_of(found.features, label) / found.features.new_tensor(self.dialect.box_divisors)
        return clipped(decoded(deltas, found.proposals, self.dialect), size, self.dialect), top

    def attributes(self, found: Regions) -> tuple[Tensor, Tensor]:
        """The likeliest attribute [R] (0 is the first name) and its probability [R].

        The dialects differ: caffe's probabilities include "none", d2's are renormalised without it.
        """
        if not self.config.attribute_names:
            raise UsageError("this detector's weights have no attributes")
        logits = self.network.attribute_logits(found.features, found.class_probs)
        probs = logits.softmax(dim=1)[:, 1:] if self.config.dialect == "caffe" else logits[:, 1:].softmax(dim=1)
        confidence, attribute = probs.max(dim=1)
        return attribute, confidence


def input_size(width: int, height: int, min_size: int, max_size: int, dialect: str) -> tuple[tuple[int, int], float | None]:
    """((width, height) of the network's input, the one scale of both axes or None where each axis has its rounded own).

    The shorter side becomes ``min_size`` unless the longer would exceed ``max_size``. The dialects round differently.
    """
    short, long = min(width, height), max(width, height)
    scale = min_size / short
    if dialect == "caffe":
        if round(scale * long) > max_size:
            scale = max_size / long
        return (max(SMALLEST_INPUT, round(width * scale)), max(SMALLEST_INPUT, round(height * scale))), scale
    scale *= min(1.0, max_size / (scale * long))
    return (max(SMALLEST_INPUT, int(width * scale + 0.5)), max(SMALLEST_INPUT, int(height * scale + 0.5))), None


def shifted_anchors(cell_anchors: Tensor, height: int, width: int) -> Tensor:
    """The anchors [h*w*A,4] of a map: those of cell (0, 0) [A,4] moved to every cell, the anchor running fastest."""
    y = torch.arange(height, device=cell_anchors.device) * STRIDE
    x = torch.arange(width, device=cell_anchors.device) * STRIDE
    shifts = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1] * 2, dim=-1)
    return (shifts[:, :, None] + cell_anchors).view(-1, 4)


def best_proposals(logits: Tensor, deltas: Tensor, anchors: Tensor, value: Input, dialect: Dialect, config: VgConfig) -> Tensor:
    """Of all anchors [N,4] with logits [N] and deltas [N,4], the proposals that remain [R,4]."""
    smallest = dialect.smallest / value.ratio[0]
    if not dialect.small_first:
        logits, best = logits.topk(min(config.proposals_before_nms, len(logits)))
        deltas, anchors = deltas[best], anchors[best]
    boxes = clipped(decoded(deltas, anchors, dialect), value.size, dialect)
    sides = boxes[:, 2:] - boxes[:, :2] + dialect.pixel
    large = (sides >= smallest).all(dim=1) if dialect.small_first else (sides > 0).all(dim=1)
    logits, boxes = logits[large], boxes[large]
    if dialect.small_first:
        logits, best = logits.topk(min(config.proposals_before_nms, len(logits)))
        boxes = boxes[best]
    widened = boxes + boxes.new_tensor([0, 0, dialect.pixel, dialect.pixel])
    return boxes[nms(widened, logits, PROPOSAL_NMS)[: config.proposals]]


def decoded(deltas: Tensor, boxes: Tensor, dialect: Dialect) -> Tensor:
    """``boxes`` [N,4] moved and grown by ``deltas`` [N,4]: (x, y) in widths and heights, log growth of width and height."""
    sides = boxes[:, 2:] - boxes[:, :2] + dialect.pixel
    centres = boxes[:, :2] + 0.5 * sides + deltas[:, :2] * sides
    halves = 0.5 * sides * deltas[:, 2:].clamp(max=dialect.most_growth).exp()
    return torch.cat([centres - halves, centres + halves], dim=1)


def clipped(boxes: Tensor, size: tuple[int, int], dialect: Dialect) -> Tensor:
    """``boxes`` [N,4] inside an input of ``size`` (height, width)."""
    limit = boxes.new_tensor([size[1], size[0], size[1], size[0]]) - dialect.pixel
    return torch.minimum(boxes.clamp(min=0), limit)
