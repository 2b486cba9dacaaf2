"""Mean and deviation of a store's region features, by which a model with ``standardize_regions`` sees them."""

from pathlib import Path

import numpy as np
import torch

from megainter.data.feature_store.reader import FeatureStore
from megainter.errors import UsageError
from megainter.model.configuration import InterBertConfig
from megainter.model.folder import read_config

IMAGES, TOGETHER = 2000, 100  # how many of a store are looked at, and at a time
LEAST = 0.01  # of the median deviation: numbers that vary less are mostly rounding, and are divided by the median instead


def keep_scaling(found: InterBertConfig, store: FeatureStore, most: int, start: Path | None) -> None:
    """Give ``found`` mean and deviation: those of the model in ``start`` where that has some, else those of the store's features."""
    own = read_config(start) if start is not None else None
    if own is not None and own.standardize_regions:
        found.region_mean, found.region_deviation = own.region_mean, own.region_deviation
    else:
        found.region_mean, found.region_deviation = feature_statistics(store, most)


def feature_statistics(store: FeatureStore, most: int) -> tuple[list[float], list[float]]:
    """Mean and deviation of each number of a region feature, over the first ``most`` regions of up to 2,000 images.

    The same for every rank: the images lie evenly over the ids. Each value is one that bfloat16 has, so that a model computes with the same
    in any precision. ``UsageError`` for a store without regions.
    """
    rows = np.unique(np.linspace(0, len(store) - 1, min(len(store), IMAGES)).round().astype(np.int64))
    count, total, squares = 0, np.zeros(store.schema.feature_size), np.zeros(store.schema.feature_size)
    for part in np.array_split(rows, -(-len(rows) // TOGETHER)):
        regions = store.first_regions(part, most)
        values = np.concatenate([np.asarray(regions.views(i).features, np.float64) for i in range(len(regions))])
        count, total, squares = count + len(values), total + values.sum(0), squares + np.square(values).sum(0)
    if not count:
        raise UsageError(f"{store.path} has no regions to scale by (model.standardize_regions)")

    mean = total / count
    deviation = np.sqrt(np.maximum(squares / count - np.square(mean), 0))
    usual = float(np.median(deviation)) or 1.0
    return _in_bfloat16(mean), _in_bfloat16(np.where(deviation < LEAST * usual, usual, deviation))


def _in_bfloat16(values: np.ndarray) -> list[float]:
    return [float(value) for value in torch.from_numpy(values).bfloat16().double()]
