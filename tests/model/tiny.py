"""A small InterBERT and random batches for it, in both forms."""

from typing import Any

import torch

from megainter import InterBertConfig, InterBertForPreTraining
from megainter.data.packed import PackedInputs

TEXT_LENGTHS, REGION_LENGTHS = (5, 9, 1, 7), (3, 1, 6, 4)


def tiny_config(**changes: Any) -> InterBertConfig:
    sizes: dict[str, Any] = {
        "vocab_size": 50,
        "hidden_size": 24,
        "num_attention_heads": 4,
        "intermediate_size": 40,
        "num_interaction_layers": 2,
        "num_text_layers": 1,
        "num_region_layers": 2,
        "num_region_attention_heads": 3,
        "region_feature_size": 10,
        "num_region_classes": 7,
        "pooler_size": 16,
        "max_position_embeddings": 12,
    }
    return InterBertConfig(**{**sizes, **changes})


def tiny_model(seed: int = 0, **changes: Any) -> InterBertForPreTraining:
    """In evaluation mode; weights wide enough that outputs differ clearly."""
    torch.manual_seed(seed)
    model = InterBertForPreTraining(tiny_config(initializer_range=0.15, **changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model


def packed_batch(
    seed: int = 0, text: tuple[int, ...] = TEXT_LENGTHS, regions: tuple[int, ...] = REGION_LENGTHS, feature_size: int = 10
) -> PackedInputs:
    generator = torch.Generator().manual_seed(seed)
    tokens, boxes = sum(text), sum(regions)
    return PackedInputs(
        torch.randint(1, 50, (tokens,), generator=generator),
        torch.randint(0, 2, (tokens,), generator=generator),
        torch.tensor(text),
        torch.randn(boxes, feature_size, generator=generator),
        torch.rand(boxes, 5, generator=generator),
        torch.tensor(regions),
    )


def samples_of(inputs: PackedInputs, order: list[int]) -> PackedInputs:
    """The named samples of a packed batch, in that order, as a packed batch."""
    text, types = (t.split(inputs.text_lengths.tolist()) for t in (inputs.input_ids, inputs.token_type_ids))
    features, locations = (t.split(inputs.region_lengths.tolist()) for t in (inputs.region_features, inputs.region_locations))
    ids, kinds, boxes, places = (torch.cat([part[i] for i in order]) for part in (text, types, features, locations))
    return PackedInputs(ids, kinds, inputs.text_lengths[order], boxes, places, inputs.region_lengths[order])


def padded(inputs: PackedInputs, extra: int = 0, fill: float = 0.0) -> dict[str, torch.Tensor]:
    """The same batch as keyword arguments of the padded door, ``extra`` columns wider than needed, padding filled with ``fill``."""
    text, regions = inputs.text_lengths.tolist(), inputs.region_lengths.tolist()
    batch, longest_t, longest_r = len(text), max(text) + extra, max(regions) + extra
    out = {
        "input_ids": torch.full((batch, longest_t), int(fill), dtype=torch.int64),
        "token_type_ids": torch.full((batch, longest_t), int(fill != 0), dtype=torch.int64),
        "attention_mask": torch.zeros(batch, longest_t, dtype=torch.int64),
        "region_features": torch.full((batch, longest_r, inputs.region_features.shape[1]), fill),
        "region_locations": torch.full((batch, longest_r, 5), fill),
        "region_mask": torch.zeros(batch, longest_r, dtype=torch.int64),
    }
    start_t = start_r = 0
    for i, (t, r) in enumerate(zip(text, regions, strict=True)):
        out["input_ids"][i, :t] = inputs.input_ids[start_t : start_t + t]
        out["token_type_ids"][i, :t] = inputs.token_type_ids[start_t : start_t + t]
        out["region_features"][i, :r] = inputs.region_features[start_r : start_r + r]
        out["region_locations"][i, :r] = inputs.region_locations[start_r : start_r + r]
        out["attention_mask"][i, :t] = 1
        out["region_mask"][i, :r] = 1
        start_t, start_r = start_t + t, start_r + r
    return out


def every_row(inputs: PackedInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions that ask for all MSM and all MRM logits."""
    return torch.arange(len(inputs.input_ids)), torch.arange(len(inputs.region_features))
