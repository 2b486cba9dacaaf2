"""Updates that are left out because a loss or a gradient is not finite: known on every rank alike, told, counted, and not saved over.

The verdict comes with the gradient norm, which all ranks share, so that none goes a way of its own. A loss that is not finite makes every
gradient of its rank NaN (``poisoned``), and with them the norm of all. On a GPU the verdict is read when it has arrived, a step late: the
host waits for nothing that the device has not done.
"""

import torch
from torch import Tensor

from megainter.training.arrival import Landing


def poisoned(loss: Tensor, factor: float) -> Tensor:
    """``loss * factor``, whose gradients are all NaN where ``loss`` (float32 []) is not finite; exactly ``loss * factor`` where it is."""
    return loss * (factor + 0.0 * loss.detach())


class StepGuard:
    """Counts updates that were left out: ``in_a_row`` up to the last step that is known, ``total`` of this run of the process.

    ``searching``: fp16 begins with a loss scale that is too large and finds the right one by leaving updates out; until the first update
    is made they do not count.
    """

    def __init__(self, device: torch.device, searching: bool) -> None:
        self.in_a_row, self.total, self._searching = 0, 0, searching
        self._landing, self._step = Landing(device), 0

    def note(self, finished: int, left_out: Tensor | float) -> list[int]:
        """Take the verdict on step ``finished`` (1: left out); gives the steps that are now known to have been left out."""
        earlier, self._step = self._step, finished
        known = self._landing.swap(left_out)
        return [] if known is None else self._count(finished if self._landing.at_once else earlier, known)

    def settle(self) -> list[int]:
        """Wait for a verdict that is still on its way; as ``note``."""
        known = self._landing.take()
        return [] if known is None else self._count(self._step, known)

    def _count(self, step: int, left_out: float) -> list[int]:
        if not left_out:
            self.in_a_row, self._searching = 0, False
            return []
        self.total += 1
        self.in_a_row += not self._searching
        return [step]
