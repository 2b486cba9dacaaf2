"""Regions of a photo that is not in the store, by the detector, the describing network and the settings that the store was made with."""

from pathlib import Path

import torch

from megainter.data.feature_store.reader import FeatureStore
from megainter.data.feature_store.record import RegionRecord, encode
from megainter.data.feature_store.views import decode
from megainter.errors import UsageError
from megainter.files import read_json
from megainter.weights import ORIGIN, PACKAGED
from preprocessing.detector.detector import Detector, build_detector
from preprocessing.detector.weights import Weights, read_weights
from preprocessing.extraction.redescribe import Description
from preprocessing.extraction.worker import Task, in_file_pixels
from preprocessing.images.decode import image_size, load_image, silence_pillow

EXTRACTION = ("min_boxes", "max_boxes", "selection", "min_size", "max_size")  # settings of a store that its detector takes
NAME = "photo"


class PhotoReader:
    """The store's detector, ready for photos."""

    def __init__(self, store: FeatureStore, weights: Path | None, device: torch.device) -> None:
        """``UsageError`` where the weights are not those of the store's detector, or regions did not come of a detector alone."""
        schema = store.schema
        if "boxes" in schema.settings or schema.extras:
            raise UsageError("the store's regions were given by a table and not found by its detector: other photos cannot be searched by")
        silence_pillow()
        self.schema = schema
        self.options = {name: schema.settings[name] for name in EXTRACTION if name in schema.settings}
        precision = schema.settings.get("precision", "fp32")
        self.detector: Detector = build_detector(detector_weights(store, weights), device, precision)
        self.description = Description.of_store(schema, str(device))

    def read(self, path: Path) -> RegionRecord:
        """The record that the store would have of an image file; ``UnreadableImageError`` where it is none."""
        image, task = load_image(path, draft=True), Task(NAME, str(path), image_size(path))
        record = in_file_pixels(self.detector.extract(image, **self.options), task)
        if self.description is not None:
            record = self.description.of([record], [image])[0]
        return decode(encode(NAME, record, self.schema)[0], NAME, self.schema, path)


def detector_weights(store: FeatureStore, given: Path | None) -> Weights:
    """The weights of a store's detector: those ``given``; else those that come along, or that the store was made from by name, if one of
    them has its fingerprint."""
    wanted = store.schema.detector
    for name in [given] if given is not None else [*map(Path, PACKAGED), *_origin(store)]:
        weights = read_weights(name)
        if weights.fingerprint == wanted:
            return weights
    if given is not None:
        raise UsageError(f"--weights {given} is not the store's detector: the store names {wanted!r:.80}")
    raise UsageError(f"photos need the store's detector, {wanted!r:.80}, which does not come along: give its weights by --weights")


def _origin(store: FeatureStore) -> list[Path]:
    """The name that the store's weights were asked for by, where it was one."""
    path = store.path / ORIGIN
    facts = read_json(path) if path.is_file() else {}
    name = facts.get("name") if isinstance(facts, dict) else None
    return [Path(name)] if isinstance(name, str) else []
