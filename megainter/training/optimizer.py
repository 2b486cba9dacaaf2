"""Parameter groups, AdamW or LAMB, and the learning-rate schedule.

The official InterBERT code trains with BertAdam (pytorch-pretrained-bert 0.6.2). What it does otherwise than AdamW is a setting
each, and ``optimizer.compat = "official"`` stands for all of them.
"""

import math
import re
from typing import Any

import torch
from torch import Tensor, nn

from megainter.config.settings import OptimizerConfig
from megainter.training.lamb import Lamb

EMBEDDINGS = ("text_embeddings", "region_embeddings")
LAYERS = ("interaction", "text", "region")
MOMENTS = ("exp_avg", "exp_avg_sq")
FROM_BERT = ("text_embeddings", "interaction", "text")  # the official list of BERT's names: embeddings and encoder.layer.0-11
_TRUNK = re.compile(r"(?:^|\.)interbert\.(?:(text_embeddings|region_embeddings)|encoder\.(interaction|text|region)\.(\d+))\.")


def parameter_groups(model: nn.Module, settings: OptimizerConfig) -> list[dict[str, Any]]:
    """Groups of parameters with one ``weight_decay`` and one ``rate_factor`` (of the schedule's rate) each, the largest first.

    Matrices and embeddings decay, biases and norm weights do not (BERT's recipe), or the other way round where decay_groups is
    "swapped", as in the released code once it starts from pretrained weights. Decided by module type and name, never by the
    number of dimensions, which ZeRO-3 hides.
    """
    factors = rate_factors([name for name, _ in model.named_parameters()], settings)
    bare = _biases_and_norms(model)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        decays = (name in bare) == (settings.decay_groups == "swapped")
        if parameter.requires_grad:
            groups.setdefault((settings.weight_decay if decays else 0.0, factors[name]), []).append(parameter)
    return [
        {"params": groups[decay, factor], "weight_decay": decay, "rate_factor": factor, "name": f"decay {decay:g}, rate x {factor:g}"}
        for decay, factor in sorted(groups, reverse=True)
    ]


def _biases_and_norms(model: nn.Module) -> set[str]:
    norm_weights = {
        id(p)
        for module in model.modules()
        if isinstance(module, nn.LayerNorm) or "LayerNorm" in type(module).__name__
        for p in module.parameters(recurse=False)
    }
    bare = ("bias", "log_scale", "margin")  # scales of cosines are biases of a logarithm, a margin is one of a cosine
    return {name for name, parameter in model.named_parameters() if name.endswith(bare) or id(parameter) in norm_weights}


def rate_factors(names: list[str], settings: OptimizerConfig) -> dict[str, float]:
    """What the schedule's rate is multiplied by for each parameter: layer_decay ** depth, times start_rate for what a BERT gives.

    Heads and poolers have depth 0, the top layer of each stream 1, and so on down through the interaction layers to the embeddings.

    >>> names = ["interbert.encoder.interaction.0.w", "interbert.encoder.text.0.w", "interbert.encoder.text.1.w", "itm_head.w"]
    >>> list(rate_factors(names, OptimizerConfig(layer_decay=0.5)).values())
    [0.125, 0.25, 0.5, 1.0]
    """
    places = {name: _place(name) for name in names}
    layers = {part: 1 + max((i for other, i in places.values() if other == part), default=-1) for part in LAYERS}
    streams = max(layers["text"], layers["region"])

    def depth(part: str, index: int) -> int:
        if part in EMBEDDINGS:
            return streams + layers["interaction"] + 1
        if part == "interaction":
            return streams + layers["interaction"] - index
        return layers[part] - index if part else 0

    return {
        name: settings.layer_decay ** depth(part, index) * (settings.start_rate if part in FROM_BERT else 1.0)
        for name, (part, index) in places.items()
    }


def _place(name: str) -> tuple[str, int]:
    """("text", 3) for a parameter of the fourth text layer, ("text_embeddings", 0); ("", 0) for one of poolers, heads, other models."""
    found = _TRUNK.search(name)
    if found is None:
        return "", 0
    return (found[1], 0) if found[1] else (found[2], int(found[3]))


def build_optimizer(model: nn.Module, settings: OptimizerConfig, device: torch.device) -> torch.optim.Optimizer:
    """LAMB, or torch's fused AdamW (on CPU 70 times faster than its loop over parameters), over the groups."""
    groups = parameter_groups(model, settings)
    betas = (settings.beta1, settings.beta2)
    if settings.name == "lamb":
        return Lamb(groups, lr=settings.learning_rate, betas=betas, eps=settings.epsilon)
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=betas, eps=settings.epsilon, fused=device.type in ("cpu", "cuda"))


def first_step_count(settings: OptimizerConfig) -> float:
    """What Adam's step counter starts at: 0, or infinity where there is to be no bias correction.

    1 - beta ** step is then exactly 1, and AdamW's update is BertAdam's: rate * (m / (sqrt(v) + epsilon) + decay * p).
    """
    return 0.0 if settings.bias_correction else math.inf


def start_state(optimizer: torch.optim.Optimizer, flats: list[Tensor], settings: OptimizerConfig) -> None:
    """Give each of the fp32 tensors ``flats`` Adam's state as zeros at its first step, whatever it had."""
    for flat in flats:
        step = torch.full((), first_step_count(settings), dtype=torch.float32, device=flat.device)
        optimizer.state[flat] = {"step": step, **{key: torch.zeros_like(flat, requires_grad=False) for key in MOMENTS}}
    _set_group_counts(optimizer, 0)


def set_step_count(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Set the number of updates, for each Adam state in its own tensor (a shared one would be counted per group)."""
    for state in optimizer.state.values():
        if math.isfinite(float(state["step"])):  # infinite: no bias correction
            state["step"] = torch.full_like(state["step"], float(step))
    _set_group_counts(optimizer, step)


def _set_group_counts(optimizer: torch.optim.Optimizer, step: int) -> None:
    """apex's optimisers count in their groups."""
    for group in optimizer.param_groups:
        if "step" in group:
            group["step"] = step


def describe(settings: OptimizerConfig, groups: list[dict[str, Any]]) -> str:
    """One line on the optimiser and what differs from the usual decay and a single rate."""
    rates = sorted({group["rate_factor"] for group in groups})
    parts = [
        _name(settings),
        f"decay {settings.weight_decay:g} on {'matrices' if settings.decay_groups == 'right' else 'biases and norms alone (swapped)'}",
        f"rates x {rates[0]:g} to {rates[-1]:g}" if len(rates) > 1 else "one rate",
        f"clipping {'each tensor' if settings.clip == 'tensor' else 'the whole gradient'} to {settings.clip_norm:g}"
        if settings.clip_norm
        else "no clipping",
    ]
    return ", ".join(parts)


def _name(settings: OptimizerConfig) -> str:
    if settings.name == "lamb":
        return "LAMB" if settings.bias_correction else "LAMB without bias correction"
    return "AdamW" if settings.bias_correction else "AdamW without bias correction (BertAdam)"


def learning_rate(settings: OptimizerConfig, step: int, total_steps: int) -> float:
    """Rate of the update that follows ``step`` finished steps: linear from 0 over the warmup, then linear to the final fraction.

    >>> settings = OptimizerConfig(learning_rate=1.0, warmup=0.5)
    >>> [learning_rate(settings, step, 4) for step in range(4)]
    [0.5, 1.0, 1.0, 0.5]
    """
    warmup_steps = round(settings.warmup * total_steps)
    if step < warmup_steps:
        return settings.learning_rate * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return settings.learning_rate * (1 - (1 - settings.final_fraction) * min(progress, 1.0))
