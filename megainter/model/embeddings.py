"""Text tokens and image regions into one width (paper section 3.1; official BertEmbeddings and BertImageEmbeddings)."""

import torch
from torch import nn

from megainter.kernels import dropout, dropout_add_layer_norm
from megainter.model.configuration import InterBertConfig


class DropoutAddLayerNorm(nn.Module):
    """LayerNorm(dropout(x) + residual); parameters ``weight`` and ``bias`` [H], as in nn.LayerNorm."""

    def __init__(self, config: InterBertConfig, dropout_p: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.bias = nn.Parameter(torch.zeros(config.hidden_size))
        self.eps = config.layer_norm_eps
        self.dropout_p = dropout_p

    def forward(self, x_NH: torch.Tensor, residual_NH: torch.Tensor) -> torch.Tensor:
        return dropout_add_layer_norm(x_NH, residual_NH, self.weight, self.bias, self.eps, self.dropout_p, self.training)


class TextEmbeddings(nn.Module):
    """Word + position (counted within the text) + token type, layer norm, dropout."""

    def __init__(self, config: InterBertConfig) -> None:
        super().__init__()
        self.word = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.position = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.norm = DropoutAddLayerNorm(config, 0.0)
        self.dropout_p = config.hidden_dropout_prob

    def forward(self, input_ids_N: torch.Tensor, position_ids_N: torch.Tensor, token_type_ids_N: torch.Tensor) -> torch.Tensor:
        """int64 [Nt] each -> [Nt, H]."""
        x_NH = self.norm(self.word(input_ids_N) + self.position(position_ids_N), self.token_type(token_type_ids_N))
        return dropout(x_NH, self.dropout_p, self.training)


class RegionEmbeddings(nn.Module):
    """Linear(feature) + Linear(location), layer norm, dropout. Regions have no position and no token type in the official code."""

    def __init__(self, config: InterBertConfig) -> None:
        super().__init__()
        self.feature = nn.Linear(config.region_feature_size, config.hidden_size)
        self.location = nn.Linear(5, config.hidden_size)
        self.norm = DropoutAddLayerNorm(config, 0.0)
        # the text's probability: the region layers' 0.2 begins above the interaction layers
        self.dropout_p = config.hidden_dropout_prob

    def forward(self, features_NF: torch.Tensor, locations_N5: torch.Tensor) -> torch.Tensor:
        """Features [Nr, F] of any floating dtype (stores keep float16) and locations [Nr, 5] -> [Nr, H]."""
        dtype = self.feature.weight.dtype
        x_NH = self.norm(self.feature(features_NF.to(dtype)), self.location(locations_N5.to(dtype)))
        return dropout(x_NH, self.dropout_p, self.training)
