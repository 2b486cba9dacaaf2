"""A run's settings from a recipe and the command line, strictly: unknown keys are errors with the nearest name."""

import copy
import dataclasses
import difflib
import json
import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import TypeAdapter, ValidationError

from megainter.config.portions import multiples_around
from megainter.config.settings import ModelSettings, OptimizerConfig, RunConfig
from megainter.errors import UnknownSettingError, UsageError

Config = TypeVar("Config")


# What ``optimizer.compat`` stands for. The last two act in the released code only where training starts from pretrained weights.
COMPAT: dict[str, dict[str, Any]] = {
    "official": {"bias_correction": False, "clip": "tensor", "decay_groups": "swapped", "start_rate": 0.1},
}
# Settings in [model] that a start brings; dropouts and the like stay the run's.
_OF_A_RUN = {"start_from", "gradient_checkpointing"}
SIZES_OF_A_START = {field.name for field in dataclasses.fields(ModelSettings) if not field.name.endswith("_dropout_prob")} - _OF_A_RUN
# Of these, what a start without vectors does not bring.
OF_VECTORS = {"itc_size", "itc_pooling", "itc_regions", "itm_similarity", "itm_vectors"}
OF_FEATURES = {"standardize_regions"}  # nor does one bring this that takes features as they are
# Settings that only recipes of one verb have.
TELLTALES = {
    "pretrain": {"data.masking", "data.vocabulary_size", "data.mismatch_probability", "model.hidden_size", "training.itm_weight"},
    "finetune retrieval": {"data.neighbours", "data.random_captions", "data.hard_captions"},
    "finetune vcr": {"data.questions"},
    "finetune classification": {"data.examples"},
}
RENAMED = {"data.max_missing": "data.max_bad"}  # settings that had another name
# What other programs call a setting, by its last part.
ELSEWHERE = {
    "lr": "optimizer.learning_rate", "batch_size": "training.global_batch", "max_steps": "training.steps", "num_epochs": "training.epochs",
    "num_train_epochs": "training.epochs", "num_workers": "data.workers", "output_dir": "output", "fp16": "engine.precision",
    "bf16": "engine.precision",
}  # fmt: skip
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
    stated = read_stated(path, overrides)
    try:
        config = TypeAdapter(kind).validate_python(stated.settings)
    except ValidationError as error:
        _refuse_another_verbs(stated.path, kind)
        raise _explained(error, stated.path, kind, list(stated.typed)) from None
    _check_shared(config)
    return config


@dataclass(frozen=True)
class Stated:
    """What is stated before defaults fill the rest: the recipe's file with its content, names that were typed, and both together.

    What one way of saying something takes the place of is not in ``settings`` any more, and what ``optimizer.compat`` stands for is.
    """

    path: Path | None
    recipe: dict[str, Any]
    typed: tuple[str, ...]
    settings: dict[str, Any]


def read_stated(path: Path | None, overrides: Sequence[str]) -> Stated:
    """A recipe with ``--section.key value`` tokens over it; ``UsageError`` as ``read_settings``, which also judges the values."""
    path = find_recipe(path) if path is not None else None
    recipe = _read_toml(path) if path is not None else {}
    given = _pairs(overrides)
    typed = tuple(key for key, _ in given)

    settings = copy.deepcopy(recipe)
    _let_length_replace(settings, list(typed))
    _let_portion_replace(settings, list(typed))
    _let_start_replace(settings, given)
    for key, value in given:
        _assign(settings, key, value)
    _spell_out_compat(settings)
    return Stated(path, recipe, typed, settings)


def _refuse_another_verbs(path: Path | None, kind: type) -> None:
    """``UsageError`` with the right command where a recipe, which could not be read as one of this ``kind``, is another verb's."""
    verb, wanted = verb_of(path) if path is not None else None, getattr(kind, "verb", None)
    if path is None or verb in (None, wanted):
        return
    name = path.stem if path == find_recipe(Path(path.stem)) else path
    others = ", ".join(shipped_recipes(wanted)) if wanted is not None else ""
    raise UsageError(f"recipe {name} is for `megainter {verb} --config {name}`; here give one of `{wanted}` ({others}, or your own)")


def verb_of(path: Path) -> str | None:
    """The verb (such as "finetune vcr") that a recipe is for: by the command that it opens with, else by its settings; None: any."""
    opening = _opening(path)
    by_command = next((verb for verb in TELLTALES if f"{verb} --config" in opening), None)
    settings = _read_toml(path)
    known = {f"{section}.{key}" for section, values in settings.items() if isinstance(values, dict) for key in values}
    return by_command or next((verb for verb, keys in TELLTALES.items() if known & keys), None)


def _opening(path: Path) -> str:
    return path.read_text(encoding="utf-8").partition("\n")[0].replace("megainter.", "")


def path_settings(kind: type) -> set[str]:
    """Names (``section.key``) of the settings of a ``kind`` of configuration that are files or folders."""
    sections = {field.name: field.type for field in dataclasses.fields(kind) if dataclasses.is_dataclass(field.type)}
    return {
        f"{section}.{key.name}"
        for section, inner in sections.items()
        for key in dataclasses.fields(inner)
        if key.type is Path or Path in get_args(key.type)
    }


def find_recipe(path: Path) -> Path:
    """The TOML file: ``path`` itself where it is a file, or the recipe of that name that comes along (``shipped_recipes``)."""
    shipped = Path(__file__).parents[1] / "recipes" / f"{path}.toml"
    return shipped if path.name == str(path) and not path.is_file() and shipped.is_file() else path


def shipped_recipes(verb: str = "pretrain") -> list[str]:
    """Names of the recipes that come with megainter for a verb (such as "finetune retrieval"): each opens with its command."""
    found = (Path(__file__).parents[1] / "recipes").glob("*.toml")
    return sorted(path.stem for path in found if verb in _opening(path))


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = difflib.get_close_matches(str(path), [found.stem for found in (Path(__file__).parents[1] / "recipes").glob("*.toml")], n=1)
        raise UsageError(f"recipe {path} does not exist" + (f"; did you mean {near[0]}?" if near else "")) from None
    except IsADirectoryError:
        raise UsageError(f"recipe {path} is a folder; give the TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"recipe {path} is not valid TOML: {error}{_line_of(path, error)}") from None


def _line_of(path: Path, error: ValueError) -> str:
    """The line of a recipe that an error of TOML's grammar names, with the usual cause: text without quotation marks."""
    named = re.search(r"at line (\d+)", str(error))
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    if named is None or not 0 < int(named[1]) <= len(lines):
        return ""
    line = lines[int(named[1]) - 1].strip()
    bare = re.fullmatch(r"([\w.-]+)\s*=\s*([A-Za-z_][\w./-]*)", line)
    return f'; did you mean {bare[1]} = "{bare[2]}"?' if bare else f": {line:.80}"


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


def _let_start_replace(settings: dict[str, Any], given: list[tuple[str, str]]) -> None:
    """A start given on the command line brings its sizes and vocabulary, which take the place of the recipe's."""
    start = dict(given).get("model.start_from", "none")
    if start.lower() == "none":
        return
    brought = brought_from(Path(start))
    for section, names in (("model", brought), ("data", {"vocabulary"})):
        part = settings.get(section)
        if isinstance(part, dict):
            settings[section] = {name: value for name, value in part.items() if name not in names}


def brought_by(start: Mapping[str, Any]) -> set[str]:
    """The settings in [model] that a start with this configuration brings."""
    return SIZES_OF_A_START - (set() if start.get("itc_size") else OF_VECTORS) - (set() if start.get("region_mean") else OF_FEATURES)


def brought_from(folder: Path) -> set[str]:
    """``brought_by`` of a model folder; of one that is not there yet, as a name on the Hub is, what all bring."""
    try:
        facts = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        facts = {}  # what is wrong with the folder is said where its weights are opened
    return brought_by(facts if isinstance(facts, dict) else {})


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


def _explained(error: ValidationError, path: Path | None, kind: type, typed: list[str]) -> UsageError:
    """One line on the first mistake: what, in the recipe or (``typed``) on the command line, and what to do."""
    unknown = ("unexpected_keyword_argument", "extra_forbidden")
    first = sorted(error.errors(), key=lambda found: found["type"] not in unknown)[0]  # a misspelt key explains a missing one
    key = ".".join(str(part) for part in first["loc"])
    key = next((given for given in typed if given == key or given.startswith(f"{key}.")), key)  # a whole section may be unknown
    where = "" if path is None or key in typed else f" in {path}"
    if first["type"] in unknown:
        near = _near_key(key, [*_known_keys(kind), *(["config"] if key in typed else [])])
        if near is None:
            return UnknownSettingError(f"unknown setting {key}{where}", key if key in typed else None)
        return UsageError(f"unknown setting {key}{where}; did you mean {near}?")
    if first["type"] in ("missing", "missing_argument"):
        return UsageError(f"setting {key} is missing{where}; give it {'there or ' if path is not None else ''}as --{key} VALUE")
    return UsageError(f"setting {'--' if key in typed else ''}{key}{where}: {first['msg']} (given: {first['input']!r})")


def _near_key(key: str, known: list[str]) -> str | None:
    """The setting that ``key`` may stand for: under its earlier name, another program's, in another section, or misspelt."""
    last, sections = key.rpartition(".")[2], sorted({each.partition(".")[0] for each in known if "." in each})
    if "." not in key and (section := difflib.get_close_matches(key, sections, n=1, cutoff=0.75)):
        return f"the section {section[0]}"
    if (named := RENAMED.get(key) or ELSEWHERE.get(last)) in known:
        return named
    elsewhere = [each for each in known if each.rpartition(".")[2] == last]
    near = elsewhere if len(elsewhere) == 1 else difflib.get_close_matches(key, known, n=1)
    return next(iter(near), None)


def _check_shared(config: Any) -> None:
    """Contradictions in the sections that every run has."""
    training, engine = config.training, config.engine
    if (training.steps is None) == (training.epochs is None):
        given = "both are there: leave one out" if training.steps is not None else "neither is there"
        raise UsageError(f"give exactly one of training.steps and training.epochs; {given}")
    if training.micro_tokens is None and training.micro_batch > training.global_batch:
        small, large = training.global_batch, training.micro_batch
        raise UsageError(f"training.micro_batch {large} exceeds training.global_batch {small}: give --training.micro_batch {small} or less")
    if engine.precision == "fp16" and engine.zero_stage == 0:
        raise UsageError("engine.precision fp16 needs engine.zero_stage 1, 2 or 3: DeepSpeed does not scale the loss at stage 0")
    if config.checkpoint.keep_every % config.checkpoint.every_steps:
        raise UsageError(
            f"checkpoint.keep_every {config.checkpoint.keep_every} is not a multiple of checkpoint.every_steps "
            f"{config.checkpoint.every_steps}: steps that both divide are rare; change one of them"
        )
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


def _check_without_contrast(config: RunConfig) -> None:
    if config.data.batch_negatives > 0:
        raise UsageError(
            f"data.batch_negatives {config.data.batch_negatives} are drawn by the vectors of contrast; give training.itc_weight above 0"
        )
    if config.data.contrast_drop > 0:
        raise UsageError(f"data.contrast_drop {config.data.contrast_drop} is of what contrast sees; give training.itc_weight above 0")
    for name in sorted(OF_VECTORS):
        if getattr(config.model, name) != getattr(ModelSettings, name):
            raise UsageError(f"model.{name} is about the vectors of contrast; give training.itc_weight above 0, or leave it out")


def _check_unmasked(config: RunConfig) -> None:
    """What is about masks or mismatched captions, where an objective of weight 0 has none."""
    data, training = config.data, config.training
    if data.conditional_masking and not (training.msm_weight > 0 and training.mrm_weight > 0):
        raise UsageError(
            "data.conditional_masking chooses between masked text and masked regions, and one of them is never masked: leave it out, "
            "or give training.msm_weight and training.mrm_weight above 0"
        )
    if training.itm_weight > 0:
        return
    for name, asked in (("hard_negatives", data.hard_negatives is not None), ("batch_negatives", data.batch_negatives > 0)):
        if asked:
            raise UsageError(f"data.{name} is about mismatched captions; give training.itm_weight above 0, or leave it out")


def _check_recall(config: RunConfig) -> None:
    validation = config.validation
    if validation.best_by is not None and not validation.images:
        raise UsageError(f"validation.best_by {validation.best_by} is measured on a gallery; give validation.images, such as 200")
    if config.training.itc_weight > 0:
        return
    if validation.best_by not in (None, "text_to_image_r_at_1"):
        raise UsageError(f"validation.best_by {validation.best_by} needs vectors; give training.itc_weight above 0")
    if validation.candidates is not None:
        raise UsageError("validation.candidates are chosen by vectors; give training.itc_weight above 0, or leave it out")


def _undivided(model: ModelSettings, name: str) -> str:
    """What is said where heads do not divide the hidden size: a number of them that does, and sizes that all heads divide."""
    size, heads = model.hidden_size, getattr(model, name)
    fitting = next(count for count in range(min(heads, size), 0, -1) if size % count == 0)
    sizes = multiples_around(size, math.lcm(model.num_attention_heads, model.num_region_attention_heads))
    wider = " or ".join(map(str, sizes))
    return (
        f"model.hidden_size {size} is not divisible by model.{name} {heads}: give --model.{name} {fitting}, or --model.hidden_size {wider}"
    )


def _check(config: RunConfig) -> None:
    training, model = config.training, config.model
    if training.msm_weight == training.mrm_weight == training.itm_weight == training.itc_weight == 0:
        raise UsageError("all objective weights are 0: nothing would be learned")
    if training.itc_weight == 0:
        _check_without_contrast(config)
    _check_unmasked(config)
    _check_recall(config)
    for heads in ("num_attention_heads", "num_region_attention_heads"):
        if model.start_from is None and model.hidden_size % getattr(model, heads):
            raise UsageError(_undivided(model, heads))
    if config.data.block is not None and config.data.order != "blocks":
        raise UsageError(f'data.block is for data.order = "blocks", and data.order is {config.data.order!r}; leave it out')
    if config.data.word_segmentation != "auto" and config.data.masking != "paper":
        raise UsageError(f'data.word_segmentation is for data.masking = "paper", and data.masking is {config.data.masking!r}; leave it out')
    if config.data.max_text_tokens > model.max_position_embeddings:
        raise UsageError(
            f"data.max_text_tokens {config.data.max_text_tokens} exceeds model.max_position_embeddings {model.max_position_embeddings}"
        )
