"""Where every attention of the plain model looks, as numbers: what `model.attentions` says of the packed one. Letters as in `plain`."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from megainter.kernels import PaddedLayout
from megainter.model.encoder import Encoder, SelfAttention


@contextmanager
def looking(encoder: Encoder, wanted: bool) -> Iterator[dict[str, tuple[torch.Tensor, ...]]]:
    """Where each layer looks in the forward within, by the names of the models' outputs; empty where it is not ``wanted``.

    ``interaction_attentions`` [B, h, R + T, R + T], regions before tokens, ``text_attentions`` [B, h, T, T] and ``region_attentions``
    [B, h', R, R]: a float32 tensor for each layer, before dropout. Entry [b, head, i, j] is the share of its attention that i gives to j;
    zeros at padding. Other threads must not run the same model meanwhile.
    """
    found: dict[str, tuple[torch.Tensor, ...]] = {}
    if not wanted:
        yield found
        return
    shares: dict[nn.Module, torch.Tensor] = {}

    def note(attention: nn.Module, given: tuple[Any, ...]) -> None:
        shares[attention] = padded_shares(attention, given[1], given[2])  # type: ignore[arg-type]

    streams = {"interaction": encoder.interaction, "text": encoder.text, "region": encoder.region}
    hooks = [layer.attention.register_forward_pre_hook(note) for layers in streams.values() for layer in layers]  # type: ignore[operator, union-attr]
    try:
        yield found
        found |= {f"{name}_attentions": tuple(shares[layer.attention] for layer in layers) for name, layers in streams.items()}  # type: ignore[index]
    finally:
        for hook in hooks:
            hook.remove()


def padded_shares(attention: SelfAttention, x_BLH: torch.Tensor, layout: PaddedLayout) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) over real columns, float32 [B, h, L, L] whatever the model computes in; zeros at padding."""
    q_BLhd, k_BLhd = (part(x_BLH).unflatten(-1, (attention.heads, -1)).float() for part in (attention.query, attention.key))
    with torch.autocast(x_BLH.device.type, enabled=False):
        scores_BhLL = torch.einsum("bihd,bjhd->bhij", q_BLhd * q_BLhd.shape[-1] ** -0.5, k_BLhd)
    both = layout.real[:, None, :, None] & layout.real[:, None, None, :]
    return torch.where(both, scores_BhLL.masked_fill(~layout.real[:, None, None, :], float("-inf")).softmax(-1), 0.0)
