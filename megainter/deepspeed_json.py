"""A DeepSpeed JSON as people have them: read as DeepSpeed reads it, and everything that is wrong with it named at once.

No DeepSpeed here, so that the launcher can ask too; its sections' models come from the engine.
"""

import difflib
import types
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import hjson
from pydantic import BaseModel, ValidationError

from megainter.errors import UsageError

AUTO = "auto"  # left to whoever trains: transformers' Trainer and Accelerate fill it in, and so does the run here
LONGEST = 12  # problems that are told; the others are counted

SWITCHES = (
    "prescale_gradients", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "wall_clock_breakdown", "dump_state",
    "memory_breakdown", "disable_allgather",
)  # fmt: skip
NUMBERS = ("gradient_predivide_factor", "steps_per_print", "communication_bucket_size")
WORDS = ("communication_data_type", "seq_parallel_communication_data_type")
# Sections that DeepSpeed 0.19.8 reads key by key, so that a misspelt one is ignored. None: not looked into.
PLAIN: Mapping[str, tuple[str, ...] | None] = {
    "torch_autocast": ("enabled", "dtype", "lower_precision_safe_modules"),
    "data_types": ("grad_accum_dtype", "param_dtype", "buffer_dtype", "keep_in_fp32_modules"),
    "flops_profiler": ("enabled", "recompute_fwd_factor", "profile_step", "module_depth", "top_modules", "detailed", "output_file"),
    "aio": ("block_size", "queue_depth", "intra_op_parallelism", "single_submit", "overlap_events", "use_gds", "thread_count"),
    "activation_checkpointing": (
        "partition_activations", "number_checkpoints", "contiguous_memory_optimization", "synchronize_checkpoint_boundary", "profile",
        "cpu_checkpointing",
    ),
    "timers": None,
}  # fmt: skip
TRACKERS = ("tensorboard", "wandb", "csv_monitor", "comet")
# What DeepSpeed 0.19 no longer has: it refuses the key even where it is switched off.
REMOVED = (
    "amp", "compression_training", "curriculum_learning", "eigenvalue", "elasticity", "graph_harvesting", "nebula",
    "progressive_layer_drop", "quantize_training", "sparse_attention", "sparse_gradients",
)  # fmt: skip
REMOVED_IN_ZERO = ("mics_shard_size", "mics_hierarchical_params_gather", "zeropp_loco_param")
# DeepSpeed has these, and the run does the same work itself or not at all.
ELSEWHERE = (
    "autotuning", "checkpoint", "data_efficiency", "dataloader_drop_last", "datastates_ckpt", "expert_parallel", "gradient_allreduce_op",
    "hybrid_engine", "managed_gradient_accumulation", "pipeline", "sequence_parallel_size", "tensor_parallel",
    "use_data_before_expert_parallelism", "weight_quantization",
)  # fmt: skip
ZERO = "zero_optimization"
Models = Mapping[str, type[BaseModel]]


def read_deepspeed_json(path: Path) -> dict[str, Any]:
    """The settings in a DeepSpeed JSON; comments and trailing commas are allowed, as DeepSpeed allows them.

    ``UsageError`` where the file is missing, no object of settings, or says a key twice.
    """
    try:
        content = hjson.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_each_once)
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist") from None
    except (OSError, ValueError, RecursionError, OverflowError) as error:
        raise UsageError(f"{path} is not valid JSON: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(content, dict):
        raise UsageError(f"{path} is no DeepSpeed JSON: it holds a {type(content).__name__} instead of an object of settings")
    if isinstance(content.get("bfloat16"), dict) and "bf16" not in content:
        content["bf16"] = content.pop("bfloat16")  # its name in early releases, which DeepSpeed still reads
    return content


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    twice = sorted({key for key, _ in pairs if sum(key == other for other, _ in pairs) > 1})
    if twice:
        raise ValueError(f"{twice[0]!r} is there twice")
    return dict(pairs)


def enables(settings: Mapping[str, Any], precision: str) -> bool | None:
    """Whether the settings switch "bf16" or "fp16" on or off; None where they leave it open ("auto", or nothing that can be understood)."""
    section = settings.get(precision)
    said = section.get("enabled") if isinstance(section, dict) else None
    return said if isinstance(said, bool) else None


def without_auto(value: Any) -> Any:
    """The settings without those that say "auto", at any depth."""
    return {key: without_auto(inner) for key, inner in value.items() if inner != AUTO} if isinstance(value, dict) else value


def is_off(value: Any) -> bool:
    """Whether a section or a switch asks for nothing."""
    return value in (None, False, AUTO) or (isinstance(value, dict) and (not value or value.get("enabled", True) in (False, AUTO)))


def without_what_is_off(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings without switched-off sections that a run does not hand on: trackers, and what DeepSpeed has removed."""
    return {key: value for key, value in settings.items() if not (key in (*TRACKERS, *REMOVED, *ELSEWHERE) and is_off(value))}


def wrong_settings(settings: Mapping[str, Any], models: Models, ours: Iterable[str]) -> Iterator[str]:
    """What DeepSpeed would refuse, or accept and ignore, each with what to do. ``ours``: keys that are judged elsewhere."""
    known = [*models, *PLAIN, *SWITCHES, *NUMBERS, *WORDS]
    for key, value in settings.items():
        if key in models or key in PLAIN:
            yield from _wrong_section(key, value, models)
        elif key in TRACKERS:
            yield f"{key} is on, but trackers are the run's (TensorBoard by its own setting tensorboard): leave the section out"
        elif key in REMOVED:
            yield f"DeepSpeed 0.19 has removed {key}: leave it out"
        elif key in ELSEWHERE:
            yield f"{key} is not for this trainer, which would not follow it: leave it out"
        elif key in SWITCHES + NUMBERS + WORDS:
            yield from _wrong_value(key, value)
        elif key not in ours:
            yield f"unknown DeepSpeed setting {key[:80]!r}" + _suggestion(key, known, models)


def _wrong_value(key: str, value: Any) -> Iterator[str]:
    if key in SWITCHES and not isinstance(value, bool):
        yield f"{key} is {_shown(value)}; write true or false"
    if key in NUMBERS and (isinstance(value, bool) or not isinstance(value, int | float)):
        yield f"{key} is {_shown(value)}; write a number"
    if key in WORDS and value not in ("fp32", "bf16", "fp16", None):
        yield f'{key} is {_shown(value)}; write "fp32", "bf16" or "fp16"'


def _wrong_section(name: str, section: Any, models: Models) -> Iterator[str]:
    if not isinstance(section, dict):
        example = '{"stage": 2}' if name == ZERO else '{"enabled": true}' if name in ("bf16", "fp16") else "{}"
        yield f'{name} is {_shown(section)} instead of a section; write "{name}": {example}'
        return
    if name not in models:
        allowed = PLAIN[name]
        for key in section if allowed is not None else ():
            if key not in allowed:  # type: ignore[operator]
                yield f"unknown DeepSpeed setting {name}.{key[:80]}" + _suggestion(key, allowed or (), {})
        return

    # Unknown keys first, by name; then what the model itself says of the others' values.
    unknown = list(_unknown_keys(name, section, models[name], models))
    yield from (said for _, said in unknown)
    yield from _misfits(name, _without(section, {path for path, _ in unknown}), models[name])


def _unknown_keys(name: str, section: Mapping[str, Any], model: type[BaseModel], models: Models) -> Iterator[tuple[tuple[str, ...], str]]:
    """The path inside the section, and the words, of every key that the section's model does not have, at any depth."""
    fields = {alias: field for key, field in model.model_fields.items() for alias in (key, field.alias) if alias is not None}
    for key, value in section.items():
        if key not in fields and key in REMOVED_IN_ZERO:
            yield (key,), f"DeepSpeed 0.19 has removed {name}.{key}: leave it out"
        elif key not in fields:
            yield (key,), f"unknown DeepSpeed setting {name}.{key[:80]}" + _suggestion(key, fields, models)
        elif isinstance(value, dict) and (inner := _model_in(fields[key].annotation)) is not None:
            yield from (((key, *path), said) for path, said in _unknown_keys(f"{name}.{key}", value, inner, models))


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model in ``Model`` or ``Optional[Model]``."""
    kinds = get_args(annotation) if isinstance(annotation, types.UnionType) or get_args(annotation) else (annotation,)
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _without(section: Mapping[str, Any], paths: set[tuple[str, ...]]) -> dict[str, Any]:
    return {
        key: _without(value, {path[1:] for path in paths if path[:1] == (key,)}) if isinstance(value, dict) else value
        for key, value in section.items()
        if (key,) not in paths
    }


def _misfits(name: str, section: dict[str, Any], model: type[BaseModel]) -> Iterator[str]:
    try:
        model(**section)
    except ValidationError as error:
        for each in error.errors(include_url=False):
            place = ".".join([name, *map(str, each["loc"])])
            shown = "" if isinstance(each["input"], dict) or not each["loc"] else f" is {_shown(each['input'])}"
            yield f"{place}{shown}: {each['msg'][:160]}"
    except (AssertionError, ValueError, TypeError, OverflowError) as error:
        yield f"{name}: {' '.join(str(error).split())[:200]}"


def _suggestion(key: str, known: Iterable[str], models: Models) -> str:
    """The nearest key here; or where a key of exactly this name belongs."""
    place = next((name for name, model in models.items() if key in model.model_fields), None)
    if place is not None:
        return f"; did you mean {place}.{key}?"
    if key in models or key in PLAIN:
        return "; it stands beside that section, not in it"
    near = difflib.get_close_matches(key, list(known), n=1, cutoff=0.45)
    return f"; did you mean {near[0]!r}?" if near else ""


def _shown(value: Any) -> str:
    text = hjson.dumpsJSON(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def refuse(path: Path, problems: list[str]) -> None:
    """``UsageError`` with all problems in one line, where there are any."""
    if problems:
        more = f"; and {len(problems) - LONGEST} more" if len(problems) > LONGEST else ""
        raise UsageError(f"{path}: {'; '.join(problems[:LONGEST])}{more}")
