"""The transformer layers: single-stream interaction, then one stream of text layers and one of region layers.

All are the same post-norm BERT block; the streams differ in heads and dropout. Rows are packed, [N, H], or side by side with padding,
[B, L, H] (`model.plain`): every layer is the same for both but attention, which the layout computes.
"""

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from megainter.kernels import PaddedLayout, QueryRows, SequenceLayout, linear_gelu
from megainter.model.configuration import InterBertConfig
from megainter.model.embeddings import DropoutAddLayerNorm
from megainter.model.packing import PackedLayout
from megainter.model.padding import PaddedStreams


class SelfAttention(nn.Module):
    """Multi-head self-attention within each sequence of a packed batch, with its output projection."""

    def __init__(self, config: InterBertConfig, heads: int) -> None:
        super().__init__()
        size = config.hidden_size
        self.query, self.key, self.value, self.output = (nn.Linear(size, size) for _ in range(4))
        self.heads = heads
        self.dropout_p = config.attention_probs_dropout_prob

    def forward(
        self, asking_MH: torch.Tensor, x_NH: torch.Tensor, layout: SequenceLayout | PaddedLayout, queries: QueryRows | None = None
    ) -> torch.Tensor:
        """What ``asking_MH``, the rows ``queries`` of ``x_NH`` (None: all of them), gather from their sequences, [M, H]."""
        q, k, v = self.query(asking_MH), self.key(x_NH), self.value(x_NH)
        q, k, v = (x.unflatten(-1, (self.heads, -1)) for x in (q, k, v))
        return self.output(layout.attention(q, k, v, self.dropout_p, self.training, queries).flatten(-2))


class LinearGelu(nn.Linear):
    """nn.Linear followed by exact GELU."""

    def forward(self, x_NI: torch.Tensor) -> torch.Tensor:
        return linear_gelu(x_NI, self.weight, self.bias)


class TransformerLayer(GradientCheckpointingLayer):
    """Attention and feed-forward, each followed by dropout, residual addition and layer norm. [N, H] -> [N, H], or [M, H] for queries."""

    def __init__(self, config: InterBertConfig, heads: int, dropout_p: float) -> None:
        super().__init__()
        self.attention = SelfAttention(config, heads)
        self.attention_norm = DropoutAddLayerNorm(config, dropout_p)
        self.intermediate = LinearGelu(config.hidden_size, config.intermediate_size)
        self.output = nn.Linear(config.intermediate_size, config.hidden_size)
        self.output_norm = DropoutAddLayerNorm(config, dropout_p)

    def forward(self, x_NH: torch.Tensor, layout: SequenceLayout | PaddedLayout, queries: QueryRows | None = None) -> torch.Tensor:
        asking_MH = x_NH if queries is None else x_NH.index_select(0, queries.rows)
        attended_MH = self.attention_norm(self.attention(asking_MH, x_NH, layout, queries), asking_MH)
        return self.output_norm(self.output(self.intermediate(attended_MH)), attended_MH)


class Encoder(nn.Module):
    """Interaction layers over each sample's regions and text together, then text layers and region layers over one kind each."""

    def __init__(self, config: InterBertConfig) -> None:
        super().__init__()
        heads, region_heads = config.num_attention_heads, config.num_region_attention_heads
        dropout_p, region_dropout_p = config.hidden_dropout_prob, config.region_hidden_dropout_prob
        self.interaction = nn.ModuleList(TransformerLayer(config, heads, dropout_p) for _ in range(config.num_interaction_layers))
        self.text = nn.ModuleList(TransformerLayer(config, heads, dropout_p) for _ in range(config.num_text_layers))
        self.region = nn.ModuleList(TransformerLayer(config, region_heads, region_dropout_p) for _ in range(config.num_region_layers))

    def forward(
        self,
        text_NH: torch.Tensor,
        region_NH: torch.Tensor,
        layout: PackedLayout | PaddedStreams,
        text_queries: QueryRows | None = None,
        region_queries: QueryRows | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Embedded text [Nt, H] and regions [Nr, H] -> the two streams' last states, of all rows or of the queries alone."""
        joint_NH = layout.join(region_NH, text_NH)
        for layer in self.interaction:
            joint_NH = layer(joint_NH, layout.joint)
        region_NH, text_NH = layout.part(joint_NH)
        return run_stream(self.text, text_NH, layout.text, text_queries), run_stream(self.region, region_NH, layout.region, region_queries)


def run_stream(
    layers: nn.ModuleList, x_NH: torch.Tensor, layout: SequenceLayout | PaddedLayout, queries: QueryRows | None = None
) -> torch.Tensor:
    """States after all ``layers``; with ``queries`` the last layer computes these rows alone, [M, H]."""
    for number, layer in enumerate(layers, start=1):
        x_NH = layer(x_NH, layout, queries if number == len(layers) else None)
    if queries is not None and not len(layers):
        return x_NH.index_select(0, queries.rows)
    return x_NH
