"""Starting an InterBERT from a BERT of any size, casing and language, or from a UNITER.

BERT's layers become the interaction module and, above it, the text stream: text alone then passes through the same layers in the same
order, so that its states are BERT's own. Region embeddings, poolers, matching and region heads begin anew (as in the official code);
the region stream does too, or starts from copies of the text stream's layers.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from megainter.conversion.architecture import layer_count
from megainter.conversion.card import NO_CARD, Card
from megainter.conversion.folder import Output, finish, refuse_existing, source_of
from megainter.conversion.foreign_files import LazyTensor, open_tensors, without_prefix
from megainter.conversion.mapping import Origin, Plan, make_plan, untied_decoder
from megainter.conversion.official import TIED, WORD, bert_names
from megainter.conversion.official_names import our_name
from megainter.conversion.vocabulary import find_vocabulary, require_room
from megainter.data.feature_store.record import StoreSchema
from megainter.data.feature_store.shard import read_store_json
from megainter.errors import DamagedError, UsageError
from megainter.files import followed, read_json
from megainter.model.configuration import InterBertConfig

OTHER_BIAS = "cls.predictions.decoder.bias"
POOLERS = r"interbert\.(text_pooler|region_pooler)\."
REGIONS = r"interbert\.(region_embeddings|encoder\.region)\."
FRESH = rf"{POOLERS}|{REGIONS}|mrm_head\.|itm_head\."
# BERT's own pooler and next-sentence head; the buffer of positions; UNITER's parts of other shape or meaning.
LEFT_OVER = (
    r"bert\.pooler\.|cls\.seq_relationship\.|bert\.embeddings\.(position_ids|token_type_ids)$|cls\.predictions\.decoder\.(bias|weight)$"
)
# Heads that fine-tuning put on a BERT: transformers' (classification, tagging, multiple choice, questions), their older names, and those
# of widely used projects (CRF taggers, ColBERT's linear, SimCSE's mlp, the training loss's own weights).
TUNED = r"(classifiers?|qa_outputs|qa_classifier|logits_proj|start_fc|end_fc|crf|linear|mlp|out|fc|loss_fct|lstm|bilstm|output_layer)\."
UNITER_LEFT_OVER = r"bert\.img_embeddings\.|itm_output\.|feat_regress\.|vqa_output\."
UNITER_CLASSES = "cls.imagePredictions.decoder.weight"  # its name here
_UNITER_HEAD = {"0": "transform.dense", "2": "transform.LayerNorm", "3": "decoder"}
_SAME = ("num_attention_heads", "hidden_dropout_prob", "attention_probs_dropout_prob", "layer_norm_eps", "initializer_range")


@dataclass(frozen=True)
class BertStart:
    """What a BERT does not decide. None takes the default.

    ``interaction_layers`` of BERT's layers (half of them, as in the official model) become the interaction module, the others the text
    stream. ``region_layers`` are "fresh", or copies of the "text" stream's. ``num_region_layers`` is as many as text layers,
    ``num_region_attention_heads`` the official 8 where they divide the width ("text": BERT's). The rest as in ``InterBertConfig``.
    """

    interaction_layers: int | None = None
    region_layers: str = "fresh"
    num_region_layers: int | None = None
    num_region_attention_heads: int | None = None
    region_feature_size: int = 2048
    num_region_classes: int = 1601
    pooler_size: int = 1024
    fusion: str = "mul"
    region_objective: str = "class"
    seed: int = 0


def region_sizes(store: Path | None, feature_size: int | None, classes: int | None) -> dict[str, int]:
    """``region_feature_size`` and ``num_region_classes`` of a start: as given, else the store's, else what ``BertStart`` has.

    ``UsageError`` where what is given is not the store's.
    """
    given = {"region_feature_size": feature_size, "num_region_classes": classes}
    stated = {name: size for name, size in given.items() if size is not None}
    if store is None:
        return stated
    schema = StoreSchema.from_json(read_store_json(store)["schema"])
    of_the_store = {"region_feature_size": schema.feature_size, "num_region_classes": schema.num_classes}
    for name, size in stated.items():
        if size != of_the_store[name]:
            raise UsageError(f"--{name.replace('_', '-')} {size}: {store} has {of_the_store[name]}; leave the option out")
    return of_the_store


def convert_bert(
    source: Path,
    destination: Path,
    start: BertStart | None = None,
    *,
    config_file: Path | None = None,
    vocabulary: Path | None = None,
    cased: bool | None = None,
    allow_partial: bool = False,
    verify: bool = False,
    card: Card = NO_CARD,
) -> Plan:
    """Write the Hugging Face folder ``destination`` from a BERT: its folder, or its ``.bin`` or ``.safetensors`` with a config.json.

    With ``verify`` transformers' BertModel and the result run on the same text. Raises ``DamagedError`` for a file that is damaged,
    hostile or incomplete, ``UsageError`` for another model or choices that do not fit it.
    """
    refuse_existing(destination)
    origin = source_of(source)
    source = origin.path
    start = start or BertStart()
    folder = source if source.is_dir() else source.parent
    stated = config_file or bert_config_file(folder)
    settings = bert_settings(stated, source) if stated.is_file() else None
    tensors, is_uniter = _uniter_as_bert(without_prefix(open_tensors(source)))
    tensors = bert_names(tensors, source)  # says what another model is, before its settings are asked for
    if any(name.startswith("bert.v_embeddings.") for name in tensors):
        raise UsageError(f"{source} is an InterBERT already (it has bert.v_embeddings.*); use convert official")
    settings = settings or bert_settings(stated, source)
    plan = plan_bert(tensors, settings, start, source, is_uniter, allow_partial)
    files, notes = find_vocabulary(vocabulary or folder, cased)
    for note in notes:
        print(f"note: {note}")
    require_room(files, plan.config.vocab_size)
    output = Output(destination, files, allow_partial, start.seed, verify=verify, origin=origin, card=card)
    finish(plan, source, output, lambda partial: compare(plan, settings, partial))
    return plan


def bert_config_file(folder: Path) -> Path:
    """The settings of the BERT in ``folder``: config.json, or bert_config.json as in the first releases where that alone is there."""
    first, older = folder / "config.json", folder / "bert_config.json"
    return older if older.is_file() and not first.is_file() else first


def bert_settings(config_file: Path, source: object) -> dict[str, Any]:
    """BERT's config.json; ``UsageError`` where it is missing, or of a model that is not computed as BERT is."""
    if not config_file.is_file():
        raise UsageError(f"{config_file} does not exist, and {source} does not tell its attention heads: give --config config.json")
    settings = read_json(followed(config_file))
    if not isinstance(settings, dict) or not isinstance(settings.get("num_attention_heads"), int):
        raise UsageError(f"{config_file} has no num_attention_heads; give the config.json of a BERT")
    wanted = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute", "is_decoder": False}
    for name, value in wanted.items():
        if settings.get(name, value) != value:
            raise UsageError(f"{config_file}: {name} is {settings[name]!r}; an InterBERT can only start from {value!r}")
    return settings


def _uniter_as_bert(tensors: dict[str, LazyTensor]) -> tuple[dict[str, LazyTensor], bool]:
    """UNITER's tensors under BERT's names: its layers are BERT's, its region classifier is InterBERT's region head."""
    if not any(name.startswith("uniter.") for name in tensors):
        return tensors, False

    def rename(name: str) -> str:
        head = re.fullmatch(r"region_classifier\.net\.([023])\.(weight|bias)", name)
        return f"cls.imagePredictions.{_UNITER_HEAD[head[1]]}.{head[2]}" if head else re.sub(r"^uniter\.", "bert.", name)

    return {rename(name): tensor for name, tensor in tensors.items()}, True


def plan_bert(
    tensors: Mapping[str, LazyTensor],
    settings: Mapping[str, Any],
    start: BertStart,
    source: object,
    is_uniter: bool = False,
    allow_partial: bool = False,
) -> Plan:
    """What a BERT becomes. ``tensors`` by the names of a BERT with heads."""
    total = layer_count({name: tensor.shape for name, tensor in tensors.items()}, "bert.encoder.layer.")
    interaction = start.interaction_layers if start.interaction_layers is not None else total // 2
    if not 0 <= interaction <= total:
        raise UsageError(f"{interaction} interaction layers are asked for, {source} has {total} layers; give 0 to {total}")
    untied = untied_decoder(tensors, TIED, WORD, source, allow_partial)
    classes = tensors[UNITER_CLASSES].shape[0] if UNITER_CLASSES in tensors else start.num_region_classes
    if is_uniter and classes != start.num_region_classes:
        asked = f"{start.num_region_classes} are asked for; give --num-region-classes {classes}"
        raise UsageError(f"{source} knows {classes} region classes, {asked}")
    config = _config(tensors, settings, start, interaction, total - interaction)
    found = _found(tensors, interaction)
    if start.region_layers == "text":
        found |= _region_copies(found, config)
    names = [name for name in tensors if name != TIED or untied]
    has_msm = "msm_head.transform.weight" in found
    fresh = FRESH if has_msm else rf"{FRESH}|msm_head\."
    left_over = f"{LEFT_OVER}|{UNITER_LEFT_OVER if is_uniter else TUNED}"
    tuned = sorted({name.partition(".")[0] for name in tensors if re.match(TUNED, name) and not is_uniter})
    notes = [*_notes(config, start, total, has_msm, is_uniter), *untied]
    if tuned:
        notes.append(f"the BERT was fine-tuned; its head has no place here and is left out: {', '.join(tuned)}")
    return make_plan(config, found, names, fresh=fresh, left_over=left_over, notes=notes)


def _config(
    tensors: Mapping[str, LazyTensor], settings: Mapping[str, Any], start: BertStart, interaction: int, text: int
) -> InterBertConfig:
    words, hidden = _rows(tensors, WORD)
    _require_config_of(tensors, settings, interaction + text)
    same = {name: settings[name] for name in _SAME if name in settings}
    heads = settings["num_attention_heads"]
    usual = 8 if start.region_layers == "fresh" and hidden % 8 == 0 else heads
    return InterBertConfig(
        vocab_size=words,
        hidden_size=hidden,
        intermediate_size=_rows(tensors, "bert.encoder.layer.0.intermediate.dense.weight")[0],
        max_position_embeddings=_rows(tensors, "bert.embeddings.position_embeddings.weight")[0],
        type_vocab_size=_rows(tensors, "bert.embeddings.token_type_embeddings.weight")[0],
        num_interaction_layers=interaction,
        num_text_layers=text,
        num_region_layers=start.num_region_layers if start.num_region_layers is not None else text,
        num_region_attention_heads=start.num_region_attention_heads or usual,
        region_feature_size=start.region_feature_size,
        num_region_classes=start.num_region_classes,
        pooler_size=start.pooler_size,
        fusion=start.fusion,
        region_objective=start.region_objective,
        **same,
    )


def _require_config_of(tensors: Mapping[str, LazyTensor], settings: Mapping[str, Any], layers: int) -> None:
    """``UsageError`` where the config.json is that of a BERT of another size: its number of heads would be believed."""
    sizes = {
        "hidden_size": _rows(tensors, WORD)[1],
        "num_hidden_layers": layers,
        "intermediate_size": _rows(tensors, "bert.encoder.layer.0.intermediate.dense.weight")[0],
        "max_position_embeddings": _rows(tensors, "bert.embeddings.position_embeddings.weight")[0],
    }
    for name, size in sizes.items():
        if settings.get(name, size) != size:
            raise UsageError(f"config.json says {name} is {settings[name]}, the tensors say {size}; give the config.json of this BERT")


def _rows(tensors: Mapping[str, LazyTensor], name: str) -> tuple[int, int]:
    shape = tensors[name].shape if name in tensors else ()
    if len(shape) != 2:
        raise DamagedError(f"the checkpoint has no matrix {name}; it is not a whole BERT")
    return shape[0], shape[1]


def _found(tensors: Mapping[str, LazyTensor], interaction: int) -> dict[str, Origin]:
    pairs = ((our_name(name, interaction), Origin(name, tensor)) for name, tensor in tensors.items() if name not in (TIED, OTHER_BIAS))
    found = {ours: origin for ours, origin in pairs if ours is not None}
    if OTHER_BIAS in tensors:  # newer files name the decoder's bias there, too or instead
        found.setdefault("msm_head.decoder.bias", Origin(OTHER_BIAS, tensors[OTHER_BIAS]))
    return found


def _region_copies(found: Mapping[str, Origin], config: InterBertConfig) -> dict[str, Origin]:
    """The first text layers once more, as region layers. ``UsageError`` where that makes no sense."""
    if config.num_region_layers > config.num_text_layers:
        raise UsageError(f"{config.num_region_layers} region layers cannot start from {config.num_text_layers} text layers; give fewer")
    if config.num_region_attention_heads != config.num_attention_heads:
        raise UsageError(f"region layers that start from text layers have their {config.num_attention_heads} heads; leave that option out")
    prefix = "interbert.encoder.text."
    return {name.replace(prefix, "interbert.encoder.region."): origin for name, origin in found.items() if name.startswith(prefix)}


def _notes(config: InterBertConfig, start: BertStart, total: int, has_msm: bool, is_uniter: bool) -> list[str]:
    said = [
        f"{config.num_interaction_layers} of {total} layers interact, {config.num_text_layers} are the text stream (--interaction-layers)",
        f"{config.num_region_layers} region layers of {config.num_region_attention_heads} heads: {start.region_layers} (--region-layers)",
    ]
    if not has_msm:
        said.append("the source has no masked-language head: that of segments begins anew, its decoder tied to the word embeddings")
    if is_uniter:
        said.append("UNITER's region embeddings (7 location values, own norms), pooler and matching head do not map and begin anew")
    return said


def compare(plan: Plan, settings: Mapping[str, Any], folder: Path) -> str:
    """Run BertModel and the converted model on the same text; ``DamagedError`` where hidden states differ by more than rounding."""
    worst = text_difference(plan, settings, folder)
    if not worst <= 1e-4:
        raise DamagedError(f"the result's states of a text differ from BERT's by {worst:.1e}: nothing was written; please report it")
    return f"verified: hidden states of a text equal to BERT's own within {worst:.1e}"


@torch.no_grad()
def text_difference(plan: Plan, settings: Mapping[str, Any], folder: Path) -> float:
    """Largest difference of a hidden state between transformers' BertModel and the model in ``folder`` on drawn texts of two lengths."""
    from transformers import BertConfig, BertModel

    from megainter.model.interbert import InterBertModel

    transformers_logging.disable_progress_bar()
    sizes = {"vocab_size": plan.config.vocab_size, "num_hidden_layers": plan.config.num_hidden_layers}
    bert = BertModel(BertConfig(**{**settings, **sizes, "attn_implementation": "eager"}), add_pooling_layer=False).eval()
    origins = {o.name.removeprefix("bert."): o.tensor for n, o in plan.taken.items() if n.startswith("interbert.") and ".region." not in n}
    bert.load_state_dict({name: tensor.read().float() for name, tensor in origins.items()})
    generator = torch.Generator().manual_seed(0)
    length = min(14, plan.config.max_position_embeddings)
    ids = torch.randint(0, plan.config.vocab_size, (2, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, length // 2 :] = 0
    ours = InterBertModel.from_pretrained(folder).eval()(input_ids=ids, attention_mask=mask).text_states
    theirs = bert(input_ids=ids, attention_mask=mask).last_hidden_state
    return float((ours - theirs)[mask.bool()].abs().max())
