"""A fine-tuned model that lies where it began is told of."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.utils import parameters_to_vector

from megainter import InterBertForPreTraining
from megainter.conversion.zero import convert, find_checkpoint
from megainter.tasks.moved import Moved, moved, told
from tests.conversion.test_zero import write_checkpoint
from tests.model.tiny import tiny_config
from tests.synthetic import environment, settings, train, write_data


def test_ways_from_the_start_against_whole_vectors(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "run", tiny_config(), ("weights", "ema", "exp_avg"))
    for kind in ("weights", "ema"):
        convert(tmp_path / "run", tmp_path / kind, ema=kind == "ema")
    torch.manual_seed(1)
    start = InterBertForPreTraining(tiny_config())
    start.save_pretrained(tmp_path / "start")

    found = moved(tmp_path / "start", find_checkpoint(tmp_path / "run"), averaged=True)
    begun = parameters_to_vector(start.parameters()).double()
    for kind, way in (("weights", found.weights), ("ema", found.result)):
        whole = parameters_to_vector(InterBertForPreTraining.from_pretrained(tmp_path / kind).parameters()).double()
        assert way == pytest.approx(float((whole - begun).norm() / begun.norm()), rel=1e-6)
    assert not found.hardly


def test_a_model_is_its_own_start(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "run", tiny_config())
    convert(tmp_path / "run", tmp_path / "start")
    assert moved(tmp_path / "start", find_checkpoint(tmp_path / "run"), averaged=False) == Moved(0.0, 0.0)


def test_what_is_hardly_moved_and_what_to_do() -> None:
    start = Path("start")
    assert not Moved(0.005, 0.006).hardly
    assert not Moved(math.inf, math.inf).hardly  # nothing in common: another matter
    averaged, slow = Moved(4e-6, 0.004), Moved(4e-4, 5e-4)
    assert averaged.hardly and "ema_decay" in told(averaged, start, 12)  # noqa: PT018 - of one case
    assert slow.hardly and "learning_rate" in told(slow, start, 12)  # noqa: PT018 - of one case
    assert Moved(0.02, 0.5).hardly  # the average stands far behind its weights


@pytest.mark.slow
def test_a_short_run_with_a_long_average_says_what_it_returns(tmp_path: Path) -> None:
    pairs, store = write_data(tmp_path, images=48)
    assert train(settings(pairs, store, tmp_path / "run", training__steps=4)).returncode == 0
    convert(tmp_path / "run", tmp_path / "model")
    for warmup in ("true", "false"):
        values = {"output": tmp_path / warmup, "data.pairs": pairs, "data.store": store, "model.start_from": tmp_path / "model",
                  "data.workers": 0, "training.steps": 12, "training.epochs": "none", "training.ema_warmup": warmup,
                  "training.ema_decay": 0.9999, "engine.precision": "fp32"}  # fmt: skip
        words = [text for name, value in values.items() for text in (f"--{name}", str(value))]
        command = [sys.executable, "-m", "megainter.finetune", "retrieval", "--config", "retrieval-small", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=environment())
        assert done.returncode == 0, done.stderr
        assert ("hardly moved" in done.stdout + done.stderr) == (warmup == "false"), done.stdout + done.stderr
