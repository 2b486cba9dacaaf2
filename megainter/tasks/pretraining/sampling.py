"""One sample of the stream: which caption beside which image, and what of both is masked, from (seed, epoch, n) alone."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from megainter.data.feature_store.first_regions import FirstRegions
from megainter.data.feature_store.reader import FeatureStore
from megainter.data.integers import Int64s
from megainter.data.matching import require_images, rows_by_storage
from megainter.data.stream.masking import (
    REGION_DRAWS,
    TEXT_DRAWS,
    Bools,
    Uniforms,
    drawn_anchors,
    mask_regions_of_images,
    mask_texts,
    recipe,
)
from megainter.data.stream.negatives import HARD_SHARE, HardNegatives, choose_captions, hard_rows, require_two_images, same_text, text_keys
from megainter.data.stream.order import Purpose, SampleGenerators, permuted, permuted_by_blocks, uniform
from megainter.data.tables.pairs import Pairs
from megainter.data.text.layout import marked_end_to_end, marked_places
from megainter.data.text.token_table import TokenTable
from megainter.data.text.vocabulary import VocabularyFacts
from megainter.errors import UsageError


@dataclass(frozen=True)
class StreamSettings:
    """What the stream is made of. ``max_regions`` excludes the global region; regions beyond it are dropped from the end.

    ``gate_msm``: mismatched captions are not scored for masked segments (the official code scores them). ``conditional_masking``: a sample
    has either its text or its regions masked, by a fair coin, so that what is masked is predicted beside an intact other side (UNITER;
    the official code's --cond_mask means that, but shares the zeroed features between both). ``mask_text`` and ``mask_regions`` False: that
    side is never masked. ``contrast``: batches also hold each sample's own caption and its regions without masks, each for itself;
    ``contrast_drop`` is the share of these tokens and regions that is left out. ``batch_negatives``: this share of the mismatched samples
    is shown another caption of the same step in place of the drawn one, chosen when the step is trained (``fresh.py``). ``shuffle`` False:
    sample n is row n, in every epoch. ``block`` samples that come after each other are of images that lie near each other in the store;
    0: all is shuffled.
    """

    seed: int
    global_batch: int
    micro_batch: int
    micro_tokens: int | None = None
    max_regions: int = 36
    masking: str = "official"
    conditional_masking: bool = False
    mask_text: bool = True
    mask_regions: bool = True
    mismatch_probability: float = 0.5
    hard_negative_share: float = HARD_SHARE  # of the mismatched captions, where the stream has hard negatives
    region_objective: Literal["class", "feature"] = "class"
    gate_msm: bool = False
    contrast: bool = False
    contrast_drop: float = 0.0
    batch_negatives: float = 0.0
    shuffle: bool = True
    block: int = 0


@dataclass(frozen=True)
class Draws:
    """What samples are before masking, each int64 [S]: epoch and number, the row of the pair (image), the row of the caption shown."""

    epochs: Int64s
    numbers: Int64s
    rows: Int64s
    caption_rows: Int64s
    itm_labels: Int64s  # 0 = matched, 1 = mismatched

    def __len__(self) -> int:
        return len(self.numbers)


@dataclass(frozen=True)
class OwnCaptions:
    """The captions that belong to the images of S samples, without masks: ``ids`` int64 [Nt], [CLS] caption [SEP] end to end, and
    ``lengths`` int64 [S]. ``keys`` int64 [S, 2]: the image's number and a hash of the text, by which equal ones are known."""

    ids: Int64s
    lengths: Int64s
    keys: Int64s


@dataclass(frozen=True)
class Sample:
    """One sample with its masks, to look at; batches are made of ``Samples``.

    ``ids`` int64 [T] are [CLS] masked caption [SEP]; ``msm_positions`` int64 index ``ids`` and ``msm_labels`` int64 are the original ids
    there. ``features`` [n, F] are as stored (not masked); ``masked`` and ``zeroed`` bool [n]. ``class_probs`` float32 [M, C] are
    those of the masked regions, in order, where they are predicted (a matched pair, the objective "class"), else of none. Boxes are
    float32 [n, 4] in pixels of a ``width`` x ``height`` image. ``row`` and ``caption_row`` are rows of the pairs.
    """

    epoch: int
    n: int
    row: int
    caption_row: int
    itm_label: int
    ids: Int64s
    msm_positions: Int64s
    msm_labels: Int64s
    boxes: NDArray[np.float32]
    features: NDArray[np.floating]
    class_probs: NDArray[np.float32]
    width: int
    height: int
    masked: NDArray[np.bool_]
    zeroed: NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Samples(Sequence[Sample]):
    """S samples end to end, as a batch takes them; ``samples[i]`` is one of them, cut out and read.

    ``ids`` int64 [Nt] are those of all samples, ``text_lengths`` int64 [S]; ``msm_positions`` int64 [M] index ``ids``, ``msm_labels``
    int64 [M]. ``regions`` has boxes [N, 4], and features and class probabilities where they are asked for; ``masked`` and ``zeroed``
    bool [N]. ``scored`` bool [N] are the masked regions of matched pairs. The rest is as in ``Sample``.
    """

    draws: Draws
    ids: Int64s
    text_lengths: Int64s
    msm_positions: Int64s
    msm_labels: Int64s
    regions: FirstRegions
    masked: Bools
    zeroed: Bools
    scored: Bools
    with_class_probs: bool  # the objective is "class"

    def __len__(self) -> int:
        return len(self.draws)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[place] for place in range(*i.indices(len(self)))]
        if not 0 <= i < len(self):
            raise IndexError(i)
        draws, regions = self.draws, self.regions
        begin, first = (int(lengths[:i].sum()) for lengths in (self.text_lengths, regions.counts))
        end, last = begin + int(self.text_lengths[i]), first + int(regions.counts[i])
        spoken = slice(*np.searchsorted(self.msm_positions, (begin, end)).tolist())
        views = regions.views(i)
        predicted = self.scored[first:last] if self.with_class_probs else np.zeros(last - first, np.bool_)
        return Sample(
            epoch=int(draws.epochs[i]),
            n=int(draws.numbers[i]),
            row=int(draws.rows[i]),
            caption_row=int(draws.caption_rows[i]),
            itm_label=int(draws.itm_labels[i]),
            ids=self.ids[begin:end],
            msm_positions=self.msm_positions[spoken] - begin,
            msm_labels=self.msm_labels[spoken],
            boxes=views.boxes,
            features=views.features,
            class_probs=views.class_probs(predicted),
            width=views.width,
            height=views.height,
            masked=self.masked[first:last],
            zeroed=self.zeroed[first:last],
        )


class Sampler:
    """Makes samples of ``pairs`` with regions from ``store`` and captions from ``tokens``; holds no state that a sample changes.

    At construction every image of the pairs is looked up in the store's index: a ``UsageError`` counts the captions without images.
    ``by_storage`` are ``rows_by_storage`` where the settings have blocks; None: they are found here.
    """

    def __init__(
        self,
        pairs: Pairs,
        store: FeatureStore,
        tokens: TokenTable,
        vocabulary: VocabularyFacts,
        settings: StreamSettings,
        hard_negatives: HardNegatives | None = None,
        by_storage: Int64s | None = None,
    ) -> None:
        if len(tokens) != len(pairs):
            raise UsageError(f"token table {tokens.path} holds {len(tokens):,} captions, the pairs {len(pairs):,}: build it again")
        self.store_rows = require_images(pairs, store)
        if settings.mismatch_probability > 0:
            require_two_images(pairs.image_numbers, f"the captions of {store.path}")
        if hard_negatives is not None and len(hard_negatives) != len(pairs):
            raise UsageError(f"hard negatives are for {len(hard_negatives):,} captions, the pairs are {len(pairs):,}: find them again")
        self.pairs, self.store, self.tokens, self.vocabulary, self.settings = pairs, store, tokens, vocabulary, settings
        self.hard_negatives = hard_negatives
        if by_storage is None and settings.block:
            by_storage = rows_by_storage(pairs, self.store_rows, store)
        self.by_storage = by_storage
        self.recipe = recipe(settings.masking)
        purposes = (Purpose.TEXT_MASK, Purpose.REGION_MASK, Purpose.CONTRAST_TEXT, Purpose.CONTRAST_REGION)
        self._text_draws, self._region_draws, self._text_drops, self._region_drops = (
            SampleGenerators(settings.seed, purpose) for purpose in purposes
        )

    def draws(self, epochs: Int64s, numbers: Int64s) -> Draws:
        """Rows and labels of samples ``numbers`` int64 [S] of ``epochs`` int64 [S]."""
        parts = [self._draws_of_epoch(int(epoch), numbers[epochs == epoch]) for epoch in np.unique(epochs)]
        rows, captions, labels = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        back = np.argsort(np.argsort(epochs, kind="stable"), kind="stable")  # parts are grouped by epoch, in order within each
        return Draws(epochs, numbers, rows[back], captions[back], labels[back])

    def _draws_of_epoch(self, epoch: int, n: Int64s) -> tuple[Int64s, Int64s, Int64s]:
        settings, numbers = self.settings, self.pairs.image_numbers
        rows = self._shuffled(epoch, n) if settings.shuffle else n
        hard, share = self.hard_negatives, settings.hard_negative_share
        same = partial(same_text, self.pairs)
        captions, labels = choose_captions(
            image_numbers=numbers,
            rows=rows,
            seed=settings.seed,
            epoch=epoch,
            n=n,
            probability=settings.mismatch_probability,
            hard=hard,
            hard_share=share,
            same=same,
        )
        return rows, captions, labels

    def _shuffled(self, epoch: int, n: Int64s) -> Int64s:
        seed, size, block = self.settings.seed, len(self.pairs), self.settings.block
        if self.by_storage is None:
            return permuted(seed, epoch, n, size)
        return self.by_storage[permuted_by_blocks(seed, epoch, n, size, block)].astype(np.int64)

    def lengths(self, draws: Draws) -> Int64s:
        """Text tokens and regions of each sample, [CLS], [SEP] and the global region included: int64 [S]."""
        regions = self.store.regions_at(self.store_rows[self.pairs.image_numbers[draws.rows]]).clip(max=self.settings.max_regions)
        return self.tokens.lengths[draws.caption_rows].astype(np.int64) + 2 + regions + 1

    def announce(self, draws: Draws, places: Int64s) -> None:
        """Let the system fetch the regions of samples ``places`` of ``draws`` ahead of their making."""
        self.store.announce(self._store_rows(draws.rows[places]), self.settings.max_regions)

    def sample(self, draws: Draws, i: int) -> Sample:
        """Sample ``i`` of ``draws``, read from the store and masked."""
        return self.samples(draws, np.array([i]))[0]

    def samples(self, draws: Draws, places: Int64s) -> Samples:
        """Samples ``places`` int64 [S] of ``draws``, their boxes read from the store, and masked together; each is what it is alone."""
        here = Draws(*(column[places] for column in vars(draws).values()))
        regions = self.store.first_regions(self._store_rows(here.rows), self.settings.max_regions)
        in_text, in_regions = self._sides(here.epochs, here.numbers)
        masked, zeroed = self._masks(here, regions, in_regions)
        scored = masked & np.repeat(here.itm_labels == 0, regions.counts)
        return Samples(here, *self._texts(here, in_text), regions, masked, zeroed, scored, self.settings.region_objective == "class")

    def own_captions(self, draws: Draws) -> OwnCaptions:
        """The captions of the images of samples ``draws``, whatever they show, but for the tokens that ``contrast_drop`` leaves out."""
        captions = [self.tokens[row] for row in draws.rows.tolist()]
        lengths = np.array([len(caption) for caption in captions], dtype=np.int64)
        kept = self._kept_by_contrast(self._text_drops, draws, lengths)
        tokens, lengths = np.concatenate([np.zeros(0, np.int32), *captions])[kept], counted(kept, lengths)
        ids = marked_end_to_end(tokens, lengths, self.vocabulary.cls_id, self.vocabulary.sep_id)
        keys = [self.pairs.image_numbers[draws.rows], text_keys(self.pairs, draws.rows)]
        return OwnCaptions(ids, lengths + 2, np.stack(keys, axis=1).astype(np.int64))

    def kept_regions(self, draws: Draws, counts: Int64s) -> Bools:
        """bool [N]: which regions of the samples' images, ``counts`` int64 [S] of them, contrast sees."""
        return self._kept_by_contrast(self._region_drops, draws, counts)

    def _kept_by_contrast(self, generators: SampleGenerators, draws: Draws, sizes: Int64s) -> Bools:
        """bool [sum of ``sizes``]: all but a share ``contrast_drop``; of a sample that has some, one stays in any case."""
        share = self.settings.contrast_drop
        if share == 0:
            return np.ones(int(sizes.sum()), np.bool_)
        uniforms = _drawn(generators, 1, draws, sizes)[0]
        some = sizes > 0
        largest = np.maximum.reduceat(uniforms, (np.cumsum(sizes) - sizes)[some]) if some.any() else np.zeros(0)
        kept: Bools = (uniforms >= share) | (uniforms == np.repeat(largest, sizes[some]))
        return kept

    def drawn_in_step(self, draws: Draws) -> Bools:
        """bool [S]: which samples are shown another caption of their step, by ``batch_negatives``."""
        coins = self._coins(draws.epochs, draws.numbers, Purpose.BATCH_NEGATIVE)
        return (draws.itm_labels == 1) & (coins < self.settings.batch_negatives)

    def drawn_hard(self, draws: Draws) -> Bools:
        """bool [S]: which samples are shown one of their caption's hard negatives."""
        found = np.zeros(len(draws), np.bool_)
        if self.hard_negatives is None:
            return found
        for epoch in np.unique(draws.epochs).tolist():
            places = np.flatnonzero((draws.epochs == epoch) & (draws.itm_labels == 1))
            rows, numbers, share = draws.rows[places], draws.numbers[places], self.settings.hard_negative_share
            similar = hard_rows(self.hard_negatives, share, rows, self.settings.seed, epoch, numbers)
            found[places] = similar == draws.caption_rows[places]  # one that read the same was not taken
        return found

    def choices_in_step(self, draws: Draws) -> NDArray[np.float64]:
        """Uniform numbers in [0, 1) by which they are chosen, float64 [S]."""
        return self._coins(draws.epochs, draws.numbers, Purpose.BATCH_CHOICE)

    def texts(self, draws: Draws) -> tuple[Int64s, Int64s, Int64s, Int64s]:
        """The texts that samples ``draws`` show, masked: ids end to end, lengths, masked positions and labels, as in ``Samples``."""
        return self._texts(draws, self._sides(draws.epochs, draws.numbers)[0])

    def _store_rows(self, rows: Int64s) -> NDArray[np.integer]:
        return self.store_rows[self.pairs.image_numbers[rows]]

    def _sides(self, epochs: Int64s, numbers: Int64s) -> tuple[Bools, Bools]:
        """bool [S] each: whether text and whether regions of a sample are masked."""
        in_text, in_regions = (np.full(len(numbers), masks) for masks in (self.settings.mask_text, self.settings.mask_regions))
        if not self.settings.conditional_masking:
            return in_text, in_regions
        coins = self._coins(epochs, numbers, Purpose.CONDITION)
        return in_text & (coins < 0.5), in_regions & (coins >= 0.5)

    def _coins(self, epochs: Int64s, numbers: Int64s, purpose: Purpose) -> NDArray[np.float64]:
        """A uniform number in [0, 1) for each sample, float64 [S]."""
        coins = np.empty(len(numbers))
        for epoch in np.unique(epochs).tolist():
            coins[epochs == epoch] = uniform(self.settings.seed, epoch, numbers[epochs == epoch], purpose)
        return coins

    def _texts(self, draws: Draws, in_text: Bools) -> tuple[Int64s, Int64s, Int64s, Int64s]:
        """[CLS] masked caption [SEP] of all samples end to end, their lengths, masked positions, and labels."""
        caption_rows = draws.caption_rows.tolist()
        captions = [self.tokens[row] for row in caption_rows]
        lengths = np.array([len(caption) for caption in captions], dtype=np.int64)
        original = np.concatenate([np.zeros(0, np.int32), *captions])
        uniforms = _drawn(self._text_draws, TEXT_DRAWS, draws, lengths)
        masked, positions = mask_texts(original, lengths, uniforms, self.recipe, self.vocabulary, self._continues(caption_rows))
        caption = np.repeat(np.arange(len(lengths)), lengths)  # of each token
        masked = np.where(in_text[caption], masked, original)
        positions = positions[in_text[caption[positions]]]
        ids = marked_end_to_end(masked, lengths, self.vocabulary.cls_id, self.vocabulary.sep_id)
        return ids, lengths + 2, marked_places(lengths)[positions], original[positions].astype(np.int64)

    def _continues(self, caption_rows: list[int]) -> Bools | None:
        """Which tokens of the captions go on with the word before them; None where the vocabulary alone tells."""
        told = [continues for row in caption_rows if (continues := self.tokens.continues(row)) is not None]
        return np.concatenate(told) if told else None

    def anchors(self, samples: Samples) -> Bools:
        """bool [N]: which regions of the samples are masked for themselves, the others because they overlap one of these."""
        drawn = drawn_anchors(self._region_uniforms(samples.draws, samples.regions), self.recipe)
        return drawn & np.repeat(self._sides(samples.draws.epochs, samples.draws.numbers)[1], samples.regions.counts)

    def _region_uniforms(self, draws: Draws, regions: FirstRegions) -> Uniforms:
        return _drawn(self._region_draws, REGION_DRAWS, draws, regions.counts)

    def _masks(self, draws: Draws, regions: FirstRegions, in_regions: Bools) -> tuple[Bools, Bools]:
        """Which regions of the samples are predicted, and which lose their feature."""
        uniforms = self._region_uniforms(draws, regions)
        both = mask_regions_of_images(regions.boxes, regions.counts, uniforms, self.recipe)
        masked, zeroed = (chosen & np.repeat(in_regions, regions.counts) for chosen in both)
        return masked, zeroed

    def digest(self, sample: Sample) -> bytes:
        """SHA-256 over what was drawn: both pair ids, masked ids, masked positions, region masks, ITM label."""
        total = hashlib.sha256()
        for pair_id in (self.pairs.pair_id(sample.row), self.pairs.pair_id(sample.caption_row)):
            total.update(f"{len(pair_id)} {pair_id} ".encode())
        total.update(f"{len(sample.ids)} {len(sample.msm_positions)} {len(sample.masked)} {sample.itm_label} ".encode())
        for array in (sample.ids, sample.msm_positions, sample.masked, sample.zeroed):
            total.update(np.ascontiguousarray(array).tobytes())
        return total.digest()


def counted(chosen: Bools, sizes: Int64s) -> Int64s:
    """int64 [S]: how many of each sample's ``sizes`` [S] are ``chosen``, bool [sum of ``sizes``]."""
    return np.bincount(np.repeat(np.arange(len(sizes)), sizes)[chosen], minlength=len(sizes)).astype(np.int64)


def _drawn(generators: SampleGenerators, each: int, draws: Draws, sizes: Int64s) -> Uniforms:
    """float64 [each, sum of sizes]: ``each`` uniform numbers for every token or region of every sample, from its own generator."""
    samples = zip(draws.epochs.tolist(), draws.numbers.tolist(), sizes.tolist(), strict=True)
    return np.concatenate([np.zeros((each, 0)), *(generators.at(epoch, n).random((each, size)) for epoch, n, size in samples)], axis=1)
