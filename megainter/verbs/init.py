"""`megainter init`: a recipe to begin one's own from."""

import difflib
from pathlib import Path
from typing import Any

from megainter.errors import UsageError


def init(recipe: str | None = None, /) -> None:
    """Print a recipe that comes along, every setting explained, to be kept and changed: megainter init small > my.toml.

    Parameters
    ----------
    recipe
        Name of a recipe of `pretrain` or `finetune`; without one they are listed.
    """
    from megainter.config.reading import find_recipe, shipped_recipes
    from megainter.config.starter import commented_recipe

    if recipe is None:
        named = "; ".join(f"{kind.verb}: {', '.join(shipped_recipes(kind.verb))}" for kind in _kinds())
        raise UsageError(f"name a recipe, as in `megainter init small > my.toml`: {named}")
    recipes = {name: kind for kind in _kinds() for name in shipped_recipes(kind.verb)}
    if recipe in recipes:
        print(commented_recipe(find_recipe(Path(recipe)), recipes[recipe]), end="")
        return
    near = difflib.get_close_matches(recipe, recipes, n=1)
    raise UsageError(f"there is no recipe {recipe!a}; " + (f"did you mean {near[0]}?" if near else f"choose {', '.join(recipes)}"))


def _kinds() -> list[Any]:
    """The configuration class of every verb that takes a recipe."""
    from megainter.config.settings import RunConfig
    from megainter.verbs.finetune import TASKS, kind_of

    return [RunConfig, *map(kind_of, TASKS)]
