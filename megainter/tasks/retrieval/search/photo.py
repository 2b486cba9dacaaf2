"""Regions of a photo that is not in the store, by the detector and the settings that the store was made with."""

from pathlib import Path

import torch

from megainter.data.feature_store.record import RegionRecord, StoreSchema, encode
from megainter.data.feature_store.views import decode
from megainter.errors import UsageError
from megainter.weights import PACKAGED, packaged_weights
from preprocessing.detector.detector import Detector, build_detector
from preprocessing.detector.weights import Weights, read_weights
from preprocessing.extraction.worker import Task, in_file_pixels
from preprocessing.images.decode import image_size, load_image, silence_pillow

EXTRACTION = ("min_boxes", "max_boxes", "selection", "min_size", "max_size")  # settings of a store that its detector takes
NAME = "photo"


class PhotoReader:
    """The store's detector, ready for photos."""

    def __init__(self, schema: StoreSchema, weights: Path | None, device: torch.device) -> None:
        """``UsageError`` where the weights are not those of the store's detector, or regions did not come of a detector alone."""
        if "boxes" in schema.settings or schema.extras:
            raise UsageError("the store's regions were given by a table and not found by its detector: other photos cannot be searched by")
        silence_pillow()
        self.schema = schema
        self.options = {name: schema.settings[name] for name in EXTRACTION if name in schema.settings}
        precision = schema.settings.get("precision", "fp32")
        self.detector: Detector = build_detector(detector_weights(schema, weights), device, precision)

    def read(self, path: Path) -> RegionRecord:
        """The record that the store would have of an image file; ``UnreadableImageError`` where it is none."""
        image, task = load_image(path, draft=True), Task(NAME, str(path), image_size(path))
        record = in_file_pixels(self.detector.extract(image, **self.options), task)
        return decode(encode(NAME, record, self.schema)[0], NAME, self.schema, path)


def detector_weights(schema: StoreSchema, given: Path | None) -> Weights:
    """The weights of a store's detector: those ``given``, else the ones that come along and have its fingerprint."""
    for weights in map(read_weights, [given] if given is not None else [packaged_weights(name) for name in PACKAGED]):
        if weights.fingerprint == schema.detector:
            return weights
    if given is not None:
        raise UsageError(f"--weights {given} is not the store's detector: the store names {schema.detector!r:.80}")
    raise UsageError(f"photos need the store's detector, {schema.detector!r:.80}, which does not come along: give its weights by --weights")
