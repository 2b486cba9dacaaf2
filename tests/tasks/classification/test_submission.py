"""The files that benchmarks' servers take, from files as the benchmarks have them to the file, with a model that decides at random."""

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from megainter.data.feature_store import FeatureStore
from megainter.data.feature_store.record import StoreSchema
from megainter.data.feature_store.writer import FeatureStoreWriter, seal_store
from megainter.data.tables.labelled import Example, TaskFacts, read_examples, write_examples
from megainter.errors import TooManyBadInputsError, UsageError
from megainter.tasks.classification import evaluation
from megainter.tasks.classification.options import ClassificationEvaluation
from megainter.tasks.classification.report import ClassificationReport
from megainter.tasks.classification.submission import submission_ids, write_submission
from preprocessing.prepare.labelled import Columns, Options, prepare_examples
from tests.synthetic import CLASSES, FEATURE_SIZE, write_data
from tests.tasks.classification.data import write_start
from tests.tasks.classification.test_evaluation import write_classifier

SCALE = 3.0  # of the classifier's weights, so that it does not say the same of all


def evaluate(model: Path, examples: Path, store: Path | None = None, **given: Any) -> ClassificationReport:
    return evaluation.evaluate(model, ClassificationEvaluation(examples=examples, store=store, **given))


def lines(path: Path, *rows: str) -> Path:
    path.write_text("".join(f"{row}\n" for row in rows))
    return path


def classifier(folder: Path, task: TaskFacts, images: tuple[str, ...] = ()) -> Path:
    """A model for a task, made from a labelled table of its own."""
    label = {"labels": task.classes[:1], "targets": (1.0,) * len(task.classes[:1])} if task.classes else {"targets": (1.0,)}
    write_examples(folder / "labelled.parquet", [Example("e", "a film", "the plot", images, split="train", **label)], task)
    return write_classifier(folder / "model", folder / "labelled.parquet", write_start(folder / "start"), SCALE)


def predicted(output: Path) -> dict[str, str]:
    return {row["example_id"]: row["prediction"] for row in pq.read_table(output.with_suffix(".predictions.parquet")).to_pylist()}


TEXTS = ("a great film", "the awful plot and the dull actor", "lovely", "poor scene, poor film", "fine", "the film is there", "what ?")
THREE_WAY = ("entailment", "neutral", "contradiction")
# Of a task of GLUE: its classes, the first line of its test file, and a row of number n with text t.
GLUE_TESTS = {
    "cola": (("0", "1"), "index\tsentence", "{n}\t{t}"),
    "mnli": (THREE_WAY, "index\tpromptID\tpairID\tgenre\tsentence1\tsentence2", "{n}\t1\t2\tx\t{t}\tthe film"),
    "qnli": (("entailment", "not_entailment"), "index\tquestion\tsentence", "{n}\t{t}\tthe plot"),
    "sts-b": ((), "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2", "{n}\tx\tx\tx\tx\tx\tx\t{t}\tfilm"),
}


@pytest.mark.parametrize("task", GLUE_TESTS)
def test_a_test_of_glue_becomes_the_server_s_table(tmp_path: Path, task: str) -> None:
    classes, header, row = GLUE_TESTS[task]
    src = lines(tmp_path / "test.tsv", header, *(row.format(n=n, t=text) for n, text in enumerate(TEXTS)))
    prepare_examples(task, [src], tmp_path / "test.parquet")  # type: ignore[arg-type]
    problem = ("single_label", classes, "accuracy") if classes else ("regression", (), "spearman")
    model = classifier(tmp_path, TaskFacts(task, *problem))  # type: ignore[arg-type]
    report = evaluate(
        model, tmp_path / "test.parquet", output=tmp_path / "s.json", split="test", submission=tmp_path / "x.tsv", processes=1
    )
    header, *rows = [line.split("\t") for line in (tmp_path / "x.tsv").read_text().splitlines()]
    assert header == ["index", "prediction"]
    assert [index for index, _ in rows] == [str(n) for n in range(len(TEXTS))]
    found = predicted(tmp_path / "s.json")
    if classes:
        assert [label for _, label in rows] == [found[f"test#{n + 2}"] for n in range(len(TEXTS))]
        assert {label for _, label in rows} <= set(classes)
    else:
        assert [float(value) for _, value in rows] == [min(max(float(found[f"test#{n + 2}"]), 0), 5) for n in range(len(TEXTS))]
    assert json.loads((tmp_path / "s.json").read_text())["submission"] == str(tmp_path / "x.tsv") == report.submission
    assert report.figures == {}


def test_rows_of_glue_that_are_missing_or_of_two_files_are_refused(tmp_path: Path) -> None:
    rows = [f"{n}\t1\t2\tx\t{text}\tfilm" for n, text in enumerate(TEXTS)]
    header = GLUE_TESTS["mnli"][1]
    one, two = lines(tmp_path / "test_matched.tsv", header, *rows), lines(tmp_path / "test_mismatched.tsv", header, *rows)
    prepare_examples("mnli", [one, two], tmp_path / "both")
    with pytest.raises(UsageError, match="holds rows of 'test_matched' and 'test_mismatched', and a submission is of one file"):
        submission_ids(tmp_path / "both", read_examples(tmp_path / "both", "test"))
    lines(one, header, *rows[:2], "2\ta line\twithout its cells", *rows[3:])
    prepare_examples("mnli", [one], tmp_path / "torn")
    with pytest.raises(UsageError, match="lacks line 4 of 'test_matched', and a submission has every row: see its report"):
        submission_ids(tmp_path / "torn", read_examples(tmp_path / "torn", "test"))
    named = Options(Columns("sentence", None, "label", None, None))
    prepare_examples("tsv", [lines(tmp_path / "x_train.tsv", "sentence\tlabel", "a\tyes", "b\tno")], tmp_path / "own", options=named)
    with pytest.raises(UsageError, match=r"--submission is for vqa, nlvr2 and GLUE's tasks, and .* is of 'tsv'"):
        submission_ids(tmp_path / "own", read_examples(tmp_path / "own"))


def store_of(path: Path, source: Path, names: list[str]) -> Path:
    """Regions of other images under these names."""
    other = FeatureStore(source)
    with FeatureStoreWriter(path, StoreSchema(FEATURE_SIZE, len(CLASSES), CLASSES, "synthetic")) as writer:
        writer.add_all([(name, other[other.ids[n]]) for n, name in enumerate(names)])
    seal_store(path)
    return path


@pytest.mark.parametrize(("subset", "folder"), [("test-dev2015", "test2015"), ("test2015", "test2015")])
def test_questions_of_vqa_s_test_are_kept_without_answers_and_answered(tmp_path: Path, subset: str, folder: str) -> None:
    """The one file of questions, without annotations: ids as numbers, in the file's order, answers as the model's classes read."""
    numbers = [262144007, 3, 99000, 12]
    questions = [{"image_id": 10 + n, "question": "what colours are there ?", "question_id": number} for n, number in enumerate(numbers)]
    src = tmp_path / f"v2_OpenEnded_mscoco_{subset}_questions.json"
    src.write_text(json.dumps({"questions": questions, "data_subtype": subset, "data_type": "mscoco"}))
    report = prepare_examples("vqa", [src], tmp_path / "test.parquet")
    assert (report.kept, report.splits) == (4, {"test": 4})
    assert read_examples(tmp_path / "test.parquet").task == TaskFacts("vqa", "multi_label", (), "vqa_accuracy")
    images = [f"COCO_{folder}_{10 + n:012d}" for n in range(4)]
    store = store_of(tmp_path / "s", write_data(tmp_path / "data")[1], images)
    classes = ("2", "yes", "café au lait", "no")
    model = classifier(tmp_path, TaskFacts("vqa", "multi_label", classes, "vqa_accuracy"), (images[0],))
    options = {"output": tmp_path / "s.json", "split": "test", "submission": tmp_path / "x.json", "processes": 1}
    evaluate(model, tmp_path / "test.parquet", store, **options)
    written = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))
    found = predicted(tmp_path / "s.json")
    assert written == [{"question_id": number, "answer": found[str(number)]} for number in numbers]
    assert {row["answer"] for row in written} <= set(classes)
    fewer = store_of(tmp_path / "fewer", write_data(tmp_path / "more")[1], images[1:])
    (tmp_path / "x.json").write_text("an earlier one")
    with pytest.raises(TooManyBadInputsError, match="1 of 4 examples"):
        evaluate(model, tmp_path / "test.parquet", fewer, **options, max_bad=0)
    with pytest.raises(UsageError, match="--submission needs all 4 examples, and 1 have no regions"):
        evaluate(model, tmp_path / "test.parquet", fewer, **options)
    assert (tmp_path / "x.json").read_text() == "an earlier one"


def test_statements_of_nlvr2_without_labels_are_judged_in_the_file_s_order(tmp_path: Path) -> None:
    names = ["test1-9-0-1", "test1-0-1-0", "test1-0-1-1"]
    src = lines(tmp_path / "test1.json", *(json.dumps({"identifier": name, "sentence": "red is left"}) for name in names))
    prepare_examples("nlvr2", [src], tmp_path / "test.parquet")
    images = [f"{pair}-img{side}" for pair in ("test1-9-0", "test1-0-1") for side in (0, 1)]
    store = store_of(tmp_path / "s", write_data(tmp_path / "data")[1], images)
    model = classifier(tmp_path, TaskFacts("nlvr2", "single_label", ("False", "True"), "accuracy"), (images[0], images[1]))
    evaluate(model, tmp_path / "test.parquet", store, output=tmp_path / "s.json", split="test", submission=tmp_path / "x.csv", processes=1)
    with open(tmp_path / "x.csv", newline="") as file:
        rows = list(csv.reader(file))
    found = predicted(tmp_path / "s.json")
    assert rows == [[name, found[name]] for name in names]
    assert {label for _, label in rows} <= {"False", "True"}


def test_a_table_of_test_questions_alone_cannot_be_trained_on(tmp_path: Path) -> None:
    row = Example("a", "film", labels=("x",), targets=(1.0,))
    with pytest.raises(UsageError, match=r"has the labels .* and the table has no classes"):
        write_examples(tmp_path / "e", [row], TaskFacts("vqa", "multi_label", (), "vqa_accuracy"))
    with pytest.raises(UsageError, match="regression has no classes, and here are 1"):
        write_examples(tmp_path / "e", [Example("a", "film")], TaskFacts("x", "regression", ("a",), "spearman"))


def test_what_cannot_be_written_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("old")
    with pytest.raises(ValueError, match="shorter"):
        write_submission(tmp_path / "x.json", "vqa", ["1", "2"], ["yes"])
    assert (tmp_path / "x.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
