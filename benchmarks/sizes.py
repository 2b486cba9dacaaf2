"""The sizes of the models that the benchmarks compute."""

from typing import Any

BASE: dict[str, Any] = {}  # InterBertConfig's own: the official base model
TOY: dict[str, Any] = {
    "hidden_size": 48, "num_attention_heads": 4, "num_region_attention_heads": 4, "intermediate_size": 96, "pooler_size": 48,
    "num_interaction_layers": 1, "num_text_layers": 1, "num_region_layers": 1,
}  # fmt: skip
TOY_BERT = {"hidden_size": 48, "num_attention_heads": 4, "intermediate_size": 96, "num_hidden_layers": 1}
