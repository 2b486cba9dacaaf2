"""The optimiser's settings in real processes at every ZeRO stage, against plain loops over whole tensors written here."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megainter.config.reading import COMPAT
from megainter.config.settings import OptimizerConfig
from megainter.conversion.official_names import official_name
from megainter.training.optimizer import learning_rate
from tests.distributed.optimizer_worker import BATCHES, STEPS, Case, Step, batch
from tests.synthetic import environment

STAGES = (0, 1, 2, 3)
EMA = 0.9
COMMON = {"learning_rate": 2e-3, "weight_decay": 0.1, "layer_decay": 0.7}
OFFICIAL = {**COMMON, "clip_norm": 0.3, **COMPAT["official"]}  # a limit that some tensors' norms exceed and others' do not
CORRECTED = {**COMMON, "clip_norm": 0.5}

CASES = [
    *(Case(f"whole-{stage}", stage, OFFICIAL, EMA, save=True) for stage in STAGES),
    *(Case(f"again-{stage}", stage, OFFICIAL, EMA, restore=f"whole-{stage}") for stage in STAGES),
    Case("corrected", 2, CORRECTED, EMA, save=True),
    Case("corrected-again", 2, CORRECTED, EMA, restore="corrected"),
    Case("bf16", 1, OFFICIAL, precision="bf16"),
]
ALONE = [
    Case("alone", 2, OFFICIAL, EMA),
    Case("alone-from-3", 0, OFFICIAL, EMA, restore="whole-3"),
    Case("alone-from-1", 3, OFFICIAL, EMA, restore="whole-1"),
]

State = dict[str, dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All cases of two processes, trained."""
    folder = tmp_path_factory.mktemp("optimizer")
    launch(folder, CASES, processes=2)
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> Path:
    """The cases of one process, which goes on from the two's checkpoints."""
    launch(folder, ALONE, processes=1)
    return folder


def launch(folder: Path, cases: list[Case], processes: int) -> None:
    (folder / "cases.json").write_text(json.dumps([dataclasses.asdict(case) for case in cases]))
    module = ["--module", "tests.distributed.optimizer_worker", str(folder)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), *module]
    done = subprocess.run(command, capture_output=True, text=True, timeout=550, check=False, env=environment())
    assert done.returncode == 0, done.stdout + done.stderr


def state_of(folder: Path, name: str) -> State:
    """{kind: {parameter: tensor}} of a finished case, from all its ranks."""
    state: State = {}
    for path in folder.glob(f"{name}.[0-9].safetensors"):
        for key, tensor in load_file(path).items():
            kind, _, parameter = key.partition("/")
            state.setdefault(kind, {})[parameter] = tensor
    return state


def assert_equal(ours: State, theirs: State, atol: float = 0.0) -> None:
    assert ours.keys() == theirs.keys()
    for kind in ours:
        assert ours[kind].keys() == theirs[kind].keys()
        for name in ours[kind]:
            torch.testing.assert_close(ours[kind][name], theirs[kind][name], atol=atol, rtol=0, msg=lambda text: f"{kind} {name}: {text}")  # noqa: B023


def gradients(module: Step, step: int) -> dict[str, torch.Tensor]:
    """Mean gradient over the step's batches, by plain autograd in one process."""
    module.zero_grad()
    for number in range(BATCHES):
        (module(batch(step * BATCHES + number)) / BATCHES).backward()
    return {name: parameter.grad for name, parameter in module.named_parameters()}


def bert_adam() -> State:
    """pytorch-pretrained-bert 0.6.2's BertAdam as the released code runs it from a BERT, one tensor after another."""
    module, options, clipped = Step(), OptimizerConfig(**OFFICIAL), set()
    m = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
    v = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
    average = {name: p.detach().clone() for name, p in module.named_parameters()}
    for step in range(STEPS):
        found = gradients(module, step)
        for name, p in module.named_parameters():
            official = official_name(name.removeprefix("model."), module.model.config)
            g = found[name]
            norm = float(g.double().norm())
            clipped.add(norm > 0.3)
            if norm > 0.3:
                g = g * (0.3 / norm)
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.999 * v[name] + 0.001 * g * g
            update = m[name] / (v[name].sqrt() + 1e-6)
            if "bias" in official or "LayerNorm.weight" in official:
                update = update + 0.1 * p.detach()
            tenth = official.startswith(("bert.embeddings.", "bert.encoder.layer."))
            p.data -= learning_rate(options, step, STEPS) * 0.7 ** depth_of(name) * (0.1 if tenth else 1.0) * update
            average[name] = EMA * average[name] + (1 - EMA) * p.detach()
    assert clipped == {True, False}
    return {"weights": {name: p.detach() for name, p in module.named_parameters()}, "exp_avg": m, "exp_avg_sq": v, "ema": average}


def adamw() -> State:
    """Textbook AdamW with bias correction, one gradient norm for all, a rate for each depth, and the average of the weights."""
    module, options = Step(), OptimizerConfig(**CORRECTED)
    m = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
    v = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
    average = {name: p.detach().clone() for name, p in module.named_parameters()}
    for step in range(STEPS):
        found = gradients(module, step)
        norm = float(torch.stack([g.double().norm() for g in found.values()]).norm())
        for name, p in module.named_parameters():
            g = found[name] * min(1.0, 0.5 / norm)
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.999 * v[name] + 0.001 * g * g
            rate = learning_rate(options, step, STEPS) * 0.7 ** depth_of(name)
            if p.dim() == 2:
                p.data -= rate * 0.1 * p.data
            p.data -= rate * (m[name] / (1 - 0.9 ** (step + 1))) / ((v[name] / (1 - 0.999 ** (step + 1))).sqrt() + 1e-6)
            average[name] = EMA * average[name] + (1 - EMA) * p.detach()
    return {"weights": {name: p.detach() for name, p in module.named_parameters()}, "exp_avg": m, "exp_avg_sq": v, "ema": average}


def depth_of(name: str) -> int:
    """By hand for two interaction layers, one text and one region layer."""
    by_place = {"text.0": 1, "region.0": 1, "interaction.1": 2, "interaction.0": 3}
    layer = re.search(r"encoder\.(\w+\.\d)", name)
    return by_place[layer[1]] if layer else 4 if "_embeddings" in name else 0


@pytest.fixture(scope="module")
def official() -> State:
    """The reference of the official cases."""
    return bert_adam()


@pytest.mark.parametrize("stage", STAGES)
def test_compat_official_is_bert_adam(stage: int, folder: Path, official: State) -> None:
    """Weights, moments and average, with a rate for each layer."""
    assert_equal(state_of(folder, f"whole-{stage}"), official, atol=1e-5)


def test_one_process_that_accumulates_is_bert_adam_too(alone: Path, official: State) -> None:
    assert_equal(state_of(alone, "alone"), official, atol=1e-5)


def test_the_defaults_are_adamw_with_a_rate_for_each_layer(folder: Path) -> None:
    assert_equal(state_of(folder, "corrected"), adamw(), atol=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_the_sharded_average_is_the_plain_one(stage: int, folder: Path, official: State) -> None:
    ours = state_of(folder, f"whole-{stage}")["ema"]
    assert max(float((ours[name] - plain).abs().max()) for name, plain in official["ema"].items()) < 1e-6


@pytest.mark.parametrize("name", [*(f"whole-{stage}" for stage in STAGES), "corrected"])
def test_resumed_is_bit_equal(name: str, folder: Path) -> None:
    again = name.replace("whole", "again") if "whole" in name else "corrected-again"
    assert_equal(state_of(folder, again), state_of(folder, name))


@pytest.mark.parametrize("name", ["alone-from-3", "alone-from-1"])
def test_resumed_by_one_process_at_another_stage(name: str, alone: Path, official: State) -> None:
    assert_equal(state_of(alone, name), official, atol=1e-5)


def test_ranks_stay_together_after_a_resume_without_sharding(folder: Path) -> None:
    first, second = (load_file(folder / f"again-0.live.{rank}.safetensors")["live"] for rank in (0, 1))
    assert torch.equal(first, second)


def test_bf16_goes_the_same_way(folder: Path, official: State) -> None:
    start = torch.cat([p.detach().flatten() for p in Step().parameters()])
    ours, exact = (torch.cat([part["weights"][n].flatten() for n in official["weights"]]) for part in (state_of(folder, "bf16"), official))
    assert float(torch.cosine_similarity(ours - start, exact - start, dim=0)) > 0.97
