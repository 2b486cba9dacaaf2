"""A step of a fine-tuning run done again has the losses that the run recorded, to the bit."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.synthetic import environment, write_data
from tests.tasks.classification import data as classification


def megainter(*words: object) -> str:
    command = [sys.executable, "-m", "megainter", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment())
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def replayed(run: Path, step: int) -> dict[str, object]:
    found: dict[str, object] = json.loads(megainter("replay", run, "--step", step, "--against", "metrics", "--json"))
    return found


@pytest.mark.slow
def test_a_step_of_classification(tmp_path: Path) -> None:
    start, reviews = classification.write_start(tmp_path / "start"), classification.write_reviews(tmp_path / "reviews.parquet")
    words = classification.settings(start, reviews, tmp_path / "run", checkpoint__every_steps=5)
    megainter("finetune", "classification", *words)
    found = replayed(tmp_path / "run", 11)
    assert found["against_metrics"] == "the losses are the recorded ones, to the bit"
    assert found["begun_at"] == 10


@pytest.mark.slow
def test_a_step_of_retrieval(tmp_path: Path) -> None:
    pairs, store = write_data(tmp_path)
    start = classification.write_start(tmp_path / "start")
    given = {
        "output": tmp_path / "run", "data.pairs": pairs, "data.store": store, "data.workers": 0, "model.start_from": start,
        "training.steps": 8, "training.global_batch": 16, "training.micro_batch": 8, "training.log_every": 1, "checkpoint.every_steps": 5,
        "validation.every_steps": 0, "engine.precision": "fp32", "engine.zero_stage": 1, "tensorboard": "false",
    }  # fmt: skip
    megainter("finetune", "retrieval", *(word for key, value in given.items() for word in (f"--{key}", value)))
    found = replayed(tmp_path / "run", 7)
    assert found["against_metrics"] == "the losses are the recorded ones, to the bit"
    assert found["begun_at"] == 5
