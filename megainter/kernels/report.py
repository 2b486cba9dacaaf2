"""Which form of every operation will run on a device: lines for the start-up log."""

import torch

from megainter.kernels.attention import attention_choice
from megainter.kernels.choice import KernelChoice, triton_choice
from megainter.kernels.dropout import dropout_form

FUSED = ("dropout + add + layer norm", "linear + GELU", "linear + cross entropy", "soft-label KL")


def choices(device: torch.device, dtype: torch.dtype, attention_dropout: float) -> list[KernelChoice]:
    """The form each operation takes on ``device`` when activations are ``dtype`` and training drops attention with this probability."""
    first = [attention_choice(device, dtype, attention_dropout), KernelChoice("dropout", *dropout_form(device))]
    return first + [triton_choice(operation, device) for operation in FUSED]
