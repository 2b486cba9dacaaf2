"""Classification losses as float32 sums.

Sums and not means, because the trainer divides by counts over the global batch, so that the gradient does not depend on how the
batch was cut into micro-batches and ranks. A sum over no rows is 0 and still has a gradient (of zeros): nothing is ever NaN
because nothing was masked.
"""

import torch
import torch.nn.functional as F


def cross_entropy_sum(logits_MV: torch.Tensor, labels_M: torch.Tensor) -> torch.Tensor:
    """Sum over rows of -log softmax(logits)[label], as a float32 scalar. ``labels_M`` int64 in [0, V)."""
    return F.cross_entropy(logits_MV.float(), labels_M, reduction="sum")


def soft_label_kl_sum(logits_KC: torch.Tensor, targets_KC: torch.Tensor) -> torch.Tensor:
    """Sum over rows and classes of KL(target || softmax(logits)), as a float32 scalar; 0 log 0 counts as 0.

    ``targets_KC`` are probabilities, any floating dtype. The official code sums over classes (it does not divide by C).
    """
    log_probs_KC = F.log_softmax(logits_KC.float(), dim=-1)
    return F.kl_div(log_probs_KC, targets_KC.float(), reduction="sum")


def squared_error_sum(predictions_KF: torch.Tensor, targets_KF: torch.Tensor) -> torch.Tensor:
    """Sum over rows and columns of the squared difference, as a float32 scalar: the squared L2 distance per row, summed."""
    return F.mse_loss(predictions_KF.float(), targets_KF.float(), reduction="sum")
