"""Masked segment modeling and masked region modeling: what is masked, as the paper states it and as the official code does it.

numpy only. All captions or images of a batch are masked at once, from uniform numbers that the caller drew for each alone, so that a
sample's masks do not depend on the others. ``mask_text`` and ``mask_regions`` do it for one, with the generator they are given, through
``Generator.random`` alone: its doubles are the generator's raw bits, so that the masks do not depend on the numpy version.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from megainter.data.integers import Int64s
from megainter.data.text.vocabulary import VocabularyFacts
from megainter.errors import UsageError

Bools = NDArray[np.bool_]
Uniforms = NDArray[np.float64]  # in [0, 1)

TEXT_DRAWS, REGION_DRAWS = 4, 2  # uniform numbers for each token and for each region

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
    iou_threshold: float | None  # regions that overlap an anchor by more, or as much (next line), are masked too; None = anchors alone
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
    draws = rng.random((TEXT_DRAWS, len(ids)))
    return mask_texts(ids, np.array([len(ids)]), draws, recipe, vocabulary, continues)


def mask_texts(
    ids: NDArray[np.int32],
    lengths: Int64s,
    draws: Uniforms,
    recipe: MaskingRecipe,
    vocabulary: VocabularyFacts,
    continues: Bools | None = None,
) -> tuple[NDArray[np.int32], Int64s]:
    """``mask_text`` of captions end to end: ``ids`` int32 [N] of S captions of ``lengths`` int64 [S], ``continues`` bool [N] or None.

    ``draws`` float64 [4, N] are uniform numbers, four for each token. Returns the masked copy, int32 [N], and masked positions in it.
    """
    if not len(ids):
        return ids.copy(), np.zeros(0, np.int64)
    if recipe.text == "words":
        chosen = _words(vocabulary.is_continuation[ids] if continues is None else continues, lengths, draws[0], draws[1], recipe)
    elif recipe.text == "span":
        chosen = _spans(lengths, draws[0], draws[1])
    else:
        chosen = draws[0] < recipe.text_probability
    positions = np.flatnonzero(chosen)
    masked = ids.copy()
    fate, entry = draws[2, positions], draws[3, positions]
    random_ids = (entry * vocabulary.size).astype(np.int32)
    masked[positions] = np.where(fate < _MASKED, vocabulary.mask_id, np.where(fate < _RANDOM, random_ids, ids[positions]))
    return masked, positions


def _words(continues: Bools, lengths: Int64s, anchor: Uniforms, reach: Uniforms, recipe: MaskingRecipe) -> Bools:
    """Tokens of the anchor words and of the 0..max_following words after each in its caption: bool [N].

    The draws of a caption's w-th word are those of its w-th token.
    """
    begins = np.cumsum(lengths) - lengths
    starts = ~continues
    starts[begins[lengths > 0]] = True
    word_of_token = np.cumsum(starts) - 1
    begin = np.repeat(begins, lengths)[starts]  # of each word: where its caption begins
    draw = begin + np.arange(len(begin)) - word_of_token[begin]
    anchors = np.flatnonzero(anchor[draw] < recipe.text_probability)
    following = (reach[draw[anchors]] * (recipe.max_following + 1)).astype(np.int64)
    chosen = np.zeros(len(begin), dtype=bool)
    chosen[anchors] = True
    for k in range(1, recipe.max_following + 1):
        word = anchors[(following >= k) & (anchors + k < len(begin))]
        chosen[word[begin[word + k] == begin[word]] + k] = True
    return chosen[word_of_token]


def _spans(lengths: Int64s, start: Uniforms, length: Uniforms) -> Bools:
    """One span in each caption: start uniform in 0..n (n masks nothing), length uniform in 1..n, clipped at the end: bool [N].

    The draws of a caption are those of its first token.
    """
    begins = np.cumsum(lengths) - lengths
    draw = begins.clip(max=len(start) - 1)  # an empty caption at the end has no token; nothing of it is chosen
    first = (start[draw] * (lengths + 1)).astype(np.int64)
    end = first + 1 + (length[draw] * lengths).astype(np.int64)
    end[(_SPAN_GATE * lengths).astype(np.int64) == 0] = 0
    place = np.arange(len(start)) - np.repeat(begins, lengths)
    return (place >= np.repeat(first, lengths)) & (place < np.repeat(end, lengths))


def mask_regions(boxes: NDArray[np.float32], rng: np.random.Generator, recipe: MaskingRecipe) -> tuple[Bools, Bools]:
    """Choose the regions whose class the model must predict.

    ``boxes`` float32 [n, 4], x1 y1 x2 y2 in pixels (overlap does not change when an image is scaled to the unit square, so pixels do).
    Returns ``(masked, zeroed)``, bool [n] each: ``masked`` are predicted, ``zeroed`` lose their feature; locations stay.
    """
    return mask_regions_of_images(boxes, np.array([len(boxes)]), rng.random((REGION_DRAWS, len(boxes))), recipe)


def mask_regions_of_images(boxes: NDArray[np.float32], counts: Int64s, draws: Uniforms, recipe: MaskingRecipe) -> tuple[Bools, Bools]:
    """``mask_regions`` of images end to end: ``boxes`` float32 [N, 4] of S images with ``counts`` int64 [S], ``draws`` float64 [2, N]."""
    anchors = np.flatnonzero(drawn_anchors(draws, recipe))
    masked = np.zeros(len(boxes), dtype=bool)
    masked[anchors] = True
    if recipe.iou_threshold is not None and len(anchors):
        near_by, others = _beside(anchors, counts)
        overlap = _overlaps(boxes.astype(np.float64).T, near_by, others, 1.0 if recipe.pixel_inclusive else 0.0)
        near = overlap >= recipe.iou_threshold if recipe.iou_inclusive else overlap > recipe.iou_threshold
        masked[others[near]] = True
    zeroed = masked if recipe.zeroed_share >= 1.0 else masked & (draws[1] < recipe.zeroed_share)
    return masked, zeroed


def drawn_anchors(draws: Uniforms, recipe: MaskingRecipe) -> Bools:
    """bool [N]: the regions that are masked for themselves; the other masked ones overlap one of these in their image."""
    return draws[0] < recipe.region_probability


def _beside(anchors: Int64s, counts: Int64s) -> tuple[Int64s, Int64s]:
    """Every anchor paired with every region of its image: int64 [P] anchors, int64 [P] regions."""
    begins = np.cumsum(counts) - counts
    image = np.repeat(np.arange(len(counts)), counts)[anchors]
    sizes = counts[image]
    regions = np.arange(int(sizes.sum())) - np.repeat(np.cumsum(sizes) - sizes - begins[image], sizes)
    return np.repeat(anchors, sizes), regions


def overlaps(a: NDArray[np.float32], b: NDArray[np.float32], offset: float) -> NDArray[np.float64]:
    """Intersection over union of boxes ``a`` [A, 4] and ``b`` [B, 4]: float64 [A, B]. ``offset`` pixels are added to every side."""
    corners = np.concatenate([a, b]).astype(np.float64).T
    of_a, of_b = np.repeat(np.arange(len(a)), len(b)), np.tile(len(a) + np.arange(len(b)), len(a))
    return _overlaps(corners, of_a, of_b, offset).reshape(len(a), len(b))


def _overlaps(corners: NDArray[np.float64], a: Int64s, b: Int64s, offset: float) -> NDArray[np.float64]:
    """Intersection over union of the boxes ``a`` int64 [P] with the boxes ``b`` int64 [P] among ``corners`` [4, N]: float64 [P]."""
    shared = _sides(corners, a, b, 0, offset)
    shared *= _sides(corners, a, b, 1, offset)
    areas = (corners[2] - corners[0] + offset) * (corners[3] - corners[1] + offset)
    union = areas[a]
    union += areas[b]
    union -= shared
    shared /= np.maximum(union, 1e-12, out=union)
    return shared


def _sides(corners: NDArray[np.float64], a: Int64s, b: Int64s, axis: int, offset: float) -> NDArray[np.float64]:
    """Length of what two boxes share along an axis (0: x, 1: y): float64 [P]."""
    low, high = np.ascontiguousarray(corners[axis]), np.ascontiguousarray(corners[2 + axis])
    sides = np.minimum(high[a], high[b])
    sides -= np.maximum(low[a], low[b])
    sides += offset
    return np.maximum(sides, 0.0, out=sides)
