"""A detector that says the same of every region is told of."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megainter.data.feature_store import FeatureStore
from megainter.data.feature_store.variety import hardly_varied
from megainter.data.feature_store.writer import FeatureStoreWriter, seal_store
from preprocessing.features.show import describe_store
from tests.synthetic import CLASSES, write_data


@pytest.mark.parametrize("likeliest", [0, 3])
def test_one_class_for_all_regions_is_told_with_its_share(likeliest: int, tmp_path: Path) -> None:
    _, path = write_data(tmp_path, images=30)
    with FeatureStore(path) as varied, FeatureStoreWriter(tmp_path / "same", varied.schema) as writer:
        assert hardly_varied(varied) == ""
        others = 0
        for image_id in varied.ids:
            record = varied[image_id]
            probs = np.full_like(record.class_probs, 0.01, dtype=np.float32)
            probs[:, likeliest] = 1 - 0.01 * (len(CLASSES) - 1)
            if image_id == varied.ids[0]:  # one region is something else
                probs[0] = np.roll(probs[0], 1)
                others += 1
            writer.add(image_id, replace(record, class_probs=probs))
        regions = sum(len(varied[image_id]) for image_id in varied.ids)
    seal_store(tmp_path / "same")
    with FeatureStore(tmp_path / "same") as same:
        said = hardly_varied(same)
    assert said.startswith(f"{1 - others / regions:.1%} of the regions in {tmp_path / 'same'} are likeliest {CLASSES[likeliest]!r}")
    assert describe_store(tmp_path / "same").endswith(f"warning: {said}")
    assert "warning" not in describe_store(path)
