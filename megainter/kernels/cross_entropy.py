"""Classification losses as float32 sums.

Sums and not means, because the trainer divides by counts over the global batch, so that the gradient does not depend on how the
batch was cut into micro-batches and ranks. A sum over no rows is 0 and still has a gradient (of zeros): nothing is ever NaN
because nothing was masked.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megainter.kernels.choice import has_triton

CHUNK_ROWS = 1024  # rows whose logits are in memory at a time: 125 MB in float32 for a vocabulary of 30,522


def cross_entropy_sum(logits_MV: Tensor, labels_M: Tensor) -> Tensor:
    """Sum over rows of -log softmax(logits)[label], as a float32 scalar. ``labels_M`` int64 in [0, V)."""
    return F.cross_entropy(logits_MV.float(), labels_M, reduction="sum")


def linear_cross_entropy_sum(x_MH: Tensor, weight_VH: Tensor, bias_V: Tensor, labels_M: Tensor) -> tuple[Tensor, Tensor]:
    """`cross_entropy_sum` of ``x W^T + b``, and how many labels have their row's highest logit; both float32 scalars.

    The logits of all rows never exist at once: their gradient is taken where they are made, ``CHUNK_ROWS`` rows at a time, and goes
    straight into those of x, W and b. Can be differentiated once.
    """
    return _LinearCrossEntropy.apply(x_MH, weight_VH, bias_V, labels_M)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        wanted = any(ctx.needs_input_grad)
        loss, right = (torch.zeros((), dtype=torch.float32, device=x.device) for _ in range(2))
        dx = torch.empty_like(x) if wanted else None
        dweight = dbias = None
        for start in range(0, len(x), CHUNK_ROWS):
            part, some = x[start : start + CHUNK_ROWS], labels[start : start + CHUNK_ROWS]
            losses, hits, slopes = _cross_entropy_rows(F.linear(part, weight, bias), some, wanted)
            loss, right = loss + losses.sum(), right + hits.sum()
            if dx is not None:
                dx[start : start + CHUNK_ROWS] = slopes @ weight.to(slopes.dtype)
                dweight = _added(dweight, slopes.T @ part.to(slopes.dtype), len(x))
                dbias = _added(dbias, slopes.sum(0), len(x))
        zeros = dweight is None and wanted
        ctx.slopes = (dx, torch.zeros_like(weight) if zeros else dweight, torch.zeros_like(bias) if zeros else dbias)
        ctx.dtypes = (x.dtype, weight.dtype, bias.dtype)
        ctx.mark_non_differentiable(right)
        return loss, right

    @staticmethod
    def backward(ctx: Any, dloss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        slopes, ctx.slopes = ctx.slopes, None
        if slopes is None:
            raise RuntimeError("linear_cross_entropy_sum can be differentiated once only")
        gradients = (part.mul_(dloss).to(dtype) for part, dtype in zip(slopes, ctx.dtypes, strict=True))
        return (*gradients, None)


def _added(sum_so_far: Tensor | None, part: Tensor, rows: int) -> Tensor:
    """The sum over chunks; in float32 where there are several, whatever the parts are."""
    if sum_so_far is None:
        return part if rows <= CHUNK_ROWS else part.to(torch.promote_types(part.dtype, torch.float32))
    return sum_so_far.add_(part)


def _cross_entropy_rows(logits: Tensor, labels: Tensor, gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Per row: loss, 1.0 where the label has the highest logit, and the gradient in the dtype of the logits."""
    if has_triton(logits.device):
        from megainter.kernels.triton.losses import cross_entropy_rows_

        return *cross_entropy_rows_(logits, labels, gradient), logits
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    of_label = wide.gather(1, labels[:, None])
    log_sum = wide.logsumexp(1, keepdim=True)
    hits = of_label >= wide.amax(1, keepdim=True) if len(wide) else of_label
    slopes = (wide - log_sum).exp_() if gradient else wide
    if gradient:
        slopes.scatter_add_(1, labels[:, None], torch.full_like(of_label, -1.0))
    return (log_sum - of_label)[:, 0], hits[:, 0].float(), slopes.to(logits.dtype)


def soft_label_kl_sum(logits_KC: Tensor, targets_KC: Tensor) -> Tensor:
    """Sum over rows and classes of KL(target || softmax(logits)), as a float32 scalar; 0 log 0 counts as 0.

    ``targets_KC`` are probabilities, any floating dtype. The official code sums over classes (it does not divide by C).
    """
    if has_triton(logits_KC.device):
        return _SoftLabelKl.apply(logits_KC, targets_KC)
    log_probs_KC = F.log_softmax(logits_KC.float(), dim=-1)
    return F.kl_div(log_probs_KC, targets_KC.float(), reduction="sum")


class _SoftLabelKl(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        from megainter.kernels.triton.losses import soft_label_kl_rows

        losses, slopes = soft_label_kl_rows(logits, targets, ctx.needs_input_grad[0])
        ctx.save_for_backward(slopes)
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (slopes,) = ctx.saved_tensors
        return slopes * dloss.to(slopes.dtype), None


def squared_error_sum(predictions_KF: Tensor, targets_KF: Tensor) -> Tensor:
    """Sum over rows and columns of the squared difference, as a float32 scalar: the squared L2 distance per row, summed."""
    return F.mse_loss(predictions_KF.float(), targets_KF.float(), reduction="sum")
