"""`megainter pretrain`: a recipe and settings laid over it."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from megainter.errors import UsageError
from megainter.paths import require_there
from megainter.tracking import require_trackers
from megainter.weights import check_name

PRINT_CONFIG = "--print-config"  # a flag among settings, which all take a value
PRINTING = f"{PRINT_CONFIG} prints what recipe and command line come to, each value with its origin, and trains nothing."

MADE_BY = {  # what writes the file of a setting, by its key
    "pairs": "`megainter prepare` makes one", "store": "`megainter extract` makes one",
    "hard_negatives": "`megainter prepare negatives` makes one", "questions": "`megainter prepare vcr` makes one",
    "examples": "`megainter prepare examples` makes one",
}  # fmt: skip


def pretrain(*settings: Annotated[str, Parameter(allow_leading_hyphen=True)]) -> None:
    """Pretrain on captions and a feature store: --config RECIPE.toml [--section.key value ...].

    Alone, or on every rank of a launcher: deepspeed --module megainter.pretrain --config RECIPE.toml. The same command resumes.

    Parameters
    ----------
    settings
        --config RECIPE.toml, and settings laid over it, such as --training.steps 1000; with --print-config the result
        is printed, and nothing trained.
    """
    if not settings or {"--help", "-h"} & set(settings):
        _explain_settings()
        return
    from megainter.config.reading import load_config
    from megainter.config.resolved import resolved_settings

    asked, rest = take_flag(PRINT_CONFIG, settings)
    recipe, overrides = split_config(rest)
    config = load_config(recipe, overrides)
    if asked:
        print(resolved_settings(config, recipe, overrides))
        return
    require_paths(config)
    require_trackers(config.tracking)
    from megainter.tasks.pretraining.training import pretrain as train

    train(config)


def require_paths(config: Any) -> None:
    """``UsageError`` where a file or folder that a run's settings name is not there, nor a name of weights; before torch is imported."""
    from megainter.config.reading import path_settings

    for name in sorted(path_settings(type(config))):
        section, _, key = name.partition(".")
        path = getattr(getattr(config, section), key)
        if key == "start_from" and path is not None:
            check_name(path, option=name)
        else:
            require_there(path, name, MADE_BY.get(key, ""))


def take_flag(flag: str, tokens: Sequence[str]) -> tuple[bool, list[str]]:
    """Whether a flag stands among the settings, and the settings without it."""
    return flag in tokens, [token for token in tokens if token != flag]


def split_config(tokens: Sequence[str]) -> tuple[Path | None, list[str]]:
    """The recipe that --config names, and the settings without it; ``UsageError`` where the name is missing."""
    rest, recipe = list(tokens), None
    for position, token in enumerate(rest):
        if token == "--config" or token.startswith("--config="):
            _, equals, value = token.partition("=")
            taken = rest[position : position + (1 if equals else 2)]
            if not equals and len(taken) < 2:
                raise UsageError("--config needs a TOML file")
            recipe = Path(value if equals else taken[1])
            rest = rest[:position] + rest[position + len(taken) :]
            break
    return recipe, rest


def settings_of_pretrain(words: Sequence[str], verb: str) -> list[str]:
    """The settings of ``pretrain`` that another verb is given, with that word in front or without; ``UsageError`` for other words."""
    first = words[0] if words else ""
    if first == "pretrain":
        return [*words[1:]]
    if first and not first.startswith("-"):
        near = "; did you mean pretrain? It may be left out" if difflib.get_close_matches(first, ["pretrain"]) else ""
        raise UsageError(f"{verb} takes the settings of pretrain, and {first!a:.80} is none{near} (see megainter {verb} --help)")
    return [*words]


def _explain_settings() -> None:
    """List every setting with its default and meaning."""
    from megainter.config.help import describe_settings
    from megainter.config.reading import shipped_recipes

    usage = "usage: megainter pretrain --config RECIPE [--section.key value ...]"
    recipes = f"RECIPE is a TOML file, or one of those that come along: {', '.join(shipped_recipes())}."
    changes = "--section.key value changes a setting of the recipe; the same command resumes."
    print(f"{usage}\n\n{recipes} {changes}\n{PRINTING}\n\n{describe_settings()}")
