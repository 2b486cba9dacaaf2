"""`--json` of the verbs that print tables: one object on standard output, and nothing else there."""

import json
from pathlib import Path
from typing import Any

import pytest

from megainter.cli import app
from megainter.errors import DamagedError
from tests.model.tiny import tiny_model
from tests.synthetic import open_store, write_data
from tests.tasks.retrieval.test_evaluation import write_model


def told(capsys: pytest.CaptureFixture[str], *words: object) -> Any:
    """The object that a command prints with ``--json``."""
    capsys.readouterr()
    app([*map(str, words), "--json"], exit_on_error=False, print_error=False, result_action="return_value")
    return json.loads(capsys.readouterr().out)


def test_features_show_tells_of_a_store_what_its_reader_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, path = write_data(tmp_path, images=12)
    facts = told(capsys, "features", "show", path)
    with open_store(path) as store:
        counts = [len(store[image_id]) for image_id in store.ids]
        assert (facts["images"], facts["regions"], facts["digest"]) == (12, sum(counts), store.digest)
        assert facts["images_by_region_count"] == {str(count): counts.count(count) for count in sorted(set(counts))}
        assert facts["schema"]["class_names"] == list(store.schema.class_names)
        assert facts["shards"] == store.shard_sizes()

        image_id = store.ids[3]
        record, shown = store[image_id], told(capsys, "features", "show", path, "--image", image_id)
        assert [each["box"] for each in shown["regions"]] == record.boxes.tolist()
        assert [each["probability"] for each in shown["regions"]] == record.class_probs.max(axis=1).tolist()


def test_features_check_lists_what_is_damaged_and_still_ends_with_its_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, path = write_data(tmp_path, images=12)
    assert told(capsys, "features", "check", path) == {"store": str(path), "records": 12, "wrong": []}

    with open_store(path) as store:
        value = store[store.ids[5]].features.tobytes()[:64]
        (shard,) = [path / name for name in store.shard_sizes()]
    content = (shard / "data.mdb" if shard.is_dir() else shard).read_bytes()
    assert content.count(value) == 1
    (shard / "data.mdb" if shard.is_dir() else shard).write_bytes(content.replace(value, bytes(64)))
    with pytest.raises(DamagedError, match="1 of 12 records"):
        told(capsys, "features", "check", path)
    found = json.loads(capsys.readouterr().out)
    assert (found["records"], len(found["wrong"])) == (12, 1)


def test_a_plan_has_every_layout_and_the_recommended_one_is_among_them(capsys: pytest.CaptureFixture[str]) -> None:
    plan = told(capsys, "plan", "--config", "small", "--gpus", 8, "--gpu", "h100")
    best = [each for each in plan["layouts"] if each["memory"] == plan["memory"] and each["time"] == plan["time"]]
    assert len(best) == 1
    assert f"--engine.zero_stage {best[0]['layout']['stage']} " in f"{plan['settings']} "
    assert len(plan["layouts"]) > 3


def test_a_conversion_counts_every_tensor_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path / "ours")
    plan = told(capsys, "convert", "hf", tmp_path / "ours", tmp_path / "hf", "--head", "classification")
    assert sum(row["tensors"] for row in plan["taken"]) == len(dict(model.named_parameters()))
    assert plan["newly_initialised"] == [{"name": "classifier", "tensors": 2}]
    assert plan["missing"] == plan["not_understood"] == []


def test_an_evaluation_prints_the_report_that_it_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs, store = write_data(tmp_path, images=8)
    words = ["--pairs", pairs, "--store", store, "--split", "val", "--output", tmp_path / "scores.json", "--processes", 1]
    printed = told(capsys, "evaluate", "retrieval", write_model(tmp_path / "model", pairs), *words)
    assert printed == json.loads((tmp_path / "scores.json").read_text())


def test_without_the_option_the_table_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    app(["plan", "--config", "small", "--gpus", "8", "--gpu", "h100"], result_action="return_value")
    assert "recommended: --engine.zero_stage" in capsys.readouterr().out
