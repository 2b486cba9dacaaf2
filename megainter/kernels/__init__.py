"""The operations worth fusing, one name each, with the plain PyTorch form that defines them.

Functions of tensors only: nothing here knows of a model, a batch or a configuration. A faster form of an operation lives behind
the same name in the same file, and `choices` says which form will run and why, for the start-up log.
"""

from megainter.kernels.activation import linear_gelu
from megainter.kernels.attention import (
    PaddedLayout,
    QueryRows,
    SequenceLayout,
    attend,
    attention_choice,
    attention_forms,
    varlen_attention,
)
from megainter.kernels.choice import KernelChoice
from megainter.kernels.cross_entropy import cross_entropy_sum, linear_cross_entropy_sum, soft_label_kl_sum, squared_error_sum
from megainter.kernels.dropout import dropout
from megainter.kernels.layer_norm import dropout_add_layer_norm
from megainter.kernels.report import choices

__all__ = [
    "KernelChoice",
    "PaddedLayout",
    "QueryRows",
    "SequenceLayout",
    "attend",
    "attention_choice",
    "attention_forms",
    "choices",
    "cross_entropy_sum",
    "dropout",
    "dropout_add_layer_norm",
    "linear_cross_entropy_sum",
    "linear_gelu",
    "soft_label_kl_sum",
    "squared_error_sum",
    "varlen_attention",
]
