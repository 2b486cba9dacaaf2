"""Images as other programs describe them, for tests that write their formats with nothing but the standard library, numpy and lmdb."""

import base64
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lmdb
import numpy as np

from megainter.data.feature_store import FeatureStore
from megainter.data.feature_store.record import RegionRecord
from preprocessing.features.importing import import_features
from preprocessing.features.writing import Imported

F, FOREGROUND = 12, 1600  # Visual Genome's classes, so that no list of classes is needed


@dataclass(frozen=True, eq=False)
class Image:
    """One image: ``probs`` [n, 1601] with background first, ids without background."""

    image_id: str
    width: int
    height: int
    boxes: np.ndarray
    features: np.ndarray
    probs: np.ndarray
    objects_id: np.ndarray
    objects_conf: np.ndarray
    attrs_id: np.ndarray
    attrs_conf: np.ndarray

    def __len__(self) -> int:
        return len(self.boxes)

    @property
    def labels(self) -> dict[str, np.ndarray]:
        return {name: getattr(self, name) for name in ("objects_id", "objects_conf", "attrs_id", "attrs_conf")}


def make_image(seed: int, image_id: str | None = None, n: int | None = None) -> Image:
    rng = np.random.default_rng(seed)
    n, width, height = n or int(rng.integers(1, 7)), int(rng.integers(50, 900)), int(rng.integers(50, 900))
    boxes = np.sort(rng.uniform(0, 1, (n, 2, 2)), axis=1).reshape(n, 4) * [width, height, width, height]
    logits = rng.standard_normal((n, FOREGROUND + 1))
    probs = np.exp(4 * logits) / np.exp(4 * logits).sum(1, keepdims=True)
    features = np.maximum(0, rng.standard_normal((n, F)))
    ids, confs = probs[:, 1:].argmax(1), probs[:, 1:].max(1)
    attributes = rng.integers(0, 400, n), rng.random(n, np.float32)
    floats = [array.astype(np.float32) for array in (boxes, features, probs)]
    return Image(image_id or f"image {seed}", width, height, *floats, ids, confs.astype(np.float32), *attributes)


def b64(array: np.ndarray) -> str:
    return base64.b64encode(array).decode()


def write_lmdb(path: Path, items: dict[bytes, bytes], subdir: bool = True) -> Path:
    with lmdb.open(str(path), map_size=1 << 28, subdir=subdir) as environment, environment.begin(write=True) as transaction:
        for key, value in items.items():
            transaction.put(key, value)
    return path


def imported(source: Path, output: Path, **options: Any) -> tuple[FeatureStore, Imported]:
    done = import_features(source, output, **options)
    return FeatureStore(output), done


def assert_holds(record: RegionRecord, image: Image, probs: bool = True, exact: bool = False) -> None:
    """The record has the image's boxes, size, features (float16, or ``exact``) and class probabilities."""
    np.testing.assert_array_equal(record.boxes, image.boxes)
    np.testing.assert_array_equal(record.features, image.features if exact else image.features.astype(np.float16))
    assert (record.width, record.height) == (image.width, image.height)
    if probs:
        np.testing.assert_array_equal(record.class_probs, image.probs.astype(np.float16).astype(np.float32))


def assert_likeliest(record: RegionRecord, ids: np.ndarray, confs: np.ndarray) -> None:
    """Of each region the class ``id`` (without background) has its confidence, and all others share the rest."""
    rows = np.arange(len(record))
    np.testing.assert_array_equal(record.class_probs[rows, ids + 1], confs.astype(np.float16).astype(np.float32))
    others = np.delete(record.class_probs[0], ids[0] + 1)
    np.testing.assert_allclose(others, (1 - confs[0]) / FOREGROUND, atol=1e-6)


def failures(store: Path) -> dict[str, str]:
    """Reasons by place, from the list beside a store."""
    lines = (store / "failed.tsv").read_text(encoding="utf-8").splitlines()[1:]
    return {line.split("\t")[1]: line.split("\t")[2] for line in lines}
