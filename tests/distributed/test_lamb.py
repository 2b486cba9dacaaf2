"""LAMB in real processes at every ZeRO stage, against a plain float64 loop over whole tensors written here."""

from pathlib import Path

import pytest
import torch

from megainter.config.settings import OptimizerConfig
from megainter.training.optimizer import learning_rate
from tests.distributed.optimizer_worker import STEPS, Case, Step
from tests.distributed.test_optimizer import STAGES, State, assert_equal, depth_of, gradients, launch, state_of

EMA, LIMIT, DECAY = 0.9, 0.5, 0.1
LAMB = {"name": "lamb", "learning_rate": 0.01, "weight_decay": DECAY, "layer_decay": 0.7, "clip_norm": LIMIT}
EACH = {**LAMB, "clip": "tensor", "bias_correction": False}

CASES = [
    *(Case(f"lamb-{stage}", stage, LAMB, EMA, save=stage == 3) for stage in STAGES),
    Case("lamb-again-3", 3, LAMB, EMA, restore="lamb-3"),
    Case("lamb-each", 1, EACH, EMA),
    Case("lamb-bf16", 1, LAMB, precision="bf16"),
]
ALONE = [Case("lamb-alone", 2, LAMB, EMA), Case("lamb-alone-from-3", 0, LAMB, EMA, restore="lamb-3")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cases of two processes, trained."""
    folder = tmp_path_factory.mktemp("lamb")
    launch(folder, CASES, processes=2)
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> Path:
    """The cases of one process, which goes on from the two's checkpoint."""
    launch(folder, ALONE, processes=1)
    return folder


@pytest.fixture(scope="module")
def reference() -> State:
    """What ``LAMB`` should give."""
    return textbook(LAMB)


def textbook(chosen: dict[str, object]) -> State:
    """Algorithm 2 of the paper, a tensor at a time, its norms and steps in float64."""
    module, options = Step(), OptimizerConfig(**chosen)
    weights = {name: p.detach().double() for name, p in module.named_parameters()}
    m, v = ({name: torch.zeros_like(w) for name, w in weights.items()} for _ in range(2))
    average = {name: w.clone() for name, w in weights.items()}
    for step in range(STEPS):
        found = {name: gradient.double() for name, gradient in gradients(module, step).items()}
        whole = float(torch.stack([g.norm() for g in found.values()]).norm())
        for name, parameter in module.named_parameters():
            norm = float(found[name].norm()) if options.clip == "tensor" else whole
            g = found[name] * (LIMIT / norm if norm > LIMIT else 1.0)
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.999 * v[name] + 0.001 * g * g
            of_m, of_v = (1 - 0.9 ** (step + 1), 1 - 0.999 ** (step + 1)) if options.bias_correction else (1.0, 1.0)
            r = (m[name] / of_m) / ((v[name] / of_v).sqrt() + 1e-6)
            if parameter.dim() == 2:
                r = r + DECAY * weights[name]
                r = r * float(weights[name].norm()) / float(r.norm())
            weights[name] = weights[name] - learning_rate(options, step, STEPS) * 0.7 ** depth_of(name) * r
            average[name] = EMA * average[name] + (1 - EMA) * weights[name]
            parameter.data.copy_(weights[name])
    return {
        kind: {name: tensor.float() for name, tensor in part.items()}
        for kind, part in (("weights", weights), ("exp_avg", m), ("exp_avg_sq", v), ("ema", average))
    }


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_do_algorithm_2_at_every_stage(stage: int, folder: Path, reference: State) -> None:
    """Weights, moments and average, with a rate for each layer."""
    assert_equal(state_of(folder, f"lamb-{stage}"), reference, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lamb-alone", "lamb-alone-from-3"])
def test_one_process_does_it_too(name: str, alone: Path, reference: State) -> None:
    """One that accumulates, and one that goes on from the shards of two."""
    assert_equal(state_of(alone, name), reference, atol=1e-5)


def test_with_each_tensor_clipped_and_without_bias_correction(folder: Path) -> None:
    assert_equal(state_of(folder, "lamb-each"), textbook(EACH), atol=1e-5)


def test_resumed_is_bit_equal(folder: Path) -> None:
    assert_equal(state_of(folder, "lamb-again-3"), state_of(folder, "lamb-3"))


def test_bf16_goes_the_same_way(folder: Path, reference: State) -> None:
    start = torch.cat([p.detach().flatten() for p in Step().parameters()])
    both = (state_of(folder, "lamb-bf16")["weights"], reference["weights"])
    ours, exact = (torch.cat([part[name].flatten() for name in reference["weights"]]) for part in both)
    assert float(torch.cosine_similarity(ours - start, exact - start, dim=0)) > 0.97


def test_ratios_are_far_from_1() -> None:
    """Or the comparisons above would say nothing of them: after the first step Adam's direction is the gradient's sign."""
    module = Step()
    found = gradients(module, 0)
    matrices = {name: p.detach() for name, p in module.named_parameters() if p.dim() == 2}
    ratios = [float(p.norm()) / float((found[name].sign() + DECAY * p).norm()) for name, p in matrices.items()]
    assert max(ratios) < 0.5
