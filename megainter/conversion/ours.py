"""Weights under our own names: in a Hugging Face folder of ours, or alone, as zero_to_fp32.py and training scripts leave them."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megainter.conversion.architecture import make_config, region_target, sizes_in_shapes, stated_sizes
from megainter.conversion.foreign_files import LazyTensor, open_tensors, without_prefix
from megainter.conversion.mapping import HEADS, Origin, Plan, make_plan, untied_decoder
from megainter.errors import UsageError
from megainter.files import followed, require_checksums
from megainter.model.configuration import InterBertConfig

WORD, TIED = "interbert.text_embeddings.word.weight", "msm_head.decoder.weight"


def has_our_names(tensors: Mapping[str, LazyTensor]) -> bool:
    """Whether tensors (without prefixes of wrappers) bear our names rather than the official ones or another model's."""
    return any(name.startswith("interbert.") for name in tensors)


def plan_ours(
    config: InterBertConfig,
    tensors: Mapping[str, LazyTensor],
    source: object,
    *,
    notes: Iterable[str] = (),
    architecture: str = "InterBertForPreTraining",
    allow_partial: bool = False,
) -> Plan:
    """A model of its own names; a downstream model has its head, others may have it beside the pretraining heads.

    A decoder that is the word embeddings once more is not named; ``DamagedError`` for another one, unless ``allow_partial``.
    """
    untied = untied_decoder(tensors, TIED, WORD, source, allow_partial)
    heads = [head for head in HEADS if f"{head}.weight" in tensors] if architecture == "InterBertForPreTraining" else []
    found = {name: Origin(name, tensor) for name, tensor in tensors.items() if name != TIED}
    names = [name for name in tensors if name != TIED or untied]
    return make_plan(config, found, names, heads=heads, left_over=TIED, notes=[*notes, *untied], architecture=architecture)


def config_of(
    tensors: Mapping[str, LazyTensor], config_file: Path | None, choices: Mapping[str, Any] | None = None
) -> tuple[InterBertConfig, list[str]]:
    """The configuration of weights of our names: sizes from their shapes, the rest from the JSON and ``choices``; and what was assumed."""
    stated, choices = stated_sizes(config_file), choices or {}
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    target, notes = region_target(shapes, choices.get("region_objective") or stated.get("region_objective"))
    config, assumed = make_config(stated, sizes_in_shapes(shapes) | target, {"fusion": choices.get("fusion")})
    return config, [*notes, *assumed]


def open_ours(source: Path, config_file: Path | None = None) -> tuple[InterBertConfig, dict[str, LazyTensor], list[str]]:
    """Configuration, tensors without wrappers' prefixes, and what was assumed: of a folder of ours, or of weights alone.

    The configuration is ``config_file``, else the config.json beside the weights, else what the tensors' shapes say.
    ``UsageError`` where it is another model's.
    """
    require_checksums(source if source.is_dir() else source.parent)
    beside = (source if source.is_dir() else source.parent) / "config.json"
    stated = stated_sizes(config_file) if config_file is not None else stated_sizes(followed(beside)) if beside.is_file() else None
    if stated is not None and config_file is None and stated.get("model_type") != InterBertConfig.model_type:
        raise UsageError(f"{source} is not an InterBERT's folder; use convert bert or convert official")
    tensors = without_prefix(open_tensors(source))
    if not has_our_names(tensors):
        first = next(iter(tensors), "nothing")
        raise UsageError(f"{source} does not bear our names (it begins with {first}); use convert official or convert bert")
    if stated is not None and stated.get("model_type") == InterBertConfig.model_type:
        return InterBertConfig(**stated), tensors, []
    config, notes = config_of(tensors, config_file)
    return config, tensors, notes
