"""Whether a detector tells regions apart: a store in which nearly all have one likeliest class teaches nothing about classes."""

from collections import Counter

import numpy as np

from megainter.data.feature_store.reader import FeatureStore

IMAGES = 200  # that are looked at, spread over the store
ALIKE = 0.99  # share of their regions


def class_warning(store: FeatureStore) -> str | None:
    """A line for the user where at least 99 % of the regions of up to 200 images have one likeliest class."""
    counts = Counter[int]()
    for place in np.unique(np.linspace(0, len(store) - 1, min(IMAGES, len(store))).astype(int)).tolist():
        counts.update(store[store.ids[place]].class_probs.argmax(1).tolist())
    total = counts.total()
    if not total:
        return None
    ((number, count),) = counts.most_common(1)
    if count < ALIKE * total:
        return None
    name = store.schema.class_names[number]
    return (
        f"warning: {100 * count / total:.3g} % of {total:,} regions looked at have the likeliest class {name!r:.80}: the detector tells "
        "these images' regions hardly apart, and an accuracy of masked regions (mrm) near 1.000 then means nothing; take another detector, "
        "or train with --training.region_objective feature"
    )
