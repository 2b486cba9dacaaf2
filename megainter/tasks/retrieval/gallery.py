"""What retrieval is measured on: the images of a gallery, their captions as tokens, and the images' regions as the model takes them."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from megainter.data.feature_store.reader import FeatureStore
from megainter.data.matching import Missing, accept_missing, drop_missing, some
from megainter.data.tables.pairs import Pairs, read_pairs
from megainter.data.text.vocabulary import Vocabulary
from megainter.errors import UsageError

CAPTIONS_PER_ENCODING = 16_384


@dataclass(frozen=True)
class Gallery:
    """I images and C captions, every caption's own image among the images and every image with a caption.

    ``rows`` int64 [C]: rows of the captions in ``pairs``. ``image_of_caption`` int32 [C]: number of the own image, 0 .. I - 1.
    ``missing_images``: how many images of the split were left out because the store lacks them.
    """

    pairs: Pairs
    image_ids: list[str]
    rows: NDArray[np.int64]
    image_of_caption: NDArray[np.int32]
    missing_images: int

    def texts(self) -> list[str]:
        """The captions, in order."""
        captions: list[str] = self.pairs.table.column("caption").take(self.rows).to_pylist()
        return captions


@dataclass(frozen=True)
class Tokens:
    """Captions end to end: ``ids`` int32 [Nt] with [CLS] and [SEP], ``lengths`` int64 [C]."""

    ids: NDArray[np.int32]
    lengths: NDArray[np.int64]

    def take(self, captions: NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor]:
        """Packed int64 ids and lengths of some captions, in the order asked for."""
        starts = np.cumsum(self.lengths) - self.lengths
        parts = [self.ids[start : start + length] for start, length in zip(starts[captions], self.lengths[captions], strict=True)]
        return torch.from_numpy(np.concatenate(parts).astype(np.int64)), torch.from_numpy(self.lengths[captions])


def read_gallery(
    pairs: Path,
    store: FeatureStore,
    split: str | None,
    images: int | None,
    captions_per_image: int | None,
    max_bad: float = 1.0,
    option: str | None = None,
) -> Gallery:
    """The first ``images`` images of a split and the first ``captions_per_image`` captions of each, in manifest order (None: all).

    Images that the store lacks are left out and counted. ``UsageError`` where none is left, or fewer than ``images``;
    ``TooManyBadInputsError`` where ``images`` is None and more than ``max_bad`` of all are left out: the smaller gallery is easier.
    ``option`` is what allows for more, in its message.
    """
    for name, limit in (("--images", images), ("--captions-per-image", captions_per_image)):
        if limit is not None and limit < 1:
            raise UsageError(f"{name} is {limit}; give at least 1, or leave it out for all")
    everything = read_pairs(pairs, split)
    present = drop_missing(everything, store)
    count = len(everything.image_ids)
    lacking = count - len(present.image_ids)
    missing = Missing("images", lacking, count, _missing_images(everything, present), lacking, count)
    if missing.count and (images is None or not present.image_ids):
        # A smaller gallery is easier, so the user says that it may be.
        accept_missing(missing, store, max_bad, pairs, option or f"--images {len(present.image_ids)} or --max-bad")
    if images is not None and images > len(present.image_ids):
        raise UsageError(f"{pairs} has {len(present.image_ids):,} images of split {split!r} with regions, and --images asks for {images:,}")
    numbers = present.image_numbers
    wanted = (numbers < (images or len(present.image_ids))) & (_nth_caption(numbers) < (captions_per_image or len(numbers)))
    rows = np.flatnonzero(wanted).astype(np.int64)
    return Gallery(present, list(present.image_ids[:images]), rows, numbers[rows].astype(np.int32), missing.count)


def _missing_images(everything: Pairs, present: Pairs) -> tuple[str, ...]:
    there = set(present.image_ids)
    return some(image_id for image_id in everything.image_ids if image_id not in there)


def _nth_caption(numbers: NDArray[np.int32]) -> NDArray[np.int64]:
    """int64 [rows]: how many earlier rows have the same image."""
    order = np.argsort(numbers, kind="stable")
    counts = np.bincount(numbers)
    nth = np.empty(len(numbers), dtype=np.int64)
    nth[order] = np.arange(len(numbers)) - np.repeat(np.cumsum(counts) - counts, counts)
    return nth


def tokenize(captions: list[str], vocabulary: Vocabulary, max_tokens: int) -> Tokens:
    """All captions as tokens, each cut to ``max_tokens`` with [CLS] and [SEP]."""
    parts = []
    for start in range(0, len(captions), CAPTIONS_PER_ENCODING):
        encoded = vocabulary.encode(captions[start : start + CAPTIONS_PER_ENCODING], max_tokens - 2)
        parts += [vocabulary.with_specials(ids).astype(np.int32) for ids in encoded]
    return Tokens(np.concatenate(parts), np.array([len(part) for part in parts], dtype=np.int64))
