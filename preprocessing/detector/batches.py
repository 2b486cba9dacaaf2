"""Images with boxes as training samples: what step ``n`` sees is a function of (seed, n), so that a resumed run goes on exactly."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from megainter.data.tables.boxes import ImageBoxes
from megainter.errors import UsageError
from preprocessing.detector.detector import BACKGROUND, to_input
from preprocessing.images.decode import UnreadableImageError, confined, load_image


@dataclass(frozen=True)
class Sample:
    """One image [3,H,W] in 0..1 as the network sees it, and its boxes [n,4] xyxy (same pixels) with class numbers [n] from 1."""

    image: Tensor
    boxes: Tensor
    labels: Tensor

    def target(self) -> dict[str, Tensor]:
        """In torchvision's form."""
        return {"boxes": self.boxes, "labels": self.labels}


def class_names_of(rows: list[ImageBoxes]) -> tuple[str, ...]:
    """The background, then every label of ``rows`` in alphabetical order."""
    return (BACKGROUND, *sorted({label for row in rows for label in row.labels}))


class BoxesDataset(Dataset[Sample]):
    """``rows`` as samples. An item is (row, flipped): flipping is decided by the sampler, not by a worker."""

    def __init__(self, rows: list[ImageBoxes], images: Path, class_names: tuple[str, ...], min_size: int, max_size: int) -> None:
        self.rows, self.images = rows, images
        self.numbers = {name: number for number, name in enumerate(class_names)}
        self.min_size, self.max_size = min_size, max_size
        unknown = sorted({label for row in rows for label in row.labels} - set(class_names))
        if unknown:
            raise UsageError(f"labels {unknown[:5]} are not among the detector's {len(class_names) - 1} classes")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, item: tuple[int, bool]) -> Sample:
        number, flipped = item
        row = self.rows[number]
        image = to_input(self._open(row.image), self.min_size, self.max_size)
        scale = np.array([image.shape[2] / row.width, image.shape[1] / row.height] * 2, dtype=np.float32)
        boxes = torch.from_numpy(row.boxes * scale)
        labels = torch.tensor([self.numbers[label] for label in row.labels], dtype=torch.int64)
        if flipped:
            image, boxes = image.flip(2), boxes[:, [2, 1, 0, 3]]
            boxes[:, [0, 2]] = image.shape[2] - boxes[:, [0, 2]]
        solid = ((boxes[:, 2:] - boxes[:, :2]) >= 1).all(dim=1)  # torchvision refuses degenerate boxes
        return Sample(image, boxes[solid], labels[solid])

    def _open(self, name: str) -> Image.Image:
        try:
            return load_image(confined(self.images, name))
        except UnreadableImageError as error:
            raise UsageError(f"{error}: correct the images folder, or remove this image's row from the boxes manifest") from None


def repeat_factors(rows: list[ImageBoxes], threshold: float) -> np.ndarray:
    """How often each image is seen per epoch [n] float64, >= 1: images with a rare class more often (LVIS's repeat-factor sampling).

    A class in a share f of the images gives max(1, sqrt(threshold / f)); an image takes the largest of its classes.
    """
    shares = Counter(label for row in rows for label in set(row.labels))
    factor = {label: max(1.0, math.sqrt(threshold * len(rows) / count)) for label, count in shares.items()}
    return np.array([max((factor[label] for label in row.labels), default=1.0) for row in rows])


def epoch_order(factors: np.ndarray, seed: int, epoch: int, flip: bool) -> list[tuple[int, bool]]:
    """The items (row, flipped) of one epoch; fractions of the repeat factors are rounded at random, anew each epoch."""
    rng = np.random.default_rng([seed, epoch])
    repeats = np.floor(factors).astype(int) + (rng.random(len(factors)) < factors % 1)
    rows = rng.permutation(np.repeat(np.arange(len(factors)), repeats))
    flips = rng.random(len(rows)) < (0.5 if flip else 0.0)
    return [(int(row), bool(flipped)) for row, flipped in zip(rows, flips, strict=True)]


def batches_from(factors: np.ndarray, seed: int, batch_size: int, flip: bool, first: int, last: int) -> Iterator[list[tuple[int, bool]]]:
    """The batches of steps ``first`` to ``last`` - 1 of a stream that runs through epoch after epoch without a seam."""
    step, epoch, waiting = 0, 0, list[tuple[int, bool]]()
    while step < last:
        waiting += epoch_order(factors, seed, epoch, flip)
        epoch += 1
        while len(waiting) >= batch_size and step < last:
            if step >= first:
                yield waiting[:batch_size]
            waiting = waiting[batch_size:]
            step += 1
