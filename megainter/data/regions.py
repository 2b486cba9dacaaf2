"""An image's regions as the model takes them: its global region first, then the detector's, with locations in shares of the image."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from megainter.data.record import RegionRecord

GLOBAL_LOCATION = (0.0, 0.0, 1.0, 1.0, 1.0)


def region_rows(records: Sequence[RegionRecord], max_regions: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Regions of several images end to end: features [Nr, F] as stored, float32 locations [Nr, 5], int64 counts [I].

    At most ``max_regions`` of each image, the first ones, after its global region: the mean of these regions (zeros where there are none),
    over the whole image.
    """
    features, locations = [], []
    for record in records:
        kept = record.features[:max_regions]
        mean = kept.mean(0, keepdims=True, dtype=np.float32) if len(kept) else np.zeros((1, kept.shape[1]), np.float32)
        features += [mean.astype(np.float16), kept]
        locations += [np.array([GLOBAL_LOCATION], dtype=np.float32), _locations(record, max_regions)]
    lengths = torch.tensor([min(len(record), max_regions) + 1 for record in records])
    return torch.from_numpy(np.concatenate(features)), torch.from_numpy(np.concatenate(locations)), lengths


def _locations(record: RegionRecord, max_regions: int) -> NDArray[np.float32]:
    """x1/W, y1/H, x2/W, y2/H and the share of the image's area, float32 [n, 5]."""
    size = np.array([record.width, record.height] * 2, dtype=np.float32)
    boxes = record.boxes[:max_regions] / size
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return np.concatenate([boxes, areas[:, None]], axis=1)
