"""All ranks stop after the same step: any rank's wish is a part of a sum that all hold."""

import torch
from torch import Tensor

from megainter.training.arrival import Landing


class StopVote:
    """Whether any rank wants to stop, by a sum that all ranks hold: read without waiting for a GPU, and so one step late there.

    The host then waits at most for the beginning of the step that the device is computing: it is never more than a step ahead.
    """

    def __init__(self, device: torch.device) -> None:
        self._landing = Landing(device)

    def passed(self, wishes: Tensor) -> bool:
        """The verdict on ``wishes`` (float32 []: how many ranks want to stop); on a GPU that of the call before, at first False."""
        return bool(self._landing.swap(wishes))
