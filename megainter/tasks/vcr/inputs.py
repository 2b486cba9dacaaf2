"""A question of VCR as the model takes it: words for the objects it points at, four texts of token ids, and the image's regions.

The released code draws the persons' names when it tokenises, so that a question's answers and rationales call one person by two names,
and it shortens the question for each further answer. Here names are a function of the question alone, and every choice is cut for itself.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from megainter.data.feature_store.reader import FeatureStore
from megainter.data.feature_store.record import RegionRecord
from megainter.data.feature_store.views import RegionViews
from megainter.data.matching import Missing, accept_missing, some
from megainter.data.packed import GLOBAL_LOCATION, image_locations
from megainter.data.tables.questions import Question, Questions, Tokens, read_questions
from megainter.data.text.layout import PAIR_MARKS, cut_pair, marked
from megainter.data.text.vocabulary import Vocabulary
from megainter.errors import UsageError
from megainter.model.configuration import InterBertConfig
from megainter.model.detector import require_same_detector

KINDS = ("answer", "rationale")
ANSWER, RATIONALE = range(len(KINDS))
MODES = {"joint": (ANSWER, RATIONALE), "answer": (ANSWER,), "rationale": (RATIONALE,)}  # what a model is trained for
FACTS = "vcr"  # where the model's config.json says how it was fine-tuned
PERSON = "person"
_BETWEEN = "and"  # of two objects that are pointed at together
# Given names in use for women and men alike; most are one entry of BERT's English vocabulary.
NAMES = (
    "alex", "sam", "robin", "kim", "jordan", "taylor", "morgan", "casey", "riley", "jamie", "avery", "cameron", "drew", "logan", "blake",
    "dana", "terry", "kelly", "tracy", "leslie", "shannon", "jessie", "pat", "chris", "lee", "ashley", "dylan", "quinn", "reese", "parker",
    "rowan", "sage", "skyler", "sydney", "peyton", "hayden", "harper", "kendall", "emerson", "finley", "devon", "corey", "jody", "kerry",
    "marion", "noel", "rory", "shawn", "stacy", "toby", "val", "whitney", "angel", "ariel", "aubrey", "bailey", "blair", "brett", "carey",
    "charlie", "dakota", "dale", "darcy", "eden", "ellis", "evan", "frankie", "gail", "glenn", "gray", "harley", "hollis", "jackie", "jan",
    "jean", "jo", "jules", "kit", "lane", "lindsay", "lynn", "mackenzie", "max", "merle", "micah", "nicky", "ollie", "paris", "phoenix",
    "ray", "remy", "ricky", "river", "robbie", "sasha", "shea", "sidney", "tatum", "teddy", "tyler",
)  # fmt: skip


@dataclass(frozen=True)
class ExampleSettings:
    """How long texts and how many regions the model sees, and whether tokens are told the region they name.

    ``max_regions`` counts all but the global region; at most ``max_objects`` of them are annotated objects.
    """

    max_answer_tokens: int
    max_rationale_tokens: int
    max_regions: int
    max_objects: int
    tie_objects: bool

    def max_tokens(self, kind: int) -> int:
        return (self.max_answer_tokens, self.max_rationale_tokens)[kind]


def read_facts(config: InterBertConfig, folder: Path) -> tuple[ExampleSettings, str, bool]:
    """How a model was fine-tuned for VCR: settings, mode, and whether it sees annotated boxes; ``UsageError`` where it was not."""
    facts = getattr(config, FACTS, None)
    names = {field.name for field in fields(ExampleSettings)}
    if not isinstance(facts, dict) or set(facts) != names | {"mode", "objects"} or facts["mode"] not in MODES:
        raise UsageError(f"{folder} was not fine-tuned for VCR (config.json says nothing of {FACTS!r}); `megainter finetune vcr` does that")
    return ExampleSettings(**{name: facts[name] for name in names}), facts["mode"], bool(facts["objects"])


@dataclass(frozen=True)
class Text:
    """Token ids and token types (0 = part A, 1 = part B), and the index of the object that each token names (-1: none); int64 [n] each."""

    ids: NDArray[np.int64]
    types: NDArray[np.int64]
    objects: NDArray[np.int64]


@dataclass(frozen=True)
class ImageRegions:
    """``features`` float16 [1 + n, F] and ``locations`` float32 [1 + n, 5], the global region first; ``object_rows`` int64 [objects]: the
    row of each annotated object, -1 where it has none."""

    features: torch.Tensor
    locations: torch.Tensor
    object_rows: NDArray[np.int64]


# --- text --------------------------------------------------------------------------------------------------------------------------


def object_words(question: Question) -> tuple[str, ...]:
    """What each object is called: a person by a name, drawn by question id and object index, anything else by its class.

    Persons of one question have different names (as long as there are names), the same in its answers and its rationales.
    """
    seed = int.from_bytes(hashlib.sha256(question.question_id.encode()).digest()[:8], "little")
    drawn = np.random.Generator(np.random.Philox(key=seed)).permutation(len(NAMES))
    return tuple(NAMES[drawn[i % len(NAMES)]] if kind == PERSON else kind for i, kind in enumerate(question.objects))


def spoken(tokens: Tokens, names: Sequence[str]) -> list[tuple[str, int]]:
    """Words, and the object that each names (-1: none); two objects that are pointed at together become "alex and sam"."""
    words: list[tuple[str, int]] = []
    for token in tokens:
        if isinstance(token, str):
            words.append((token, -1))
            continue
        for place, number in enumerate(token):
            words += [(_BETWEEN, -1)] * (place > 0) + [(names[number], number)]
    return words


@dataclass(frozen=True)
class WordPieces:
    """Token ids of every word of some questions, so that loader processes need no tokenizer; ``cls`` and ``sep`` are the specials' ids."""

    ids: dict[str, NDArray[np.int32]]
    cls: int
    sep: int

    @classmethod
    def of(cls, questions: Questions, vocabulary: Vocabulary) -> "WordPieces":
        """Each word for itself: WordPiece looks at no word's neighbours, so that this equals encoding the whole text."""
        table = questions.table
        tokens = [table.column("question"), *(pc.list_flatten(table.column(name)) for name in ("answers", "rationales"))]
        columns = [pc.struct_field(pc.list_flatten(column), "word") for column in tokens]
        columns.append(pc.list_flatten(table.column("objects")))
        words = {word for column in columns for word in pc.unique(column).to_pylist()} | {*NAMES, _BETWEEN}
        ordered = sorted(words)
        encoded = vocabulary.encode(ordered, max_tokens=1_000)
        facts = vocabulary.facts
        return cls(dict(zip(ordered, encoded, strict=True)), facts.cls_id, facts.sep_id)

    def part(self, words: list[tuple[str, int]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Ids and objects of some words, int64 [n] each."""
        pieces = [self.ids[word] for word, _ in words]
        objects = np.repeat([number for _, number in words], [len(piece) for piece in pieces])
        return np.concatenate([np.zeros(0, np.int64), *pieces]).astype(np.int64), objects.astype(np.int64)


def choice_texts(question: Question, kind: int, given: int, words: WordPieces, max_tokens: int) -> list[Text]:
    """The four texts to choose from: question and answer; or question, the answer ``given`` and rationale.

    [CLS] A [SEP] B [SEP], where A of a rationale is the question, [SEP] and the answer. Each is cut to ``max_tokens``, the longer
    part first.
    """
    names = object_words(question)
    ids, objects = words.part(spoken(question.question, names))
    if kind == RATIONALE:
        answer_ids, answer_objects = words.part(spoken(question.answers[given], names))
        ids, objects = np.concatenate([ids, [words.sep], answer_ids]), np.concatenate([objects, [-1], answer_objects])
    choices = question.answers if kind == ANSWER else question.rationales
    return [_text((ids, objects), words.part(spoken(tokens, names)), words, max_tokens) for tokens in choices]


def _text(
    a: tuple[NDArray[np.int64], NDArray[np.int64]], b: tuple[NDArray[np.int64], NDArray[np.int64]], words: WordPieces, max_tokens: int
) -> Text:
    n_a, n_b = cut_pair(len(a[0]), len(b[0]), max_tokens - PAIR_MARKS)
    types = np.repeat([0, 1], [n_a + 2, n_b + 1])
    ids, objects = (
        marked(of_a[:n_a], of_b[:n_b], *marks) for of_a, of_b, marks in zip(a, b, ((words.cls, words.sep), (-1, -1)), strict=True)
    )
    return Text(ids, types, objects)


# --- regions -----------------------------------------------------------------------------------------------------------------------


def image_regions(
    detected: RegionRecord | RegionViews, given: RegionRecord | RegionViews | None, objects: int, settings: ExampleSettings
) -> ImageRegions:
    """[global, detector's boxes, annotated boxes], where the annotated ones have the first claim on the places (released code).

    Each store's first boxes are taken. The global region's feature is the mean of the regions that are kept. ``given`` is the record
    of the annotated boxes, in the order of the question's ``objects``; a question without objects uses none of it.
    """
    n_given = min(objects, settings.max_objects, settings.max_regions) if given is not None else 0
    n_detected = min(len(detected), settings.max_regions - n_given)
    parts = [(detected, n_detected)] + ([(given, n_given)] if given is not None else [])
    features = np.concatenate([record.features[:kept] for record, kept in parts])
    mean = features.mean(0, dtype=np.float32) if len(features) else np.zeros(features.shape[1], np.float32)
    locations = [np.array([GLOBAL_LOCATION], dtype=np.float32), *(image_locations(record, kept) for record, kept in parts)]
    rows = np.full(objects, -1, dtype=np.int64)
    rows[:n_given] = 1 + n_detected + np.arange(n_given)
    packed = np.concatenate([mean[None], features]).astype(np.float16)
    return ImageRegions(torch.from_numpy(packed), torch.from_numpy(np.concatenate(locations)), rows)


# --- questions and stores that belong together -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stores:
    """The detector's regions, and those of the annotated boxes where there is such a store."""

    detected: FeatureStore
    given: FeatureStore | None

    @property
    def digests(self) -> dict[str, str]:
        """By the name that the settings call them."""
        return {"store": self.detected.digest} | ({"objects_store": self.given.digest} if self.given is not None else {})


def open_stores(store: Path, objects_store: Path | None) -> Stores:
    """Open one or both; ``UsageError`` where their features are of different sizes, or of different detectors."""
    detected, given = FeatureStore(store), FeatureStore(objects_store) if objects_store is not None else None
    if given is not None:
        require_same_detector(detected, given, "the annotated boxes' store")
    return Stores(detected, given)


def has_questions(path: Path, split: str) -> bool:
    """Whether a file of questions has any of ``split``."""
    return split in pc.unique(read_questions(path).table.column("split")).to_pylist()


def open_questions(path: Path, split: str | None, stores: Stores, max_bad: float, option: str = "--data.max_bad") -> tuple[Questions, str]:
    """The questions whose images have regions in all stores, and the digest of what was read (also of those left out).

    ``UsageError`` for two questions of one id and for annotated boxes that are not the question's objects;
    ``TooManyBadInputsError`` where more than ``max_bad`` of their images have no regions.
    """
    questions = read_questions(path, split)
    ids = questions.table.column("question_id")
    if pc.count_distinct(ids).as_py() != len(ids):
        raise UsageError(f"{path}: two questions of split {split!r} have one id; a question's scores are joined by its id")
    digest = _digest(questions.table)
    present = _with_regions(questions, stores, max_bad, path, option)
    _check_objects(present, stores, path)
    return present, digest


def _digest(table: pa.Table) -> str:
    """SHA-256 of the rows, whatever file they came from."""
    hashed = hashlib.sha256()
    for batch in table.combine_chunks().to_batches(max_chunksize=16_384):
        hashed.update(batch.serialize())
    return hashed.hexdigest()


def _with_regions(questions: Questions, stores: Stores, limit: float, path: Path, option: str) -> Questions:
    images = questions.table.column("image_id").to_pylist()
    present = np.ones(len(images), dtype=bool)
    for store in (store for store in (stores.detected, stores.given) if store is not None):
        missing = store.find(images) < 0
        present &= ~missing
        if missing.any():
            without = dict.fromkeys(images[row] for row in np.flatnonzero(missing))
            lacking = Missing("questions", int(missing.sum()), len(images), some(without), len(without), len(set(images)))
            accept_missing(lacking, store, limit, path, option)
    return Questions(questions.table.filter(pa.array(present)).combine_chunks()) if not present.all() else questions


def _check_objects(questions: Questions, stores: Stores, path: Path) -> None:
    """Box j of an image's record is object j of its questions: so there must be as many."""
    if stores.given is None:
        return
    table = questions.table
    objects = pc.list_value_length(table.column("objects")).to_numpy()
    boxes = stores.given.region_counts(table.column("image_id").to_pylist())
    wrong = np.flatnonzero((objects > 0) & (objects != boxes))  # an image without boxes has one region: all of it
    if len(wrong):
        question = questions[int(wrong[0])]
        raise UsageError(
            f"{path}: question {question.question_id!r} has {len(question.objects)} objects, and {stores.given.path} has "
            f"{int(boxes[wrong[0]])} boxes of {question.image_id!r}; extract the boxes that `prepare vcr --boxes` wrote for these questions"
        )


def require_labels(questions: Questions, kinds: Sequence[int], path: Path) -> None:
    """``UsageError`` where a question lacks a label that training on ``kinds`` needs (a rationale also needs the right answer)."""
    for column in {"answer_label", *(f"{KINDS[kind]}_label" for kind in kinds)}:
        labels = questions.table.column(column).to_numpy()
        if (labels < 0).any():
            first = questions[int((labels < 0).argmax())].question_id
            raise UsageError(f"{path}: question {first!r} has no {column}; the labels of test are not public, train on another split")
