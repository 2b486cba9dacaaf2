"""NanoDet-g, a one-stage detector of COCO's 80 classes: the network and what its outputs mean.

The backbone is a cross-stage partial network (``Stage``), the neck adds its three last maps down and up again, and one head per map says of
every place what is there and how far away its four sides are, each as a distribution over 0 to 10 strides whose mean counts (generalised
focal loss). Normalisation is folded into the convolutions. Architecture: https://github.com/RangiLyu/nanodet (Apache-2.0).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

STRIDES = (8, 16, 32)  # pixels of the input per place of each map
DISTANCES = 11  # 0 to 10 strides
WIDTH = 128  # channels of the neck and the head
SLOPE = 0.1  # of the activation below 0
MEAN, DEVIATION = (103.53, 116.28, 123.675), (57.375, 57.12, 58.395)  # of blue, green and red in 0..255, as it was trained
COCO_CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light", "fire hydrant", "stop sign",
    "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella",
    "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard",
    "surfboard", "tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange",
    "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet", "tv",
    "laptop", "mouse", "remote", "keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase",
    "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip


class Convolution(nn.Module):
    """A convolution with bias that keeps the size (divided by ``stride``), and a leaky activation."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.conv(x), SLOPE)


class Pair(nn.Module):
    """Two convolutions; what each says stands side by side, the second's first."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = Convolution(channels, channels // 2)
        self.second = Convolution(channels // 2, channels // 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return torch.cat([self.second(x), x], dim=1)


class Stage(nn.Module):
    """A convolution, ``pairs`` behind it, and the input of the pairs beside their output: twice ``channels``."""

    def __init__(self, channels: int, pairs: int, stride: int) -> None:
        super().__init__()
        self.enter = Convolution(channels, channels, stride)
        self.pairs = nn.Sequential(*(Pair(channels) for _ in range(pairs)))
        self.leave = Convolution(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        return torch.cat([self.leave(self.pairs(x)), x], dim=1)


class Head(nn.Module):
    """Class logits and distances of one map, in one convolution's channels."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.hidden = Convolution(WIDTH, WIDTH)
        self.output = nn.Conv2d(WIDTH, classes + 4 * DISTANCES, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.hidden(x))


class NanoDet(nn.Module):
    """Normalised BGR [S, 3, H, W], sides multiples of 32 -> class logits [S, P, classes] and distances' logits [S, P, 44].

    P places: those of the map at stride 8, row by row, then 16, then 32. Of the 44 numbers 11 each are of left, top, right and bottom.
    """

    def __init__(self, classes: int = len(COCO_CLASSES)) -> None:
        super().__init__()
        self.classes = classes
        self.stem = Convolution(3, 32, stride=2)
        self.stages = nn.ModuleList([Stage(32, 1, 1), Stage(64, 2, 2), Stage(128, 2, 2), Stage(256, 3, 2)])
        self.laterals = nn.ModuleList(nn.Conv2d(channels, WIDTH, 1) for channels in (128, 256, 512))
        self.heads = nn.ModuleList(Head(classes) for _ in STRIDES)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        found = [head(level).flatten(2).transpose(1, 2) for head, level in zip(self.heads, self._neck(pixels), strict=True)]
        logits, distances = torch.cat(found, dim=1).split([self.classes, 4 * DISTANCES], dim=2)
        return logits, distances

    def levels(self, pixels: Tensor) -> list[Tensor]:
        """The backbone's own maps at strides 8, 16 and 32, of 128, 256 and 512 channels."""
        x = self.stages[0](F.max_pool2d(self.stem(pixels), 3, stride=2, padding=1))
        levels = []
        for stage in self.stages[1:]:
            levels.append(x := stage(x))
        return levels

    def _neck(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`levels` in ``WIDTH`` channels, each with what the others know added, coarse to fine and back."""
        fine, middle, coarse = (lateral(level) for lateral, level in zip(self.laterals, self.levels(pixels), strict=True))

        middle = middle + _resized(coarse, middle)
        fine = fine + _resized(middle, fine)
        middle = middle + _resized(fine, middle)
        return fine, middle, coarse + _resized(middle, coarse)


def _resized(level: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(level, size=like.shape[-2:], mode="bilinear", align_corners=False)


def normalised(pixels: Tensor) -> Tensor:
    """RGB in 0..1 [S, 3, H, W] as the network takes it."""
    mean, deviation = (pixels.new_tensor(values).view(3, 1, 1) for values in (MEAN, DEVIATION))
    return (pixels.flip(1) * 255 - mean) / deviation


def decoded_boxes(distances: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes [S, P, 4] xyxy from distances' logits [S, P, 44], in pixels of an input of ``size`` (height, width), clipped to it."""
    steps = torch.arange(DISTANCES, dtype=torch.float32, device=distances.device)
    sides = distances.float().unflatten(2, (4, DISTANCES)).softmax(dim=3) @ steps
    centres, strides = _places(size, distances.device)

    corners = torch.cat([centres - sides[..., :2] * strides, centres + sides[..., 2:] * strides], dim=2)
    return corners.clamp(min=0).minimum(corners.new_tensor([size[1], size[0]] * 2))


def _places(size: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """The centre [P, 2] of every place of an input of ``size``, as x and y, and its stride [P, 1]."""
    centres, strides = [], []
    for stride in STRIDES:
        y, x = ((torch.arange(side // stride, dtype=torch.float32, device=device) + 0.5) * stride for side in size)
        centres.append(torch.cartesian_prod(y, x).flip(1))
        strides.append(torch.full((len(y) * len(x), 1), float(stride), device=device))
    return torch.cat(centres), torch.cat(strides)
