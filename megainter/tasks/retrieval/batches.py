"""Fine-tuning for retrieval: every caption with its own image, and beside it pairs that do not match.

The released code makes four pairs of a caption: its own; its image with a random caption; the caption with a random image; its image
with a caption of a similar image. Here the number of each kind is a setting. Which pairs sample n of epoch e has is a pure function of
(seed, e, n), as in pretraining.
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
from megainter.data.packed import PackedInputs, region_rows
from megainter.data.stream.negatives import negative_rows, same_text
from megainter.data.stream.order import Purpose, permuted, uniform
from megainter.data.stream.steps import GlobalSteps
from megainter.data.tables.pairs import Pairs
from megainter.data.text.layout import marked
from megainter.data.text.token_table import TokenTable
from megainter.data.text.vocabulary import VocabularyFacts
from megainter.errors import UsageError


@dataclass(frozen=True)
class GroupSettings:
    """How many pairs of each kind stand beside a caption's own, and the portions of a step (in captions)."""

    seed: int
    global_batch: int
    micro_batch: int
    random_captions: int
    random_images: int
    hard_captions: int
    hard_images: int
    micro_tokens: int | None = None

    @property
    def group(self) -> int:
        """Pairs of one caption, its own included."""
        return 1 + self.random_captions + self.random_images + self.hard_captions + self.hard_images

    @property
    def needs_neighbours(self) -> bool:
        return self.hard_captions + self.hard_images > 0


@dataclass(frozen=True)
class RetrievalBatch:
    """S captions with K pairs each, packed as S * K samples, a caption's pairs together and its own first. ``group`` is K."""

    inputs: PackedInputs
    group: int
    listwise: bool

    def counts(self) -> tuple[int]:
        """Pairs, or captions where they are compared as lists."""
        return (len(self.inputs) // self.group if self.listwise else len(self.inputs),)

    def tokens(self) -> int:
        """Real tokens, text and regions."""
        return len(self.inputs.input_ids) + len(self.inputs.region_features)

    def to(self, device: torch.device | str) -> "RetrievalBatch":
        """The same batch on ``device``, copied without waiting where its memory is pinned."""
        return replace(self, inputs=self.inputs.to(device))

    def pin_memory(self) -> "RetrievalBatch":
        """The same batch in page-locked memory (called by the loader)."""
        return replace(self, inputs=self.inputs.pin_memory())


@dataclass(frozen=True)
class Groups:
    """Images (numbers) and captions (rows) of S captions' pairs, int64 [S, K]; column 0 is the caption's own image and itself."""

    images: Int64s
    captions: Int64s


class RetrievalStream(Dataset[list[RetrievalBatch]]):
    """``stream[step]``: this rank's micro-batches of a global step. Endless; every epoch shows each caption once.

    ``neighbours`` int32 [images, k]: images with similar regions, by image number; needed where hard pairs are asked for.
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
        self.region_counts = store.region_counts(pairs.image_ids).clip(max=max_regions)
        self._rows_by_image = np.argsort(pairs.image_numbers, kind="stable").astype(np.int64)
        self._captions_of = np.bincount(pairs.image_numbers, minlength=len(pairs.image_ids))
        self._first_of = np.cumsum(self._captions_of) - self._captions_of
        self.steps = GlobalSteps(
            settings, len(pairs), lambda epochs, numbers: self.lengths(self._groups(epochs, numbers)), rank, world_size
        )

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, step: int) -> list[RetrievalBatch]:
        groups = self.groups(step)
        return [self._batch(groups, share) for share in self.steps.mine(self.lengths(groups))]

    def sample_ids(self, step: int) -> list[str]:
        """Pair ids of a global step's captions."""
        return [self.pairs.pair_id(row) for row in self.groups(step).captions[:, 0].tolist()]

    def places(self, step: int) -> list[Int64s]:
        """Places within the global step of the captions of each of this rank's micro-batches."""
        return self.steps.mine(self.lengths(self.groups(step)))

    def shown(self, step: int) -> list[str]:
        """Image id and caption of each of a global step's captions, its other pairs left out."""
        rows = self.groups(step).captions[:, 0].tolist()
        return [f"{self.pairs.image_id(row)}: {caption}" for row, caption in zip(rows, self.pairs.captions(rows), strict=True)]

    def groups(self, step: int) -> Groups:
        """All pairs of a global step, in the order of the sequence."""
        return self._groups(*self.steps.samples(step))

    def _groups(self, epochs: Int64s, numbers: Int64s) -> Groups:
        parts = [self._groups_of_epoch(int(epoch), numbers[epochs == epoch]) for epoch in np.unique(epochs)]
        return Groups(np.concatenate([part.images for part in parts]), np.concatenate([part.captions for part in parts]))

    def _groups_of_epoch(self, epoch: int, n: Int64s) -> Groups:
        settings, numbers = self.settings, self.pairs.image_numbers
        own = permuted(settings.seed, epoch, n, len(self.pairs))
        image = numbers[own].astype(np.int64)
        images, captions = [image], [own]
        for slot in range(1, settings.group):
            counter = n * settings.group + slot  # its own random numbers for every pair of a sample
            kind = self._kind(slot)
            other = self._random(own, epoch, counter) if kind.startswith("random") else self._similar(own, image, epoch, counter)
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

    def _similar(self, own: Int64s, image: Int64s, epoch: int, counter: Int64s) -> Int64s:
        """A caption of a similar image; a random one where that reads the same as the own."""
        other = self._caption_of(self._neighbour(image, epoch, counter), epoch, counter)
        twins = np.flatnonzero(same_text(self.pairs, own, other))
        other[twins] = self._random(own[twins], epoch, counter[twins])
        return other

    def _neighbour(self, images: Int64s, epoch: int, counter: Int64s) -> Int64s:
        assert self.neighbours is not None
        drawn = uniform(self.settings.seed, epoch, counter, Purpose.HARD_NEGATIVE) * self.neighbours.shape[1]
        return self.neighbours[images, drawn.astype(np.int64)].astype(np.int64)

    def _caption_of(self, images: Int64s, epoch: int, counter: Int64s) -> Int64s:
        drawn = (uniform(self.settings.seed, epoch, counter, Purpose.HARD_CHOICE) * self._captions_of[images]).astype(np.int64)
        return self._rows_by_image[self._first_of[images] + drawn]

    def lengths(self, groups: Groups) -> Int64s:
        """Real tokens of each caption's pairs, int64 [S]."""
        text = self.tokens.lengths[groups.captions].astype(np.int64) + 2
        return (text + self.region_counts[groups.images] + 1).sum(axis=1)

    def _batch(self, groups: Groups, share: Int64s) -> RetrievalBatch:
        inputs = self.pack(groups.images[share].ravel(), groups.captions[share].ravel())
        return RetrievalBatch(inputs, self.settings.group, self.listwise)

    def pack(self, images: Int64s, captions: Int64s) -> PackedInputs:
        """Pairs of image numbers [S] and caption rows [S], one packed sample each."""
        distinct, places = np.unique(images, return_inverse=True)
        features, locations, lengths = region_rows(
            self.store.views([self.pairs.image_ids[i] for i in distinct], self.max_regions), self.max_regions
        )
        rows = _rows_of(lengths.numpy(), places)
        marks = self.vocabulary.cls_id, self.vocabulary.sep_id
        ids = [marked(self.tokens[row].astype(np.int64), None, *marks) for row in captions.tolist()]
        packed = torch.from_numpy(np.concatenate(ids))
        text_lengths = torch.tensor([len(one) for one in ids], dtype=torch.int64)
        return PackedInputs(
            input_ids=packed,
            token_type_ids=torch.zeros_like(packed),
            text_lengths=text_lengths,
            region_features=features[rows],
            region_locations=locations[rows],
            region_lengths=lengths[places],
        )


def _rows_of(lengths: Int64s, places: Int64s) -> Tensor:
    """Rows of the images ``places`` [S], one image after the other, where image i has ``lengths[i]`` rows."""
    starts = np.cumsum(lengths) - lengths
    taken = lengths[places]
    offsets = np.repeat(starts[places] - (np.cumsum(taken) - taken), taken)
    return torch.from_numpy(offsets + np.arange(int(taken.sum()), dtype=np.int64))
