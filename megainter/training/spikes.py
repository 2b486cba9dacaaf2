"""Spikes: a loss or a gradient norm far above those of the steps before it, judged on the device before the update is made.

The idea is that of OLMo-core's SkipStepOptimizer: mean and standard deviation of a rolling window, and an update that does not count where
the step lies so many of them above. Spikes enter the window as well, so that a loss which stays high is soon taken as it is.
"""

from typing import Any

import torch
from torch import Tensor

# A standard deviation below this share of the mean is taken as this share: what hardly varies has no spikes of a hair's breadth.
LEAST_DEVIATION = 1e-3


class SpikeWindow:
    """Losses and gradient norms of the last ``width`` steps that were finite; all on ``device``, and no host waits for any of it.

    Judges once half the window is filled (at least two steps). The same on all ranks, where losses and norms are.
    """

    def __init__(self, width: int, sigma: float, device: torch.device) -> None:
        self.width, self.sigma = width, sigma
        self._values = torch.zeros(2, width, dtype=torch.float64, device=device)
        self._count = torch.zeros((), dtype=torch.int64, device=device)
        self._places = torch.arange(width, device=device)

    def judge(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Take in a step, and say what it is: float64 [5], (1 for a spike else 0, loss, norm, highest loss, highest norm that are none).

        ``loss`` and ``norm`` are those of the whole global batch, [] each. What is not finite is no spike, and stays out of the window.
        """
        values = torch.stack([loss.double(), norm.double()])
        finite = values.isfinite().all()
        limits = self._limits()
        spike = (values > limits).any() & finite

        here = self._places == self._count % self.width
        self._values = torch.where(here & finite, values[:, None], self._values)
        self._count = self._count + finite
        return torch.cat([spike.double()[None], values, limits])

    def _limits(self) -> Tensor:
        """The highest loss and norm that are no spikes: float64 [2], infinite while too few steps are known."""
        known = self._places < self._count
        number = self._count.clamp(min=1, max=self.width)
        mean = (self._values * known).sum(dim=1) / number
        deviation = ((self._values - mean[:, None]).square() * known).sum(dim=1).div(number).sqrt()
        limits = mean + self.sigma * torch.maximum(deviation, LEAST_DEVIATION * mean.abs())
        return torch.where(self._count >= max(2, self.width // 2), limits, torch.inf)

    def state(self) -> dict[str, Any]:
        """Losses and norms where they lie in the window, as numbers that JSON keeps to the bit, and their count. Waits for the device."""
        losses, norms = self._values.tolist()
        return {"count": int(self._count), "losses": losses, "gradient_norms": norms}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on with what ``state`` gave: to the bit where the width is the same, else with the last steps that both have room for."""
        values, count = torch.tensor([state["losses"], state["gradient_norms"]], dtype=torch.float64), int(state["count"])
        width = values.shape[1]
        if width != self.width:
            in_order = values.roll(-count, dims=1) if count > width else values[:, :count]
            kept = in_order[:, -self.width :]
            values, count = torch.zeros(2, self.width, dtype=torch.float64), kept.shape[1]
            values[:, :count] = kept
        self._values, self._count = values.to(self._values.device), torch.full_like(self._count, count)
