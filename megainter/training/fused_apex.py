"""NVIDIA apex's fused optimisers (github.com/NVIDIA/apex) in place of ours, where ``engine.apex`` asks for them.

They are used only after they have agreed with a loop in float64 on the machine and device of the run.
"""

import importlib.util
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megainter.config.settings import OptimizerConfig
from megainter.training.optimizer import MOMENTS, set_step_count, start_state

Build = Callable[[list[dict[str, Any]], float], torch.optim.Optimizer]  # from parameter groups and a learning rate

TOLERANCE = 1e-5  # of how far weights move, relative
_SHAPES = ((48, 32), (70_000,), (17,), (1,))  # the second is longer than the 65,536 elements that a block of apex's kernels takes
_DECAYING = 2  # the first two decay
_STEPS, _RESUMED = 4, 2
_RATE, _DECAY = 0.1, 0.05


def piece(settings: OptimizerConfig) -> str:
    """What of apex would update the weights."""
    return "FusedLAMB" if settings.name == "lamb" else "FusedAdam"


def obstacle(settings: OptimizerConfig, zero_stage: int, device: torch.device) -> str | None:
    """Why apex cannot update the weights of a run whose optimiser state is on ``device``; None where it can."""
    if device.type != "cuda":
        return "apex needs the optimiser's state on a CUDA device, and here it is in the host's memory"
    if settings.name == "lamb" and zero_stage > 0:
        return "FusedLAMB would take ZeRO's flat tensors for parameters, with wrong trust ratios; it is for engine.zero_stage 0"
    if zero_stage == 3:
        return "FusedAdam counts every call as a step of all parameter groups, and ZeRO stage 3 calls it once for each group"
    if importlib.util.find_spec("apex") is None:
        return "apex is not installed (github.com/NVIDIA/apex)"
    try:
        optimizers = importlib.util.find_spec("apex.optimizers")
    except ImportError as error:
        return f"apex cannot be imported ({error})"
    if optimizers is None:
        return "the installed package apex is not NVIDIA's (github.com/NVIDIA/apex; PyPI's is an unrelated one)"
    if importlib.util.find_spec("amp_C") is None:
        return "apex was built without its CUDA extensions (see github.com/NVIDIA/apex)"
    return None


def fused_build(settings: OptimizerConfig) -> Build:
    """How apex's optimiser for ``settings`` is built. Its gradient clipping is off: DeepSpeed and we clip before."""
    from apex import optimizers

    shared = {"betas": (settings.beta1, settings.beta2), "eps": settings.epsilon, "bias_correction": settings.bias_correction}

    def build(groups: list[dict[str, Any]], rate: float) -> torch.optim.Optimizer:
        counted = [group | {"step": 0} for group in groups]  # apex keeps the number of steps there
        if settings.name == "lamb":
            lamb: torch.optim.Optimizer = optimizers.FusedLAMB(counted, lr=rate, max_grad_norm=math.inf, use_nvlamb=False, **shared)
            return lamb
        adam: torch.optim.Optimizer = optimizers.FusedAdam(counted, lr=rate, adam_w_mode=True, **shared)
        return adam

    return build


def disagreement(build: Build, settings: OptimizerConfig, device: torch.device) -> float:
    """How far weights that ``build``'s optimiser moves end from where float64 puts them: the largest of the tensors, relative.

    Four steps over small tensors; the last two by a new optimiser that goes on from the first one's moments, as a resumed run does.
    """
    start, found = _tensors(0), [_tensors(1 + step) for step in range(_STEPS)]
    weights = [torch.nn.Parameter(tensor.to(device, copy=True)) for tensor in start]
    optimizer = _started(build, settings, weights)
    for step, gradients in enumerate(found):
        if step == _RESUMED:
            states = [optimizer.state[weight] for weight in weights]
            optimizer = _started(build, settings, weights)
            for weight, state in zip(weights, states):
                optimizer.state[weight] |= {key: state[key] for key in MOMENTS}
            set_step_count(optimizer, _RESUMED)
        for weight, gradient in zip(weights, gradients):
            weight.grad = gradient.to(device, copy=True)
        optimizer.step()
    exact = _in_float64(settings, start, found)
    ours = [weight.detach().cpu().double() for weight in weights]
    errors = [(mine - right).norm() / (right - before).norm() for before, right, mine in zip(start, exact, ours)]
    return float(torch.stack(errors).max())  # NaN where one of them is


def _tensors(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in _SHAPES]


def _started(build: Build, settings: OptimizerConfig, weights: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    groups = [{"params": weights[:_DECAYING], "weight_decay": _DECAY}, {"params": weights[_DECAYING:], "weight_decay": 0.0}]
    optimizer = build(groups, _RATE)
    start_state(optimizer, list(weights), settings)
    return optimizer


def _in_float64(settings: OptimizerConfig, start: list[Tensor], found: list[list[Tensor]]) -> list[Tensor]:
    """The same steps by the textbook, a tensor at a time."""
    (beta1, beta2), after = (settings.beta1, settings.beta2), []
    for i, weight in enumerate(tensor.double() for tensor in start):
        m, v = torch.zeros_like(weight), torch.zeros_like(weight)
        for step, gradients in enumerate(found, start=1):
            g = gradients[i].double()
            m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
            of_m, of_v = (1 - beta1**step, 1 - beta2**step) if settings.bias_correction else (1.0, 1.0)
            update = (m / of_m) / ((v / of_v).sqrt() + settings.epsilon)
            if i < _DECAYING:
                update = update + _DECAY * weight
                if settings.name == "lamb":
                    update = update * (weight.norm() / update.norm())
            weight = weight - _RATE * update
        after.append(weight)
    return after
