"""Loss of a batch of four-way choices."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megainter.data.packed import PackedInputs
from megainter.data.tables.questions import CHOICES
from megainter.model.interbert import InterBertForMultipleChoice
from megainter.tasks.vcr.batches import ChoiceBatch
from megainter.transfers import Constants


class ChoiceStep(nn.Module):
    """The module DeepSpeed wraps: from a micro-batch to its share of the global loss."""

    def __init__(self, model: InterBertForMultipleChoice, weights: Sequence[float]) -> None:
        super().__init__()
        self.model = model
        self._weights_K = Constants(weights)

    def forward(self, batch: ChoiceBatch, counts: Tensor | None, each: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Loss share (scalar, fp32) and ``tallies`` [2, K]: sums of the four-way cross-entropy, and right choices, of each objective.

        ``counts`` [K]: questions of each in the global batch (at least 1 each). Without counts: the logits [Q, 4], fp32;
        with ``each`` the loss of each question in the column of its objective, [Q, K].
        """
        logits_Q4 = choice_logits(self.model, batch.inputs)
        if each:
            return F.one_hot(batch.kinds, batch.objectives) * F.cross_entropy(logits_Q4, batch.labels, reduction="none")[:, None]
        if counts is None:
            return logits_Q4
        # By product with the kinds' table: no waiting for a GPU, and a fixed order of summation.
        table_KQ = F.one_hot(batch.kinds, batch.objectives).T.float() * float(batch.counted)
        sums_K = table_KQ @ F.cross_entropy(logits_Q4, batch.labels, reduction="none")
        right_K = table_KQ @ (logits_Q4.detach().argmax(-1) == batch.labels).float()
        return (self._weights_K.on(sums_K.device) * sums_K / counts).sum(), torch.stack([sums_K.detach(), right_K])


def choice_logits(model: InterBertForMultipleChoice, inputs: PackedInputs) -> Tensor:
    """Logits of the four choices of each question, float32 [Q, 4]."""
    return model.score_packed(inputs).float().view(-1, CHOICES)
