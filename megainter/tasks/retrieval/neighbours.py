"""Images that look alike, by their mean features; found once for a run, and mapped by all its processes."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megainter.data.feature_store.reader import FeatureStore
from megainter.data.mapped import ArrayWriter, open_arrays
from megainter.data.tables.pairs import Pairs
from megainter.errors import DamagedError, UsageError

NEIGHBOURS = "neighbours"
log = logging.getLogger("megainter")


def mean_features(store: FeatureStore, image_ids: Sequence[str], max_regions: int) -> NDArray[np.float32]:
    """The mean of each image's first ``max_regions`` region features, float32 [images, F]."""
    means = np.empty((len(image_ids), store.schema.feature_size), dtype=np.float32)
    for number, row in enumerate(store.rows_of(image_ids).tolist()):
        means[number] = store.at(row, max_regions).features.mean(axis=0, dtype=np.float32)
    return means


def nearest_images(features: NDArray[np.float32], count: int) -> NDArray[np.int32]:
    """For each image the ``count`` others whose mean features are nearest (Euclidean), nearest first: int32 [images, count].

    scikit-learn's exact search, in chunks; the released code's pool is made so (a ball tree over mean features, the 99 nearest).
    """
    from sklearn.neighbors import NearestNeighbors

    images = len(features)
    count = min(count, images - 1)
    found = NearestNeighbors(n_neighbors=count + 1, algorithm="brute").fit(features).kneighbors(features, return_distance=False)
    own = found == np.arange(images)[:, None]
    own[~own.any(axis=1), -1] = True  # twins of an image may come before it; then the farthest one goes
    return found[~own].reshape(images, count).astype(np.int32)


def build_neighbours(pairs: Pairs, store: FeatureStore, max_regions: int, count: int, folder: Path) -> str:
    """Write the ``nearest_images`` of the pairs' images to ``folder``, for ``open_neighbours``; returns their key.

    What is there of the same key and as it was written is kept. ``NoSpaceError`` where the disk is full.
    """
    key = json.dumps({"pairs": pairs.digest, "store": store.digest, "max_regions": max_regions, "count": count})
    try:
        open_arrays(folder, key, verify=True)
        return key
    except (UsageError, DamagedError):
        pass  # none there, of other data, or not as they were written
    log.info("looking for similar images of %s images", f"{len(pairs.image_ids):,}")
    nearest = nearest_images(mean_features(store, pairs.image_ids, max_regions), count)
    with ArrayWriter(folder, {NEIGHBOURS: "int32"}) as writer:
        writer.append(NEIGHBOURS, nearest.ravel())
        writer.publish(key, {"each": nearest.shape[1]})
    return key


def open_neighbours(folder: Path, key: str) -> NDArray[np.int32]:
    """Similar images of every image, mapped: int32 [images, count]. ``DamagedError`` where a file is missing or of another length."""
    mapped = open_arrays(folder, key)
    found: NDArray[np.int32] = mapped.arrays[NEIGHBOURS].reshape(-1, mapped.facts["each"])
    return found
