"""`megainter features redescribe`: the boxes of a store with other features, those of networks that have seen more.

A detector trained on a few thousand photos finds boxes, but its features know little beyond its own classes. A network trained on 1.3
million images sees more in the same boxes, and one beside it that was trained to find objects in scenes sees what that one leaves out.
As bottom-up attention's features are the mean of a pretrained stage over a region, each region's feature here is the mean of the
network's last map over the region's box. A photo says more than its boxes: the whole of it and the cells of a coarse grid can be put
before them as regions of their own.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from megainter.data.feature_store.reader import FeatureStore
from megainter.data.feature_store.record import RegionRecord, StoreSchema
from megainter.data.feature_store.writer import FeatureStoreWriter, seal_store
from megainter.data.image_ids import match
from megainter.devices import torch_device
from megainter.errors import UsageError
from megainter.memory import keep_freed_memory
from megainter.progress import Progress
from preprocessing.detector.describers import DESCRIBERS, STRIDE, digest_of, region_means
from preprocessing.images.decode import confined, load_image, silence_pillow
from preprocessing.images.listing import ListedImage, list_images, renamed

GRIDS = (0, 16)  # cells on a side: none, and more than the map of a usual photo has places


def redescribe(
    store: Path,
    images: Path,
    output: Path,
    *,
    network: str = "efficientnet_lite0",
    side: int = 224,
    grid: int = 0,
    batch: int = 8,  # larger tensors than the C library keeps cost a CPU as much again
    device: str = "auto",
) -> str:
    """Write ``output``: the records of ``store`` with features float16 [n, C] of ``network``; returns its digest.

    Images are squeezed to ``side`` x ``side`` pixels, a multiple of 32: 224 gives a map of 7 x 7 places. Boxes, class probabilities and
    extras stay. With ``grid`` g the whole image and its g x g cells, row by row, come before them as regions (``with_grid``). The same
    command goes on after a stop. ``UsageError`` where ``images`` lacks an image of the store.
    """
    if not GRIDS[0] <= grid <= GRIDS[1]:
        raise UsageError(f"--grid is {grid}; give the cells on a side, {GRIDS[0]} (none) to {GRIDS[1]}")
    if side < STRIDE or side % STRIDE:
        raise UsageError(f"--side is {side}; give a multiple of {STRIDE} pixels")
    if batch < 1:
        raise UsageError(f"--batch is {batch}; give at least 1")
    given = FeatureStore(store)
    items = _files_of(given, images)
    seeing = Description(network, side, grid, device)
    keep_freed_memory()
    with FeatureStoreWriter(output, seeing.schema(given.schema)) as writer:
        todo = [item for item in items if item.image_id not in writer]
        with Progress("describing", len(items), "images", done=len(items) - len(todo)) as progress:
            for start in range(0, len(todo), batch):
                some = todo[start : start + batch]
                writer.add_all(_described(some, given, images, seeing))
                progress.update(len(some))
    return seal_store(output)


class Description:
    """A network that says what is in regions, and how it is shown an image: what makes a store's records anew."""

    def __init__(self, network: str, side: int, grid: int, device: str = "auto") -> None:
        """Arguments as `redescribe`; ``UsageError`` for an unknown network, and where its weights are absent."""
        if network not in DESCRIBERS:
            raise UsageError(f"unknown network {network!r}; there is {', '.join(DESCRIBERS)}")
        self.side, self.grid, self.device = side, grid, torch_device(device)
        describer, weights = DESCRIBERS[network]()
        self.describer = describer.eval().to(self.device).to(memory_format=torch.channels_last)
        self.settings = {"feature_network": network, "feature_network_sha256": digest_of(weights), "feature_side": side}
        if grid:
            self.settings["feature_grid"] = grid

    @classmethod
    def of_store(cls, schema: StoreSchema, device: str = "auto") -> "Description | None":
        """What described the records of a store anew, to do the same to another image; None where nothing did. ``UsageError`` as the
        constructor, and where the weights are others than those of the store."""
        settings = schema.settings
        if "feature_network" not in settings:
            return None
        made = cls(settings["feature_network"], settings["feature_side"], settings.get("feature_grid", 0), device)
        if made.settings["feature_network_sha256"] != settings["feature_network_sha256"]:
            raise UsageError(
                f"the store's features are of other weights of {settings['feature_network']} than those installed here: install the "
                "release they came from, or make the store anew by `megainter features redescribe`"
            )
        return made

    def schema(self, given: StoreSchema) -> StoreSchema:
        """That of a store of ``given`` once it is described anew."""
        settings = given.settings | self.settings
        return replace(given, feature_size=self.describer.out_channels, feature_dtype="float16", settings=settings)

    @torch.inference_mode()
    def of(self, records: Sequence[RegionRecord], images: Sequence[Image.Image]) -> list[RegionRecord]:
        """``records``, with the grid before their regions, with the network's features of their images."""
        records = [with_grid(record, self.grid) for record in records] if self.grid else list(records)
        boxes = [torch.from_numpy(_scaled(record, self.side)).to(self.device) for record in records]
        pixels = torch.stack([_squeezed(image, self.side) for image in images]).to(self.device)
        seen = self.describer(pixels.contiguous(memory_format=torch.channels_last))
        features = region_means(seen, boxes).cpu().numpy().astype(np.float16)
        ends = np.cumsum([len(record) for record in records])
        return [replace(record, features=own) for record, own in zip(records, np.split(features, ends[:-1]), strict=True)]


def _files_of(store: FeatureStore, images: Path) -> list[ListedImage]:
    """The image file of every record, in the order of their ids, in whatever form the store has them (``image_ids.match``)."""
    source, settings = list_images(images), store.schema.settings
    if "ids" in settings and "imported" not in settings:
        source = renamed(source, settings["ids"])
    found = {item.image_id: item for item in source.items}
    ids = list(store.ids)
    names = match(ids, list(found)).names
    missing = [image_id for image_id in ids if image_id not in names]
    if missing:
        raise UsageError(
            f"{images} lacks {len(missing):,} of the {len(ids):,} images of {store.path}, first {missing[0]!r:.200}; it has "
            f"{source.items[0].image_id!r:.200}{' and others' if len(found) > 1 else ''}"
        )
    return [found[names[image_id]]._replace(image_id=image_id) for image_id in ids]


def _described(items: Sequence[ListedImage], store: FeatureStore, images: Path, seeing: Description) -> Iterator[tuple[str, RegionRecord]]:
    silence_pillow()
    pictures = [load_image(confined(images, item.path), draft=True, part=item.part) for item in items]
    records = seeing.of([store[item.image_id] for item in items], pictures)
    return zip([item.image_id for item in items], records, strict=True)


def with_grid(record: RegionRecord, cells: int) -> RegionRecord:
    """``record`` with 1 + ``cells``² regions before its own: the whole image and its cells, row by row; their features are zeros.

    What is in such a region is told by the boxes in it: the mean of their class probabilities, weighted by the share of the region that
    each covers; what no box covers is background. Their extras are 0.
    """
    boxes = _grid_boxes(record.width, record.height, cells)
    left_top = np.maximum(boxes[:, None, :2], record.boxes[None, :, :2])
    right_bottom = np.minimum(boxes[:, None, 2:], record.boxes[None, :, 2:])
    covered = (right_bottom - left_top).clip(min=0).prod(2) / (boxes[:, 2:] - boxes[:, :2]).prod(1)[:, None]  # [1 + cells², n]

    # Boxes that lie over each other may cover more than there is.
    total = covered.sum(1, keepdims=True)
    probs = (covered / np.maximum(total, 1)) @ record.class_probs.astype(np.float32)
    probs[:, 0] += (1 - total).clip(min=0)[:, 0]

    added = len(boxes)
    return RegionRecord(
        boxes=np.concatenate([boxes, record.boxes]),
        features=np.concatenate([np.zeros((added, record.features.shape[1]), record.features.dtype), record.features]),
        class_probs=np.concatenate([probs, record.class_probs]),
        width=record.width,
        height=record.height,
        extras={name: np.concatenate([np.zeros(added, value.dtype), value]) for name, value in record.extras.items()},
    )


def _grid_boxes(width: int, height: int, cells: int) -> NDArray[np.float32]:
    """Boxes float32 [1 + cells², 4] of the whole image and its cells, in pixels."""
    x, y = np.linspace(0, width, cells + 1, dtype=np.float32), np.linspace(0, height, cells + 1, dtype=np.float32)
    rows = [(x[i], y[j], x[i + 1], y[j + 1]) for j in range(cells) for i in range(cells)]
    return np.array([(0, 0, width, height), *rows], dtype=np.float32)


def _squeezed(image: Image.Image, side: int) -> Tensor:
    """RGB in 0..1, float32 [3, side, side]."""
    pixels = np.array(image.resize((side, side), Image.Resampling.BILINEAR))
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def _scaled(record: RegionRecord, side: int) -> NDArray[np.float32]:
    """Boxes [n, 4] in pixels of the squeezed image."""
    scale = np.array([side / record.width, side / record.height] * 2, dtype=np.float32)
    return record.boxes.astype(np.float32) * scale
