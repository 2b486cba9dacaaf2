"""Loss of a retrieval batch: the right pair among the wrong ones, and where it is trained image-text contrast."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megainter import kernels
from megainter.model.interbert import MATCHED, InterBertForRetrieval
from megainter.tasks.contrast import contrast_sums
from megainter.tasks.retrieval.batches import RetrievalBatch
from megainter.transfers import Constants


class RetrievalStep(nn.Module):
    """The module DeepSpeed wraps. Matching: every pair is right or wrong (the released code); listwise: the own pair among a caption's.

    ``weights``: of that loss, and of the contrast's where there are two.
    """

    def __init__(self, model: InterBertForRetrieval, weights: Sequence[float] = (1.0,)) -> None:
        super().__init__()
        self.model = model
        self._weights, self._contrasts = Constants(weights), len(weights) > 1

    def forward(self, batch: RetrievalBatch, counts: Tensor | None, each: bool = False) -> Tensor | tuple[Tensor, ...]:
        """Loss share (fp32) and ``tallies`` [2, K]: loss sums and right predictions; ``counts`` [K] as ``RetrievalBatch.counts``, summed.

        Without ``counts`` the vectors of both sides alone and the scale, as the model's ``vectors_packed`` gives them: the first half of
        the contrast. ``each``: the loss sums of each caption, [S, K], and no counts.
        """
        if counts is None and not each:
            assert batch.sides is not None
            return self.model.vectors_packed(batch.sides.inputs(batch.inputs))

        # First, so that after the same seed dropout falls on the vectors as it does without counts.
        contrast = contrast_sums(self.model, batch) if self._contrasts else []
        logits, labels = self._judged(batch)
        if each:
            return self._each(batch, logits, labels)
        assert counts is not None  # but for the above
        right = (logits.argmax(dim=-1) == labels).sum().float()
        sums = torch.stack([kernels.cross_entropy_sum(logits, labels), *contrast[:1]])
        loss = (self._weights.on(sums.device) * sums / counts).sum()
        return loss, torch.stack([sums.detach(), torch.cat([right[None], *contrast[1:]])])

    def _judged(self, batch: RetrievalBatch) -> tuple[Tensor, Tensor]:
        """Logits of the pairs, or of lists of pairs, and which is right."""
        logits_S2 = self.model.logits_packed(batch.inputs).float()
        if batch.listwise:
            logits = (logits_S2[:, MATCHED] - logits_S2[:, 1 - MATCHED]).view(-1, batch.group)
            return logits, logits.new_zeros(len(logits), dtype=torch.long)
        labels = logits_S2.new_full((len(logits_S2) // batch.group, batch.group), 1 - MATCHED, dtype=torch.long)
        labels[:, 0] = MATCHED
        return logits_S2, labels.flatten()

    def _each(self, batch: RetrievalBatch, logits: Tensor, labels: Tensor) -> Tensor:
        """Loss sums of each caption, fp32 [S, K]."""
        captions = len(batch.inputs) // batch.group
        sums = F.cross_entropy(logits, labels, reduction="none").view(captions, -1).sum(dim=1, keepdim=True)
        if not self._contrasts:
            return sums
        assert batch.sides is not None
        answers = batch.sides.answers
        return torch.cat([sums, answers.losses[:, None] if answers is not None else torch.zeros_like(sums)], dim=1)
