"""VCR's questions as packed micro-batches: each question with its four choices, four packed samples one after the other.

Q: questions of a batch; S = 4 Q packed samples; K: the kinds that are trained (answers, rationales, or both).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from megainter.data.integers import Int64s
from megainter.data.packed import PackedInputs
from megainter.data.stream.order import permuted
from megainter.data.stream.portions import Portions
from megainter.data.stream.steps import GlobalSteps
from megainter.data.tables.questions import CHOICES, Question, Questions
from megainter.tasks.vcr.inputs import (
    ANSWER,
    KINDS,
    RATIONALE,
    ExampleSettings,
    ImageRegions,
    Stores,
    Text,
    WordPieces,
    choice_texts,
    image_regions,
)


@dataclass(frozen=True)
class ChoiceToMake:
    """One choice to make: the answer of question ``row``, or its rationale given answer ``given`` (-1: the right one)."""

    row: int
    kind: int
    given: int = -1


@dataclass(frozen=True)
class ChoiceBatch:
    """Q questions. ``labels`` int64 [Q]: the right choice (-1: not known); ``kinds`` int64 [Q]: place of each question's objective among
    the K. ``counted`` False marks a filler: run so that all ranks run as many forwards, and left out of every count."""

    inputs: PackedInputs
    labels: Tensor
    kinds: Tensor
    objectives: int
    counted: bool = True

    def counts(self) -> tuple[int, ...]:
        """Questions of each objective, K numbers: what its loss is divided by, summed over the global batch."""
        return tuple(torch.bincount(self.kinds, minlength=self.objectives).tolist()) if self.counted else (0,) * self.objectives

    def tokens(self) -> int:
        """Real tokens, text and regions."""
        return len(self.inputs.input_ids) + len(self.inputs.region_features)

    def to(self, device: torch.device | str) -> "ChoiceBatch":
        """The same batch on ``device``, copied without waiting where its memory is pinned."""
        labels, kinds = (tensor.to(device, non_blocking=True) for tensor in (self.labels, self.kinds))
        return replace(self, inputs=self.inputs.to(device), labels=labels, kinds=kinds)

    def pin_memory(self) -> "ChoiceBatch":
        """The same batch in page-locked memory (called by the loader)."""
        return replace(self, inputs=self.inputs.pin_memory(), labels=self.labels.pin_memory(), kinds=self.kinds.pin_memory())


@dataclass(frozen=True)
class Choice:
    """An item's question, its four texts, and which is right (-1: not known, or another answer than the right one is given)."""

    question: Question
    kind: int
    texts: list[Text]
    label: int


@dataclass(frozen=True)
class ChoiceSource:
    """Everything that items are made of; ``kinds`` are the K that are trained or scored, in the order of the objectives."""

    questions: Questions
    stores: Stores
    words: WordPieces
    settings: ExampleSettings
    kinds: tuple[int, ...]

    def of(self, item: ChoiceToMake) -> Choice:
        """The example of an item, without its image."""
        question = self.questions[item.row]
        given = question.answer_label if item.given < 0 else item.given
        texts = choice_texts(question, item.kind, given, self.words, self.settings.max_tokens(item.kind))
        rationale = question.rationale_label if given == question.answer_label else -1
        return Choice(question, item.kind, texts, question.answer_label if item.kind == ANSWER else rationale)

    def tokens(self, examples: Sequence[Choice]) -> Int64s:
        """Text tokens and regions of each example's four choices, without reading a record."""
        text = np.array([sum(len(choice.ids) for choice in example.texts) for example in examples])
        images = [example.question.image_id for example in examples]
        regions = self.stores.detected.region_counts(images).astype(np.int64)
        if self.stores.given is not None:
            regions += np.array([min(len(example.question.objects), self.settings.max_objects) for example in examples])
        return text + CHOICES * (1 + regions.clip(max=self.settings.max_regions))

    def collate(self, examples: Sequence[Choice], counted: bool = True) -> ChoiceBatch:
        """Examples as one micro-batch, with the regions of their images."""
        regions = [self._regions(example.question) for example in examples]
        inputs = pack([example.texts for example in examples], regions, self.settings.tie_objects)
        labels = torch.tensor([example.label for example in examples])
        places = torch.tensor([self.kinds.index(example.kind) for example in examples])
        return ChoiceBatch(inputs, labels, places, len(self.kinds), counted)

    def _regions(self, question: Question) -> ImageRegions:
        detected, given = self.stores.detected, self.stores.given
        most, image = self.settings.max_regions, [question.image_id]
        boxes = given.views(image, most)[0] if given is not None else None
        return image_regions(detected.views(image, most)[0], boxes, len(question.objects), self.settings)


def pack(texts: Sequence[list[Text]], regions: Sequence[ImageRegions], tie_objects: bool) -> PackedInputs:
    """Four packed samples for each question, every one with the question's image; tokens know their regions where ``tie_objects``."""
    flat = [(text, image) for choices, image in zip(texts, regions, strict=True) for text in choices]
    lengths = np.array([len(image.features) for _, image in flat])
    starts = np.cumsum(lengths) - lengths
    named = [_named_rows(text, image, int(start)) for (text, image), start in zip(flat, starts, strict=True)] if tie_objects else None
    return PackedInputs(
        input_ids=torch.from_numpy(np.concatenate([text.ids for text, _ in flat])),
        token_type_ids=torch.from_numpy(np.concatenate([text.types for text, _ in flat])),
        text_lengths=torch.tensor([len(text.ids) for text, _ in flat]),
        region_features=torch.cat([image.features for _, image in flat]),
        region_locations=torch.cat([image.locations for _, image in flat]),
        region_lengths=torch.from_numpy(lengths),
        text_regions=torch.from_numpy(np.concatenate(named)) if named is not None else None,
    )


def _named_rows(text: Text, image: ImageRegions, start: int) -> Int64s:
    """Packed row of the region that each token names, -1: none."""
    padded = np.concatenate([image.object_rows, [-1]])  # object -1 is none
    rows = padded[text.objects]
    return np.where(rows < 0, -1, start + rows)


class ChoiceStream(Dataset[list[ChoiceBatch]]):
    """``stream[step]``: the micro-batches of this rank at that global step (from 0). Endless, a pure function of its arguments.

    An epoch shows every question once for each kind; kinds take turns, each in an order of its own, so that a global batch has as many
    questions of one as of the other. What the samples are depends on neither rank nor world size.
    """

    def __init__(self, examples: ChoiceSource, portions: Portions, rank: int = 0, world_size: int = 1) -> None:
        self.examples, self._seed = examples, portions.seed
        self.steps = GlobalSteps(
            portions,
            len(examples.questions) * len(examples.kinds),
            lambda epochs, numbers: examples.tokens(self._examples(epochs, numbers)),
            rank,
            world_size,
        )

    @property
    def size(self) -> int:
        """Samples of an epoch: every question once for each kind."""
        return self.steps.size

    def __getitem__(self, step: int) -> list[ChoiceBatch]:
        examples = self._examples(*self.steps.samples(step))
        mine = self.steps.mine(self.examples.tokens(examples))
        return [self.examples.collate([examples[int(i)] for i in share]) for share in mine]

    def sample_ids(self, step: int) -> list[str]:
        """Question ids of a global step, each with what is asked of it."""
        return [f"{self.examples.questions[item.row].question_id} ({KINDS[item.kind]})" for item in self.items(step)]

    def places(self, step: int) -> list[Int64s]:
        """Places within the global step of the questions of each of this rank's micro-batches."""
        return self.steps.mine(self.examples.tokens(self._examples(*self.steps.samples(step))))

    def items(self, step: int) -> list[ChoiceToMake]:
        """All samples of a global step, in the order of the sequence."""
        return self._items(*self.steps.samples(step))

    def _examples(self, epochs: Int64s, numbers: Int64s) -> list[Choice]:
        return [self.examples.of(item) for item in self._items(epochs, numbers)]

    def _items(self, epochs: Int64s, numbers: Int64s) -> list[ChoiceToMake]:
        return [self._item(epoch, n) for epoch, n in zip(epochs.tolist(), numbers.tolist(), strict=True)]

    def _item(self, epoch: int, n: int) -> ChoiceToMake:
        kinds = self.examples.kinds
        place, turn = divmod(n, len(kinds))
        order = epoch * len(kinds) + turn  # an order for each kind in each epoch
        row = permuted(self._seed, order, np.array([place]), len(self.examples.questions))
        return ChoiceToMake(int(row[0]), kinds[turn])


def all_items(questions: Questions, kinds: Sequence[int], every_answer: bool) -> list[ChoiceToMake]:
    """What is scored of some questions: their answers, and their rationales given the right answer.

    Given each of the four answers where the right one is not known, or ``every_answer`` asks for it.
    """
    labels = questions.table.column("answer_label").to_pylist()
    return [item for row, label in enumerate(labels) for item in _items_of(row, kinds, every_answer or label < 0)]


def _items_of(row: int, kinds: Sequence[int], every_answer: bool) -> Iterator[ChoiceToMake]:
    if ANSWER in kinds:
        yield ChoiceToMake(row, ANSWER)
    if RATIONALE in kinds:
        yield from (ChoiceToMake(row, RATIONALE, given) for given in (range(CHOICES) if every_answer else (-1,)))


def right_choices(questions: Questions, items: Sequence[ChoiceToMake]) -> Int64s:
    """int64 [items]: the right choice of each, -1 where it is not known or another answer than the right one is given."""
    answers, rationales = (questions.table.column(f"{name}_label").to_numpy().astype(np.int64) for name in KINDS)
    rows, given = np.array([item.row for item in items]), np.array([item.given for item in items])
    given_right = (given < 0) | (given == answers[rows])
    asks_answer = np.array([item.kind == ANSWER for item in items])
    return np.where(asks_answer, answers[rows], np.where(given_right & (answers[rows] >= 0), rationales[rows], -1))
