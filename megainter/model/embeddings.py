"""Text tokens and image regions into one width (paper section 3.1; official BertEmbeddings and BertImageEmbeddings)."""

import torch
from torch import nn

from megainter.kernels import dropout, dropout_add_layer_norm
from megainter.model.configuration import InterBertConfig


def at_least_single(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in float32, or in double precision where it has that."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


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


class RegionScaling(nn.Module):
    """Region features brought to mean 0 and deviation 1 in each of their numbers, by the configuration's.

    A detector's features are lopsided and of unlike size: numbers that hardly vary would cost a linear layer as much as those that tell
    photos apart. Mean and deviation are the configuration's, not weights: they are not trained, and belong to no checkpoint.
    """

    mean: torch.Tensor
    deviation: torch.Tensor

    def __init__(self, config: InterBertConfig) -> None:
        super().__init__()
        for name in ("mean", "deviation"):
            numbers = torch.tensor(getattr(config, f"region_{name}"), dtype=torch.float32, device="cpu")  # never "meta": no file has them
            self.register_buffer(name, numbers, persistent=False)

    def forward(self, features_NF: torch.Tensor) -> torch.Tensor:
        """[..., F] of any floating dtype -> the same in float32, or double precision where they have that."""
        return (at_least_single(features_NF) - self.mean) / self.deviation


class RegionEmbeddings(nn.Module):
    """Linear(feature) + Linear(location), layer norm, dropout. Regions have no position and no token type in the official code."""

    def __init__(self, config: InterBertConfig) -> None:
        super().__init__()
        self.scaling = RegionScaling(config) if config.standardize_regions else None
        self.feature_dropout_p = config.region_feature_dropout_prob
        self.feature = nn.Linear(config.region_feature_size, config.hidden_size)
        self.location = nn.Linear(5, config.hidden_size)
        self.norm = DropoutAddLayerNorm(config, 0.0)
        # the text's probability: the region layers' 0.2 begins above the interaction layers
        self.dropout_p = config.hidden_dropout_prob

    def forward(self, features_NF: torch.Tensor, locations_N5: torch.Tensor) -> torch.Tensor:
        """Features [Nr, F] of any floating dtype (stores keep float16) and locations [Nr, 5] -> [Nr, H]."""
        seen_NF = self.seen(features_NF)
        x_NH = self.norm(self.feature(seen_NF), self.location(locations_N5.to(seen_NF.dtype)))
        return dropout(x_NH, self.dropout_p, self.training)

    def seen(self, features_NF: torch.Tensor) -> torch.Tensor:
        """Features [..., F] as they are embedded: standardized where the configuration says so, in training with dropout."""
        if self.scaling is not None:
            features_NF = self.scaling(features_NF)
        return dropout(features_NF.to(self.feature.weight.dtype), self.feature_dropout_p, self.training)
