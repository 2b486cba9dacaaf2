"""Loss of a classifier's batch."""

import torch
from torch import Tensor, nn

from megainter.model.architecture import classification_losses
from megainter.model.interbert import InterBertForSequenceClassification
from megainter.tasks.classification.batches import LabelledBatch


class ClassificationStep(nn.Module):
    """The module DeepSpeed wraps: from a packed micro-batch to its share of the global loss."""

    def __init__(self, model: InterBertForSequenceClassification) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: LabelledBatch, counts: Tensor | None, each: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Loss share (fp32) and ``tallies`` [2, 1]: loss sum and how much of it was right; ``counts`` [1]: examples of the global batch.

        ``each``: the loss of each example, [E, 1], and no counts.
        """
        logits = self.model.score_packed(batch.inputs)
        losses = classification_losses(logits, batch.labels, self.model.config)
        if each:
            return losses[:, None]
        assert counts is not None  # but for each
        total = losses.sum() * float(batch.counted)
        right = _right(logits.detach(), batch.labels) * float(batch.counted)
        return (total / counts).sum(), torch.stack([total.detach(), right])[:, None]


def _right(logits_EK: Tensor, labels: Tensor) -> Tensor:
    """Number of right classes, sum of the soft labels of the likeliest answers, or number of values off by less than a half."""
    if labels.dim() == 2:
        return labels.gather(1, logits_EK.argmax(1, keepdim=True)).sum()
    if labels.dtype == torch.int64:
        return (logits_EK.argmax(1) == labels).sum().float()
    return ((logits_EK[:, 0] - labels).abs() < 0.5).sum().float()
