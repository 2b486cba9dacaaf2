"""Pretraining in real processes over gloo: the same numbers at every ZeRO stage, world size and after every interruption."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from megainter.conversion.zero import convert, find_checkpoint, load_model
from megainter.model.interbert import InterBertForPreTraining
from megainter.training import checkpoint
from megainter.training.metrics import read_metrics
from tests.kills import kill_and_compare
from tests.synthetic import NO_DROPOUT, environment, losses, settings, train, write_data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny data set, shared by the module."""
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def reference(data: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """20 losses of one process at ZeRO stage 0 in fp32 without dropout: plain PyTorch gradients."""
    run = tmp_path_factory.mktemp("reference") / "run"
    done = train(settings(*data, run, engine__zero_stage=0, **NO_DROPOUT))
    assert done.returncode == 0, done.stdout + done.stderr
    return losses(run)


def test_it_learns(reference: list[float]) -> None:
    assert len(reference) == 20
    assert sum(reference[-5:]) < 0.9 * sum(reference[:5])


@pytest.mark.parametrize(
    "stage", [pytest.param(0, marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow), 3]
)  # the optimisers' tests have all of them every day
def test_two_processes_give_the_losses_of_one(stage: int, data: tuple[Path, Path], reference: list[float], tmp_path: Path) -> None:
    profiled = 2 if stage == 3 else 0
    done = train(settings(*data, tmp_path / "run", engine__zero_stage=stage, training__profile_steps=profiled, **NO_DROPOUT), processes=2)
    assert done.returncode == 0, done.stdout + done.stderr
    ours = losses(tmp_path / "run")
    assert ours[0] == pytest.approx(reference[0], abs=1e-5)
    assert ours == pytest.approx(reference, abs=1e-4)
    if profiled:
        check_profile(tmp_path / "run" / "profile")


def check_profile(folder: Path) -> None:
    """Every rank has a trace with the module's marks; the table's parts of the encoder add up to it within their own overhead."""
    for rank in (0, 1):
        events = json.loads((folder / f"trace-rank-{rank:05}.json").read_text())["traceEvents"]
        assert sum(event.get("name") == "module model.interbert.encoder" for event in events) == 2 * 2, "two steps of two micro-batches"
    rows = {line.split()[0]: line.split()[1:] for line in (folder / "modules.txt").read_text().splitlines()[1:] if line[0] != "("}
    encoder = float(rows["model.interbert.encoder"][1])
    layers = [float(row[1]) for name, row in rows.items() if re.fullmatch(r"model\.interbert\.encoder\.\w+\.\d+", name)]
    assert 0.5 * encoder < sum(layers) <= encoder * 1.01
    assert "(update)" in (folder / "modules.txt").read_text()


@pytest.mark.slow  # every day by the runs that are interrupted and by those with another cut
def test_same_seed_gives_bit_equal_losses(data: tuple[Path, Path], tmp_path: Path) -> None:
    for name in ("a", "b"):
        done = train(settings(*data, tmp_path / name, data__workers=1), processes=2)
        assert done.returncode == 0, done.stdout + done.stderr
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert len(losses(tmp_path / "a")) == 20


@pytest.mark.parametrize(
    ("precision", "stage", "log_every"),
    [
        ("bf16", 3, 1),
        pytest.param("fp32", 2, 4, marks=pytest.mark.slow),
        pytest.param("bf16", 0, 1, marks=pytest.mark.slow),
        pytest.param("bf16", 1, 1, marks=pytest.mark.slow),
    ],
)
def test_interrupted_and_resumed_is_bit_equal(precision: str, stage: int, log_every: int, data: tuple[Path, Path], tmp_path: Path) -> None:
    """With dropout; the checkpoint holds 7 steps (amid what one record covers, where that is four), the interruption comes later."""
    choices = {"engine__precision": precision, "engine__zero_stage": stage, "checkpoint__every_steps": 7, "training__steps": 60,
               "training__log_every": log_every}  # fmt: skip
    whole = train(settings(*data, tmp_path / "whole", **choices))
    assert whole.returncode == 0, whole.stdout + whole.stderr
    arguments = settings(*data, tmp_path / "cut", **choices)
    assert run_and_kill(arguments, tmp_path / "cut", after_step=10 // log_every, saved=True) == -signal.SIGKILL
    again = train(settings(*data, tmp_path / "cut", **choices))
    assert again.returncode == 0, again.stdout + again.stderr
    assert "resuming from" in again.stdout
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    resumed = read_metrics(tmp_path / "cut" / "metrics.jsonl", "resumed")
    assert [(record["step"] % 7, record["ranks"]) for record in resumed] == [(0, 1)]
    assert read_metrics(tmp_path / "whole" / "metrics.jsonl", "resumed") == []
    assert all(record["memory_bytes"] > 10**8 for record in read_metrics(tmp_path / "cut" / "metrics.jsonl", "train"))


def test_resume_at_another_world_size_and_stage(data: tuple[Path, Path], reference: list[float], tmp_path: Path) -> None:
    first = train(settings(*data, tmp_path / "run", engine__zero_stage=3, checkpoint__every_steps=10, **NO_DROPOUT), processes=2)
    assert first.returncode == 0, first.stdout + first.stderr
    forget_after(tmp_path / "run", 10)
    second = train(settings(*data, tmp_path / "run", engine__zero_stage=1, checkpoint__every_steps=10, **NO_DROPOUT))
    assert second.returncode == 0, second.stdout + second.stderr
    assert losses(tmp_path / "run") == pytest.approx(reference, abs=1e-4)


def test_sigterm_saves_and_ends_with_75(data: tuple[Path, Path], tmp_path: Path) -> None:
    arguments = settings(*data, tmp_path / "run", training__steps=100000)
    code = run_and_kill(arguments, tmp_path / "run", after_step=5, number=signal.SIGTERM)
    assert code == 75
    saved = checkpoint.newest(tmp_path / "run" / "checkpoints", print)
    assert saved is not None
    assert saved.step >= 5


def test_damaged_checkpoint_falls_back_and_says_so(data: tuple[Path, Path], tmp_path: Path) -> None:
    arguments = settings(*data, tmp_path / "run", checkpoint__every_steps=10)
    assert train(arguments).returncode == 0
    whole = losses(tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / checkpoint.step_name(20)
    victim = next(newest.glob("exp_avg-*"))
    content = bytearray(victim.read_bytes())
    content[-5] ^= 1
    victim.write_bytes(content)
    again = train(arguments)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "is damaged" in again.stdout
    assert "SHA-256" in again.stdout
    assert losses(tmp_path / "run") == whole


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow), 3])
def test_export_is_bit_equal_to_the_trained_weights(stage: int, data: tuple[Path, Path], tmp_path: Path) -> None:
    """Two processes, bf16: the exported fp32 weights are the master weights, and their bf16 rounding is what trained."""
    done = train(settings(*data, tmp_path / "run", engine__zero_stage=stage, engine__precision="bf16", training__steps=4), processes=2)
    assert done.returncode == 0, done.stdout + done.stderr
    command = [sys.executable, "-m", "megainter", "convert", "zero", str(tmp_path / "run"), str(tmp_path / "hf")]
    converted = subprocess.run(command, capture_output=True, text=True, check=False, env=environment())
    assert converted.returncode == 0, converted.stderr
    model = InterBertForPreTraining.from_pretrained(tmp_path / "hf")
    assert (model.config.max_regions, model.config.max_text_tokens) == (6, 36), "the folder says what inputs it was trained on"
    from transformers import AutoModel

    base = AutoModel.from_pretrained(tmp_path / "hf")
    with checkpoint.reader(find_checkpoint(tmp_path / "run")) as read:
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, read("weights", "model." + name)), name
    for name, parameter in base.named_parameters():
        assert torch.equal(parameter, model.get_parameter(f"{model.base_model_prefix}.{name}")), name
    fresh = load_model(find_checkpoint(tmp_path / "run"))
    assert any(not torch.equal(parameter, parameter.bfloat16().float()) for parameter in fresh.parameters()), "master weights are not fp32"


def test_the_official_optimiser_and_the_average_go_on_bit_equal_and_are_exported(data: tuple[Path, Path], tmp_path: Path) -> None:
    """The whole command, with dropout: 6 of 12 steps, all again, and the averaged weights as a model."""
    choices = {"optimizer__compat": "official", "optimizer__layer_decay": 0.8, "training__ema_decay": 0.9, "engine__zero_stage": 2}
    arguments = settings(*data, tmp_path / "run", checkpoint__every_steps=6, training__steps=12, **choices)
    assert train(arguments).returncode == 0
    whole = digests(tmp_path / "run", 12)
    forget_after(tmp_path / "run", 6)
    again = train(arguments)
    assert "BertAdam" in again.stdout, again.stdout + again.stderr
    assert "ema-00000-of-00001.safetensors" in whole
    assert digests(tmp_path / "run", 12) == whole
    convert(tmp_path / "run", tmp_path / "averaged", ema=True)
    model = InterBertForPreTraining.from_pretrained(tmp_path / "averaged")
    with checkpoint.reader(find_checkpoint(tmp_path / "run")) as read:
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, read("ema", "model." + name)), name


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_kills_at_random_moments_change_nothing(stage: int, tmp_path: Path) -> None:
    assert kill_and_compare(tmp_path, rounds=20, saving=6, seed=stage, stage=stage) == 0


def digests(run: Path, step: int) -> dict[str, str]:
    """SHA-256 of every file of tensors of a checkpoint."""
    manifest = json.loads((run / "checkpoints" / checkpoint.step_name(step) / checkpoint.MANIFEST).read_text())
    return {entry["file"]: entry["sha256"] for entry in manifest["files"] if entry["file"].endswith(".safetensors")}


def run_and_kill(arguments: list[str], run: Path, after_step: int, number: int = signal.SIGKILL, saved: bool = False) -> int:
    """Start a run alone, send it a signal once so many steps (or intervals of them) are logged, and return its exit code.

    ``saved``: not before it has a checkpoint.
    """
    child = subprocess.Popen(
        [sys.executable, "-m", "megainter.pretrain", *arguments], env=environment(), stdout=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and child.poll() is None:
        logged = (run / "metrics.jsonl").exists() and len((run / "metrics.jsonl").read_text().splitlines()) >= after_step
        if logged and (not saved or any((run / "checkpoints").glob("step_*"))):
            os.kill(child.pid, number)
            break
        time.sleep(0.02)
    return child.wait(timeout=120)


def forget_after(run: Path, step: int) -> None:
    """Make the run one that ended at ``step``."""
    import shutil

    for folder in (run / "checkpoints").glob("step_*"):
        if int(folder.name[5:]) > step:
            shutil.rmtree(folder)
    (run / "checkpoints" / "latest").write_text(checkpoint.step_name(step) + "\n")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert all(json.loads(line)["step"] <= 20 for line in lines)
