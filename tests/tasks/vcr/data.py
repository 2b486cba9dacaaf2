"""Questions about composed scenes, with regions of features that tell an object's kind: no picture is drawn and no detector runs."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megainter.data.feature_store.record import RegionRecord, StoreSchema
from megainter.data.feature_store.writer import FeatureStoreWriter, seal_store
from megainter.data.tables.questions import Question, read_questions, write_questions
from megainter.data.text.vocabulary import train_vocabulary
from megainter.model.configuration import InterBertConfig
from megainter.model.interbert import InterBertForPreTraining
from megainter.tasks.vcr.inputs import NAMES, object_words, spoken
from preprocessing.scenes.questions import class_names, scene_questions
from preprocessing.scenes.scenes import SCENE_SIZE, Scene, compose, glyphs
from tests.synthetic import TINY

FEATURE_SIZE = 32
CLASSES = ("__background__", "thing")


@dataclass(frozen=True)
class VcrFiles:
    """What ``write_scene_questions`` wrote; ``ambiguous`` are ids of questions whose tags do not tell who is meant."""

    questions: Path
    store: Path
    objects_store: Path
    ambiguous: frozenset[str]


def write_scene_questions(folder: Path, scenes: dict[str, int], seed: int = 0, noise: float = 0.1) -> VcrFiles:
    """Questions of ``scenes`` (split -> number), a store of shuffled, slightly moved boxes, and one of the objects' own boxes."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([seed, 77])
    prototypes = rng.standard_normal((len(glyphs()), FEATURE_SIZE)).astype(np.float32)
    schema = StoreSchema(FEATURE_SIZE, len(CLASSES), CLASSES, "synthetic")
    files = VcrFiles(folder / "questions.parquet", folder / "regions.store", folder / "objects.store", frozenset())
    rows: list[Question] = []
    ambiguous: set[str] = set()
    index = 0
    with FeatureStoreWriter(files.store, schema) as detected, FeatureStoreWriter(files.objects_store, schema) as given:
        for split, count in scenes.items():
            for _ in range(count):
                scene, image_id = compose(seed, index), f"scene-{index:06d}"
                order = rng.permutation(len(scene.objects))
                detected.add(image_id, record(rng, scene, order, prototypes, noise, shift=1.5))
                given.add(image_id, record(rng, scene, np.arange(len(order)), prototypes, noise, shift=0.0))
                for made in scene_questions(scene, seed, index, 3):
                    question_id = f"{split}-{len(rows)}"
                    ambiguous |= {question_id} if made.ambiguous else set()
                    rows.append(as_question(question_id, image_id, split, scene, made))
                index += 1
    seal_store(files.store)
    seal_store(files.objects_store)
    write_questions(files.questions, rows)
    return VcrFiles(files.questions, files.store, files.objects_store, frozenset(ambiguous))


def record(rng: np.random.Generator, scene: Scene, order: np.ndarray, prototypes: np.ndarray, noise: float, shift: float) -> RegionRecord:
    boxes = np.array([scene.objects[i].box for i in order], dtype=np.float32) + shift * rng.standard_normal((len(order), 4))
    kinds = [scene.objects[i].kind for i in order]
    features = prototypes[kinds] + noise * rng.standard_normal((len(order), FEATURE_SIZE))
    probs = np.tile(np.array([0.1, 0.9], np.float32), (len(order), 1))
    boxes = boxes.clip(0, SCENE_SIZE).astype(np.float32)
    return RegionRecord(boxes, features.astype(np.float16), probs, SCENE_SIZE, SCENE_SIZE)


def as_question(question_id: str, image_id: str, split: str, scene: Scene, made) -> Question:
    tokens = lambda words: tuple(word if isinstance(word, str) else tuple(word) for word in words)  # noqa: E731
    labels = (made.answer_label, made.rationale_label) if split != "test" else (-1, -1)
    answers, rationales = (tuple(tokens(choice) for choice in choices) for choices in (made.answers, made.rationales))
    image, metadata = f"{image_id}.jpg", f"{image_id}.json"
    objects = tuple(class_names(scene))
    return Question(question_id, image_id, image, metadata, split, objects, tokens(made.question), answers, rationales, *labels)


def texts_of(path: Path) -> list[str]:
    """Everything that is said in a file of questions, names among it."""
    questions = read_questions(path)
    lines = [" ".join(NAMES)] * 2
    for row in range(len(questions)):
        question = questions[row]
        names = object_words(question)
        for tokens in (question.question, *question.answers, *question.rationales):
            lines.append(" ".join(word for word, _ in spoken(tokens, names)))
    return lines


def write_start(folder: Path, questions: Path, feature_size: int = FEATURE_SIZE, classes: int = len(CLASSES), **changes: object) -> Path:
    """A pretraining model with fresh weights, its vocabulary trained on the questions."""
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = train_vocabulary(texts_of(questions), 600, folder / "vocab.txt")
    (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": True}))
    size = len(vocabulary.read_text().splitlines())
    torch.manual_seed(0)
    sizes = {"vocab_size": size, "region_feature_size": feature_size, "num_region_classes": classes, "max_position_embeddings": 96}
    InterBertForPreTraining(InterBertConfig(**(TINY | sizes | changes))).save_pretrained(folder)
    return folder
