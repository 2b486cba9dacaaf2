"""What passes between a detector's network and the choice of its regions."""

from dataclasses import dataclass
from typing import Any, Literal, Protocol

from PIL import Image
from torch import Tensor

BACKGROUND = "__background__"  # the name of class 0
Selection = Literal["caffe", "d2", "objectness"]  # rules that pick regions: see ``selection``


@dataclass(frozen=True)
class Input:
    """An image as a network takes it: ``pixels`` float32 [3,H,W], and original pixels per pixel of it, along x and y."""

    pixels: Tensor
    ratio: tuple[float, float]

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels of the network's input."""
        return self.pixels.shape[-2], self.pixels.shape[-1]


@dataclass(frozen=True)
class Regions:
    """Everything the network says about one image, before boxes are chosen. In pixels of the network's input."""

    proposals: Tensor  # [R,4] xyxy, by falling objectness
    features: Tensor  # [R,F] what the classifier sees of each proposal
    class_probs: Tensor  # [R,C] background first
    deltas: Tensor | None = None  # [R,4*C] box regression, where the network computes it for all classes at once


class Network(Protocol):
    """A detection network with its preprocessing, stage by stage."""

    @property
    def config(self) -> Any:
        """With ``class_names`` (background first), ``feature_size``, ``min_size`` and ``max_size``."""

    @property
    def selection(self) -> Selection:
        """The rule that picks this network's regions where none is asked for."""

    @property
    def object_from(self) -> float:
        """Probability of not being background from which the rule "objectness" keeps a region."""

    @property
    def pixel(self) -> float | None:
        """Width added to a box under the caffe rule, in original pixels; None where boxes are compared as the network sees them."""

    def prepare(self, image: Image.Image, min_size: int, max_size: int) -> Input:
        """The resized and normalised image, on the network's device."""

    def maps(self, inputs: list[Input]) -> Any:
        """The backbone's feature maps of all inputs, in a form of the network's own."""

    def propose(self, maps: Any, inputs: list[Input]) -> list[Tensor]:
        """Proposals [R,4] of each input, at least one."""

    def read(self, maps: Any, inputs: list[Input], boxes: list[Tensor]) -> list[Regions]:
        """What the classifier sees in boxes [R,4] (pixels of the input) of each input."""

    def regressed(self, found: Regions, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Boxes [R,4] regressed to each one's likeliest object class and clipped to ``size`` (height, width), and its probability [R]."""


def whole(size: tuple[int, int], like: Tensor) -> Tensor:
    """One box [1,4] around an input of ``size`` (height, width), of the type of ``like``."""
    return like.new_tensor([[0.0, 0.0, size[1], size[0]]])
