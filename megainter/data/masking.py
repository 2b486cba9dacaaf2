"""Masked segment modeling and masked region modeling: what is masked, as the paper states it and as the official code does it.

numpy only. The functions draw from the generator they are given, through ``Generator.random`` alone: its doubles are the generator's raw
bits, so that the masks do not depend on the numpy version.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from megainter.errors import UsageError

Bools = NDArray[np.bool_]

_MASKED, _RANDOM = 0.8, 0.9  # BERT: 80 % [MASK], the next 10 % a random vocabulary entry, the last 10 % unchanged
_SPAN_GATE = 0.3  # official code: no span where int(0.3 * n) is 0, that is in captions under 4 tokens


@dataclass(frozen=True)
class MaskingRecipe:
    """How text and regions are masked. Probabilities are per word, token or region."""

    name: str
    text: Literal["words", "span", "tokens"]  # short runs of whole words; one long span; single tokens
    text_probability: float  # of an anchor word ("words") or of a token ("tokens"); unused for "span"
    max_following: int  # "words": 0..max_following words after each anchor are masked too
    region_probability: float  # of an anchor region
    iou_threshold: float | None  # regions that overlap an anchor by more than this are masked too; None = anchors alone
    iou_inclusive: bool  # overlap >= threshold, not >
    pixel_inclusive: bool  # boxes reach one pixel beyond x2 and y2 (the official code's + 1)
    zeroed_share: float  # share of masked regions whose feature is zeroed; the others are scored with their feature in sight


PAPER = MaskingRecipe(
    name="paper",  # section 2.2: anchors 10 % of words with the 0-2 words after them; anchors 15 % of regions with those of IoU > 0.4
    text="words",
    text_probability=0.10,
    max_following=2,
    region_probability=0.15,
    iou_threshold=0.4,
    iou_inclusive=False,
    pixel_inclusive=False,
    zeroed_share=1.0,
)
OFFICIAL = MaskingRecipe(
    name="official",  # the released code with --span_mask, the flag of its README
    text="span",
    text_probability=0.0,
    max_following=0,
    region_probability=0.10,
    iou_threshold=0.4,
    iou_inclusive=True,
    pixel_inclusive=True,
    zeroed_share=1.0,
)
BERT = MaskingRecipe(
    name="bert",  # the released code without --span_mask: ViLBERT's masking
    text="tokens",
    text_probability=0.15,
    max_following=0,
    region_probability=0.15,
    iou_threshold=None,
    iou_inclusive=False,
    pixel_inclusive=False,
    zeroed_share=0.9,
)


def recipe(name: str) -> MaskingRecipe:
    """The recipe of that name; an unknown one is a ``UsageError`` that lists them."""
    for known in (PAPER, OFFICIAL, BERT):
        if known.name == name:
            return known
    raise UsageError(f'masking recipe "{name}" is unknown: choose "paper", "official" or "bert"')


@dataclass(frozen=True)
class VocabularyFacts:
    """What masking and batching must know of a vocabulary. ``is_continuation`` bool [size]: entries that begin with "##"."""

    size: int
    pad_id: int
    unk_id: int
    cls_id: int
    sep_id: int
    mask_id: int
    is_continuation: Bools


def mask_text(
    ids: NDArray[np.int32],
    rng: np.random.Generator,
    recipe: MaskingRecipe,
    vocabulary: VocabularyFacts,
    continues: Bools | None = None,
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Mask a caption.

    ``ids`` int32 [n] are its tokens without [CLS] and [SEP], so that these are never masked. ``continues`` bool [n] are the tokens that go
    on with the word before them; None: those that the vocabulary marks with "##". Returns the masked copy, int32 [n], and the
    masked positions, int64, ascending; the labels are ``ids[positions]``. Of the chosen tokens 80 % become [MASK], 10 % a random entry of
    the vocabulary, 10 % stay.
    """
    draws = rng.random((4, max(len(ids), 1)))
    if recipe.text == "words":
        chosen = _words(vocabulary.is_continuation[ids] if continues is None else continues, draws[0], draws[1], recipe)
    elif recipe.text == "span":
        chosen = _span(len(ids), draws[0, 0], draws[1, 0])
    else:
        chosen = draws[0, : len(ids)] < recipe.text_probability
    positions = np.flatnonzero(chosen)
    masked = ids.copy()
    fate, entry = draws[2, positions], draws[3, positions]
    random_ids = (entry * vocabulary.size).astype(np.int32)
    masked[positions] = np.where(fate < _MASKED, vocabulary.mask_id, np.where(fate < _RANDOM, random_ids, ids[positions]))
    return masked, positions


def _words(continues: Bools, anchor: NDArray[np.float64], reach: NDArray[np.float64], recipe: MaskingRecipe) -> Bools:
    """Tokens of the anchor words and of the 0..max_following words after each: bool [n]."""
    starts = ~continues
    starts[:1] = True
    word_of_token = np.cumsum(starts) - 1
    words = int(word_of_token[-1]) + 1 if len(continues) else 0
    chosen = np.zeros(words, dtype=bool)
    for word in np.flatnonzero(anchor[:words] < recipe.text_probability):
        chosen[word : word + 1 + int(reach[word] * (recipe.max_following + 1))] = True
    return chosen[word_of_token]


def _span(n: int, start: float, length: float) -> Bools:
    """One span: start uniform in 0..n (n masks nothing), length uniform in 1..n, clipped at the end: bool [n]."""
    chosen = np.zeros(n, dtype=bool)
    if int(_SPAN_GATE * n) > 0:
        first = int(start * (n + 1))
        chosen[first : first + 1 + int(length * n)] = True
    return chosen


def mask_regions(boxes: NDArray[np.float32], rng: np.random.Generator, recipe: MaskingRecipe) -> tuple[Bools, Bools]:
    """Choose the regions whose class the model must predict.

    ``boxes`` float32 [n, 4], x1 y1 x2 y2 in pixels (overlap does not change when an image is scaled to the unit square, so pixels do).
    Returns ``(masked, zeroed)``, bool [n] each: ``masked`` are predicted, ``zeroed`` lose their feature; locations stay.
    """
    draws = rng.random((2, len(boxes)))
    anchors = np.flatnonzero(draws[0] < recipe.region_probability)
    masked = np.zeros(len(boxes), dtype=bool)
    masked[anchors] = True
    if recipe.iou_threshold is not None and len(anchors) and len(boxes) > 1:
        overlap = overlaps(boxes[anchors], boxes, 1.0 if recipe.pixel_inclusive else 0.0)
        near = overlap >= recipe.iou_threshold if recipe.iou_inclusive else overlap > recipe.iou_threshold
        masked |= near.any(axis=0)
    zeroed = masked if recipe.zeroed_share >= 1.0 else masked & (draws[1] < recipe.zeroed_share)
    return masked, zeroed


def overlaps(a: NDArray[np.float32], b: NDArray[np.float32], offset: float) -> NDArray[np.float64]:
    """Intersection over union of boxes ``a`` [A, 4] and ``b`` [B, 4]: float64 [A, B]. ``offset`` pixels are added to every side."""
    columns, rows = a.astype(np.float64).T[:, :, None], b.astype(np.float64).T[:, None, :]
    shared = _sides(columns, rows, 0, offset)
    shared *= _sides(columns, rows, 1, offset)
    areas_a, areas_b = ((x[2] - x[0] + offset) * (x[3] - x[1] + offset) for x in (columns, rows))
    union = areas_a + areas_b
    union -= shared
    shared /= np.maximum(union, 1e-12, out=union)
    return shared


def _sides(a: NDArray[np.float64], b: NDArray[np.float64], axis: int, offset: float) -> NDArray[np.float64]:
    """Length of what boxes share along an axis (0: x, 1: y), from corners [4, A, 1] and [4, 1, B]: float64 [A, B]."""
    sides = np.minimum(a[2 + axis], b[2 + axis])
    sides -= np.maximum(a[axis], b[axis])
    sides += offset
    return np.maximum(sides, 0.0, out=sides)
