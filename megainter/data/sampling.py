"""One sample of the stream: which caption beside which image, and what of both is masked, from (seed, epoch, n) alone."""

import hashlib
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from megainter.data.feature_store import FeatureStore
from megainter.data.manifest import Pairs, digest_of_kept
from megainter.data.masking import REGION_DRAWS, TEXT_DRAWS, Bools, Uniforms, VocabularyFacts, mask_regions_of_images, mask_texts, recipe
from megainter.data.negatives import HARD_SHARE, HardNegatives, choose_captions, require_two_images, same_text
from megainter.data.order import Int64s, Purpose, SampleGenerators, permuted, permuted_by_blocks, uniform
from megainter.data.record import RegionViews
from megainter.data.text import TokenTable
from megainter.errors import UsageError


@dataclass(frozen=True)
class StreamSettings:
    """What the stream is made of. ``max_regions`` excludes the global region; regions beyond it are dropped from the end.

    ``gate_msm``: mismatched captions are not scored for masked segments (the official code scores them). ``conditional_masking``: a sample
    has either its text or its regions masked, by a fair coin, so that what is masked is predicted beside an intact other side (UNITER;
    the official code's --cond_mask means that, but shares the zeroed features between both). ``shuffle`` False: sample n is row n, in
    every epoch. ``block`` samples that come after each other are of images that lie near each other in the store; 0: all is shuffled.
    """

    seed: int
    global_batch: int
    micro_batch: int
    micro_tokens: int | None = None
    max_regions: int = 36
    masking: str = "official"
    conditional_masking: bool = False
    mismatch_probability: float = 0.5
    hard_negative_share: float = HARD_SHARE  # of the mismatched captions, where the stream has hard negatives
    region_objective: Literal["class", "feature"] = "class"
    gate_msm: bool = False
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
class Sample:
    """One sample with its masks; a batch lays these end to end.

    ``ids`` int64 [T] are [CLS] masked caption [SEP]; ``msm_positions`` int64 index ``ids`` and ``msm_labels`` int64 are the original ids
    there. ``features`` float16 [n, F] are as stored (not masked); ``masked`` and ``zeroed`` bool [n]. ``class_probs`` float32 [M, C] are
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
    features: NDArray[np.float16]
    class_probs: NDArray[np.float32]
    width: int
    height: int
    masked: NDArray[np.bool_]
    zeroed: NDArray[np.bool_]


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
        self._text_draws, self._region_draws = (
            SampleGenerators(settings.seed, purpose) for purpose in (Purpose.TEXT_MASK, Purpose.REGION_MASK)
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
        captions, labels = choose_captions(numbers, rows, settings.seed, epoch, n, settings.mismatch_probability, hard, share, same)
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
        self.store.announce(self.store_rows[self.pairs.image_numbers[draws.rows[places]]], self.settings.max_regions)

    def sample(self, draws: Draws, i: int) -> Sample:
        """Sample ``i`` of ``draws``, read from the store and masked."""
        return self.samples(draws, np.array([i]))[0]

    def samples(self, draws: Draws, places: Int64s) -> list[Sample]:
        """Samples ``places`` int64 [S] of ``draws``, read from the store and masked together; each is what it is alone."""
        if not len(places):
            return []
        epochs, numbers, rows, caption_rows, labels = (
            column[places].tolist() for column in (draws.epochs, draws.numbers, draws.rows, draws.caption_rows, draws.itm_labels)
        )
        store_rows = self.store_rows[self.pairs.image_numbers[draws.rows[places]]].tolist()
        records = [self.store.at(row, self.settings.max_regions) for row in store_rows]
        in_text, in_regions = self._sides(draws.epochs[places], draws.numbers[places])
        texts = self._texts(epochs, numbers, caption_rows, in_text)
        masks = self._masks(epochs, numbers, records, in_regions)
        facts = zip(epochs, numbers, rows, caption_rows, labels, texts, records, masks, strict=True)
        return [self._sample(*fact) for fact in facts]

    def _sample(
        self,
        epoch: int,
        n: int,
        row: int,
        caption_row: int,
        itm_label: int,
        text: tuple[Int64s, Int64s, Int64s],
        record: RegionViews,
        masks: tuple[Bools, Bools],
    ) -> Sample:
        scored = itm_label == 0 and self.settings.region_objective == "class"
        probs = record.class_probs(np.flatnonzero(masks[0]) if scored else np.zeros(0, np.int64))
        return Sample(
            epoch, n, row, caption_row, itm_label, *text, record.boxes, record.features, probs, record.width, record.height, *masks
        )

    def _sides(self, epochs: Int64s, numbers: Int64s) -> tuple[Bools, Bools]:
        """bool [S] each: whether text and whether regions of a sample are masked."""
        if not self.settings.conditional_masking:
            every = np.ones(len(numbers), np.bool_)
            return every, every
        coins = np.empty(len(numbers))
        for epoch in np.unique(epochs).tolist():
            coins[epochs == epoch] = uniform(self.settings.seed, epoch, numbers[epochs == epoch], Purpose.CONDITION)
        return coins < 0.5, coins >= 0.5

    def _texts(self, epochs: list[int], numbers: list[int], caption_rows: list[int], in_text: Bools) -> list[tuple[Int64s, Int64s, Int64s]]:
        """[CLS] masked caption [SEP], masked positions in it, and labels, of each sample."""
        captions = [self.tokens[row] for row in caption_rows]
        original, lengths = np.concatenate(captions), np.array([len(caption) for caption in captions], dtype=np.int64)
        draws = _drawn(self._text_draws, TEXT_DRAWS, epochs, numbers, lengths)
        masked, positions = mask_texts(original, lengths, draws, self.recipe, self.vocabulary, self._continues(caption_rows))
        caption = np.repeat(np.arange(len(lengths)), lengths)  # of each token
        masked = np.where(in_text[caption], masked, original)
        positions = positions[in_text[caption[positions]]]
        begins = np.cumsum(lengths) - lengths
        bounds = np.searchsorted(positions, np.append(begins, len(original))).tolist()
        inside, labels = positions - begins[caption[positions]] + 1, original[positions].astype(np.int64)
        ids, ends = self._between_marks(masked, caption, lengths)
        return [
            (ids[end - length - 2 : end], inside[first:last], labels[first:last])
            for end, length, first, last in zip(ends.tolist(), lengths.tolist(), bounds[:-1], bounds[1:], strict=True)
        ]

    def _between_marks(self, tokens: NDArray[np.int32], caption: Int64s, lengths: Int64s) -> tuple[Int64s, Int64s]:
        """Captions end to end, each between [CLS] and [SEP], and where each ends; ``caption`` [N] is the caption of each token."""
        ends = np.cumsum(lengths + 2)
        ids = np.empty(len(tokens) + 2 * len(lengths), dtype=np.int64)
        ids[np.arange(len(tokens)) + 2 * caption + 1] = tokens
        ids[ends - lengths - 2], ids[ends - 1] = self.vocabulary.cls_id, self.vocabulary.sep_id
        return ids, ends

    def _continues(self, caption_rows: list[int]) -> Bools | None:
        """Which tokens of the captions go on with the word before them; None where the vocabulary alone tells."""
        told = [continues for row in caption_rows if (continues := self.tokens.continues(row)) is not None]
        return np.concatenate(told) if told else None

    def _masks(self, epochs: list[int], numbers: list[int], records: list[RegionViews], in_regions: Bools) -> list[tuple[Bools, Bools]]:
        """Which regions of each sample are predicted, and which lose their feature."""
        counts = np.array([len(record) for record in records], dtype=np.int64)
        draws = _drawn(self._region_draws, REGION_DRAWS, epochs, numbers, counts)
        boxes = np.concatenate([record.boxes for record in records])
        masked, zeroed = (chosen & np.repeat(in_regions, counts) for chosen in mask_regions_of_images(boxes, counts, draws, self.recipe))
        ends = np.cumsum(counts).tolist()
        return [(masked[first:end], zeroed[first:end]) for first, end in zip([0, *ends], ends, strict=False)]

    def digest(self, sample: Sample) -> bytes:
        """SHA-256 over what was drawn: both pair ids, masked ids, masked positions, region masks, ITM label."""
        total = hashlib.sha256()
        for pair_id in (self.pairs.pair_id(sample.row), self.pairs.pair_id(sample.caption_row)):
            total.update(f"{len(pair_id)} {pair_id} ".encode())
        total.update(f"{len(sample.ids)} {len(sample.msm_positions)} {len(sample.masked)} {sample.itm_label} ".encode())
        for array in (sample.ids, sample.msm_positions, sample.masked, sample.zeroed):
            total.update(np.ascontiguousarray(array).tobytes())
        return total.digest()


def _drawn(generators: SampleGenerators, each: int, epochs: list[int], numbers: list[int], sizes: Int64s) -> Uniforms:
    """float64 [each, sum of sizes]: ``each`` uniform numbers for every token or region of every sample, from its own generator."""
    samples = zip(epochs, numbers, sizes.tolist(), strict=True)
    return np.concatenate([generators.at(epoch, n).random((each, size)) for epoch, n, size in samples], axis=1)


def rows_in_store(pairs: Pairs, store: FeatureStore) -> NDArray[np.integer]:
    """[images]: the place in the store's ids of each image number, -1 where the store lacks it."""
    if pairs.found is not None and pairs.found.store_digest == store.digest:
        return pairs.found.rows
    return store.find(pairs.image_ids)


def rows_by_storage(pairs: Pairs, store_rows: NDArray[np.integer], store: FeatureStore) -> Int64s:
    """int64 [rows]: rows of the pairs in the order in which their images' records lie in the store; captions of one image as they came."""
    order = store.rows_in_storage_order()
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    return np.argsort(rank[store_rows][pairs.image_numbers], kind="stable")


def missing_images(pairs: Pairs, store: FeatureStore) -> NDArray[np.bool_]:
    """bool [images]: which image numbers of the pairs are not in the store."""
    return rows_in_store(pairs, store) < 0


def require_images(pairs: Pairs, store: FeatureStore) -> NDArray[np.integer]:
    """``rows_in_store``; a ``UsageError`` where captions have no image in the store: how many, and three examples."""
    rows = rows_in_store(pairs, store)
    if pairs.found is not None and rows is pairs.found.rows:
        return rows  # they were matched, and none is missing
    missing = rows < 0
    if not missing.any():
        return rows
    captions = int(missing[pairs.image_numbers].sum())
    first = ", ".join(pairs.image_ids[i] for i in np.flatnonzero(missing)[:3])
    raise UsageError(
        f"captions without images in {store.path}: {captions:,} of {len(pairs):,}, first {first}: run `megainter extract` on these images, "
        "or leave their captions out of the manifest"
    )


def drop_missing(pairs: Pairs, store: FeatureStore) -> Pairs:
    """The pairs whose image is in the store, with images numbered anew; the digest is that of the pairs and of what was kept."""
    missing = missing_images(pairs, store)
    keep = ~missing[pairs.image_numbers]
    new_numbers = (np.cumsum(~missing) - 1).astype(np.int32)
    image_ids = [image_id for image_id, gone in zip(pairs.image_ids, missing, strict=True) if not gone]
    digest = digest_of_kept(pairs.digest, keep)
    return Pairs(pairs.table.filter(pa.array(keep)), new_numbers[pairs.image_numbers[keep]], image_ids, digest)
