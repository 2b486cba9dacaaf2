"""`megainter pretrain`: a recipe and settings laid over it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from megainter.errors import UsageError
from megainter.weights import check_name, require_there


def pretrain(*settings: Annotated[str, Parameter(allow_leading_hyphen=True)]) -> None:
    """Pretrain on captions and a feature store: --config RECIPE.toml [--section.key value ...].

    Alone, or on every rank of a launcher: deepspeed --module megainter.pretrain --config RECIPE.toml. The same command resumes.

    Parameters
    ----------
    settings
        --config RECIPE.toml, and settings laid over it, such as --training.steps 1000.
    """
    if not settings or {"--help", "-h"} & set(settings):
        _explain_settings()
        return
    from megainter.config.reading import load_config

    recipe, overrides = split_config(settings)
    config = load_config(recipe, overrides)
    require_paths(config)
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
            require_there(path, name)


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


def _explain_settings() -> None:
    """List every setting with its default and meaning."""
    from megainter.config.help import describe_settings
    from megainter.config.reading import shipped_recipes

    usage = "usage: megainter pretrain --config RECIPE [--section.key value ...]"
    recipes = f"RECIPE is a TOML file, or one of those that come along: {', '.join(shipped_recipes())}."
    print(f"{usage}\n\n{recipes} --section.key value changes a setting of the recipe; the same command resumes.\n\n{describe_settings()}")
