"""Which form of every operation will run on a device: lines for the start-up log."""

import torch

from megainter.kernels.attention import attention_choice
from megainter.kernels.choice import KernelChoice
from megainter.kernels.dropout import dropout_form


def choices(device: torch.device, dtype: torch.dtype, attention_dropout: float) -> list[KernelChoice]:
    """The form each operation takes on ``device`` when activations are ``dtype`` and training drops attention with this probability."""
    plain = "the only form so far"
    return [
        attention_choice(device, dtype, attention_dropout),
        KernelChoice("dropout", *dropout_form(device)),
        KernelChoice("dropout + add + layer norm", "plain PyTorch", plain),
        KernelChoice("linear + GELU", "plain PyTorch", plain),
        KernelChoice("cross entropy", "plain PyTorch", plain),
        KernelChoice("soft-label KL", "plain PyTorch", plain),
    ]
