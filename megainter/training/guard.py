"""Updates that are left out, because a loss or a gradient is not finite or a spike: known on every rank alike, told, and counted.

The verdict comes with the gradient norm, which all ranks share, so that none goes a way of its own. A loss that is not finite makes every
gradient of its rank NaN (``poisoned``), and with them the norm of all. On a GPU the verdict is read when it has arrived, a step late: the
host waits for nothing that the device has not done.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megainter.training.arrival import Landing
from megainter.training.spikes import SpikeWindow


def poisoned(loss: Tensor, factor: float) -> Tensor:
    """``loss * factor``, whose gradients are all NaN where ``loss`` (float32 []) is not finite; exactly ``loss * factor`` where it is."""
    return loss * (factor + 0.0 * loss.detach())


@dataclass(frozen=True)
class Verdict:
    """What became of a step that is worth a word: left out, or a spike, or both. The limits are the highest values that are no spikes."""

    step: int  # finished with it
    left_out: bool
    spike: bool
    loss: float
    gradient_norm: float
    loss_limit: float
    gradient_norm_limit: float

    @property
    def finite(self) -> bool:
        """Whether loss and gradient were: the update was made, or left out only as a spike."""
        return self.spike or not self.left_out


class StepGuard:
    """Counts updates that were left out: ``in_a_row`` up to the last step that is known, ``total`` of this run of the process.

    ``sound``: whether the last known step's loss and gradient were finite, or the search for a loss scale is on.

    ``searching``: fp16 begins with a loss scale that is too large and finds the right one by leaving updates out; until the first update
    is made they do not count.

    ``spikes``: the window by which the host judges losses and norms that come without a judgement, which is then the run's.
    """

    def __init__(self, device: torch.device, searching: bool, spikes: SpikeWindow | None = None) -> None:
        self._spikes = spikes
        self.in_a_row, self.total, self.sound, self._searching = 0, 0, True, searching
        self._landing, self._step = Landing(device), 0

    def note(self, finished: int, verdict: Tensor) -> list[Verdict]:
        """Take the ``engine.verdict`` on step ``finished``; gives those now known that are worth a word."""
        earlier, self._step = self._step, finished
        known = self._landing.swap(verdict)
        return [] if known is None else self._count(finished if self._landing.at_once else earlier, known)

    def settle(self) -> list[Verdict]:
        """Wait for a verdict that is still on its way; as ``note``."""
        known = self._landing.take()
        return [] if known is None else self._count(self._step, known)

    def _count(self, step: int, known: Tensor) -> list[Verdict]:
        if len(known) == 3 and self._spikes is not None:
            known = torch.cat([known[:1], self._spikes.judge(known[1], known[2])])
        left_out, spike, *numbers = known.tolist()
        verdict = Verdict(step, bool(left_out), bool(spike), *numbers)
        self.sound = verdict.finite or self._searching
        if not left_out:
            self.in_a_row, self._searching = 0, False
            return [verdict] if spike else []
        self.total += 1
        self.in_a_row += verdict.spike or not self._searching
        return [verdict]


def told(verdict: Verdict, in_a_row: int, loss_scale: float) -> tuple[str, dict[str, Any]]:
    """The record of it: "spike", or "skipped" for what is not finite, and its values."""
    if not verdict.spike:
        return "skipped", {"in_a_row": in_a_row, "loss_scale": loss_scale}
    values = {name: getattr(verdict, name) for name in ("loss", "loss_limit", "gradient_norm", "gradient_norm_limit", "left_out")}
    return "spike", values | {"in_a_row": in_a_row}


def said(verdict: Verdict, in_a_row: int) -> str:
    """The line of it."""
    if not verdict.spike:
        return f"step {verdict.step} left out: its loss or gradient is not finite ({in_a_row} in a row)"
    kinds = (("loss", verdict.loss, verdict.loss_limit), ("gradient norm", verdict.gradient_norm, verdict.gradient_norm_limit))
    high = " and ".join(f"{name} {value:.4g} above {limit:.4g}" for name, value, limit in kinds if value > limit)
    return f"step {verdict.step} is a spike: {high}" + (f"; left out ({in_a_row} in a row)" if verdict.left_out else "")
