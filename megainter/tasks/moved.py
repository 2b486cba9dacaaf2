"""How far a fine-tuned model lies from the one it started from: a result that hardly moved has its start's figures, and is told of."""

from dataclasses import dataclass
from pathlib import Path

import torch

from megainter.conversion.foreign_files import open_tensors
from megainter.training import checkpoint
from megainter.training.ema import EMA
from megainter.training.zero_state import WEIGHTS

# Of the start's norm. bf16 rounds each weight by up to 2e-3 of itself; a single update of Adam at a rate of 2e-5 moves a BERT by 7e-4.
HARDLY = 1e-3
LEFT_BEHIND = 0.1  # of the way that the weights themselves have gone: an average that went less of it stands at the start


@dataclass(frozen=True)
class Moved:
    """Euclidean distances from the start, as shares of its norm, over the parameters that both have: the result's, and what it averages."""

    result: float
    weights: float

    @property
    def hardly(self) -> bool:
        """Whether the result is as good as its start."""
        return self.result < max(HARDLY, LEFT_BEHIND * self.weights)


def moved(start: Path, saved: checkpoint.Checkpoint, averaged: bool, prefix: str = "model.") -> Moved:
    """How far what becomes of ``saved``, its weights or their average, lies from the model in the folder ``start``; tensor by tensor.

    ``prefix`` stands before the model's names in a checkpoint. Infinite where the two have no parameter in common.
    """
    begun, known = open_tensors(start), set(checkpoint.weight_names(saved))
    norm, ways = 0.0, {WEIGHTS: 0.0, EMA: 0.0}
    with checkpoint.reader(saved) as read:
        for name, tensor in begun.items():
            if prefix + name not in known or not tensor.dtype.is_floating_point:
                continue
            first = tensor.read().float()
            for kind in (WEIGHTS, EMA) if averaged else (WEIGHTS,):
                now = read(kind, prefix + name)
                ways[kind] += _squares(now - first) if now.shape == first.shape else 0.0
            norm += _squares(first)
    shares = {kind: (way / norm) ** 0.5 if norm else float("inf") for kind, way in ways.items()}
    return Moved(shares[EMA if averaged else WEIGHTS], shares[WEIGHTS])


def _squares(tensor: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2


def told(found: Moved, start: Path, step: int) -> str:
    """The warning for a result that hardly moved: by how much, and what to do."""
    way = f"{100 * found.result:.2g} % of its norm at step {step:,}"
    if found.weights > max(HARDLY, found.result / LEFT_BEHIND):
        why = f"the weights themselves {100 * found.weights:.2g} %: give a smaller training.ema_decay, or 0"
    else:
        why = "train for longer, or with a higher optimizer.learning_rate"
    return f"the result hardly moved from {start} ({way}), so its figures are those of its start; {why}"
