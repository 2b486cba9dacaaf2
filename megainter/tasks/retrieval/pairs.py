"""Scores of captions against images, of every pair or of chosen ones, chunk by chunk, by one or several processes.

The work is cut into chunks of a few images against all their captions. The cut depends on the data and on ``batch_pairs`` alone, and on CPU
every process computes with one thread, so that the scores are bit-equal whoever computes them and however many share the work.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from megainter.data.feature_store.reader import FeatureStore
from megainter.data.packed import region_rows
from megainter.model.grid import EmbeddedRows, embed_captions, embed_images, score_grid, score_pairs
from megainter.model.interbert import InterBertForRetrieval
from megainter.tasks.retrieval.gallery import Tokens
from megainter.tasks.scoring.models import DTYPES, load_model

IMAGES_PER_CHUNK = 8  # a caption's embedding is shared by so many images; few, so that chunks can be shared out evenly


@dataclass(frozen=True)
class PairsToScore:
    """Everything a process needs to score any chunk. ``image_order`` and ``caption_order`` sort by length, against padding."""

    model: Path
    store: FeatureStore
    image_ids: list[str]
    tokens: Tokens
    image_order: NDArray[np.int64]
    caption_order: NDArray[np.int64]
    max_regions: int
    batch_pairs: int
    precision: str

    def __len__(self) -> int:
        return -(-len(self.image_ids) // self.images_per_chunk)

    @property
    def images_per_chunk(self) -> int:
        return min(IMAGES_PER_CHUNK, self.batch_pairs)

    def images(self, chunk: int) -> NDArray[np.int64]:
        """Numbers of the images of a chunk."""
        return self.image_order[chunk * self.images_per_chunk : (chunk + 1) * self.images_per_chunk]

    def places(self, chunk: int) -> NDArray[np.int64]:
        """Rows of a chunk's scores in the matrix [I, C] of all."""
        return self.images(chunk)

    def pair(self, chunk: int, row: int, column: int) -> tuple[int, int]:
        """Numbers of the image and the caption of a chunk's score."""
        return int(self.images(chunk)[row]), column

    def units(self, chunk: int) -> int:
        """How many pairs a chunk has."""
        return len(self.images(chunk)) * len(self.caption_order)

    def captions(self) -> Iterator[NDArray[np.int64]]:
        """Numbers of the captions of each forward."""
        size = max(1, self.batch_pairs // self.images_per_chunk)
        for start in range(0, len(self.caption_order), size):
            yield self.caption_order[start : start + size]

    def scorer(self, device: torch.device) -> "ChunkScorer":
        return ChunkScorer(self, device)


@dataclass(frozen=True)
class CandidatesToScore:
    """The same chunks of images, and of their pairs the chosen ones. ``keys`` int64 [P]: image * C + caption, ascending."""

    job: PairsToScore
    keys: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.job)

    @property
    def batch_pairs(self) -> int:
        return self.job.batch_pairs

    def places(self, chunk: int) -> NDArray[np.int64]:
        """Rows of a chunk's scores in the column [P, 1] of all: its images' pairs, image by image."""
        captions = len(self.job.caption_order)
        images = self.job.images(chunk)
        begins, ends = np.searchsorted(self.keys, images * captions), np.searchsorted(self.keys, (images + 1) * captions)
        return np.concatenate([np.arange(begin, end) for begin, end in zip(begins, ends, strict=True)])

    def pair(self, chunk: int, row: int, column: int) -> tuple[int, int]:
        """Numbers of the image and the caption of a chunk's score."""
        image, caption = divmod(int(self.keys[self.places(chunk)[row]]), len(self.job.caption_order))
        return image, caption

    def units(self, chunk: int) -> int:
        """How many pairs a chunk has."""
        return len(self.places(chunk))

    def scorer(self, device: torch.device) -> "CandidateScorer":
        return CandidateScorer(self, device)


def pairs_to_score(
    model: Path, store: FeatureStore, image_ids: list[str], tokens: Tokens, max_regions: int, batch_pairs: int, precision: str
) -> PairsToScore:
    """Sort images by region count and captions by length (stable), so that a forward has hardly any padding."""
    counts = store.region_counts(image_ids).clip(max=max_regions)
    image_order, caption_order = (np.argsort(lengths, kind="stable") for lengths in (counts, tokens.lengths))
    return PairsToScore(
        model=model,
        store=store,
        image_ids=image_ids,
        tokens=tokens,
        image_order=image_order,
        caption_order=caption_order,
        max_regions=max_regions,
        batch_pairs=batch_pairs,
        precision=precision,
    )


class ChunkScorer:
    """The model on one device, and the chunks it scores."""

    def __init__(self, job: PairsToScore, device: torch.device) -> None:
        self.job, self.device = job, device
        self.model = load_model(job.model, InterBertForRetrieval)
        # nn.Module's own method: the wrapper around it in transformers has no usable type
        torch.nn.Module.to(self.model, device=device, dtype=DTYPES[job.precision])

    @torch.inference_mode()
    def score(self, chunk: int) -> NDArray[np.float32]:
        """Log-odds [images of the chunk, C], captions in their own order. Every image is read and embedded once."""
        job = self.job
        images = self._embed_images([job.image_ids[number] for number in job.images(chunk)])
        scores = np.empty((len(images.lengths), len(job.caption_order)), dtype=np.float32)
        for numbers in job.captions():
            ids, lengths = job.tokens.take(numbers)
            captions = embed_captions(self.model, ids.to(self.device), lengths)
            scores[:, numbers] = score_grid(self.model, captions, images).cpu().numpy()
        return scores

    @torch.inference_mode()
    def score_some(self, chunk: int, images_S: NDArray[np.int64], captions_S: NDArray[np.int64]) -> NDArray[np.float32]:
        """Log-odds [S] of some pairs of a chunk: places of images in the chunk, and numbers of captions.

        Captions of similar length meet in a forward, of as many pairs as a forward of all pairs has; all pairs give the bits of ``score``.
        """
        job = self.job
        images = self._embed_images([job.image_ids[number] for number in job.images(chunk)])
        place_of_caption = np.empty_like(job.caption_order)
        place_of_caption[job.caption_order] = np.arange(len(job.caption_order))
        order = np.lexsort((images_S, place_of_caption[captions_S]))
        width = max(1, job.batch_pairs // job.images_per_chunk) * len(images.lengths)
        scores = np.empty(len(order), dtype=np.float32)
        for start in range(0, len(order), width):
            some = order[start : start + width]
            some = some[np.lexsort((place_of_caption[captions_S[some]], images_S[some]))]
            distinct, caption_S = np.unique(place_of_caption[captions_S[some]], return_inverse=True)
            ids, lengths = job.tokens.take(job.caption_order[distinct])
            captions = embed_captions(self.model, ids.to(self.device), lengths)
            found = score_pairs(self.model, captions, images, torch.from_numpy(caption_S), torch.from_numpy(images_S[some]))
            scores[some] = found.cpu().numpy()
        return scores

    def _embed_images(self, image_ids: list[str]) -> EmbeddedRows:
        features, locations, lengths = region_rows(self.job.store.views(image_ids, self.job.max_regions), self.job.max_regions)
        return embed_images(self.model, features.to(self.device), locations.to(self.device), lengths)


class CandidateScorer:
    """The model on one device, and the chosen pairs it scores."""

    def __init__(self, work: CandidatesToScore, device: torch.device) -> None:
        self.work, self.scorer = work, ChunkScorer(work.job, device)

    def score(self, chunk: int) -> NDArray[np.float32]:
        """Log-odds [pairs of the chunk, 1], in the order of ``places``."""
        images, captions = np.divmod(self.work.keys[self.work.places(chunk)], len(self.work.job.caption_order))
        numbers = self.work.job.images(chunk)
        place = {int(number): i for i, number in enumerate(numbers)}
        places = np.array([place[int(number)] for number in images], dtype=np.int64)
        return self.scorer.score_some(chunk, places, captions)[:, None]
