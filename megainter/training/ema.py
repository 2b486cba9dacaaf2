"""An exponential moving average of the weights, kept beside Adam's moments: sharded where they are, saved and restored with them.

As in the official fine-tuning code: it starts at the first weights and is not debiased.
"""

import torch

EMA = "ema"  # its name in the optimiser's state and in checkpoints


@torch.no_grad()
def update_average(optimizer: torch.optim.Optimizer, decay: float) -> None:
    """average <- decay * average + (1 - decay) * weights, over every fp32 tensor this rank updates (flat, of any length)."""
    averages = [state[EMA] for state in optimizer.state.values()]
    torch._foreach_lerp_(averages, [flat.detach() for flat in optimizer.state], 1.0 - decay)
