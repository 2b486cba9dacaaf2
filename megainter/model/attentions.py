"""Where every attention of the encoder looks, as numbers: computed a second time, beside whatever form computes the states.

The forms that pack or fuse (`kernels.attention`) never hold these shares in memory, so they are made anew from the rows that each
attention was given. Letters as in `interbert`; h heads, L rows of one sequence (a sample's regions, its tokens, or both).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from megainter.kernels import SequenceLayout
from megainter.model.encoder import Encoder, SelfAttention
from megainter.model.packing import PaddedPlaces

# Of each sequence of a stream, float32 [h, L, L]: how row i of the sequence shares out its attention, which sums to 1.
Shares = list[torch.Tensor]


class Watched:
    """The shares of the attentions of ``encoder`` in the forward that ran while they were `watched`."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self.shares: dict[nn.Module, Shares] = {}

    def padded(self, places: PaddedPlaces) -> dict[str, tuple[torch.Tensor, ...]]:
        """By the names of the models' outputs one float32 tensor for each layer, zeros at padding, for the padded batch of ``places``.

        ``interaction_attentions`` [B, h, R + T, R + T], the R regions before the T tokens; ``text_attentions`` [B, h, T, T];
        ``region_attentions`` [B, h', R, R]. Entry [b, head, i, j] is the share of its attention that i gives to j.
        """
        text = _columns(places.text_rows, places.batch, places.text_length)
        region = _columns(places.region_rows, places.batch, places.region_length)
        joint = [torch.cat([r, places.region_length + t]) for r, t in zip(region, text, strict=True)]
        return {
            "interaction_attentions": self._layers(self.encoder.interaction, joint, places.region_length + places.text_length),
            "text_attentions": self._layers(self.encoder.text, text, places.text_length),
            "region_attentions": self._layers(self.encoder.region, region, places.region_length),
        }

    def _layers(self, layers: nn.ModuleList, columns: list[torch.Tensor], width: int) -> tuple[torch.Tensor, ...]:
        attentions = [module for layer in layers for module in layer.modules() if isinstance(module, SelfAttention)]
        return tuple(_padded(self.shares[attention], attention.heads, columns, width) for attention in attentions)


@contextmanager
def watched(encoder: Encoder, wanted: bool = True) -> Iterator[Watched | None]:
    """Note where each attention looks in the forward within: before dropout, of all rows, also of those that nobody asks for.

    None where it is not ``wanted``. Other threads must not run the same model meanwhile.
    """
    if not wanted:
        yield None
        return
    found = Watched(encoder)

    def note(attention: nn.Module, arguments: tuple[Any, ...]) -> None:
        assert isinstance(attention, SelfAttention)
        _, x_NH, layout, _ = arguments
        found.shares[attention] = attention_shares(attention, x_NH, layout)

    hooks = [module.register_forward_pre_hook(note) for module in encoder.modules() if isinstance(module, SelfAttention)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def padded_attentions(found: Watched | None, places: PaddedPlaces) -> dict[str, tuple[torch.Tensor, ...]]:
    """``found.padded``; nothing where nothing was watched."""
    return found.padded(places) if found is not None else {}


def attention_shares(attention: SelfAttention, x_NH: torch.Tensor, layout: SequenceLayout) -> Shares:
    """softmax(q k^T / sqrt(d)) of each sequence of ``x_NH`` [N, H], in float32 whatever the model computes in."""
    q_Nhd, k_Nhd = (part(x_NH).unflatten(-1, (attention.heads, -1)).float() for part in (attention.query, attention.key))
    lengths, scale = layout.lengths.tolist(), q_Nhd.shape[-1] ** -0.5
    with torch.autocast(x_NH.device.type, enabled=False):
        parts = zip(q_Nhd.split(lengths), k_Nhd.split(lengths), strict=True)
        return [torch.einsum("ihd,jhd->hij", q * scale, k).softmax(-1) for q, k in parts]


def _columns(rows: torch.Tensor, batch: int, width: int) -> list[torch.Tensor]:
    """The columns that hold something, int64, of each of ``batch`` rows of a padded batch: ``rows`` are places in [batch * width]."""
    return [rows[(rows >= i * width) & (rows < (i + 1) * width)] - i * width for i in range(batch)]


def _padded(shares: Shares, heads: int, columns: list[torch.Tensor], width: int) -> torch.Tensor:
    """float32 [B, h, width, width]: each sequence's shares at its ``columns``. A sample without a column has no sequence."""
    padded = torch.zeros(len(columns), heads, width, width, device=columns[0].device if columns else None)
    present = [i for i, own in enumerate(columns) if len(own)]
    for i, own in zip(present, (part for part in shares if part.shape[-1]), strict=True):
        padded[i][:, columns[i][:, None], columns[i]] = own
    return padded
