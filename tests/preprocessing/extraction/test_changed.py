"""Images that changed under an id that the store has: told of, and extracted anew where that is asked for."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from megainter.data.feature_store import FeatureStore
from preprocessing.extraction.changed import SEEN
from preprocessing.extraction.extract import extract
from tests.preprocessing.extraction.test_extract import folder  # noqa: F401 - a fixture

OPTIONS = {"workers": 1, "min_boxes": 3, "max_boxes": 9, "precision": "fp32", "device": "cpu", "max_bad": 1.0}


def features(store: Path) -> dict[str, np.ndarray]:
    with FeatureStore(store) as opened:
        return {image_id: opened[image_id].features for image_id in opened.ids}


@pytest.mark.slow
def test_a_changed_image_is_told_and_extracted_anew_on_request(
    folder: Path,  # noqa: F811 - the fixture
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    images, store, weights = tmp_path / "images", tmp_path / "store", folder / "detector.safetensors"
    images.mkdir()
    for number in range(4):
        shutil.copy(folder / "images" / f"{number:04d}.jpg", images)
    extract(images, store, weights, **OPTIONS)
    first = features(store)

    # Nothing changed, nothing is said; then one file becomes another.
    extract(images, store, weights, **OPTIONS)
    assert "changed" not in capsys.readouterr().err
    shutil.copy(folder / "images" / "0009.jpg", images / "0002.jpg")
    extract(images, store, weights, **OPTIONS)
    told = capsys.readouterr().err
    assert "1 images changed (size or time) since they were extracted, first '0002'" in told
    assert "--redo-changed" in told
    assert all(np.array_equal(first[name], value) for name, value in features(store).items())

    # Extracted anew, it is what an extraction of these files alone gives; the others are as they were, and nothing is said any more.
    extract(images, store, weights, **OPTIONS, redo_changed=True)
    extract(images, tmp_path / "other", weights, **OPTIONS)
    second, wanted = features(store), features(tmp_path / "other")
    assert second.keys() == wanted.keys() == first.keys()
    assert all(np.array_equal(second[name], wanted[name]) for name in wanted)
    assert not np.array_equal(second["0002"], first["0002"])
    capsys.readouterr()
    extract(images, store, weights, **OPTIONS)
    assert "changed" not in capsys.readouterr().err


@pytest.mark.slow
def test_another_time_alone_is_told_and_a_store_without_notes_takes_the_files_as_they_are(
    folder: Path,  # noqa: F811 - the fixture
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    images, store, weights = tmp_path / "images", tmp_path / "store", folder / "detector.safetensors"
    images.mkdir()
    shutil.copy(folder / "images" / "0000.jpg", images)
    extract(images, store, weights, **OPTIONS)
    os.utime(images / "0000.jpg", ns=(1, 1))
    extract(images, store, weights, **OPTIONS)
    assert "1 images changed" in capsys.readouterr().err
    (store / SEEN).unlink()
    extract(images, store, weights, **OPTIONS)
    assert "changed" not in capsys.readouterr().err
