"""The architecture of a checkpoint, read from its tensors' shapes and from its JSON, with every assumption said."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megainter.errors import DamagedError, UsageError
from megainter.files import followed, read_json
from megainter.model.configuration import NEARNESS, InterBertConfig

# The official configuration's names, and ours. pooler and region widths have other names there, layers count per module.
OURS_OF_OFFICIAL = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_interaction_layers",
    "t_num_hidden_layers": "num_text_layers",
    "v_num_hidden_layers": "num_region_layers",
    "v_num_attention_heads": "num_region_attention_heads",
    "hidden_dropout_prob": "hidden_dropout_prob",
    "attention_probs_dropout_prob": "attention_probs_dropout_prob",
    "v_hidden_dropout_prob": "region_hidden_dropout_prob",
    "v_feature_size": "region_feature_size",
    "v_target_size": "num_region_classes",
    "bi_hidden_size": "pooler_size",
    "fusion_method": "fusion",
    "max_position_embeddings": "max_position_embeddings",
    "type_vocab_size": "type_vocab_size",
    "initializer_range": "initializer_range",
}
# One value here for what the official JSON says twice.
_SHARED = {
    "v_hidden_size": "hidden_size",
    "v_intermediate_size": "intermediate_size",
    "v_attention_probs_dropout_prob": "attention_probs_dropout_prob",
}
_NOT_IN_SHAPES = {"num_attention_heads": 12, "num_region_attention_heads": 8}
Shapes = Mapping[str, tuple[int, ...]]


def stated_sizes(config_file: Path | None) -> dict[str, Any]:
    """What a JSON says, by our names: one in the official names, or a config.json of ours. Empty without a file.

    ``UsageError`` for a JSON of another model, or one that gives the two streams different widths or another activation.
    """
    if config_file is None:
        return {}
    settings = read_json(followed(config_file))
    if not isinstance(settings, dict):
        raise UsageError(f"{config_file} is not a JSON object of settings")
    if settings.get("model_type") == InterBertConfig.model_type:
        return dict(settings)
    for name, ours in _SHARED.items():
        if name in settings and settings[name] != settings.get(ours, settings[name]):
            both = f"{name} is {settings[name]}, {ours} is {settings.get(ours)}"
            raise UsageError(f"{config_file}: {both}; InterBERT has one value for both streams")
    for name in ("hidden_act", "v_hidden_act"):
        if settings.get(name, "gelu") != "gelu":
            raise UsageError(f"{config_file}: {name} is {settings[name]!r}; InterBERT has the exact gelu only")
    return {ours: settings[name] for name, ours in OURS_OF_OFFICIAL.items() if name in settings}


def sizes_in_shapes(shapes: Shapes) -> dict[str, Any]:
    """The sizes that can be read from the shapes of tensors under our names; those of absent tensors are left out."""
    embeddings, layer = "interbert.text_embeddings", "interbert.encoder.interaction.0"
    places = {
        "vocab_size": (f"{embeddings}.word.weight", 0),
        "hidden_size": (f"{embeddings}.word.weight", 1),
        "max_position_embeddings": (f"{embeddings}.position.weight", 0),
        "type_vocab_size": (f"{embeddings}.token_type.weight", 0),
        "intermediate_size": (f"{layer}.intermediate.weight", 0),
        "region_feature_size": ("interbert.region_embeddings.feature.weight", 1),
        "pooler_size": ("interbert.text_pooler.dense.weight", 0),
        "num_labels": ("classifier.weight", 0),
        "itc_size": ("itc_head.text.weight", 0),
    }
    sizes = {name: shapes[place][axis] for name, (place, axis) in places.items() if len(shapes.get(place, ())) == 2}
    counts = {f"num_{stream}_layers": layer_count(shapes, f"interbert.encoder.{stream}.") for stream in ("interaction", "text", "region")}
    found: dict[str, Any] = sizes | counts
    found |= {name: True for name in NEARNESS if f"{name}.margin" in shapes}
    vectors, features = (shapes.get(name, ()) for name in ("itc_head.region.weight", "interbert.region_embeddings.feature.weight"))
    if vectors[1:] and vectors[1:] == features[1:] and vectors != shapes.get("itc_head.text.weight"):
        found["itc_regions"] = "mean_feature"  # nothing in the weights tells it from the first region's
    return found


def layer_count(names: Shapes, prefix: str) -> int:
    """One more than the highest layer number behind ``prefix``; 0 where there is none. ``DamagedError`` for numbers with great gaps."""
    numbers = (name.removeprefix(prefix).partition(".")[0] for name in names if name.startswith(prefix))
    count = max((int(number) + 1 for number in numbers if number.isdecimal()), default=0)
    if count > len(names):
        raise DamagedError(f"the checkpoint has a layer {prefix}{count - 1}, but only {len(names)} tensors in all; it is damaged")
    return count


def region_target(shapes: Shapes, region_objective: str | None) -> tuple[dict[str, Any], list[str]]:
    """Objective and number of classes from the region head's rows, and what had to be assumed.

    As wide as the features means that it predicts features, unless ``region_objective`` says otherwise.
    """
    rows = shapes.get("mrm_head.decoder.weight", (0,))[0]
    features = shapes.get("interbert.region_embeddings.feature.weight", (0, -1))[-1]
    if not rows:
        return {}, []
    by_width = "feature" if rows == features else "class"
    notes = [f"region objective: {region_objective or by_width} ({rows} outputs, {features} features per region)"]
    if (region_objective or by_width) == "feature":
        return {"region_objective": "feature"}, [*notes, "the number of region classes does not show in a head that predicts features"]
    return {"region_objective": "class", "num_region_classes": rows}, notes


def make_config(stated: Mapping[str, Any], read: Mapping[str, Any], chosen: Mapping[str, Any]) -> tuple[InterBertConfig, list[str]]:
    """The configuration: ``chosen`` by option, over ``read`` from the tensors, over ``stated`` in a JSON; and what was assumed.

    ``UsageError`` where the JSON contradicts the tensors.
    """
    for name, size in read.items():
        # the official trainer overwrites the JSON's width of the region head
        if name in stated and stated[name] != size and name not in ("num_region_classes", "region_objective", "num_labels"):
            raise UsageError(f"the JSON says {name} is {stated[name]}, the tensors say {size}; give the JSON of this checkpoint")
    chosen = {name: value for name, value in chosen.items() if value is not None}
    sizes = {**stated, **read, **chosen}
    notes = []
    for name, usual in _NOT_IN_SHAPES.items():
        if name not in sizes:
            sizes[name] = usual
            notes.append(f"{name} cannot be read from tensors: {usual} as in the released model; --config JSON says otherwise")
    if "fusion" not in sizes:
        notes.append("fusion cannot be read from tensors: mul as in the released model; --fusion or --config says otherwise")
    return InterBertConfig(**sizes), notes


def official_settings(config: InterBertConfig) -> dict[str, Any]:
    """The official JSON of a configuration, the names that stand for one value of ours included."""
    settings = {name: getattr(config, ours) for name, ours in OURS_OF_OFFICIAL.items()}
    settings |= {name: getattr(config, ours) for name, ours in _SHARED.items()}
    return settings | {"v_target_size": config.region_target_size, "hidden_act": "gelu", "v_hidden_act": "gelu"}
