"""Images that look alike, by their mean features."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megainter.data.feature_store.reader import FeatureStore


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
