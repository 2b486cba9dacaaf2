"""An image's regions as the model takes them: its global region first, then the detector's, with locations in shares of the image."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from megainter.data.feature_store.first_regions import FirstRegions
from megainter.data.integers import Int64s

GLOBAL_LOCATION = (0.0, 0.0, 1.0, 1.0, 1.0)


class Regions(Protocol):
    """What a record, a view of one, or anything else has of an image's regions."""

    @property
    def features(self) -> np.ndarray: ...
    @property
    def boxes(self) -> np.ndarray: ...
    @property
    def width(self) -> int: ...
    @property
    def height(self) -> int: ...
    def __len__(self) -> int: ...


def region_rows(images: Sequence[Regions], max_regions: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Regions of several images end to end: features [Nr, F] as stored, float32 locations [Nr, 5], int64 counts [I].

    At most ``max_regions`` of each image, the first ones, after its global region: the mean of these regions (zeros where there are none),
    over the whole image.
    """
    features, places = [], []
    for image in images:
        own = image.features[:max_regions]
        mean = own.mean(0, keepdims=True, dtype=np.float32) if len(own) else np.zeros((1, own.shape[1]), np.float32)
        features += [mean.astype(np.float16), own]
        places += [np.array([GLOBAL_LOCATION], dtype=np.float32), image_locations(image, max_regions)]
    lengths = torch.tensor([min(len(image), max_regions) + 1 for image in images])
    return torch.from_numpy(np.concatenate(features)), torch.from_numpy(np.concatenate(places)), lengths


def image_locations(image: Regions, most: int) -> NDArray[np.float32]:
    """float32 [n, 5]: ``locations`` of the first ``most`` regions of one image."""
    return locations(image.boxes[:most], np.array([image.width, image.height] * 2))


def packed_rows(counts: Int64s) -> Int64s:
    """int64 [N]: the packed row of each region of images with ``counts`` [I] of them, every image's global region before its own."""
    image = np.repeat(np.arange(len(counts)), counts)
    return np.arange(len(image)) + image + 1


def packed_locations(regions: FirstRegions) -> NDArray[np.float32]:
    """float32 [Nr, 5]: locations of all regions, every image's global region before its own."""
    sizes = np.stack([regions.widths, regions.heights, regions.widths, regions.heights], axis=1)
    packed = np.empty((len(regions.boxes) + len(regions), 5), dtype=np.float32)
    packed[:] = GLOBAL_LOCATION
    packed[packed_rows(regions.counts)] = locations(regions.boxes, np.repeat(sizes, regions.counts, axis=0))
    return packed


def locations(boxes: NDArray[np.float32], sizes: NDArray[np.integer]) -> NDArray[np.float32]:
    """x1/W, y1/H, x2/W, y2/H and the share of the image's area, float32 [n, 5].

    ``boxes`` [n, 4] xyxy in pixels of images whose W, H, W, H are ``sizes``, [n, 4] or [4] where they are all of one image.
    """
    shares = boxes / sizes.astype(np.float32)
    areas = (shares[:, 2] - shares[:, 0]) * (shares[:, 3] - shares[:, 1])
    return np.concatenate([shares, areas[:, None]], axis=1)


@dataclass(frozen=True)
class PackedInputs:
    """A batch as the model's core takes it. Sample i owns the next ``text_lengths[i]`` tokens and ``region_lengths[i]`` regions.

    ``input_ids``, ``token_type_ids`` int64 [Nt]; ``region_features`` [Nr, F] of any floating dtype; ``region_locations`` float32
    [Nr, 5] (x1/W, y1/H, x2/W, y2/H, area share); each sample's first region is its global region. The lengths are int64 [S] and
    stay on the CPU wherever the rest goes: shapes follow from them, and a GPU must not be waited for to learn a shape.

    ``text_regions`` int64 [Nt], where there are any: for a token that names an object of the image, the packed row of the object's region
    (a row of its own sample), else -1. Models with ``tie_objects`` use it.

    Text alone: no regions at all (Nr = 0, every region length 0). Regions alone: likewise. A batch may not mix.
    """

    input_ids: torch.Tensor
    token_type_ids: torch.Tensor
    text_lengths: torch.Tensor
    region_features: torch.Tensor
    region_locations: torch.Tensor
    region_lengths: torch.Tensor
    text_regions: torch.Tensor | None = None

    def to(self, device: torch.device | str) -> "PackedInputs":
        """The same batch on ``device``, copied without waiting when its memory is pinned. The lengths stay on the CPU."""
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in self._rows().items()}
        return replace(self, text_lengths=self.text_lengths.cpu(), region_lengths=self.region_lengths.cpu(), **moved)

    def pin_memory(self) -> "PackedInputs":
        """The same batch in page-locked memory; the lengths stay as they are, they never leave the CPU."""
        return replace(self, **{name: tensor.pin_memory() for name, tensor in self._rows().items()})

    def apart(self) -> "PackedInputs":
        """The texts of S pairs alone, and then their images alone, as one batch of 2 S samples."""
        nothing = torch.zeros_like(self.text_lengths)
        text, regions = torch.cat([self.text_lengths, nothing]), torch.cat([nothing, self.region_lengths])
        return replace(self, text_lengths=text, region_lengths=regions, text_regions=None)

    def texts_alone(self) -> "PackedInputs":
        """The texts of a batch of sides alone, without its images."""
        lengths = self.text_lengths[self.text_lengths > 0]
        features, locations = self.region_features[:0], self.region_locations[:0]
        return replace(
            self, text_lengths=lengths, region_lengths=torch.zeros_like(lengths), region_features=features, region_locations=locations
        )

    def _rows(self) -> dict[str, torch.Tensor]:
        """The tensors with a row for each token or region, by name."""
        named = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in ("text_lengths", "region_lengths")}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def __len__(self) -> int:
        return len(self.text_lengths)


def texts_alone(ids: torch.Tensor, lengths: torch.Tensor, feature_size: int) -> PackedInputs:
    """T texts without images: ``ids`` int64 [Nt], [CLS] text [SEP] end to end, ``lengths`` int64 [T]."""
    return PackedInputs(
        input_ids=ids,
        token_type_ids=torch.zeros_like(ids),
        text_lengths=lengths,
        region_features=torch.zeros(0, feature_size, dtype=torch.float16),
        region_locations=torch.zeros(0, 5),
        region_lengths=torch.zeros_like(lengths),
    )


def images_alone(features: torch.Tensor, locations: torch.Tensor, lengths: torch.Tensor) -> PackedInputs:
    """I images without texts, as ``region_rows`` gives them."""
    nothing = torch.zeros(0, dtype=torch.int64)
    return PackedInputs(
        input_ids=nothing,
        token_type_ids=nothing,
        text_lengths=torch.zeros_like(lengths),
        region_features=features,
        region_locations=locations,
        region_lengths=lengths,
    )
