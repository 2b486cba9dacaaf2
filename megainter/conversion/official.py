"""The released InterBERT's checkpoints: into a Hugging Face folder, and back, bit-equal.

The official ``pytorch_model_N.bin`` and ``_ema.bin`` are plain dictionaries of tensors, pretraining and VL-task models alike. What they do
not tell (attention heads, fusion, where the interaction layers end) comes from the JSON, from options, or from the released model.
"""

import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megainter.conversion.architecture import layer_count, make_config, official_settings, region_target, sizes_in_shapes, stated_sizes
from megainter.conversion.card import NO_CARD, Card
from megainter.conversion.folder import Output, finish, refuse_existing, reread, source_of
from megainter.conversion.foreign_files import LazyTensor, open_tensors, without_prefix
from megainter.conversion.mapping import HEADS, Origin, Plan, expected_shapes, make_plan, require_complete, untied_decoder
from megainter.conversion.official_names import official_name, our_name
from megainter.conversion.ours import config_of, has_our_names, open_ours, plan_ours
from megainter.conversion.vocabulary import NO_VOCABULARY, find_vocabulary, require_room
from megainter.errors import DamagedError, UsageError
from megainter.files import aside, write_json
from megainter.model.configuration import NEARNESS, InterBertConfig

WORD, TIED = "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"
# Two heads of the official VL-task model that none of its tasks trains, the buffer of token positions newer tools add, an untied decoder.
LEFT_OVER = r"(vision_logit|linguisic_logit)\.|bert\.embeddings\.position_ids$|cls\.predictions\.decoder\.weight$"
REGION_HEAD, REGION_FEATURES = "cls.imagePredictions.decoder.weight", "bert.v_embeddings.image_embeddings.weight"
# Word embeddings of a BERT that a project's own module holds: DPR's and CLIP-like models' bert_model, sentence-transformers' auto_model.
HELD = re.compile(r"(?:.+\.)?(?:_?bert|bert_model|auto_model)\.embeddings\.word_embeddings\.weight")
CHOICES = ("fusion", "region_objective", "num_interaction_layers")


def convert_official(
    source: Path,
    destination: Path,
    *,
    config_file: Path | None = None,
    choices: Mapping[str, Any] | None = None,
    vocabulary: Path | None = None,
    cased: bool | None = None,
    allow_partial: bool = False,
    verify: bool = False,
    card: Card = NO_CARD,
) -> Plan:
    """Write the Hugging Face folder ``destination`` from an official checkpoint.

    ``choices`` may name "fusion", "region_objective" and "num_interaction_layers" (None: not chosen). With ``verify`` the source runs
    through a plain reading of the official forward, the target through its own, on the same input.
    Raises ``DamagedError`` for a file that is damaged, hostile or incomplete, ``UsageError`` for one of another model.
    """
    refuse_existing(destination)
    origin = source_of(source)
    source = origin.path
    tensors = without_prefix(open_tensors(source))
    ours = has_our_names(tensors)
    tensors = tensors if ours else bert_names(tensors, source)
    beside = source.with_suffix(".json")
    told = [f"settings are read from {beside}, which lies beside the checkpoint"] if config_file is None and beside.is_file() else []
    plan = plan_weights(tensors, source, beside if told else config_file, choices or {}, allow_partial)
    files, notes = find_vocabulary(vocabulary, cased) if vocabulary is not None else (None, [NO_VOCABULARY])
    require_room(files, plan.config.vocab_size)
    plan = replace(plan, notes=(*told, *plan.notes, *notes))
    output = Output(destination, files, allow_partial, verify=verify, origin=origin, card=card)
    finish(plan, source, output, None if ours else lambda folder: compare(tensors, plan, folder))
    return plan


def plan_weights(
    tensors: Mapping[str, LazyTensor], source: object, config_file: Path | None, choices: Mapping[str, Any], allow_partial: bool
) -> Plan:
    """What weights become that bear our names (a merged DeepSpeed checkpoint's) or the official ones."""
    if not has_our_names(tensors):
        return plan_official(tensors, source, config_file, choices, allow_partial)
    config, notes = config_of(tensors, config_file, choices)
    chosen = choices.get("num_interaction_layers")
    if chosen not in (None, config.num_interaction_layers):
        raise UsageError(f"--interaction-layers {chosen}: {source} has {config.num_interaction_layers}, by its names; leave the option out")
    return plan_ours(config, tensors, source, notes=[*notes, *_casts(tensors.values())], allow_partial=allow_partial)


def bert_names(tensors: dict[str, LazyTensor], source: object) -> dict[str, LazyTensor]:
    """The tensors under the names of a model with heads: a bare one's get the prefix ``bert.``; ``UsageError`` for another model."""
    if any(".c_layer." in name for name in tensors):
        count = sum(".c_layer." in name for name in tensors)
        raise UsageError(
            f"{source} is a ViLBERT: its {count} co-attention tensors (encoder.c_layer.*) have no place in an InterBERT, and without them "
            "its two streams mean nothing; start from the BERT it started from (convert bert)"
        )
    if "embeddings.word_embeddings.weight" in tensors:
        tensors = {f"bert.{name}": tensor for name, tensor in tensors.items()}
    held = [name.removesuffix(WORD.removeprefix("bert.")) for name in tensors if HELD.fullmatch(name)] if WORD not in tensors else []
    if len(held) == 1:  # one BERT inside another module
        tensors = {f"bert.{name.removeprefix(held[0])}" if name.startswith(held[0]) else name: tensor for name, tensor in tensors.items()}
    if WORD not in tensors:
        raise UsageError(f"{source} has no {WORD}: it is neither an InterBERT nor a BERT (it begins with {next(iter(tensors), 'nothing')})")
    return tensors


def plan_official(
    tensors: Mapping[str, LazyTensor], source: object, config_file: Path | None, choices: Mapping[str, Any], allow_partial: bool = False
) -> Plan:
    """What an official checkpoint becomes. ``tensors`` by official names."""
    if not any(name.startswith("bert.v_embeddings.") for name in tensors):
        raise UsageError(f"{source} has no bert.v_embeddings.*: it is a BERT, not an InterBERT; use convert bert")
    stated = stated_sizes(config_file)
    _require_agreement(tensors, stated, config_file, choices)
    interaction, notes = _interaction_layers(tensors, stated, choices.get("num_interaction_layers"))
    found = {}
    for name, tensor in tensors.items():
        ours = our_name(name, interaction)
        if ours is not None and name != TIED:
            found[ours] = Origin(name, tensor)
    shapes = {name: origin.tensor.shape for name, origin in found.items()}
    target, more = region_target(shapes, choices.get("region_objective") or stated.get("region_objective"))
    config, assumed = make_config(stated, sizes_in_shapes(shapes) | target, {"fusion": choices.get("fusion")})
    heads = [head for head in HEADS if f"{head}.weight" in found]
    untied = untied_decoder(tensors, TIED, WORD, source, allow_partial)
    names = [name for name in tensors if name != TIED or untied]  # as a rule the same tensor as the word embeddings
    casts = _casts(origin.tensor for origin in found.values())
    return make_plan(config, found, names, heads=heads, left_over=LEFT_OVER, notes=[*notes, *more, *assumed, *untied, *casts])


def _require_agreement(
    tensors: Mapping[str, LazyTensor], stated: Mapping[str, Any], config_file: Path | None, choices: Mapping[str, Any]
) -> None:
    """``UsageError`` where an option says otherwise than the JSON, or asks for region features of a head of another width."""
    options = {"fusion": "--fusion", "region_objective": "--region-objective", "num_interaction_layers": "--interaction-layers"}
    for name, option in options.items():
        if choices.get(name) is not None and stated.get(name, choices[name]) != choices[name]:
            raise UsageError(f"{option} {choices[name]} contradicts {config_file}, which says {stated[name]}; leave the option out")
    head, features = (tensors[name].shape if name in tensors else (0, 0) for name in (REGION_HEAD, REGION_FEATURES))
    if choices.get("region_objective") == "feature" and head[0] != features[1]:
        raise UsageError(f"--region-objective feature needs a region head of {features[1]} values, and this one has {head[0]}")


def _interaction_layers(tensors: Mapping[str, LazyTensor], stated: Mapping[str, Any], chosen: int | None) -> tuple[int, list[str]]:
    """How many of ``bert.encoder.layer`` are interaction layers; the rest are the text stream's."""
    total = layer_count({name: tensor.shape for name, tensor in tensors.items()}, "bert.encoder.layer.")
    count = chosen if chosen is not None else stated.get("num_interaction_layers")
    if count is None:
        return total // 2, [f"layers 0-{total // 2 - 1} of {total} are taken for the interaction module, as in the released model"]
    if not isinstance(count, int) or not 0 <= count <= total:
        raise UsageError(f"{count} interaction layers are asked for, the checkpoint has {total} layers of text in all")
    return count, []


def _casts(tensors: Iterable[LazyTensor]) -> list[str]:
    others = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors} - {"float32"}
    return [f"{', '.join(sorted(others))} tensors are written as fp32"] if others else []


def compare(tensors: Mapping[str, LazyTensor], plan: Plan, folder: Path) -> str:
    """Run source and target on one drawn input; ``DamagedError`` where their logits differ by more than rounding."""
    from megainter.conversion.plain_official import difference

    worst = difference({name: tensor.read().float() for name, tensor in tensors.items()}, plan.config, folder)
    if not worst <= 1e-4:
        raise DamagedError(f"the converted model's logits differ from the source's by {worst:.1e}: nothing was written; please report it")
    return f"verified: all logits equal to those of the official forward within {worst:.1e} of the largest"


def to_official(source: Path, destination: Path, *, verify: bool = False) -> Plan:
    """Write a folder of ours as an official ``.bin``, the tied decoder included, and its JSON beside it (``NAME.json``).

    fp32 tensors arrive bit-equal, but for the embedding of features that the model standardizes: the official one takes features as they
    are, and gets a weight and a bias that do both. ``UsageError`` where files exist or the source is not a pretraining folder of ours.
    """
    settings = destination.with_suffix(".json")
    for path in (destination, settings):
        refuse_existing(path)
    source = source_of(source).path
    config, tensors, notes = open_ours(source)
    if config.itc_size:
        notes = [*notes, "the head of image-text contrast (itc_head) has no place in an official checkpoint; it is left out"]
        for part in (name for name in NEARNESS if getattr(config, name)):
            notes.append(f"nor has the similarity of its vectors in matching ({part}): without it this model matches worse")
            setattr(config, part, False)
        config.itc_size = 0
        lost = tuple(f"{part}." for part in ("itc_head", *NEARNESS))
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(lost)}
    if config.standardize_regions:
        notes = [*notes, "features are standardized by the weight and bias of their embedding, which differ from ours"]
        tensors = _with_scaling_inside(tensors, config)
    for note in notes:
        print(f"note: {note}")
    heads = [head for head in HEADS if f"{head}.weight" in tensors]
    plan = plan_ours(config, tensors, source)
    require_complete(plan, source, allow_partial=False)
    state = official_state({name: tensors[name].read().float() for name in expected_shapes(config, heads)}, config)
    destination.parent.mkdir(parents=True, exist_ok=True)
    with aside(destination) as partial:
        with open(partial, "wb") as file:
            torch.save(state, file)
        if verify:
            print(reread(partial, {name: LazyTensor.of(tensor) for name, tensor in state.items()}, torch.float32))
        write_json(settings, official_settings(config))
    print(f"{source} -> {destination}: {len(state)} tensors, and its settings in {settings.name}")
    return plan


def _with_scaling_inside(tensors: Mapping[str, LazyTensor], config: InterBertConfig) -> dict[str, LazyTensor]:
    """``tensors`` with mean and deviation of the features in the layer that embeds them: W ((x - m) / d) + b = (W / d) x + (b - W (m / d)).

    Takes both from ``config``, which says of these tensors that there are none.
    """
    weight_name, bias_name = (f"interbert.region_embeddings.feature.{name}" for name in ("weight", "bias"))
    weight, bias = tensors[weight_name].read().double(), tensors[bias_name].read().double()
    mean, deviation = (torch.tensor(values, dtype=torch.float64) for values in (config.region_mean, config.region_deviation))
    config.region_mean = config.region_deviation = None
    folded = {weight_name: (weight / deviation).float(), bias_name: (bias - weight @ (mean / deviation)).float()}
    return {**tensors, **{name: LazyTensor.of(tensor) for name, tensor in folded.items()}}


def official_state(tensors: Mapping[str, Tensor], config: InterBertConfig) -> "OrderedDict[str, Tensor]":
    """Our tensors under the official names, the decoder's tied weight under both of its own."""
    state = OrderedDict((official_name(name, config), tensor) for name, tensor in tensors.items())
    state[TIED] = state[WORD]
    return state
