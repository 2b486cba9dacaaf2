"""The pretraining objectives of one micro-batch, normalised by counts over the global batch.

Paper section 3 (masked segment modeling, masked region modeling, image-text matching), and where it is asked for image-text contrast, whose
losses and gradients come from a comparison over the global batch (``tasks/contrast.py``). The losses are sums divided by the
number of masked tokens, scored regions and samples of the whole global batch, so that the gradient depends neither on the
number of ranks nor on the number of micro-batches.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megainter import kernels
from megainter.model.interbert import InterBertForPreTraining
from megainter.model.outputs import PackedLosses
from megainter.tasks.contrast import CONTRAST, contrast_sums
from megainter.tasks.pretraining.batches import PretrainBatch
from megainter.transfers import Constants

OBJECTIVES = ("msm", "mrm", "itm")


@dataclass(frozen=True)
class ObjectiveWeights:
    """Weights of the losses in their sum; contrast of weight 0 is none."""

    msm: float = 1.0
    mrm: float = 1.0
    itm: float = 1.0
    itc: float = 0.0

    @property
    def objectives(self) -> tuple[str, ...]:
        """Names of the objectives that are trained, in the order of tallies and counts."""
        return (*OBJECTIVES, CONTRAST) if self.itc > 0 else OBJECTIVES

    @property
    def values(self) -> tuple[float, ...]:
        """Their weights."""
        return tuple(getattr(self, name) for name in self.objectives)


class PretrainingStep(nn.Module):
    """The module DeepSpeed wraps: from a packed micro-batch to its share of the global loss."""

    def __init__(self, model: InterBertForPreTraining, weights: ObjectiveWeights) -> None:
        super().__init__()
        self.model = model
        self._weights = Constants(weights.values)
        self._contrasts = weights.itc > 0

    def forward(self, batch: PretrainBatch, counts: Tensor | None, each: bool = False) -> Tensor | tuple[Tensor, ...]:
        """Loss share (scalar, fp32) and ``tallies`` [2, K] fp32: loss sums and correct predictions of the K objectives.

        ``counts`` [K] fp32: masked tokens, scored regions, samples (and samples again) of the global batch, at least 1 each. A filler batch
        (``batch.counted`` False) runs like any other, so that collectives match, and weighs nothing.

        Without ``counts`` the vectors of both sides alone and the scale, as the model's ``vectors_packed`` gives them: the first
        half of the contrast. ``each``: the loss sums of each sample, [S, K], and no counts.
        """
        if counts is None and not each:
            assert batch.sides is not None
            return self.model.vectors_packed(batch.sides.inputs(batch.inputs))

        # First, so that after the same seed dropout falls on the vectors as it does without counts.
        contrast = contrast_sums(self.model, batch) if self._contrasts else []
        if each:
            return self._each(batch)
        assert counts is not None  # but for the above
        made = self.model.judge_packed(batch.inputs, batch.msm_positions, batch.msm_labels, batch.mrm_positions)
        region_sum = self._region_sum(made.mrm_logits, batch.mrm_targets)
        sums = torch.stack([made.msm_sum, region_sum, kernels.cross_entropy_sum(made.itm_logits, batch.itm_labels), *contrast[:1]])
        if not batch.counted:
            sums = sums * 0.0
        loss = (self._weights.on(sums.device) * sums / counts).sum()
        right = torch.cat([self._correct(made, batch), *contrast[1:]])
        return loss, torch.stack([sums.detach(), right * float(batch.counted)])

    def _each(self, batch: PretrainBatch) -> Tensor:
        """Loss sums of each sample, fp32 [S, K]; their dropout is that of ``forward``, as the heads have none."""
        made = self.model.score_packed(batch.inputs, batch.msm_positions, batch.mrm_positions)
        targets, logits = batch.mrm_targets.float(), made.mrm_logits.float()
        if self.model.config.region_objective == "feature":
            regions = (logits - targets).square().sum(dim=1)
        else:
            regions = F.kl_div(logits.log_softmax(dim=1), targets, reduction="none").sum(dim=1)
        sums = torch.zeros(len(batch.itm_labels), len(OBJECTIVES), device=regions.device)
        spoken, seen = _owners(batch.inputs.text_lengths, batch.msm_positions), _owners(batch.inputs.region_lengths, batch.mrm_positions)
        sums[:, 0].index_add_(0, spoken, F.cross_entropy(made.msm_logits.float(), batch.msm_labels, reduction="none"))
        sums[:, 1].index_add_(0, seen, regions)
        sums[:, 2] = F.cross_entropy(made.itm_logits.float(), batch.itm_labels, reduction="none")
        if self._contrasts:
            assert batch.sides is not None
            answers = batch.sides.answers
            sums = torch.cat([sums, answers.losses[:, None] if answers is not None else torch.zeros_like(sums[:, :1])], dim=1)
        return sums

    def _region_sum(self, logits: Tensor, targets: Tensor) -> Tensor:
        if self.model.config.region_objective == "feature":
            return kernels.squared_error_sum(logits, targets)
        return kernels.soft_label_kl_sum(logits, targets)

    @torch.no_grad()
    def _correct(self, made: PackedLosses, batch: PretrainBatch) -> Tensor:
        pairs = ((made.mrm_logits, _best(batch.mrm_targets)), (made.itm_logits, batch.itm_labels))
        return torch.stack([made.msm_right.float(), *((_best(logits) == labels).sum().float() for logits, labels in pairs)])


def _owners(lengths: Tensor, rows: Tensor) -> Tensor:
    """The sample of each of ``rows`` int64 [M] of a packed tensor whose samples have ``lengths``."""
    return torch.bucketize(rows, lengths.cumsum(0).to(rows.device), right=True)


def _best(scores: Tensor) -> Tensor:
    """Index of the largest entry of each row; rows may be missing altogether."""
    return scores.argmax(dim=-1) if scores.numel() else scores.new_zeros(scores.shape[0], dtype=torch.long)
