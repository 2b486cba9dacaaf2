"""Labelled examples as packed batches: texts as BERT takes them, beside the regions of no image, one or two.

Shape letters: E examples, S samples (as many, or twice as many where an example has two images), K classes.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from megainter.data.feature_store.reader import FeatureStore
from megainter.data.integers import Int64s
from megainter.data.matching import Missing, accept_missing, some
from megainter.data.packed import PackedInputs, region_rows
from megainter.data.stream.portions import Portions
from megainter.data.stream.steps import GlobalSteps, shuffled
from megainter.data.tables.labelled import Examples
from megainter.data.text.layout import PAIR_MARKS, cut_pair, marked
from megainter.data.text.vocabulary import Vocabulary
from megainter.tasks.classification.metrics import Labels, labels_of

TEXTS_PER_ENCODING = 16_384


@dataclass(frozen=True, eq=False)
class Texts:
    """Texts end to end: ``ids`` int32 [Nt] with [CLS] and [SEP]; int64 [N] ``lengths``, and ``first_lengths``, the tokens of type 0."""

    ids: NDArray[np.int32]
    lengths: Int64s
    first_lengths: Int64s

    def take(self, rows: Int64s) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Packed int64 ids, token types and lengths of some texts, in the order asked for."""
        starts = np.cumsum(self.lengths) - self.lengths
        ids = np.concatenate([self.ids[start : start + length] for start, length in zip(starts[rows], self.lengths[rows], strict=True)])
        parts = zip(self.first_lengths[rows], self.lengths[rows], strict=True)
        types = np.concatenate([np.arange(length) >= first for first, length in parts])
        lengths = torch.from_numpy(self.lengths[rows])
        return torch.from_numpy(ids.astype(np.int64)), torch.from_numpy(types.astype(np.int64)), lengths


def encode_texts(first: list[str], second: list[str], vocabulary: Vocabulary, max_tokens: int) -> Texts:
    """[CLS] first [SEP], and second [SEP] where it is not empty, cut to ``max_tokens``: of a pair the longer text is cut first."""
    marks = vocabulary.facts.cls_id, vocabulary.facts.sep_id
    parts, first_lengths = list[NDArray[np.int32]](), []
    for start in range(0, len(first), TEXTS_PER_ENCODING):
        ones = vocabulary.encode(first[start : start + TEXTS_PER_ENCODING], max_tokens - 2)
        twos = vocabulary.encode(second[start : start + TEXTS_PER_ENCODING], max_tokens - PAIR_MARKS)
        for one, two in zip(ones, twos, strict=True):
            left, right = cut_pair(len(one), len(two), max_tokens - PAIR_MARKS) if len(two) else (len(one), 0)
            parts.append(marked(one[:left], two[:right] if len(two) else None, *marks))
            first_lengths.append(left + 2)
    lengths = np.array([len(part) for part in parts], dtype=np.int64)
    return Texts(np.concatenate(parts), lengths, np.array(first_lengths, dtype=np.int64))


@dataclass(frozen=True)
class LabelledBatch:
    """E examples. ``labels``: int64 [E] classes, float32 [E, K] soft labels, or float32 [E] values. A filler is not ``counted``."""

    inputs: PackedInputs
    labels: torch.Tensor
    counted: bool = True

    def counts(self) -> tuple[int]:
        """Examples."""
        return (len(self.labels) if self.counted else 0,)

    def tokens(self) -> int:
        """Real tokens, text and regions."""
        return len(self.inputs.input_ids) + len(self.inputs.region_features)

    def to(self, device: torch.device | str) -> "LabelledBatch":
        """The same batch on ``device``, copied without waiting where its memory is pinned."""
        return replace(self, inputs=self.inputs.to(device), labels=self.labels.to(device, non_blocking=True))

    def pin_memory(self) -> "LabelledBatch":
        """The same batch in page-locked memory (called by the loader)."""
        return replace(self, inputs=self.inputs.pin_memory(), labels=self.labels.pin_memory())


@dataclass(frozen=True, eq=False)
class EncodedExamples:
    """Examples ready to be packed. ``image_ids``: N tuples of as many ids as ``images``; ``store`` is None where that is 0."""

    texts: Texts
    labels: Labels
    images: int
    image_ids: tuple[tuple[str, ...], ...]
    store: FeatureStore | None
    max_regions: int
    feature_size: int
    example_ids: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.texts.lengths)

    def lengths(self) -> Int64s:
        """Real tokens of each example, text and regions, over all its images."""
        text = self.texts.lengths * max(self.images, 1)
        if self.store is None:
            return text
        counts = self.store.region_counts([image for images in self.image_ids for image in images]).clip(max=self.max_regions) + 1
        return text + np.asarray(counts, dtype=np.int64).reshape(len(self), -1).sum(1)

    def batch(self, rows: Int64s, counted: bool = True) -> LabelledBatch:
        """Some examples, in the order asked for."""
        return LabelledBatch(self.inputs(rows), self.targets(rows), counted)

    def inputs(self, rows: Int64s) -> PackedInputs:
        """Some examples as packed samples; an example of two images is two samples, its text beside each of them."""
        texts = self.texts.take(np.repeat(rows, max(self.images, 1)))
        if self.store is None:
            none = torch.zeros(0, self.feature_size), torch.zeros(0, 5), torch.zeros(len(rows), dtype=torch.int64)
            return PackedInputs(*texts, *none)
        images = [image for row in rows for image in self.image_ids[row]]
        return PackedInputs(*texts, *region_rows(self.store.views(images, self.max_regions), self.max_regions))

    def targets(self, rows: Int64s) -> torch.Tensor:
        """What the model should say of some examples; where a label is not public, anything."""
        if self.labels.problem == "multi_label":
            soft = torch.zeros(len(rows), len(self.labels.classes))
            for place, row in enumerate(rows):
                for number, (target, _) in self.labels.scores[row].items():
                    soft[place, number] = target
            return soft
        values = torch.from_numpy(np.nan_to_num(self.labels.values[rows]))
        return values.long() if self.labels.problem == "single_label" else values.float()


def encode_examples(
    examples: Examples,
    classes: tuple[str, ...],
    vocabulary: Vocabulary,
    max_tokens: int,
    store: FeatureStore | None,
    max_regions: int,
    feature_size: int,
) -> EncodedExamples:
    """Encode all texts and number all labels by a model's ``classes``. ``UsageError`` where a label is none of them."""
    texts = encode_texts(examples.column("text_a"), examples.column("text_b"), vocabulary, max_tokens)
    image_ids = tuple(tuple(images) for images in examples.column("images"))
    labels = labels_of(examples, classes)
    return EncodedExamples(
        texts=texts,
        labels=labels,
        images=examples.images,
        image_ids=image_ids,
        store=store if examples.images else None,
        max_regions=max_regions,
        feature_size=feature_size,
        example_ids=tuple(examples.column("example_id")),
    )


class ClassificationStream(Dataset[list[LabelledBatch]]):
    """``stream[step]``: this rank's micro-batches of a global step. Endless, and a pure function of its arguments.

    Every epoch shows each example once, in an order of its own; the steps are ``GlobalSteps``.
    """

    def __init__(self, examples: EncodedExamples, portions: Portions, rank: int = 0, world_size: int = 1) -> None:
        self.examples, self._seed, self._lengths = examples, portions.seed, examples.lengths()
        self.steps = GlobalSteps(
            portions, len(examples), lambda epochs, numbers: self._lengths[self._rows(epochs, numbers)], rank, world_size
        )

    def __getitem__(self, step: int) -> list[LabelledBatch]:
        rows = self.rows(step)
        return [self.examples.batch(rows[share]) for share in self.steps.mine(self._lengths[rows])]

    def sample_ids(self, step: int) -> list[str]:
        """Example ids of a global step."""
        return [self.examples.example_ids[row] for row in self.rows(step).tolist()]

    def places(self, step: int) -> list[Int64s]:
        """Places within the global step of the examples of each of this rank's micro-batches."""
        return self.steps.mine(self._lengths[self.rows(step)])

    def rows(self, step: int) -> Int64s:
        """The examples of a global step, int64 [global_batch]."""
        return self._rows(*self.steps.samples(step))

    def _rows(self, epochs: Int64s, numbers: Int64s) -> Int64s:
        return shuffled(self._seed, epochs, numbers, len(self.examples))


def fixed_batches(examples: EncodedExamples, size: int) -> list[Int64s]:
    """All examples in batches of ``size``, by length against padding: the same cut for any number of processes."""
    order = np.argsort(examples.lengths(), kind="stable")
    return [order[start : start + size] for start in range(0, len(order), size)]


def with_regions(examples: Examples, store: FeatureStore, limit: float, path: Path, option: str = "--data.max_bad") -> Examples:
    """Examples all of whose images have regions; raises as ``accept_missing`` where more than ``limit`` have not."""
    images = examples.column("images")
    missing = (store.find([image for row in images for image in row]) < 0).reshape(len(images), -1)
    lacking = missing.any(axis=1)
    if not lacking.any():
        return examples
    named = np.array(images, dtype=object)
    without, everything = dict.fromkeys(named[missing]), set(named.ravel())
    found = Missing("examples", int(lacking.sum()), len(images), some(without), len(without), len(everything))
    accept_missing(found, store, limit, path, option)
    return examples.take(np.flatnonzero(~lacking))
