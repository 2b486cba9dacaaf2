"""Fresh negatives: for some mismatched samples the wrong caption comes from the step itself, the likelier the nearer the model holds it to
be (ALBEF, arXiv 2107.07651, section 3.2). What is near changes as the model learns, which no list made beforehand does.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from megainter.data.integers import Int64s
from megainter.tasks.contrast import Vectors, excluded, scale_of
from megainter.tasks.pretraining.batches import PretrainBatch, with_captions
from megainter.tasks.pretraining.sampling import Sampler
from megainter.transfers import sent


def with_fresh_captions(batches: Sequence[PretrainBatch], vectors: Vectors, sampler: Sampler) -> list[PretrainBatch]:
    """This rank's micro-batches with the captions that ``data.batch_negatives`` asks for drawn in the step; the rest as they are.

    A sample's draw is a function of (seed, epoch, n), of what the step's samples are, and of the vectors.
    """
    return [_with_fresh_captions(batch, vectors, sampler) for batch in batches]


def _with_fresh_captions(batch: PretrainBatch, vectors: Vectors, sampler: Sampler) -> PretrainBatch:
    assert batch.sides is not None
    draws = batch.sides.draws
    drawn = np.flatnonzero(sampler.drawn_in_step(draws))
    if not len(drawn):
        return batch
    places = batch.sides.places[torch.from_numpy(drawn)]
    chosen = choose(vectors, places, sampler.choices_in_step(draws)[drawn])
    captions = np.array(draws.caption_rows)
    captions[drawn[chosen >= 0]] = vectors.keys.cpu().numpy()[chosen[chosen >= 0], 2]
    return with_captions(batch, replace(draws, caption_rows=captions), sampler)


def choose(vectors: Vectors, places: torch.Tensor, uniforms: NDArray[np.float64]) -> Int64s:
    """For each sample in ``places`` int64 [B] (CPU) the place of another of the N whose caption it is shown, int64 [B].

    In proportion to the softmax of the image's similarity with captions, among those that are wrong for it: not of the same image, nor
    reading the same as its own. -1 where there is none. ``uniforms`` float64 [B], each in [0, 1), decide.
    """
    rows = sent(places, vectors.texts.device)
    logits = scale_of(vectors.log_scale) * vectors.regions[rows] @ vectors.texts.T
    barred = excluded(vectors.keys[rows], vectors.keys).cpu().numpy()
    weights = np.where(barred, 0.0, _exponentials(logits.double().cpu().numpy(), barred))
    sums = np.cumsum(weights, axis=1)
    chosen = np.array([np.searchsorted(row, u * row[-1], side="right") for row, u in zip(sums, uniforms, strict=True)], dtype=np.int64)
    last = barred.shape[1] - 1 - np.argmin(barred[:, ::-1], axis=1)  # u times the sum may round to the sum
    return np.where(barred.all(axis=1), -1, np.minimum(chosen, last))


def _exponentials(logits: NDArray[np.float64], barred: NDArray[np.bool_]) -> NDArray[np.float64]:
    """exp of the logits, of each row's largest as 1."""
    largest = np.where(barred, -np.inf, logits).max(axis=1, keepdims=True)
    return np.exp(np.minimum(logits - np.where(np.isfinite(largest), largest, 0.0), 0.0))
