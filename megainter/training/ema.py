"""An exponential moving average of the weights, kept beside Adam's moments: sharded where they are, saved and restored with them.

It starts at the first weights and is not debiased, as in the official fine-tuning code; but its window grows with the run.
"""

import torch
from torch import Tensor

from megainter.config.settings import TrainingConfig

EMA = "ema"  # its name in the optimiser's state and in checkpoints


def decay_at(settings: TrainingConfig, step: int) -> float:
    """The decay of update number ``step``, from 1: ``ema_decay``, or less as long as its window is longer than a tenth of the run so far.

    With ``step / (step + 9)`` the weights in the average are a tenth of the updates so far old on average, which is what TensorFlow's
    ``ExponentialMovingAverage`` does with ``num_updates``. 12 updates leave 3e-6 of the first weights in it; of 0.9999 alone, 0.9988. A
    function of the step alone, so that a run which goes on has nothing to restore.
    """
    return min(settings.ema_decay, step / (step + 9)) if settings.ema_warmup else settings.ema_decay


@torch.no_grad()
def update_average(optimizer: torch.optim.Optimizer, decay: float, left_out: Tensor | None = None) -> None:
    """average <- decay * average + (1 - decay) * weights, over every fp32 tensor this rank updates (flat, of any length).

    Nothing changes where ``left_out`` (float32 [], on the device) is 1 and not 0.
    """
    averages, flats = [state[EMA] for state in optimizer.state.values()], [flat.detach() for flat in optimizer.state]
    if left_out is None:
        torch._foreach_lerp_(averages, flats, 1.0 - decay)
    else:
        weight = (1.0 - left_out) * (1.0 - decay)
        torch._foreach_lerp_(averages, flats, [weight] * len(flats))
