"""A model keeps whose regions it was trained on, and takes no other's unnoticed."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megainter import InterBertConfig, InterBertForPreTraining
from megainter.conversion.hugging_face import convert_hugging_face
from megainter.data.feature_store import FeatureStore
from megainter.data.feature_store.record import RegionRecord, StoreSchema
from megainter.data.feature_store.writer import FeatureStoreWriter, seal_store
from megainter.errors import UsageError
from megainter.model.detector import keep_detector, require_detector, require_same_detector
from tests.model.tiny import tiny_config
from tests.synthetic import CLASSES, FEATURE_SIZE

SCHEMA = StoreSchema(FEATURE_SIZE, len(CLASSES), CLASSES, "one")


def store_of(path: Path, schema: StoreSchema) -> FeatureStore:
    """A store of one image with one region."""
    probs = np.eye(1, len(CLASSES), 2, dtype=np.float32)
    with FeatureStoreWriter(path, schema) as writer:
        writer.add("a", RegionRecord(np.array([[0, 0, 9, 9]], np.float32), np.ones((1, FEATURE_SIZE), np.float16), probs, 10, 10))
    seal_store(path)
    return FeatureStore(path)


def test_another_detectors_store_is_refused_unless_the_user_says_so(tmp_path: Path) -> None:
    config = tiny_config()
    keep_detector(config, SCHEMA, "photos")
    described = {"feature_network": "net", "feature_network_sha256": "ab", "feature_side": 8}
    others = {
        "detector": replace(SCHEMA, detector="two"),
        "network": replace(SCHEMA, settings=described),
        "classes": replace(SCHEMA, class_names=(*CLASSES[:-1], "pink")),
    }
    for name, schema in others.items():
        store = store_of(tmp_path / name, schema)
        with pytest.raises(UsageError, match=r"m was trained on regions of (photos, 'one', and|other classes) .*--other-detector"):
            require_detector(config, "m", store, "--other-detector", other=False)
        assert require_detector(config, "m", store, "--other-detector", other=True) == ""
    same = store_of(tmp_path / "same", replace(SCHEMA, settings={"min_boxes": 3}))
    assert require_detector(config, "m", same, "--other-detector", other=False) == ""
    assert "not checked" in require_detector(tiny_config(), "old", same, "--other-detector", other=False)
    with pytest.raises(UsageError, match=r"different detectors, 'one' and 'two'"):
        require_same_detector(same, FeatureStore(tmp_path / "detector"), "validation.store")


def test_the_detector_goes_with_the_weights(tmp_path: Path) -> None:
    config = tiny_config()
    keep_detector(config, SCHEMA, "photos")
    InterBertForPreTraining(config).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n")
    convert_hugging_face(tmp_path / "model", tmp_path / "half", dtype="bf16", cased=False)
    found = InterBertConfig.from_pretrained(tmp_path / "half")
    assert (found.detector, found.detector_name, found.region_classes) == ("one", "photos", list(CLASSES))
    assert "from the detector `photos` (`one`)" in (tmp_path / "half" / "README.md").read_text()


@pytest.mark.parametrize("wrong", [{"detector": 3}, {"detector_name": 3}, {"region_classes": [1]}])
def test_nonsense_is_refused(wrong: dict) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        InterBertConfig(**wrong)
