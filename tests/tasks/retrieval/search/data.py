"""A tiny gallery with a model, a first stage and pictures, for the tests of searching."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from megainter.data.feature_store import FeatureStore
from megainter.data.feature_store.writer import FeatureStoreWriter, seal_store
from megainter.data.tables.pairs import PAIRS_SCHEMA, Pair, read_pairs, write_pairs
from megainter.tasks.retrieval.prefilter.training import PrefilterTraining, finetune
from megainter.tasks.retrieval.search.building import build_index
from megainter.tasks.retrieval.search.index import Index
from megainter.tasks.retrieval.search.options import IndexOptions
from megainter.weights import packaged_weights
from preprocessing.detector import load_detector
from tests.synthetic import write_data
from tests.tasks.retrieval.test_evaluation import write_model

IMAGES, CAPTIONS, PHOTOS = 23, 2, 8
COLOURS = ("red", "green", "blue", "white", "black", "amber", "violet", "brown")
CHINESE = {"red": "红", "green": "绿", "blue": "蓝", "white": "白", "black": "黑", "amber": "琥珀", "violet": "紫"}
HOSTILE = "<script>alert('&\"')</script>\x1b[31m\u202e red"
TRAINING = PrefilterTraining(epochs=60, batch=20, learning_rate=3e-3)


@dataclass(frozen=True)
class Gallery:
    """Where everything is."""

    model: Path
    pairs: Path
    store: Path
    prefilter: Path
    images: Path

    def index(self, output: Path, **changes: object) -> Index:
        """An index of all of it."""
        options = {"store": self.store, "pairs": self.pairs, "prefilter_model": self.prefilter, "images": self.images} | changes
        return build_index(self.model, IndexOptions(output=output, **options))  # type: ignore[arg-type]


def write_gallery(folder: Path) -> Gallery:
    """23 images of colours, each with an English caption and a Chinese one, and a file of its own; one caption is hostile."""
    pairs, store = write_data(folder, images=IMAGES, captions=CAPTIONS)
    rows = [Pair(**{name: row[name] for name in PAIRS_SCHEMA.names}) for row in read_pairs(pairs).table.to_pylist()]
    write_pairs(pairs, [_translated(row) for row in rows])
    images = folder / "images"
    images.mkdir()
    rng = np.random.default_rng(0)
    for number in range(IMAGES):
        pixels = rng.integers(0, 255, (24, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"image-{number:03d}.jpg")
    model = write_model(folder / "model", pairs)
    prefilter = finetune(model, pairs, store, output=folder / "prefilter", split="train", training=TRAINING)
    return Gallery(model, pairs, store, prefilter, images)


def _translated(row: Pair) -> Pair:
    caption = HOSTILE if row.pair_id == "image-003#0" else row.caption
    if row.pair_id.endswith("#1"):
        names = caption.removeprefix("a picture of ").split(", ")
        caption = "和".join(CHINESE[name] for name in names)
    return Pair(row.pair_id, row.image_id, row.image, caption, row.split)


def captions_of(pairs: Path, image_id: str) -> list[str]:
    """The captions of an image, as the table has them."""
    table = read_pairs(pairs).table
    found: list[str] = table.filter(pc.equal(table.column("image_id"), pa.scalar(image_id))).column("caption").to_pylist()
    return found


def write_photo_gallery(folder: Path) -> Gallery:
    """Eight photos of coloured noise, with the regions that the demo's detector finds, two captions each; a first stage hardly trained."""
    images, store, pairs, model = (folder / name for name in ("images", "store", "pairs.parquet", "model"))
    images.mkdir()
    rows = []
    options: dict[str, Any] = {"min_boxes": 3, "max_boxes": 6, "max_size": 160}
    detector = load_detector(packaged_weights("demo"))
    with FeatureStoreWriter(store, replace(detector.schema(), settings=options)) as writer:
        for number in range(PHOTOS):
            noise = np.random.default_rng(number).integers(0, 255, (6, 8 + number, 3), dtype=np.uint8)
            image = Image.fromarray(noise).resize((160 + 20 * number, 120), Image.Resampling.NEAREST)
            image.save(images / f"{number}.png")
            writer.add(f"{number}", detector.extract(image, **options))
            captions = HOSTILE if number == 3 else f"a {COLOURS[number]} picture", f"noise in {COLOURS[number]} and grey"
            rows += [Pair(f"{number}#{k}", f"{number}", f"{number}.png", text, "train") for k, text in enumerate(captions)]
    seal_store(store)
    write_pairs(pairs, rows)
    schema = FeatureStore(store).schema
    write_model(model, pairs, region_feature_size=schema.feature_size, num_region_classes=schema.num_classes)
    prefilter = finetune(model, pairs, store, output=folder / "prefilter", training=PrefilterTraining(epochs=4, batch=8))
    return Gallery(model, pairs, store, prefilter, images)
