"""The model card of a converted folder: valid for the Hub, true to what is known, and silent where nothing is."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from megainter.cli import main
from megainter.conversion.card import Card, CardOptions, command_of
from megainter.conversion.hugging_face import convert_hugging_face
from megainter.conversion.zero import convert
from megainter.errors import UsageError
from megainter.model.folder import model_digest, read_config
from tests.conversion.test_zero import write_checkpoint
from tests.model.tiny import tiny_config, tiny_model
from tests.synthetic import environment

RECORDS = [
    {"kind": "train", "step": 5, "loss": 9.5, "msm_loss": 7.25, "itm_accuracy": 0.5, "samples_per_second": 70.0, "time": 1.0},
    {"kind": "validation", "step": 7, "loss": 8.125, "val_r_at_1": 0.25},
    {"kind": "train", "step": 7, "loss": 8.75, "msm_loss": 6.5, "itm_accuracy": 0.625, "samples_per_second": 71.0, "time": 2.0},
    {"kind": "train", "step": 9, "loss": 1.0, "msm_loss": 0.5},  # later than what was saved
]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder whose checkpoint is that of step 7."""
    folder = tmp_path / "run"
    write_checkpoint(folder, tiny_config(itc_size=5))
    (folder / "metrics.jsonl").write_text("\n".join([*map(json.dumps, RECORDS), '{"kind": "train", "st']))
    settings = {"training": {"steps": 300, "global_batch": 64, "seed": 7}, "optimizer": {"learning_rate": 0.001}, "model": {}}
    (folder / "config.json").write_text(json.dumps(settings))
    environment = {
        "python": "3.11.9",
        "packages": {"megainter": "0.1", "torch": "2.14.1"},
        "command": ["/bin/megainter", "pretrain", "a b"],
    }
    (folder / "environment.json").write_text(json.dumps(environment))
    (folder / "origin.json").write_text(json.dumps({"name": "hf:google-bert/bert-base-uncased@" + "b" * 40, "sha256": {}}))
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tiny_model(itc_size=5).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def report_of(model: Path, pairs: str = "captions.parquet", **changes: Any) -> dict[str, Any]:
    way = {"queries": 10, "candidates": 5, "r_at_1": 0.2, "r_at_5": 0.5, "r_at_10": 0.8125, "median_rank": 4, "chance_at_1": 0.1}
    return {
        "text_to_image": way,
        "image_to_text": way | {"r_at_1": 0.3},
        "images": 5,
        "captions": 10,
        "split": "test",
        "precision": "fp32",
        "model": str(model),
        "model_digest": model_digest(model),
        "pairs": pairs,
        "pairs_digest": "c" * 64,
        "prefilter": None,
    } | changes


def card_in(folder: Path) -> ModelCard:
    return ModelCard.load(folder / "README.md")


def test_without_anything_said_nothing_is_invented(model: Path, tmp_path: Path) -> None:
    convert_hugging_face(model, tmp_path / "out")
    card = card_in(tmp_path / "out")
    assert card.data.to_dict() == {"library_name": "transformers", "pipeline_tag": "feature-extraction", "tags": ["interbert"]}
    assert "## Training" not in card.text
    assert "## Evaluation" not in card.text
    assert f"{sum(p.numel() for p in tiny_model(itc_size=5).parameters()):,} parameters" in card.text


def test_what_is_said_stands_in_front(model: Path, tmp_path: Path) -> None:
    options = CardOptions(license="cc-by-nc-4.0", dataset=("nlphuji/flickr30k", "coco"), language=("en", "zh"), base_model="a/b")
    convert_hugging_face(model, tmp_path / "out", card=Card(options, command_of(["x/megainter", "convert", "hf", "it's here"])))
    card = card_in(tmp_path / "out")
    assert card.data.license == "cc-by-nc-4.0"
    assert card.data.datasets == ["nlphuji/flickr30k", "coco"]
    assert card.data.language == ["en", "zh"]
    assert card.data.base_model == "a/b"
    assert "megainter convert hf 'it'\"'\"'s here'" in card.text


def test_a_runs_card_has_the_last_figures_before_what_was_saved_and_its_start(run: Path, tmp_path: Path) -> None:
    convert(run, tmp_path / ".out.123.partial")  # as fine-tuning does, which gives it its name later
    card = card_in(tmp_path / ".out.123.partial")
    assert card.text.strip().startswith("# run\n")
    assert card.data.base_model == "google-bert/bert-base-uncased"
    training = card.text.split("## Training")[1].split("## ")[0]
    for row in ("| msm_loss | 6.5 |", "| loss | 8.75 |", "| loss | 8.125 |", "| val_r_at_1 | 0.25 |", "| training.seed | 7 |"):
        assert row in training, row
    for absent in ("samples_per_second", "7.25", "| loss | 1 |"):
        assert absent not in training, absent
    assert "megainter pretrain 'a b'" in training
    assert "megainter 0.1, torch 2.14.1, Python 3.11.9" in training


def test_how_a_model_is_used_depends_on_its_head(model: Path, tmp_path: Path) -> None:
    convert_hugging_face(model, tmp_path / "choice", head="choice")
    assert "AutoModelForMultipleChoice.from_pretrained" in card_in(tmp_path / "choice").text
    assert "InterBertForMultipleChoice.from_pretrained" in card_in(tmp_path / "choice").text
    assert card_in(tmp_path / "choice").data.pipeline_tag == "visual-question-answering"
    convert_hugging_face(model, tmp_path / "out")
    assert "model(**inputs).scores" in card_in(tmp_path / "out").text
    assert "encode_texts" in card_in(tmp_path / "out").text
    convert_hugging_face(tmp_path / "out", tmp_path / "later", head="choice")
    assert card_in(tmp_path / "later").data.pipeline_tag == "visual-question-answering"


def test_the_code_of_a_card_runs_as_it_stands(model: Path, tmp_path: Path) -> None:
    (model / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{n}" for n in range(45))]) + "\n")
    convert_hugging_face(model, tmp_path / "out", head="retrieval", cased=False)
    code = card_in(tmp_path / "out").text.split("```python\n")[1].split("```")[0] + "print(tuple(scores.shape), tuple(vectors.shape))"
    places = environment() | {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "out", capture_output=True, text=True, check=False, env=places)
    assert done.stdout.strip() == "(1,) (1, 5)", done.stderr


def test_evaluations_become_the_index_of_the_hub(model: Path, tmp_path: Path) -> None:
    (tmp_path / "scores.json").write_text(json.dumps(report_of(model, "/data/Flickr 8k.parquet")))
    convert_hugging_face(model, tmp_path / "out", card=Card(CardOptions(evaluation=(tmp_path / "scores.json",))))
    card = card_in(tmp_path / "out")
    found = {result.metric_name: result.metric_value for result in card.data.eval_results or []}
    assert found == {
        "text to image R@1": 20.0, "text to image R@5": 50.0, "text to image R@10": 81.25,
        "image to text R@1": 30.0, "image to text R@5": 50.0, "image to text R@10": 81.25,
    }  # fmt: skip
    index = card.data.to_dict()["model-index"]
    assert [entry["name"] for entry in index] == ["out"]
    assert index[0]["results"][0]["dataset"] == {
        "name": "Flickr 8k", "type": "flickr-8k", "config": "fp32", "split": "test",
        "args": {"images": 5, "captions": 10, "pairs_digest": "c" * 64},
    }  # fmt: skip
    assert "| Flickr 8k, test: 5 images (fp32) | image to text | 30.0% | 50.0% | 81.2% | 4 | 10.00% |" in card.text


def test_two_evaluations_on_one_data_set_are_told_apart_and_the_same_twice_is_refused(model: Path, tmp_path: Path) -> None:
    whole = report_of(model, "/data/Flickr 8k.parquet")
    paths = [tmp_path / name for name in ("all.json", "candidates.json", "again.json")]
    for path, more in zip(paths, ({}, {"prefilter": {"candidates": 20}}, {}), strict=True):
        path.write_text(json.dumps(whole | more))
    convert_hugging_face(model, tmp_path / "out", card=Card(CardOptions(evaluation=(paths[0], paths[1]))))
    results = card_in(tmp_path / "out").data.to_dict()["model-index"][0]["results"]
    assert [each["dataset"]["config"] for each in results] == ["fp32", "fp32, 20 candidates of a first stage"]
    assert [len(each["metrics"]) for each in results] == [6, 6]
    with pytest.raises(UsageError, match=r"all\.json and .*again\.json report the same evaluation, fp32; give one of them"):
        convert_hugging_face(model, tmp_path / "other", card=Card(CardOptions(evaluation=(paths[0], paths[2]))))


def test_the_index_has_the_name_that_the_card_has(run: Path, tmp_path: Path) -> None:
    convert(run, tmp_path / "model")
    (tmp_path / "scores.json").write_text(json.dumps(report_of(tmp_path / "model")))
    convert_hugging_face(tmp_path / "model", tmp_path / "out", card=Card(CardOptions(evaluation=(tmp_path / "scores.json",))))
    card = card_in(tmp_path / "out")
    (entry,) = card.data.to_dict()["model-index"]
    assert f"\n# {entry['name']}\n" in card.text


def test_an_evaluation_of_other_weights_or_none_at_all_is_refused(model: Path, tmp_path: Path) -> None:
    scores = tmp_path / "scores.json"
    card = Card(CardOptions(evaluation=(scores,)))
    scores.write_text(json.dumps(report_of(model) | {"model_digest": "0" * 64}))
    with pytest.raises(UsageError, match="measured with other weights"):
        convert_hugging_face(model, tmp_path / "out", card=card)
    assert not (tmp_path / "out").exists()
    scores.write_text(json.dumps({"accuracy": 1}))
    with pytest.raises(UsageError, match="no report of `megainter evaluate` that has figures"):
        convert_hugging_face(model, tmp_path / "out", card=card)


def test_reports_of_other_tasks_have_tables_of_their_own(model: Path, tmp_path: Path) -> None:
    same = {"model": str(model), "model_digest": model_digest(model), "split": "val", "precision": "bf16"}
    vcr = {"answer": 0.5, "rationale": 0.25, "both": None, "labelled": 40, "questions_file": "/d/vcr.parquet", "chance": {"both": 0.0625}}
    reviews = {
        "task": "sentiment",
        "figures": {"accuracy": 0.84437, "loss": 0.41},
        "count": 7,
        "examples": "reviews|.parquet",
        "store": None,
    }
    answers = reviews | {"task": "vqa", "figures": {"vqa_accuracy": 0.5}, "examples": "vqa.parquet", "store": "regions.store"}
    paths = []
    for name, report in (("a", vcr), ("b", reviews), ("c", answers), ("d", report_of(model))):
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(json.dumps(same | report))
    convert_hugging_face(model, tmp_path / "out", card=Card(CardOptions(evaluation=tuple(paths))))
    card = card_in(tmp_path / "out")
    assert "| vcr, val: 40 with labels (bf16) | 50.0% | 25.0% |  | 6.25% |" in card.text
    assert "| reviews/, val: 7 (bf16) | accuracy | 0.8444 |" in card.text
    assert [f"By `megainter evaluate {task}`:" in card.text for task in ("retrieval", "vcr", "classification")] == [True] * 3
    found = {(result.task_type, result.metric_name): result.metric_value for result in card.data.eval_results or []}
    assert found["visual-question-answering", "Q->A"] == 50.0
    assert ("visual-question-answering", "Q->AR") not in found
    assert found["text-classification", "accuracy"] == 0.8444
    assert found["visual-question-answering", "vqa accuracy"] == 0.5
    assert found["image-text-retrieval", "text to image R@1"] == 20.0

    paths[0].write_text(json.dumps(same | vcr | {"answer": None, "rationale": None}))
    with pytest.raises(UsageError, match="no report of `megainter evaluate` that has figures"):
        convert_hugging_face(model, tmp_path / "more", card=Card(CardOptions(evaluation=(paths[0],))))


def test_figures_of_the_weights_before_a_cast_say_so(model: Path, tmp_path: Path) -> None:
    (tmp_path / "scores.json").write_text(json.dumps(report_of(model)))
    convert_hugging_face(model, tmp_path / "half", dtype="bf16", card=Card(CardOptions(evaluation=(tmp_path / "scores.json",))))
    assert "(fp32, before this conversion)" in card_in(tmp_path / "half").text
    assert "parameters (bf16)" in card_in(tmp_path / "half").text


def test_a_card_that_people_went_on_with_goes_on_with_the_model(run: Path, tmp_path: Path) -> None:
    convert(run, tmp_path / "model", card=Card(CardOptions(license="mit")))
    (tmp_path / "scores.json").write_text(json.dumps(report_of(tmp_path / "model")))
    convert_hugging_face(tmp_path / "model", tmp_path / "told", card=Card(CardOptions(evaluation=(tmp_path / "scores.json",))))
    page = tmp_path / "told" / "README.md"
    page.write_text(page.read_text().replace("# run\n", "# Our shop's model\n") + "\n## Limits\n\nIt knows no shoes.\n")
    read_config(tmp_path / "told")  # a card may be changed: the folder is still whole
    convert_hugging_face(tmp_path / "told", tmp_path / "half", dtype="bf16", card=Card(CardOptions(language=("en",))))
    card = card_in(tmp_path / "half")
    assert (
        card.data.to_dict() | {"license": "mit", "language": ["en"], "base_model": "google-bert/bert-base-uncased"} == card.data.to_dict()
    )
    assert "# Our shop's model" in card.text
    assert "(bf16)" in card.text
    assert "It knows no shoes." in card.text
    assert "| msm_loss | 6.5 |" in card.text
    assert "model-index" not in card.data.to_dict()  # those figures were of the weights before
    assert "## Evaluation" not in card.text
    assert card.text.count("## How it was made") == 1


def test_hostile_names_stay_text(model: Path, tmp_path: Path) -> None:
    name = "a|b`<script>alert(1)</script>\n## Evil\n---\nlicense: mit.parquet"
    (tmp_path / "scores.json").write_text(json.dumps(report_of(model, name, split="x\n## Evil")))
    convert_hugging_face(model, tmp_path / "out", card=Card(CardOptions(evaluation=(tmp_path / "scores.json",))))
    card = card_in(tmp_path / "out")
    assert card.data.license is None
    assert "<script>" not in card.text
    assert "\n## Evil" not in card.text


@pytest.mark.parametrize(
    "wrong",
    [{"license": "Apache 2.0"}, {"license": "apache"}, {"language": ("english",)}, {"dataset": ("a/b/c",)}, {"base_model": "http://x"}],
)
def test_what_the_hub_would_not_take_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"give|did you mean apache-2\.0\?"):
        CardOptions(**wrong)


def test_from_the_command_line(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scores.json").write_text(json.dumps(report_of(model)))
    words = ["convert", "hf", str(model), str(tmp_path / "out"), "--license", "mit", "--language", "en", "--language", "zh"]
    words += ["--evaluation", str(tmp_path / "scores.json"), "--dataset", "a/b"]
    monkeypatch.setattr("sys.argv", ["megainter", *words])
    main(words)
    card = card_in(tmp_path / "out")
    assert (card.data.license, card.data.language, card.data.datasets) == ("mit", ["en", "zh"], ["a/b"])
    assert "megainter convert hf" in card.text
