"""The official forward, read plainly from a state dict in the official names: what a conversion is compared with.

One pair at a time and without padding, so that no mask is needed; shares no code with the model.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils import logging as transformers_logging

from megainter.model.configuration import InterBertConfig
from megainter.model.interbert import InterBertForPreTraining

Weights = Mapping[str, Tensor]


def plain_forward(
    weights: Weights, config: InterBertConfig, input_ids: Tensor, features: Tensor, locations: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids int64 [T], features [R, F] and locations [R, 5] of one pair -> text logits [T, V], region logits [R, C], ITM logits [2]."""
    regions = _linear(weights, "bert.v_embeddings.image_embeddings", features)
    regions = regions + _linear(weights, "bert.v_embeddings.image_location_embeddings", locations)
    regions = _norm(weights, config, "bert.v_embeddings.LayerNorm", regions)
    both = torch.cat([regions, _embedded(weights, config, input_ids)])
    for number in range(config.num_interaction_layers):
        both = _layer(weights, config, f"bert.encoder.layer.{number}", config.num_attention_heads, both)
    regions, text = both.split([len(regions), len(input_ids)])
    for number in range(config.num_interaction_layers, config.num_hidden_layers):
        text = _layer(weights, config, f"bert.encoder.layer.{number}", config.num_attention_heads, text)
    for number in range(config.num_region_layers):
        regions = _layer(weights, config, f"bert.encoder.v_layer.{number}", config.num_region_attention_heads, regions)
    pooled = [F.relu(_linear(weights, f"bert.{side}_pooler.dense", state[0])) for side, state in (("t", text), ("v", regions))]
    fused = pooled[0] * pooled[1] if config.fusion == "mul" else pooled[0] + pooled[1]
    text_hidden = _transformed(weights, config, "cls.predictions.transform", text)
    text_logits = text_hidden @ weights["bert.embeddings.word_embeddings.weight"].T + weights["cls.predictions.bias"]
    region_hidden = _transformed(weights, config, "cls.imagePredictions.transform", regions)
    return text_logits, _linear(weights, "cls.imagePredictions.decoder", region_hidden), _linear(weights, "cls.bi_seq_relationship", fused)


def _embedded(weights: Weights, config: InterBertConfig, input_ids: Tensor) -> Tensor:
    word, position, kind = (weights[f"bert.embeddings.{name}_embeddings.weight"] for name in ("word", "position", "token_type"))
    return _norm(weights, config, "bert.embeddings.LayerNorm", word[input_ids] + position[: len(input_ids)] + kind[0])


def _layer(weights: Weights, config: InterBertConfig, name: str, heads: int, x: Tensor) -> Tensor:
    projected = (_linear(weights, f"{name}.attention.self.{part}", x) for part in ("query", "key", "value"))
    query, key, value = (part.unflatten(-1, (heads, -1)).transpose(0, 1) for part in projected)
    attention = (query @ key.transpose(1, 2) / query.shape[-1] ** 0.5).softmax(-1)
    mixed = (attention @ value).transpose(0, 1).flatten(1)
    x = _norm(weights, config, f"{name}.attention.output.LayerNorm", _linear(weights, f"{name}.attention.output.dense", mixed) + x)
    hidden = F.gelu(_linear(weights, f"{name}.intermediate.dense", x))
    return _norm(weights, config, f"{name}.output.LayerNorm", _linear(weights, f"{name}.output.dense", hidden) + x)


def _transformed(weights: Weights, config: InterBertConfig, name: str, x: Tensor) -> Tensor:
    return _norm(weights, config, f"{name}.LayerNorm", F.gelu(_linear(weights, f"{name}.dense", x)))


def _linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])


def _norm(weights: Weights, config: InterBertConfig, name: str, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + config.layer_norm_eps)
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


@torch.no_grad()
def difference(weights: Weights, config: InterBertConfig, folder: Path) -> float:
    """Largest difference of any logit between the plain forward of ``weights`` and the model in ``folder``, over the largest logit."""
    transformers_logging.disable_progress_bar()
    model = InterBertForPreTraining.from_pretrained(folder).eval()
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(0, config.vocab_size, (min(12, config.max_position_embeddings),), generator=generator)
    features = torch.rand(7, config.region_feature_size, generator=generator)
    locations = torch.rand(7, 5, generator=generator)
    plain = plain_forward(weights, config, input_ids, features, locations)
    ours = model(input_ids=input_ids[None], region_features=features[None], region_locations=locations[None])
    pairs = zip(plain, (ours.text_logits[0], ours.region_logits[0], ours.itm_logits[0]), strict=True)
    return max(float((a - b).abs().max() / a.abs().max().clamp(min=1e-6)) for a, b in pairs)
