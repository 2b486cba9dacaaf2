"""Our parameter names and those of the official InterBERT code, one to one.

The official code keeps interaction and text layers in one list, ``bert.encoder.layer``: the interaction layers first.
"""

import re

from megainter.model.configuration import InterBertConfig

_MODULES = {
    "interbert.text_embeddings.word": "bert.embeddings.word_embeddings",
    "interbert.text_embeddings.position": "bert.embeddings.position_embeddings",
    "interbert.text_embeddings.token_type": "bert.embeddings.token_type_embeddings",
    "interbert.text_embeddings.norm": "bert.embeddings.LayerNorm",
    "interbert.region_embeddings.feature": "bert.v_embeddings.image_embeddings",
    "interbert.region_embeddings.location": "bert.v_embeddings.image_location_embeddings",
    "interbert.region_embeddings.norm": "bert.v_embeddings.LayerNorm",
    "interbert.text_pooler.dense": "bert.t_pooler.dense",
    "interbert.region_pooler.dense": "bert.v_pooler.dense",
    "msm_head.transform": "cls.predictions.transform.dense",
    "msm_head.norm": "cls.predictions.transform.LayerNorm",
    "msm_head.decoder": "cls.predictions.decoder",
    "mrm_head.transform": "cls.imagePredictions.transform.dense",
    "mrm_head.norm": "cls.imagePredictions.transform.LayerNorm",
    "mrm_head.decoder": "cls.imagePredictions.decoder",
    "itm_head": "cls.bi_seq_relationship",
    "choice_head": "vil_logit",
    "classifier": "vil_prediction",
}
_LAYER_MODULES = {
    "attention.query": "attention.self.query",
    "attention.key": "attention.self.key",
    "attention.value": "attention.self.value",
    "attention.output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "intermediate": "intermediate.dense",
    "output": "output.dense",
    "output_norm": "output.LayerNorm",
}
_OUR_MODULES = {theirs: ours for ours, theirs in _MODULES.items()}
_OUR_LAYER_MODULES = {theirs: ours for ours, theirs in _LAYER_MODULES.items()}
_LAYER = re.compile(r"bert\.encoder\.(layer|v_layer)\.(\d{1,4})\.(.+)")
# The official decoder has no bias of its own: the head adds one that sits beside it.
_MSM_BIAS = ("msm_head.decoder.bias", "cls.predictions.bias")


def official_name(name: str, config: InterBertConfig) -> str:
    """The official state-dict key of our parameter ``name`` (as in ``InterBertForPreTraining.state_dict()``). KeyError if there is none."""
    if name == _MSM_BIAS[0]:
        return _MSM_BIAS[1]
    module, _, kind = name.rpartition(".")
    if module.startswith("interbert.encoder."):
        _, _, stream, index, rest = module.split(".", 4)
        number = int(index) + (config.num_interaction_layers if stream == "text" else 0)
        stack = "v_layer" if stream == "region" else "layer"
        return f"bert.encoder.{stack}.{number}.{_LAYER_MODULES[rest]}.{kind}"
    return f"{_MODULES[module]}.{kind}"


def our_name(name: str, interaction_layers: int) -> str | None:
    """Our parameter name of an official state-dict key, where the first ``interaction_layers`` layers interact; None if there is none."""
    if name == _MSM_BIAS[1]:
        return _MSM_BIAS[0]
    module, _, kind = name.rpartition(".")
    layer = _LAYER.fullmatch(module)
    if layer is None:
        ours = _OUR_MODULES.get(module)
        return f"{ours}.{kind}" if ours is not None else None
    rest, number = _OUR_LAYER_MODULES.get(layer[3]), int(layer[2])
    if rest is None:
        return None
    stream = "region" if layer[1] == "v_layer" else "interaction" if number < interaction_layers else "text"
    return f"interbert.encoder.{stream}.{number - (interaction_layers if stream == 'text' else 0)}.{rest}.{kind}"


def official_names(names: list[str], config: InterBertConfig) -> dict[str, str]:
    """Our name -> official key for every one of ``names``; the inverse is as unique."""
    return {name: official_name(name, config) for name in names}
