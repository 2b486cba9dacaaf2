"""Dropout, residual addition and layer normalisation: the end of every half of a post-norm transformer block."""

import torch
import torch.nn.functional as F

from megainter.kernels.choice import has_triton
from megainter.kernels.dropout import dropout


def dropout_add_layer_norm(
    x_NH: torch.Tensor,
    residual_NH: torch.Tensor,
    weight_H: torch.Tensor,
    bias_H: torch.Tensor,
    eps: float,
    dropout_p: float,
    training: bool,
) -> torch.Tensor:
    """LayerNorm(dropout(x) + residual) over the last dimension, with biased variance (as in the official code).

    ``x_NH``, ``residual_NH`` [N, H]; ``eps`` is added to the variance. Dropout acts only when ``training``. Returns [N, H].
    """
    if has_triton(x_NH.device):
        from megainter.kernels.triton import layer_norm

        return layer_norm.dropout_add_layer_norm(x_NH, residual_NH, weight_H, bias_H, eps, dropout_p if training else 0.0)
    dropped_NH = dropout(x_NH, dropout_p, training)
    return F.layer_norm(dropped_NH + residual_NH, weight_H.shape, weight_H, bias_H, eps)
