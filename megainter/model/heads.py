"""Poolers, their fusion, and the heads of the pretraining objectives and of the downstream tasks."""

import math
from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import nn

from megainter.kernels import dropout, linear_cross_entropy_sum
from megainter.model.configuration import InterBertConfig
from megainter.model.embeddings import at_least_single
from megainter.model.encoder import LinearGelu

TwoSides = tuple[torch.Tensor, torch.Tensor]  # of texts, and of regions
FIRST_SCALE, LARGEST_SCALE = 1 / 0.07, 100.0  # of contrast, as in CLIP (arXiv 2103.00020)
FIRST_FACTOR, FIRST_MARGIN = 10.0, 0.3  # of similarity: wrong pairs begin below 0, right ones above


class Pooler(nn.Module):
    """Linear + ReLU on the first row of every sample: [S, H] -> [S, P]."""

    def __init__(self, config: InterBertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.pooler_size)

    def forward(self, first_SH: torch.Tensor) -> torch.Tensor:
        return F.relu(self.dense(first_SH))


def means(states_NH: torch.Tensor, starts_S1: torch.Tensor) -> torch.Tensor:
    """Each sequence's mean over its rows: packed [N, H], and where sequences begin and the last one ends, [S + 1] -> [S, H].

    Rows of a sequence are summed in their order, in float32: to the same bits at every run, on GPUs too.
    """
    lengths_S = starts_S1.diff().long()
    return torch.segment_reduce(at_least_single(states_NH), "mean", lengths=lengths_S, axis=0, unsafe=True).to(states_NH.dtype)


def rows_compared(starts_I: torch.Tensor, lengths_I: torch.Tensor, config: Any) -> torch.Tensor:
    """Which row of its regions makes an image's vector, where a feature does: the global region, the mean of all; or the first one after
    it, if there is one. ``starts_I`` int64 [I] are the global regions' rows, ``lengths_I`` the numbers of rows."""
    return starts_I + (lengths_I > 1) if config.itc_regions == "first_feature" else starts_I


class Fusion(nn.Module):
    """Pooled text and pooled regions into one vector per sample, [S, P]; then dropout (official: 0.1, our hidden_dropout_prob)."""

    def __init__(self, config: InterBertConfig) -> None:
        super().__init__()
        self.method = config.fusion
        self.dropout_p = config.hidden_dropout_prob

    def forward(self, text_SP: torch.Tensor, region_SP: torch.Tensor) -> torch.Tensor:
        if text_SP.shape[0] == 0 or region_SP.shape[0] == 0:  # not len(), which an export takes for a constant
            # One modality is absent: the other's vector alone. The empty sum keeps the absent stream in the graph with zero
            # gradients, so that all ranks reduce the same parameters.
            present, absent = (region_SP, text_SP) if text_SP.shape[0] == 0 else (text_SP, region_SP)
            fused_SP = present + absent.sum()
        else:
            fused_SP = text_SP * region_SP if self.method == "mul" else text_SP + region_SP
        return dropout(fused_SP, self.dropout_p, self.training)


class Decoder(nn.Linear):
    """To logits over the vocabulary or the region targets, [M, H] -> [M, out_size]."""

    @overload
    def forward(self, x_MH: torch.Tensor) -> torch.Tensor: ...
    @overload
    def forward(self, x_MH: torch.Tensor, labels_M: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...
    def forward(self, x_MH: torch.Tensor, labels_M: torch.Tensor | None = None) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """The logits; with int64 ``labels_M`` instead their summed cross entropy and how many rows are right, float32 scalars, without
        all logits in memory at once. Through the module's call, where ZeRO-3 gathers the weight."""
        return super().forward(x_MH) if labels_M is None else linear_cross_entropy_sum(x_MH, self.weight, self.bias, labels_M)


class PredictionHead(nn.Module):
    """Linear, GELU, layer norm, then a decoder: to the vocabulary (its weight tied to the word embeddings), or to region targets."""

    def __init__(self, config: InterBertConfig, out_size: int) -> None:
        super().__init__()
        self.transform = LinearGelu(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.decoder = Decoder(config.hidden_size, out_size)

    def forward(self, x_MH: torch.Tensor) -> torch.Tensor:
        """Only the rows that are asked for, [M, H] (M may be 0) -> [M, out_size]."""
        return self.decoder(self.norm(self.transform(x_MH)))

    def losses(self, x_MH: torch.Tensor, labels_M: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Summed cross entropy of the rows against int64 ``labels_M``, and how many are right: float32 scalars."""
        return self.decoder(self.norm(self.transform(x_MH)), labels_M)


class ContrastiveHead(nn.Module):
    """A text alone and an image alone as vectors of one space, and what their products are multiplied by where they are compared.

    ``log_scale`` [1] is the logarithm of that factor, one over the temperature: a parameter without dimensions is one that DeepSpeed
    cannot send.
    """

    def __init__(self, config: InterBertConfig) -> None:
        super().__init__()
        size = config.pooler_size if config.itc_pooling == "first" else config.hidden_size
        self.text = nn.Linear(size, config.itc_size)
        self.region = nn.Linear(config.region_feature_size if config.itc_of_features else size, config.itc_size)
        self.log_scale = nn.Parameter(torch.full((1,), math.log(FIRST_SCALE)))

    def forward(self, text_TP: torch.Tensor, region_IP: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Texts [T, P] and regions [I, P or F], one row each -> float32 vectors of length 1, [T, D] and [I, D], and ``log_scale`` [1].

        That is a product and not the parameter itself, which ZeRO-3 takes away when this forward ends.
        """
        texts, regions = (
            F.normalize(at_least_single(into(rows)), dim=-1) for into, rows in ((self.text, text_TP), (self.region, region_IP))
        )
        return texts, regions, self.log_scale.float() * 1.0


class Similarity(nn.Module):
    """Log-odds that text and image match, by their vectors of contrast: of states that have seen each other, or of each side alone.

    ``exp(log_scale) * (cosine - margin)``, both of them learned, [1] each as DeepSpeed needs it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.full((1,), math.log(FIRST_FACTOR)))
        self.margin = nn.Parameter(torch.full((1,), FIRST_MARGIN))

    def forward(self, text_SD: torch.Tensor, region_SD: torch.Tensor) -> torch.Tensor:
        """Vectors of length 1, [S, D] each -> float32 [S]."""
        return at_least_single(self.log_scale).exp() * ((text_SD * region_SD).sum(-1) - at_least_single(self.margin))


def matching_logits(
    model: Any, pooled_text_SP: torch.Tensor, pooled_region_SP: torch.Tensor, sides: TwoSides | None, alone: TwoSides | None
) -> torch.Tensor:
    """Logits [S, 2] of a ``model``'s matching head, class 0 = matched; log-odds by ``itm_similarity`` and ``itm_vectors``, where the model
    has them, are added to class 0's, float32.

    ``sides``: what the vectors of text and of regions are made of once they have seen each other, [S, P, H or F] each; ``alone``: the
    vectors of each alone, [S, D]. None where text or regions are absent.
    """
    logits_S2: torch.Tensor = model.itm_head(model.fusion(pooled_text_SP, pooled_region_SP))
    near = []
    if model.itm_similarity is not None and sides is not None:
        near.append(model.itm_similarity(*model.itc_head(*sides)[:2]))
    if model.itm_vectors is not None and alone is not None:
        near.append(model.itm_vectors(*alone))
    if not near:
        return logits_S2
    near_S = torch.stack(near).sum(0)
    return at_least_single(logits_S2) + torch.stack([near_S, torch.zeros_like(near_S)], dim=1)
