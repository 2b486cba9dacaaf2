"""Loss of a retrieval batch: the right pair among the wrong ones."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megainter import kernels
from megainter.model.interbert import MATCHED, InterBertForRetrieval
from megainter.tasks.retrieval.batches import RetrievalBatch


class RetrievalStep(nn.Module):
    """The module DeepSpeed wraps. Matching: every pair is right or wrong (the released code); listwise: the own pair among a caption's."""

    def __init__(self, model: InterBertForRetrieval) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: RetrievalBatch, counts: Tensor | None, each: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Loss share (fp32) and ``tallies`` [2, 1]: loss sum and right predictions; ``counts`` [1] as ``RetrievalBatch.counts``, summed.

        ``each``: the loss sum of each caption, [S, 1], and no counts.
        """
        logits_S2 = self.model.logits_packed(batch.inputs).float()
        if batch.listwise:
            logits = (logits_S2[:, MATCHED] - logits_S2[:, 1 - MATCHED]).view(-1, batch.group)
            labels = logits.new_zeros(len(logits), dtype=torch.long)
        else:
            logits = logits_S2
            labels = logits.new_full((len(logits) // batch.group, batch.group), 1 - MATCHED, dtype=torch.long)
            labels[:, 0] = MATCHED
            labels = labels.flatten()
        if each:
            return F.cross_entropy(logits, labels, reduction="none").view(len(batch.inputs) // batch.group, -1).sum(dim=1, keepdim=True)
        assert counts is not None  # but for each
        total = kernels.cross_entropy_sum(logits, labels)
        right = (logits.argmax(dim=-1) == labels).sum().float()
        return (total / counts).sum(), torch.stack([total.detach(), right])[:, None]
