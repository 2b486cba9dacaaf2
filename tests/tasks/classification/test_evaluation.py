"""Figures, batches and evaluation against definitions written out, transformers' tokenizer and the padded door. Training: the next file."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import BertTokenizerFast

from megainter import InterBertConfig, InterBertForSequenceClassification
from megainter.data.feature_store import FeatureStore
from megainter.data.packed import region_rows
from megainter.data.stream.portions import Portions
from megainter.data.tables.labelled import Example, TaskFacts, answer_accuracy, read_examples, write_examples
from megainter.data.text.vocabulary import load_vocabulary
from megainter.errors import MegainterError, NumericsError, TooManyBadInputsError, UsageError
from megainter.tasks.classification import evaluation
from megainter.tasks.classification.batches import ClassificationStream, EncodedExamples, encode_examples, encode_texts
from megainter.tasks.classification.evaluation import BatchScorer
from megainter.tasks.classification.head import describe_classifier
from megainter.tasks.classification.metrics import by_kind, figures
from megainter.tasks.classification.options import ClassificationEvaluation
from megainter.tasks.classification.report import ClassificationReport
from tests.synthetic import FEATURE_SIZE, write_data
from tests.tasks.classification.data import WORDS, write_image_pairs, write_questions, write_reviews, write_start


def evaluate(model: Path, examples: Path, store: Path | None = None, **given: Any) -> ClassificationReport:
    return evaluation.evaluate(model, ClassificationEvaluation(examples=examples, store=store, **given))


def examples_of(path: Path, rows: list[Example], task: TaskFacts, split: str | None = None) -> EncodedExamples:
    """Rows written, read and encoded with no vocabulary to speak of."""
    write_examples(path, rows, task)
    start = write_start(path.parent / "start")
    return encode_examples(read_examples(path, split), task.classes, load_vocabulary(start), 16, None, 6, FEATURE_SIZE)


def test_single_label_figures_by_their_definitions(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    truth, given = rng.integers(0, 2, 97), rng.integers(0, 2, 97)
    rows = [Example(f"e{n}", "film", labels=(str(label),), targets=(1.0,)) for n, label in enumerate(truth)]
    labels = examples_of(tmp_path / "e.parquet", rows, TaskFacts("t", "single_label", ("0", "1"), "f1")).labels
    found = figures(labels, given.astype(float))
    tp, tn = int((truth & given).sum()), int(((1 - truth) & (1 - given)).sum())
    fp, fn = int(((1 - truth) & given).sum()), int((truth & (1 - given)).sum())
    assert found["accuracy"] == (tp + tn) / 97
    assert found["f1"] == pytest.approx(2 * tp / (2 * tp + fp + fn), abs=1e-12)
    matthews = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert found["matthews"] == pytest.approx(matthews, abs=1e-12)
    assert set(found) == {"accuracy", "f1", "matthews"}
    assert figures(labels, np.ones(97))["matthews"] == 0.0


def test_consistency_is_of_whole_groups_and_kinds_are_apart(tmp_path: Path) -> None:
    truth, given = [0, 1, 1, 0, 1, 0], [0, 1, 1, 1, 1, 0]
    kinds = [("matched",), ("matched",), ("mismatched",), ("mismatched",), (), ()]
    rows = [
        Example(f"e{n}", "film", labels=(str(label),), targets=(1.0,), kinds=kinds[n], group="abbacc"[n]) for n, label in enumerate(truth)
    ]
    labels = examples_of(tmp_path / "e.parquet", rows, TaskFacts("t", "single_label", ("0", "1"), "accuracy")).labels
    given_numbers = np.array(given, dtype=float)
    assert figures(labels, given_numbers)["consistency"] == pytest.approx(2 / 3), "group a has one wrong, b and c none"
    apart = by_kind(labels, given_numbers, "accuracy")
    assert apart == {"matched": {"examples": 2, "accuracy": 1.0}, "mismatched": {"examples": 2, "accuracy": 0.5}}


def test_correlations_by_their_definitions(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    truth = rng.integers(0, 6, 40).astype(float)  # with ties
    given = truth + rng.normal(0, 2, 40)
    rows = [Example(f"e{n}", "film", targets=(float(value),)) for n, value in enumerate(truth)]
    labels = examples_of(tmp_path / "e.parquet", rows, TaskFacts("t", "regression", (), "spearman")).labels
    found = figures(labels, given)

    def correlation(a: np.ndarray, b: np.ndarray) -> float:
        a, b = a - a.mean(), b - b.mean()
        return float((a * b).sum() / math.sqrt((a * a).sum() * (b * b).sum()))

    def ranks(values: np.ndarray) -> np.ndarray:
        return np.array([(values < value).sum() + ((values == value).sum() + 1) / 2 for value in values])

    assert found["pearson"] == pytest.approx(correlation(truth, given), abs=1e-12)
    assert found["spearman"] == pytest.approx(correlation(ranks(truth), ranks(given)), abs=1e-12)
    assert found["mean_squared_error"] == pytest.approx(((truth - given) ** 2).mean(), abs=1e-12)
    assert figures(labels, np.ones(40))["pearson"] == 0.0, "a constant has no correlation"


def test_answers_of_questions(tmp_path: Path) -> None:
    """An answer that is no class cannot be given; the annotators who gave it count all the same."""
    rows = [
        Example("a", "film", labels=("red", "pink"), targets=(1.0, 1 / 3), counts=(9, 1), kinds=("answer: other",)),
        Example("b", "film", labels=("red", "blue"), targets=(2 / 3, 1.0), counts=(2, 8), kinds=("answer: other",)),
        Example("c", "film", labels=("pink",), targets=(1.0,), counts=(10,), kinds=("answer: rare",)),
    ]
    encoded = examples_of(tmp_path / "e.parquet", rows, TaskFacts("t", "multi_label", ("red", "blue"), "vqa_accuracy"))
    found = figures(encoded.labels, np.array([0.0, 0.0, 1.0]))
    assert found["vqa_accuracy"] == pytest.approx((answer_accuracy(9) + answer_accuracy(2) + 0) / 3)
    assert found["soft_accuracy"] == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert by_kind(encoded.labels, np.array([0.0, 0.0, 1.0]), "vqa_accuracy")["answer: rare"] == {"examples": 1, "vqa_accuracy": 0.0}
    torch.testing.assert_close(encoded.targets(np.array([1, 2])), torch.tensor([[2 / 3, 1.0], [0.0, 0.0]]))


def test_texts_are_those_of_the_bert_tokenizer(tmp_path: Path) -> None:
    """Ids, token types and the cut of the longer text, around a limit of even room (an odd one's last token it gives otherwise)."""
    start = write_start(tmp_path / "start")
    tokenizer = BertTokenizerFast(vocab=str(start / "vocab.txt"), do_lower_case=True)
    rng = np.random.default_rng(2)
    words = [word for word in WORDS if word.isalpha()]
    pairs = [(" ".join(rng.choice(words, a)), " ".join(rng.choice(words, b))) for a in range(1, 14) for b in range(0, 14, 2)]
    first, second = [list(texts) for texts in zip(*pairs, strict=True)]
    texts = encode_texts(first, second, load_vocabulary(start), 15)
    for row, (one, two) in enumerate(pairs):
        expected = tokenizer(one, two or None, truncation=True, max_length=15)
        ids, types, lengths = texts.take(np.array([row]))
        assert ids.tolist() == expected["input_ids"], (one, two)
        assert types.tolist() == expected["token_type_ids"]
        assert lengths.tolist() == [len(expected["input_ids"])]


def encoded_reviews(folder: Path) -> EncodedExamples:
    examples = read_examples(write_reviews(folder / "reviews.parquet"), "train")
    return encode_examples(examples, ("bad", "good"), load_vocabulary(write_start(folder / "start")), 16, None, 6, FEATURE_SIZE)


def test_an_epoch_shows_every_example_once_at_any_world_size(tmp_path: Path) -> None:
    examples = encoded_reviews(tmp_path)
    stream = ClassificationStream(examples, Portions(3, 12, 2))
    shown = np.concatenate([stream.rows(step) for step in range(30)])[: 2 * len(examples)].reshape(2, -1)
    assert len(examples) == 180
    assert np.array_equal(np.sort(shown), np.tile(np.arange(180), (2, 1)))
    assert not np.array_equal(shown[0], shown[1])
    whole = texts_of(stream[4])
    for world in (2, 3):
        ranks = [ClassificationStream(examples, Portions(3, 12, 2), rank, world)[4] for rank in range(world)]
        assert [len(batches) for batches in ranks] == [6 // world] * world
        assert sorted(text for batches in ranks for text in texts_of(batches)) == sorted(whole)


def texts_of(batches: list) -> list[tuple[tuple[int, ...], int]]:
    """(ids, label) of every example of some batches."""
    return [
        (tuple(ids.tolist()), int(label))
        for batch in batches
        for ids, label in zip(batch.inputs.input_ids.split(batch.inputs.text_lengths.tolist()), batch.labels, strict=True)
    ]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """(folder, pairs, store) of 40 images."""
    folder = tmp_path_factory.mktemp("classification")
    return folder, *write_data(folder)


def write_classifier(folder: Path, examples: Path, start: Path, scale: float = 0.3) -> Path:
    """A random classifier for a table of examples, as fine-tuning would leave it."""
    read = read_examples(examples)
    config = InterBertConfig.from_pretrained(start)
    describe_classifier(config, read.task, read.images)
    config.max_text_tokens = 16
    torch.manual_seed(4)
    model = InterBertForSequenceClassification.from_pretrained(start, config=config)
    with torch.no_grad():
        for name, parameter in model.classifier.named_parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    model.save_pretrained(folder)
    for name in ("vocab.txt", "tokenizer_config.json"):
        (folder / name).write_bytes((start / name).read_bytes())
    return folder


@torch.no_grad()
def padded_logits(
    model: InterBertForSequenceClassification, example: Example, tokens: BertTokenizerFast, store: Path | None
) -> torch.Tensor:  # fmt: skip
    """Logits of one example by the padded door and transformers' tokenizer."""
    inputs = dict(tokens(example.text_a, example.text_b or None, truncation=True, max_length=16, return_tensors="pt"))
    if store is not None:
        with FeatureStore(store) as opened:
            features, locations, lengths = region_rows([opened[image] for image in example.images], 6)
        rows = int(lengths.max())
        padded = torch.zeros(len(lengths), rows, FEATURE_SIZE), torch.zeros(len(lengths), rows, 5), torch.zeros(len(lengths), rows)
        for number, (one, two) in enumerate(zip(features.split(lengths.tolist()), locations.split(lengths.tolist()), strict=True)):
            padded[0][number, : len(one)], padded[1][number, : len(one)], padded[2][number, : len(one)] = one.float(), two, 1
        shape = (lambda t: t[None]) if len(lengths) == 2 else (lambda t: t)
        inputs |= dict(zip(("region_features", "region_locations", "region_mask"), map(shape, padded), strict=True))
    return model(**inputs).logits[0]


@pytest.mark.parametrize(
    ("kind", "processes"),
    [("reviews", (1,)), ("questions", (1,)), ("pairs", (1, 3)), pytest.param("pairs", (1, 2, 3), marks=pytest.mark.slow)],
)
def test_predictions_are_those_of_the_padded_door(
    kind: str, processes: tuple[int, ...], data: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    """And the figures are equal to the last digit on one, two and three processes."""
    _, pairs, store = data
    write = {
        "reviews": lambda path: write_reviews(path, count=80),
        "questions": lambda path: write_questions(path, pairs),
        "pairs": lambda path: write_image_pairs(path, pairs, count=64),
    }[kind]
    examples, own = write(tmp_path / "examples.parquet"), store if kind != "reviews" else None
    start = write_start(tmp_path / "start")
    model = write_classifier(tmp_path / "model", examples, start)
    reports = [
        evaluate(model, examples, own, output=tmp_path / f"{n}.json", batch=5, processes=n, precision="fp32", device="cpu")
        for n in processes
    ]
    assert all((report.figures, report.by_kind) == (reports[0].figures, reports[0].by_kind) for report in reports)
    assert tuple(report.processes for report in reports) == processes
    table = pq.read_table(tmp_path / "1.predictions.parquet").to_pylist()
    loaded = InterBertForSequenceClassification.from_pretrained(model).eval()
    tokenizer = BertTokenizerFast(vocab=str(start / "vocab.txt"), do_lower_case=True)
    read = read_examples(examples, "val")
    assert len(table) == len(read) > 10
    for row, written in enumerate(table):
        logits = padded_logits(loaded, read[row], tokenizer, own)
        chance = (logits.sigmoid() if kind == "questions" else logits.softmax(0)).max(0)
        assert written["example_id"] == read[row].example_id
        assert written["prediction"] == read.task.classes[int(chance.indices)]
        assert written["score"] == pytest.approx(float(chance.values), abs=1e-5)
    right = [dict(zip(read[row].labels, read[row].targets, strict=True)).get(w["prediction"], 0.0) for row, w in enumerate(table)]
    figure = "soft_accuracy" if kind == "questions" else "accuracy"
    assert reports[0].figures[figure] == pytest.approx(np.mean(right), abs=1e-6)
    assert [w["right"] for w in table] == pytest.approx(right)


def test_evaluation_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = write_reviews(tmp_path / "reviews.parquet", count=80)
    model = write_classifier(tmp_path / "model", examples, write_start(tmp_path / "start"))
    whole = evaluate(model, examples, output=tmp_path / "whole.json", batch=4, processes=1)
    score, calls = BatchScorer.score, list[int]()

    def interrupted(self: BatchScorer, chunk: int) -> np.ndarray:
        calls.append(chunk)
        if len(calls) == 3:
            raise MegainterError("stopped")
        return score(self, chunk)

    monkeypatch.setattr(BatchScorer, "score", interrupted)
    with pytest.raises(MegainterError, match="stopped"):
        evaluate(model, examples, output=tmp_path / "cut.json", batch=4, processes=1)
    again = evaluate(model, examples, output=tmp_path / "cut.json", batch=4, processes=1)
    assert len(calls) == 3 + 5 - 2, "two of five batches were not done again"
    assert again.figures == whole.figures
    assert (tmp_path / "cut.predictions.parquet").read_bytes() == (tmp_path / "whole.predictions.parquet").read_bytes()


def test_hidden_labels_give_predictions_alone(tmp_path: Path) -> None:
    path = write_reviews(tmp_path / "reviews.parquet", count=40)
    model = write_classifier(tmp_path / "model", path, write_start(tmp_path / "start"))
    read = read_examples(path)
    hidden = [Example(read[row].example_id, read[row].text_a, split="test") for row in range(9)]
    write_examples(tmp_path / "test.parquet", hidden, read.task)
    report = evaluate(model, tmp_path / "test.parquet", output=tmp_path / "test.json", split="test")
    assert (report.figures, report.by_kind, report.count) == ({}, {}, 9)
    table = pq.read_table(tmp_path / "test.predictions.parquet").to_pylist()
    assert all(math.isnan(row["right"]) and row["prediction"] in ("bad", "good") for row in table)
    write_examples(tmp_path / "some.parquet", [*hidden, read[9]], read.task)
    with pytest.raises(UsageError, match="9 of 10 examples have no label"):
        evaluate(model, tmp_path / "some.parquet", output=tmp_path / "some.json", split=None)


def test_classes_are_told_by_their_names(tmp_path: Path) -> None:
    """A table whose classes stand in another order gives the same accuracy; a class that the model lacks is refused."""
    path = write_reviews(tmp_path / "reviews.parquet", count=80)
    model = write_classifier(tmp_path / "model", path, write_start(tmp_path / "start"))
    read = read_examples(path)
    rows = [read[row] for row in range(len(read))]
    write_examples(tmp_path / "turned.parquet", rows, TaskFacts("t", "single_label", ("good", "bad"), "accuracy"))
    one, two = (evaluate(model, file, output=tmp_path / "s.json").figures for file in (path, tmp_path / "turned.parquet"))
    assert one == two
    write_examples(tmp_path / "new.parquet", [Example("x", "film", labels=("odd",), targets=(1.0,), split="val")],
                   TaskFacts("t", "single_label", ("odd",), "accuracy"))  # fmt: skip
    with pytest.raises(UsageError, match="label 'odd' is none of the model's classes, bad, good"):
        evaluate(model, tmp_path / "new.parquet", output=tmp_path / "s.json")


def test_what_does_not_fit_is_refused(data: tuple[Path, Path, Path], tmp_path: Path) -> None:
    _, pairs, store = data
    start = write_start(tmp_path / "start")
    reviews, questions = write_reviews(tmp_path / "reviews.parquet", count=40), write_questions(tmp_path / "questions.parquet", pairs)
    model = write_classifier(tmp_path / "model", questions, start)
    output = tmp_path / "s.json"
    with pytest.raises(UsageError, match="is no classifier"):
        evaluate(start, reviews, output=output)
    with pytest.raises(UsageError, match=r"is for single_label, and .* was trained for multi_label_classification"):
        evaluate(model, reviews, output=output)
    with pytest.raises(UsageError, match="have images; give their regions as --store"):
        evaluate(model, questions, output=output)
    with pytest.raises(UsageError, match="give 5 to 24"):
        evaluate(model, questions, store, output=output, max_text_tokens=25)
    rows = [read_examples(questions)[0], Example("x", "what", images=("nowhere",), labels=("red",), targets=(1.0,), split="val")]
    write_examples(tmp_path / "missing.parquet", rows, read_examples(questions).task)
    with pytest.raises(
        TooManyBadInputsError, match=r"1 of 2 examples are of images without regions .* first 'nowhere' \(the store has 'image-"
    ):
        evaluate(model, tmp_path / "missing.parquet", store, output=output, split=None, max_bad=0)
    assert evaluate(model, tmp_path / "missing.parquet", store, output=output, split=None).missing_examples == 1
    write_examples(tmp_path / "missing.parquet", rows[1:], read_examples(questions).task)
    with pytest.raises(TooManyBadInputsError, match=r"1 of 1 examples .* \(the store has 'image-\d+' and others\); they meet in no form"):
        evaluate(model, tmp_path / "missing.parquet", store, output=output, split=None, max_bad=1)


def test_scores_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    path = write_reviews(tmp_path / "reviews.parquet", count=40)
    model = write_classifier(tmp_path / "model", path, write_start(tmp_path / "start"), scale=float("nan"))
    with pytest.raises(NumericsError, match="the score of example 'r"):
        evaluate(model, path, output=tmp_path / "s.json")


def test_the_summary_is_one_line() -> None:
    values: dict[str, Any] = dict.fromkeys(ClassificationReport.__dataclass_fields__)
    report = ClassificationReport(**values | {"task": "rte", "count": 277, "figures": {"mean_squared_error": 0.5}, "predictions": "p"})
    assert evaluation.summary(report) == "rte, 277 examples: mean squared error 0.5000 (p)"
