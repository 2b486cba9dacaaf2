"""Stores whose regions all look alike to their detector, and such as do not."""

from pathlib import Path

import numpy as np
import pytest

from megainter.data.feature_store import FeatureStore
from megainter.data.feature_store.record import RegionRecord, StoreSchema
from megainter.data.feature_store.writer import FeatureStoreWriter, seal_store
from preprocessing.features.show import describe_store
from preprocessing.features.variety import class_warning


def store_of(path: Path, likeliest: list[int], names: tuple[str, ...] = ("__background__", "cat", "dog")) -> Path:
    """A store of an image for each number: a region whose likeliest class that is."""
    with FeatureStoreWriter(path, StoreSchema(4, len(names), names, "tiny")) as writer:
        for number, best in enumerate(likeliest):
            probs = np.full((1, len(names)), 0.1, np.float32)
            probs[0, best] = 1 - 0.1 * (len(names) - 1)
            writer.add(f"{number:05d}", RegionRecord(np.array([[0, 0, 9, 9]], np.float32), np.ones((1, 4), np.float16), probs, 9, 9))
    seal_store(path)
    return path


@pytest.mark.parametrize(
    ("likeliest", "told"),
    [
        ([1] * 300, "100 % of 200 regions looked at have the likeliest class 'cat'"),
        ([0] * 5, "100 % of 5 regions looked at have the likeliest class '__background__'"),
        ([1] * 199 + [2], "99.5 % of 200 regions"),
        ([1] * 195 + [2] * 5, None),
        ([0, 1, 2] * 10, None),
    ],
)
def test_one_class_for_nearly_all_regions_is_warned_about(tmp_path: Path, likeliest: list[int], told: str | None) -> None:
    path = store_of(tmp_path / "store", likeliest)
    with FeatureStore(path) as store:
        warning = class_warning(store)
    assert (warning is None) == (told is None)
    assert told is None or (told in str(warning) and "(mrm) near 1.000 then means nothing" in str(warning))
    assert (describe_store(path).splitlines()[-1] == warning) == (told is not None)
