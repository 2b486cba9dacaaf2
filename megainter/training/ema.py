"""An exponential moving average of the weights, kept beside Adam's moments: sharded where they are, saved and restored with them.

As in the official fine-tuning code: it starts at the first weights and is not debiased.
"""

import torch
from torch import Tensor

EMA = "ema"  # its name in the optimiser's state and in checkpoints


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
