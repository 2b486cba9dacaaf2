"""The settings of a run: frozen dataclasses, filled from a TOML file and then from the command line.

Pretraining's are here, with the sections that fine-tuning shares; each task owns its configuration (``megainter/tasks``).

Every key is known, typed and bounded; an unknown key is an error that names the nearest one. Relative paths are taken from
the current folder, as in a shell.
"""

import dataclasses
import difflib
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, TypeVar, get_args, get_origin

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from megainter.errors import UsageError
from megainter.precision import AskedPrecision

STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True)  # what stands under a setting is its help text
Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Config = TypeVar("Config")


@dataclass(frozen=True, config=STRICT)
class DataConfig:
    """What is read: captions (``prepare``), regions (``extract``) and how both are masked."""

    pairs: Path
    """Captions: what `megainter prepare` wrote."""
    store: Path
    """Regions: what `megainter extract` wrote."""
    split: str = "train"
    """Split of the captions that is trained on."""
    vocabulary: Path | None = None
    """A WordPiece vocab.txt; none: one is trained on the captions."""
    vocabulary_size: Positive = 8000
    """Upper bound, where the vocabulary is trained."""
    lowercase: bool = True
    """Whether captions are lowercased."""
    max_text_tokens: Annotated[int, Field(ge=4)] = 36
    """Longest caption in tokens, [CLS] and [SEP] included; longer ones are cut."""
    max_regions: Positive = 36
    """Most regions of an image, without the global region; of more, the store's first ones are taken."""
    masking: Literal["official", "paper", "bert"] = "official"
    """What is masked: official (the released code's one long span), paper (short segments of whole words), bert (single tokens)."""
    word_segmentation: Literal["auto", "wordpiece", "jieba"] = "auto"
    """Chinese words, for masking "paper": auto (jieba's, where 1 % of the captions have Chinese), jieba, wordpiece (every character)."""
    conditional_masking: bool = False
    """true: a sample has text or regions masked, never both."""
    mismatch_probability: Probability = 0.5
    """Share of samples that get another image's caption, for image-text matching."""
    hard_negatives: Path | None = None
    """What `megainter prepare negatives` wrote for these pairs."""
    hard_negative_share: Probability = 0.2
    """Share of the mismatched captions that are hard negatives, where those are given."""
    gate_msm: bool = False
    """true: no masked-segment loss on mismatched captions."""
    max_missing: Probability = 0.01
    """Share of captions that may be left out because their image has no regions in the store."""
    order: Literal["random", "blocks"] = "random"
    """Of an epoch's samples: random, or blocks of images that lie near each other in the store, for network disks and hard disks."""
    block: Positive | None = None
    """Samples of a block, for order "blocks"; none: 4096."""
    workers: NotNegative = 2
    """Loader processes of each rank; 0: the rank loads for itself."""


@dataclass(frozen=True, config=STRICT)
class ValidationConfig:
    """Periodic validation on a fixed set of samples; ``pairs`` and ``store`` default to those of the training data."""

    pairs: Path | None = None
    """Captions; none: those of the training data."""
    store: Path | None = None
    """Regions; none: those of the training data."""
    split: str = "val"
    """Split of the captions; where it has none there is no validation."""
    samples: Positive = 1000
    """Samples of the fixed set."""
    every_steps: NotNegative = 500
    """Steps between two validations; 0: only at the end."""


@dataclass(frozen=True, config=STRICT)
class ModelSettings:
    """The architecture, in the names of ``InterBertConfig``; None: taken from the data (vocabulary, feature store)."""

    start_from: Path | None = None
    """A Hugging Face folder whose weights are the start (`megainter convert bert` makes one of a BERT)."""
    vocab_size: Positive | None = None
    """Entries of the vocabulary; none: as the data has."""
    region_feature_size: Positive | None = None
    """Width of a region's feature; none: as the feature store has."""
    num_region_classes: Positive | None = None
    """Classes of the detector, background included; none: as the feature store has."""
    hidden_size: Positive = 768
    """Width of the hidden states."""
    num_attention_heads: Positive = 12
    """Attention heads of the interaction and text layers."""
    intermediate_size: Positive = 3072
    """Width inside the feed-forward blocks."""
    num_interaction_layers: NotNegative = 6
    """Layers that see text and regions together."""
    num_text_layers: NotNegative = 6
    """Layers of the text stream above them."""
    num_region_layers: NotNegative = 6
    """Layers of the region stream above them."""
    num_region_attention_heads: Positive = 8
    """Attention heads of the region layers."""
    hidden_dropout_prob: Probability = 0.1
    """Dropout of hidden states."""
    attention_probs_dropout_prob: Probability = 0.1
    """Dropout of attention weights."""
    region_hidden_dropout_prob: Probability = 0.2
    """Dropout of hidden states in the region layers."""
    pooler_size: Positive = 1024
    """Width of the pooled text and image."""
    fusion: Literal["mul", "sum"] = "mul"
    """How pooled text and image are joined for matching: product or sum."""
    region_objective: Literal["class", "feature"] = "class"
    """What a masked region's head predicts: the detector's class probabilities, or the feature itself."""
    max_position_embeddings: Positive = 512
    """Longest text that the model has positions for."""
    type_vocab_size: Positive = 2
    """Token types."""
    layer_norm_eps: Annotated[float, Field(gt=0)] = 1e-12
    """Added to the variance in layer norms."""
    initializer_range: Annotated[float, Field(gt=0)] = 0.02
    """Standard deviation of fresh weights; narrow models need more."""
    gradient_checkpointing: bool = False
    """true: recompute activations in the backward pass; less memory, about a third more time."""


@dataclass(frozen=True, config=STRICT)
class StartConfig:
    """The model that fine-tuning starts from, and what of it may be changed; None: as the model has it."""

    start_from: Path
    """Hugging Face folder of a pretrained model, with its vocabulary."""
    hidden_dropout_prob: Probability | None = None
    """Dropout of hidden states."""
    attention_probs_dropout_prob: Probability | None = None
    """Dropout of attention weights."""
    region_hidden_dropout_prob: Probability | None = None
    """Dropout of hidden states in the region layers."""
    gradient_checkpointing: bool = False
    """true: recompute activations in the backward pass; less memory, about a third more time."""


@dataclass(frozen=True, config=STRICT)
class TrainingConfig:
    """How long and in what portions; exactly one of ``steps`` and ``epochs``."""

    steps: Positive | None = None
    """Optimiser steps."""
    epochs: Annotated[float, Field(gt=0)] | None = None
    """Or passes over the captions; fractions are allowed."""
    global_batch: Positive = 512
    """Samples of one optimiser step over all ranks."""
    micro_batch: Positive = 64
    """Samples of one forward on one rank, where micro_tokens is not given."""
    micro_tokens: Positive | None = None
    """Real tokens, text and regions, of one forward on one rank, in place of micro_batch; the samples of a step stay the same."""
    seed: NotNegative = 42
    """Of weights, order, masks, mismatches and dropout."""
    log_every: Positive = 20
    """Steps between two records of losses and rates; progress is shown at least once a minute besides."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Of a moving average of the weights, kept in the checkpoints; 0: none."""
    profile_steps: NotNegative = 0
    """Steps to profile after two of warm-up: a Chrome trace of each rank and a table by module, in the run folder's profile; 0: none."""


@dataclass(frozen=True, config=STRICT)
class PretrainingConfig(TrainingConfig):
    """How long and in what portions, exactly one of ``steps`` and ``epochs``; and how much each objective weighs."""

    msm_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the masked-segment loss."""
    mrm_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the masked-region loss."""
    itm_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the image-text matching loss."""


@dataclass(frozen=True, config=STRICT)
class OptimizerConfig:
    """AdamW or LAMB with decoupled weight decay; linear warmup, then linear decay to ``final_fraction``.

    ``optimizer.compat = "official"`` in a recipe or on the command line stands for the released code's choices (``COMPAT``).
    """

    name: Literal["adamw", "lamb"] = "adamw"
    """LAMB is for global batches of several thousand; its rates are larger (docs/optimizers.md)."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    """Peak learning rate."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of Adam's first moment."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of Adam's second moment."""
    epsilon: Annotated[float, Field(gt=0)] = 1e-6
    """Added to the root of Adam's second moment."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Decoupled weight decay."""
    warmup: Probability = 0.1
    """Share of all steps in which the rate rises."""
    final_fraction: Probability = 0.0
    """Of the peak learning rate, at the last step."""
    clip_norm: Annotated[float, Field(ge=0)] = 1.0
    """Largest norm of what `clip` says; 0: no clipping."""
    clip: Literal["global", "tensor"] = "global"
    """What is clipped: the gradient as one vector, or each parameter's for itself."""
    decay_groups: Literal["right", "swapped"] = "right"
    """Decay on matrices and embeddings (right), or on biases and norms (swapped, as in the released code)."""
    bias_correction: bool = True
    """Adam's; the released code has none."""
    start_rate: Annotated[float, Field(gt=0)] = 1.0
    """Times the rate, for what a BERT gives: text embeddings, interaction and text layers."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Times the rate, for each layer below the heads."""


@dataclass(frozen=True, config=STRICT)
class EngineConfig:
    """How DeepSpeed runs it."""

    precision: AskedPrecision = "auto"
    """Of the model's arithmetic; auto: bf16 where all devices compute it, else fp16 on GPUs, else fp32. Weights and optimiser are fp32."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 2
    """What DeepSpeed shares out over ranks: 0 nothing, 1 the optimiser's state, 2 also gradients, 3 also weights."""
    communication: Literal["fp32", "bf16"] = "fp32"
    """Of gradients while they are summed over ranks; bf16 sends half as much (docs/performance.md)."""
    offload_optimizer: bool = False
    """Keep the optimiser's state in the host's memory."""
    deepspeed: Path | None = None
    """A DeepSpeed JSON (see ds_configs/) laid over what the settings give."""
    apex: Literal["off", "auto", "on"] = "off"
    """NVIDIA apex's fused optimisers, checked at the start (docs/optimizers.md); auto: where it can be had."""


@dataclass(frozen=True, config=STRICT)
class CheckpointConfig:
    """When a checkpoint is published, and how many are kept."""

    every_steps: Positive = 1000
    """Steps between two checkpoints."""
    keep: Positive = 2
    """How many are kept, the newest."""


@dataclass(frozen=True, config=STRICT)
class RunConfig:
    """A whole pretraining run."""

    output: Path
    """Run folder; the same command goes on with the run in it."""
    data: DataConfig
    training: PretrainingConfig
    model: ModelSettings = dataclasses.field(default_factory=ModelSettings)
    validation: ValidationConfig = dataclasses.field(default_factory=ValidationConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    engine: EngineConfig = dataclasses.field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    tensorboard: bool = True
    """Write TensorBoard events besides metrics.jsonl."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class FinetuneConfig:
    """What every fine-tuning run has; a task adds its ``data`` and ``validation``."""

    output: Path
    """Run folder; the same command goes on with the run in it. Its folder `model` is the result."""
    training: TrainingConfig
    model: StartConfig
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    engine: EngineConfig = dataclasses.field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    tensorboard: bool = True
    """Write TensorBoard events besides metrics.jsonl."""


# What ``optimizer.compat`` stands for. The last two act in the released code only where training starts from pretrained weights.
COMPAT: dict[str, dict[str, Any]] = {
    "official": {"bias_correction": False, "clip": "tensor", "decay_groups": "swapped", "start_rate": 0.1},
}
_COMPAT_OF_A_START = ("decay_groups", "start_rate")


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """The settings of a pretraining run, as ``read_settings`` reads them."""
    config = read_settings(RunConfig, path, overrides)
    _check(config)
    return config


def read_settings(kind: type[Config], path: Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read a recipe of this ``kind`` and lay ``--section.key value`` (or ``--section.key=value``) tokens over it.

    Raises ``UsageError`` with one line for a missing file, broken TOML, an unknown key, a wrong type or a contradiction.
    """
    path = find_recipe(path) if path is not None else None
    settings = _read_toml(path) if path is not None else {}
    given = _pairs(overrides)
    _let_length_replace(settings, [key for key, _ in given])
    _let_portion_replace(settings, [key for key, _ in given])
    for key, value in given:
        _assign(settings, key, value)
    _spell_out_compat(settings)
    try:
        config = TypeAdapter(kind).validate_python(settings)
    except ValidationError as error:
        raise UsageError(_explain(error, path, kind, [key for key, _ in given])) from None
    _check_shared(config)
    return config


def as_dict(config: Any) -> dict[str, Any]:
    """The resolved settings as JSON types, as they are stored in the run folder."""
    return TypeAdapter(type(config)).dump_python(config, mode="json")


def path_settings(kind: type) -> set[str]:
    """Names (``section.key``) of the settings of a ``kind`` of configuration that are files or folders."""
    sections = {field.name: field.type for field in dataclasses.fields(kind) if dataclasses.is_dataclass(field.type)}
    return {
        f"{section}.{key.name}"
        for section, inner in sections.items()
        for key in dataclasses.fields(inner)
        if key.type is Path or Path in get_args(key.type)
    }


def section_defaults(section: str, kind: type = RunConfig) -> dict[str, Any]:
    """Default of every setting of a section that has one, as JSON types: what a run recorded before the setting existed had."""
    inner = next((field.type for field in dataclasses.fields(kind) if field.name == section), None)
    known = dataclasses.fields(inner) if dataclasses.is_dataclass(inner) else ()
    return {field.name: field.default for field in known if isinstance(field.default, bool | int | float | str | None)}


class Portioned(Protocol):
    """Whatever says in which portions a step runs: ``TrainingConfig``, and the settings of the streams."""

    @property
    def global_batch(self) -> int: ...
    @property
    def micro_batch(self) -> int: ...
    @property
    def micro_tokens(self) -> int | None: ...


def check_portions(training: Portioned, world_size: int) -> None:
    """A ``UsageError`` where ``world_size`` ranks cannot share the global batch out; what needs no data to know."""
    if training.micro_tokens is None:
        accumulation_steps(training, world_size)
    elif training.global_batch < world_size:
        raise UsageError(f"training.global_batch {training.global_batch} has no sample for each of {world_size} processes; raise it")


def accumulation_steps(training: Portioned, world_size: int) -> int:
    """Micro-batches of ``micro_batch`` samples that each rank runs per optimiser step; a ``UsageError`` where the batch does not divide.

    With ``micro_tokens`` the data decide: ``data.portions.accumulation``.
    """
    portion = training.micro_batch * world_size
    if training.global_batch % portion:
        raise UsageError(
            f"training.global_batch {training.global_batch} is not a multiple of training.micro_batch {training.micro_batch} "
            f"x {world_size} processes = {portion}; change one of them"
        )
    return training.global_batch // portion


def find_recipe(path: Path) -> Path:
    """The TOML file: ``path`` itself, or the recipe of that name that comes with megainter (``shipped_recipes``)."""
    shipped = Path(__file__).parent / "recipes" / f"{path}.toml"
    return shipped if path.name == str(path) and not path.exists() and shipped.is_file() else path


def shipped_recipes(verb: str = "pretrain") -> list[str]:
    """Names of the recipes that come with megainter for a verb (such as "finetune retrieval"): each opens with its command."""
    found = (Path(__file__).parent / "recipes").glob("*.toml")
    return sorted(path.stem for path in found if verb in path.read_text(encoding="utf-8").partition("\n")[0].replace("megainter.", ""))


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = difflib.get_close_matches(str(path), [found.stem for found in (Path(__file__).parent / "recipes").glob("*.toml")], n=1)
        raise UsageError(f"recipe {path} does not exist" + (f"; did you mean {near[0]}?" if near else "")) from None
    except IsADirectoryError:
        raise UsageError(f"recipe {path} is a folder; give the TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"recipe {path} is not valid TOML: {error}") from None


def _pairs(tokens: Sequence[str]) -> list[tuple[str, str]]:
    found = []
    rest = list(tokens)
    while rest:
        token = rest.pop(0)
        if not token.startswith("--"):
            raise UsageError(f"{token!r} is not an option; settings are given as --section.key value")
        key, equals, value = token[2:].partition("=")
        if not equals:
            if not rest:
                raise UsageError(f"--{key} needs a value")
            value = rest.pop(0)
        found.append((key.replace("-", "_"), value))
    return found


def _let_length_replace(settings: dict[str, Any], keys: list[str]) -> None:
    """A length given on the command line, in steps or in epochs, takes the place of the recipe's, whichever way that counts."""
    training = settings.get("training")
    if isinstance(training, dict) and {"training.steps", "training.epochs"} & set(keys):
        training.pop("steps", None)
        training.pop("epochs", None)


def _let_portion_replace(settings: dict[str, Any], keys: list[str]) -> None:
    """A micro-batch given on the command line, in samples or in tokens, takes the place of the recipe's; two from one place contradict."""
    training = settings.get("training")
    if not isinstance(training, dict):
        return
    ways = {f"training.{name}" for name in ("micro_batch", "micro_tokens")}
    typed = ways & set(keys)
    if len(typed) == 1:
        for key in ways - typed:
            training.pop(key.removeprefix("training."), None)
    if len(typed) == 2 or (not typed and {"micro_batch", "micro_tokens"} <= training.keys()):
        raise UsageError("training.micro_batch counts samples and training.micro_tokens real tokens; give one and leave the other out")


def _spell_out_compat(settings: dict[str, Any]) -> None:
    """Replace ``optimizer.compat`` by the settings it stands for, so that the run records these; what is given for itself stays."""
    optimizer, model = settings.get("optimizer"), settings.get("model")
    if not isinstance(optimizer, dict) or optimizer.get("compat") is None:
        return
    name = str(optimizer.pop("compat"))
    if name not in COMPAT:
        raise UsageError(f"setting optimizer.compat: {name!r} is unknown; choose {', '.join(COMPAT)} or leave it out")
    if optimizer.get("name") == "lamb":
        raise UsageError(f'optimizer.compat = "{name}" stands for BertAdam, and optimizer.name is "lamb"; leave one of them out')
    started = isinstance(model, dict) and model.get("start_from") is not None
    stands_for = {key: value for key, value in COMPAT[name].items() if started or key not in _COMPAT_OF_A_START}
    settings["optimizer"] = stands_for | optimizer


def _assign(settings: dict[str, Any], key: str, value: str) -> None:
    *sections, name = key.split(".")
    place = settings
    for section in sections:
        place = place.setdefault(section, {})
        if not isinstance(place, dict):
            raise UsageError(f"--{key}: {section} is a value, not a section")
    place[name] = None if value.lower() == "none" else value


def _known_keys(kind: type) -> list[str]:
    keys = []
    for field in dataclasses.fields(kind):
        inner = dataclasses.fields(field.type) if dataclasses.is_dataclass(field.type) else ()
        keys += [f"{field.name}.{key.name}" for key in inner] or [field.name]
    return keys


def _explain(error: ValidationError, path: Path | None, kind: type, typed: list[str]) -> str:
    """One line on the first mistake: what, in the recipe or (``typed``) on the command line, and what to do."""
    unknown = ("unexpected_keyword_argument", "extra_forbidden")
    first = sorted(error.errors(), key=lambda found: found["type"] not in unknown)[0]  # a misspelt key explains a missing one
    key = ".".join(str(part) for part in first["loc"])
    key = next((given for given in typed if given == key or given.startswith(f"{key}.")), key)  # a whole section may be unknown
    where = "" if path is None or key in typed else f" in {path}"
    if first["type"] in unknown:
        near = difflib.get_close_matches(key, _known_keys(kind), n=1, cutoff=0.4)
        return f"unknown setting {key}{where}" + (f"; did you mean {near[0]}?" if near else "")
    if first["type"] in ("missing", "missing_argument"):
        return f"setting {key} is missing{where}; give it {'there or ' if path is not None else ''}as --{key} VALUE"
    return f"setting {'--' if key in typed else ''}{key}{where}: {first['msg']} (given: {first['input']!r})"


def _check_shared(config: Any) -> None:
    """Contradictions in the sections that every run has."""
    training, engine = config.training, config.engine
    if (training.steps is None) == (training.epochs is None):
        raise UsageError("give exactly one of training.steps and training.epochs")
    if training.micro_tokens is None and training.micro_batch > training.global_batch:
        raise UsageError(f"training.micro_batch {training.micro_batch} exceeds training.global_batch {training.global_batch}")
    if engine.precision == "fp16" and engine.zero_stage == 0:
        raise UsageError("engine.precision fp16 needs engine.zero_stage 1, 2 or 3: DeepSpeed does not scale the loss at stage 0")
    if config.optimizer.name == "lamb":
        _check_lamb(config.optimizer)
    if config.optimizer.start_rate != 1 and config.model.start_from is None:
        raise UsageError("optimizer.start_rate is for weights that are there already; give model.start_from, or leave it out")
    if engine.offload_optimizer and engine.zero_stage == 0:
        raise UsageError("engine.offload_optimizer needs engine.zero_stage 1, 2 or 3")


def _check_lamb(optimizer: OptimizerConfig) -> None:
    """LAMB adapts what decays, as is usual: without decaying matrices it would be Adam under another name."""
    if optimizer.weight_decay == 0:
        raise UsageError('optimizer.name "lamb" adapts the rates of what decays; give optimizer.weight_decay above 0 (usual: 0.01)')
    if optimizer.decay_groups == "swapped":
        raise UsageError('optimizer.name "lamb" adapts the rates of what decays: matrices, not biases; leave out optimizer.decay_groups')


def _check(config: RunConfig) -> None:
    training, model = config.training, config.model
    if training.msm_weight == training.mrm_weight == training.itm_weight == 0:
        raise UsageError("all three objective weights are 0: nothing would be learned")
    for heads in ("num_attention_heads", "num_region_attention_heads"):
        if model.hidden_size % getattr(model, heads):
            raise UsageError(f"model.hidden_size {model.hidden_size} is not divisible by model.{heads} {getattr(model, heads)}")
    if config.data.block is not None and config.data.order != "blocks":
        raise UsageError(f'data.block is for data.order = "blocks", and data.order is {config.data.order!r}; leave it out')
    if config.data.word_segmentation != "auto" and config.data.masking != "paper":
        raise UsageError(f'data.word_segmentation is for data.masking = "paper", and data.masking is {config.data.masking!r}; leave it out')
    if config.data.max_text_tokens > model.max_position_embeddings:
        raise UsageError(
            f"data.max_text_tokens {config.data.max_text_tokens} exceeds model.max_position_embeddings {model.max_position_embeddings}"
        )


def describe_settings(kind: type = RunConfig) -> str:
    """Every setting with type, default and meaning, a section a paragraph, for the help text."""
    lines = []
    for field in dataclasses.fields(kind):
        if not dataclasses.is_dataclass(field.type):
            lines += _described(field, field.name, kind)
            continue
        summary = (field.type.__doc__ or "").split("\n")[0]
        lines += ["", f"[{field.name}] {summary.replace('``', '')}"]
        for key in dataclasses.fields(field.type):
            lines += _described(key, f"{field.name}.{key.name}", field.type)
        if field.type is OptimizerConfig:
            lines += [f"  --optimizer.compat {'|'.join(COMPAT)}", "      Stands for several of the above: docs/fidelity.md."]
    return "\n".join(lines)


def _described(field: dataclasses.Field, name: str, owner: Any) -> list[str]:
    owners = (base for base in owner.__mro__ if field.name in vars(base).get("__annotations__", {}))  # only there is it documented
    meaning = next(owners).__pydantic_fields__[field.name].description
    return [f"  --{name} {_type_name(field.type)}{_default_of(field)}", f"      {meaning}"]


def _type_name(kind: Any) -> str:
    if get_origin(kind) is Annotated:
        return _type_name(get_args(kind)[0])
    if get_origin(kind) is Literal:
        return "|".join(str(value) for value in get_args(kind))
    if get_args(kind):
        return "|".join(_type_name(part) for part in get_args(kind) if part is not type(None))
    return {"Path": "PATH", "str": "TEXT", "bool": "true|false"}.get(kind.__name__, kind.__name__.upper())


def _default_of(field: dataclasses.Field) -> str:
    if field.default is dataclasses.MISSING:
        return "  (required)"
    return f"  (default {str(field.default).lower() if field.default is None or isinstance(field.default, bool) else field.default})"
