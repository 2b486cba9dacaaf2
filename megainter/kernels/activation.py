"""Linear layer followed by GELU: the first half of a transformer's feed-forward block."""

import torch
import torch.nn.functional as F

from megainter.kernels.choice import has_triton


def linear_gelu(x_NI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor) -> torch.Tensor:
    """GELU(x W^T + b), the exact erf form that BERT and InterBERT use (not the tanh approximation).

    One name for both, because a fused form adds the bias inside the activation instead of inside the matrix product.
    ``x_NI`` [N, I] floating; returns [N, O] in the dtype the matrix product gives (autocast applies).
    """
    if has_triton(x_NI.device):
        from megainter.kernels.triton import gelu

        return gelu.linear_gelu(x_NI, weight_OI, bias_O)
    return F.gelu(F.linear(x_NI, weight_OI, bias_O))
