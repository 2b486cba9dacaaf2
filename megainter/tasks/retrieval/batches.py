"""Fine-tuning for retrieval: every caption with its own image, and beside it pairs that do not match.

The released code makes four pairs of a caption: its own; its image with a random caption; the caption with a random image; its image
with a caption of a similar image. Here the number of each kind is a setting. Which pairs sample n of epoch e has is a pure function of
(seed, e, n), as in pretraining; but for those that are drawn from the candidates of a first stage, which are a function of these too
(``negatives.py``).
"""

from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from megainter.data.feature_store.reader import FeatureStore
from megainter.data.integers import Int64s
from megainter.data.packed import PackedInputs, images_alone, region_rows, texts_alone
from megainter.data.stream.negatives import negative_rows, same_text, text_keys
from megainter.data.stream.order import Purpose, permuted, uniform
from megainter.data.stream.steps import GlobalSteps, shuffled
from megainter.data.tables.pairs import Pairs
from megainter.data.text.layout import marked
from megainter.data.text.token_table import TokenTable
from megainter.data.text.vocabulary import VocabularyFacts
from megainter.errors import UsageError
from megainter.tasks.contrast import Answers


@dataclass(frozen=True)
class GroupSettings:
    """How many pairs of each kind stand beside a caption's own, and the portions of a step (in captions). ``contrast``: batches also say
    what each caption alone and its image alone are."""

    seed: int
    global_batch: int
    micro_batch: int
    random_captions: int
    random_images: int
    hard_captions: int
    hard_images: int
    micro_tokens: int | None = None
    contrast: bool = False
    hard_share: float = 1.0  # of the hard pairs; the rest of them is random
    from_candidates: bool = False  # hard pairs are a first stage's candidates, not captions and images of images that look alike

    @property
    def group(self) -> int:
        """Pairs of one caption, its own included."""
        return 1 + self.random_captions + self.random_images + self.hard_captions + self.hard_images

    @property
    def has_hard(self) -> bool:
        return self.hard_captions + self.hard_images > 0

    @property
    def needs_neighbours(self) -> bool:
        return self.has_hard and not self.from_candidates


@dataclass(frozen=True)
class OwnSides:
    """Each of S captions alone and its own image alone, for contrast: rows of the batch that they are in.

    ``places`` int64 [S] in the global step, and ``keys`` int64 [S, 3]: the image's number, a hash of the text, the caption's row; both stay
    on the CPU, as ``text_lengths`` and ``region_lengths`` int64 [S]. ``tokens`` int64 [Nt] and ``regions`` int64 [Nr] are packed rows.
    """

    places: Tensor
    keys: Tensor
    text_lengths: Tensor
    region_lengths: Tensor
    tokens: Tensor
    regions: Tensor
    answers: Answers | None = None

    def inputs(self, shown: PackedInputs) -> PackedInputs:
        """S texts alone and then S images alone, in one batch, where ``shown`` are the inputs of all pairs."""
        return PackedInputs(
            input_ids=shown.input_ids[self.tokens],
            token_type_ids=shown.token_type_ids[self.tokens],
            text_lengths=torch.cat([self.text_lengths, torch.zeros_like(self.text_lengths)]),
            region_features=shown.region_features[self.regions],
            region_locations=shown.region_locations[self.regions],
            region_lengths=torch.cat([torch.zeros_like(self.region_lengths), self.region_lengths]),
        )

    def to(self, device: torch.device | str) -> "OwnSides":
        """The same on ``device``, copied without waiting where its memory is pinned."""
        rows = {name: getattr(self, name).to(device, non_blocking=True) for name in ("tokens", "regions")}
        return replace(self, answers=self.answers.to(device) if self.answers is not None else None, **rows)

    def pin_memory(self) -> "OwnSides":
        """The same in page-locked memory."""
        return replace(self, tokens=self.tokens.pin_memory(), regions=self.regions.pin_memory())


@dataclass(frozen=True)
class RetrievalBatch:
    """S captions with K pairs each, packed as S * K samples, a caption's pairs together and its own first. ``group`` is K. ``sides`` is
    what contrast compares, where that is trained."""

    inputs: PackedInputs
    group: int
    listwise: bool
    sides: OwnSides | None = None
    counted: bool = True  # there are no fillers

    def counts(self) -> tuple[int, ...]:
        """Pairs, or captions where they are compared as lists; and with ``sides`` captions."""
        captions = len(self.inputs) // self.group
        return (captions if self.listwise else len(self.inputs), *([captions] if self.sides is not None else []))

    def tokens(self) -> int:
        """Real tokens, text and regions."""
        return len(self.inputs.input_ids) + len(self.inputs.region_features)

    def to(self, device: torch.device | str) -> "RetrievalBatch":
        """The same batch on ``device``, copied without waiting where its memory is pinned."""
        return replace(self, inputs=self.inputs.to(device), sides=self.sides.to(device) if self.sides is not None else None)

    def pin_memory(self) -> "RetrievalBatch":
        """The same batch in page-locked memory (called by the loader)."""
        return replace(self, inputs=self.inputs.pin_memory(), sides=self.sides.pin_memory() if self.sides is not None else None)


@dataclass(frozen=True)
class Groups:
    """Images (numbers) and captions (rows) of S captions' pairs, int64 [S, K]; column 0 is the caption's own image and itself."""

    images: Int64s
    captions: Int64s


@dataclass(frozen=True)
class WrongCandidates:
    """What a first stage lets through and is wrong, best first: ``captions`` int32 [I, K] of each image, as rows of the pairs, ``images``
    int32 [C, K'] of each caption, as numbers."""

    captions: NDArray[np.int32]
    images: NDArray[np.int32]


class RetrievalStream(Dataset[list[RetrievalBatch]]):
    """``stream[step]``: this rank's micro-batches of a global step. Endless; every epoch shows each caption once.

    ``neighbours`` int32 [images, k]: images with similar regions, by image number; needed where hard pairs are drawn from them. Where they
    are drawn from ``candidates``, whoever trains sets these before a step is asked for.
    """

    def __init__(
        self,
        pairs: Pairs,
        store: FeatureStore,
        tokens: TokenTable,
        vocabulary: VocabularyFacts,
        settings: GroupSettings,
        max_regions: int,
        listwise: bool,
        neighbours: NDArray[np.int32] | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if settings.needs_neighbours and (neighbours is None or neighbours.shape[0] != len(pairs.image_ids) or not neighbours.shape[1]):
            raise UsageError("hard pairs need the neighbours of every image")
        self.pairs, self.store, self.tokens, self.vocabulary, self.settings = pairs, store, tokens, vocabulary, settings
        self.max_regions, self.listwise, self.neighbours = max_regions, listwise, neighbours
        self.candidates: WrongCandidates | None = None
        self.region_counts = store.region_counts(pairs.image_ids).clip(max=max_regions)
        self._rows_by_image = np.argsort(pairs.image_numbers, kind="stable").astype(np.int64)
        self._captions_of = np.bincount(pairs.image_numbers, minlength=len(pairs.image_ids))
        self._first_of = np.cumsum(self._captions_of) - self._captions_of
        self.steps = GlobalSteps(settings, len(pairs), self._planned, rank, world_size)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, step: int) -> list[RetrievalBatch]:
        groups = self.groups(step)
        return [self._batch(groups, share) for share in self.places(step)]

    def sample_ids(self, step: int) -> list[str]:
        """Pair ids of a global step's captions."""
        return [self.pairs.pair_id(row) for row in self._own(step)]

    def places(self, step: int) -> list[Int64s]:
        """Places within the global step of the captions of each of this rank's micro-batches."""
        return self.steps.mine(self._planned(*self.steps.samples(step)))

    def shown(self, step: int) -> list[str]:
        """Image id and caption of each of a global step's captions, its other pairs left out."""
        rows = self._own(step)
        return [f"{self.pairs.image_id(row)}: {caption}" for row, caption in zip(rows, self.pairs.captions(rows), strict=True)]

    def groups(self, step: int) -> Groups:
        """All pairs of a global step, in the order of the sequence."""
        return self._groups(*self.steps.samples(step))

    def _own(self, step: int) -> list[int]:
        """Rows of a global step's captions."""
        rows: list[int] = shuffled(self.settings.seed, *self.steps.samples(step), len(self.pairs)).tolist()
        return rows

    def _planned(self, epochs: Int64s, numbers: Int64s) -> Int64s:
        """Real tokens of each caption's pairs, int64 [S], by which steps are shared out; candidates, which change, count as random ones."""
        return self.lengths(self._groups(epochs, numbers, planned=self.settings.from_candidates))

    def _groups(self, epochs: Int64s, numbers: Int64s, planned: bool = False) -> Groups:
        parts = [self._groups_of_epoch(int(epoch), numbers[epochs == epoch], planned) for epoch in np.unique(epochs)]
        return Groups(np.concatenate([part.images for part in parts]), np.concatenate([part.captions for part in parts]))

    def _groups_of_epoch(self, epoch: int, n: Int64s, planned: bool) -> Groups:
        settings, numbers = self.settings, self.pairs.image_numbers
        own = permuted(settings.seed, epoch, n, len(self.pairs))
        image = numbers[own].astype(np.int64)
        images, captions = [image], [own]
        for slot in range(1, settings.group):
            counter = n * settings.group + slot  # its own random numbers for every pair of a sample
            kind = self._kind(slot)
            hard = kind.startswith("hard") and not planned
            other = self._hard(kind, own, image, epoch, counter) if hard else self._random(own, epoch, counter)
            other_image = numbers[other].astype(np.int64)
            images.append(other_image if kind.endswith("image") else image)
            captions.append(other if kind.endswith("caption") else own)
        return Groups(np.stack(images, axis=1), np.stack(captions, axis=1))

    def _kind(self, slot: int) -> str:
        settings = self.settings
        kinds = ["random caption"] * settings.random_captions + ["random image"] * settings.random_images
        kinds += ["hard caption"] * settings.hard_captions + ["hard image"] * settings.hard_images
        return kinds[slot - 1]

    def _random(self, own: Int64s, epoch: int, counter: Int64s) -> Int64s:
        """A caption of another image that does not read the same."""
        return negative_rows(self.pairs.image_numbers, own, self.settings.seed, epoch, counter, partial(same_text, self.pairs))

    def _hard(self, kind: str, own: Int64s, image: Int64s, epoch: int, counter: Int64s) -> Int64s:
        """A caption that is hard for the image, or of an image that is hard for the caption; a random one where that reads the same as the
        own, and where chance has it so (``hard_share``)."""
        lists, rows = self._hard_lists(kind, own, image)
        assert lists is not None  # neighbours are checked at the start, candidates set before the first step
        drawn = uniform(self.settings.seed, epoch, counter, Purpose.HARD_NEGATIVE) * lists.shape[1]
        other = lists[rows, drawn.astype(np.int64)].astype(np.int64)
        if not (self.settings.from_candidates and kind.endswith("caption")):
            other = self._caption_of(other, epoch, counter)
        replaced = same_text(self.pairs, own, other)
        replaced |= uniform(self.settings.seed, epoch, counter, Purpose.BATCH_NEGATIVE) >= self.settings.hard_share
        other[replaced] = self._random(own[replaced], epoch, counter[replaced])
        return other

    def _hard_lists(self, kind: str, own: Int64s, image: Int64s) -> tuple[NDArray[np.int32] | None, Int64s]:
        """Lists [n, K] of what is hard, images or captions, and of each caption the row to draw from."""
        if not self.settings.from_candidates:
            return self.neighbours, image
        if self.candidates is None:
            return None, own
        return (self.candidates.captions, image) if kind.endswith("caption") else (self.candidates.images, own)

    def _caption_of(self, images: Int64s, epoch: int, counter: Int64s) -> Int64s:
        drawn = (uniform(self.settings.seed, epoch, counter, Purpose.HARD_CHOICE) * self._captions_of[images]).astype(np.int64)
        return self._rows_by_image[self._first_of[images] + drawn]

    def lengths(self, groups: Groups) -> Int64s:
        """Real tokens of each caption's pairs, int64 [S]."""
        text = self.tokens.lengths[groups.captions].astype(np.int64) + 2
        return (text + self.region_counts[groups.images] + 1).sum(axis=1)

    def _batch(self, groups: Groups, share: Int64s) -> RetrievalBatch:
        inputs = self.pack(groups.images[share].ravel(), groups.captions[share].ravel())
        sides = self._sides(inputs, groups.captions[share, 0], share) if self.settings.contrast else None
        return RetrievalBatch(inputs, self.settings.group, self.listwise, sides)

    def _sides(self, inputs: PackedInputs, own: Int64s, places: Int64s) -> OwnSides:
        """What the first pair of each caption, its own, has of each side."""
        first = np.arange(len(own)) * self.settings.group
        keys = np.stack([self.pairs.image_numbers[own].astype(np.int64), text_keys(self.pairs, own), own], axis=1)
        return OwnSides(
            places=torch.from_numpy(places),
            keys=torch.from_numpy(keys),
            text_lengths=inputs.text_lengths[first],
            region_lengths=inputs.region_lengths[first],
            tokens=_rows_of(inputs.text_lengths.numpy(), first),
            regions=_rows_of(inputs.region_lengths.numpy(), first),
        )

    def pack(self, images: Int64s, captions: Int64s) -> PackedInputs:
        """Pairs of image numbers [S] and caption rows [S], one packed sample each."""
        distinct, places = np.unique(images, return_inverse=True)
        features, locations, lengths = self._regions(distinct)
        rows = _rows_of(lengths.numpy(), places)
        ids, text_lengths = self._texts(captions)
        return PackedInputs(
            input_ids=ids,
            token_type_ids=torch.zeros_like(ids),
            text_lengths=text_lengths,
            region_features=features[rows],
            region_locations=locations[rows],
            region_lengths=lengths[places],
        )

    def texts_alone(self, captions: Int64s) -> PackedInputs:
        """Caption rows [T], each alone."""
        return texts_alone(*self._texts(captions), self.store.schema.feature_size)

    def images_alone(self, images: Int64s) -> PackedInputs:
        """Image numbers [I], each alone."""
        return images_alone(*self._regions(images))

    def _regions(self, images: Int64s) -> tuple[Tensor, Tensor, Tensor]:
        return region_rows(self.store.views([self.pairs.image_ids[i] for i in images], self.max_regions), self.max_regions)

    def _texts(self, captions: Int64s) -> tuple[Tensor, Tensor]:
        """[CLS] caption [SEP] of each, end to end, and their lengths."""
        marks = self.vocabulary.cls_id, self.vocabulary.sep_id
        ids = [marked(self.tokens[row].astype(np.int64), None, *marks) for row in captions.tolist()]
        return torch.from_numpy(np.concatenate(ids)), torch.tensor([len(one) for one in ids], dtype=torch.int64)


def _rows_of(lengths: Int64s, places: Int64s) -> Tensor:
    """Rows of the images or texts ``places`` [S], one after the other, where the i-th has ``lengths[i]`` rows."""
    starts = np.cumsum(lengths) - lengths
    taken = lengths[places]
    offsets = np.repeat(starts[places] - (np.cumsum(taken) - taken), taken)
    return torch.from_numpy(offsets + np.arange(int(taken.sum()), dtype=np.int64))
