"""A run's settings as TOML, each with where its value came from (`--print-config`)."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megainter.config.reading import Stated, brought_from, read_stated
from megainter.config.settings import as_dict

ORIGIN_COLUMN = 60  # where comments begin, unless a value is longer


def resolved_settings(config: Any, path: Path | None, overrides: Sequence[str]) -> str:
    """TOML that gives ``config`` again, with a comment on the origin of every value.

    ``path`` and ``overrides`` are what ``config`` was read from. What is none, is not used, or comes from the weights that a run
    starts from is a comment alone.
    """
    stated = read_stated(path, overrides)
    values = as_dict(config)
    top = [name for name, value in values.items() if not isinstance(value, dict)]
    lines = [_line(name, values[name], _origin("", name, stated)) for name in top]
    for section in (name for name in values if name not in top):
        lines += ["", f"[{section}]", *_section(section, values[section], stated)]
    return "\n".join(lines)


def _section(section: str, values: dict[str, Any], stated: Stated) -> Iterator[str]:
    """The lines of one section; sizes that a start brings are not known before its weights are opened."""
    start = values.get("start_from") if section == "model" else None
    sizes = brought_from(Path(start)) if start is not None else set()
    said = stated.settings.get(section, {})
    for name, value in values.items():
        brought = name in sizes and name not in said
        if section == "training" and name == "micro_batch" and values["micro_tokens"] is not None:
            yield _line(name, None, "training.micro_tokens stands in its place")
        elif brought:
            yield _line(name, None, "taken from model.start_from")
        else:
            yield _line(name, value, _origin(section, name, stated))


def _origin(section: str, name: str, stated: Stated) -> str:
    """Where a value came from; a recipe's own that gave way to another setting is told with the default that took its place."""
    key = f"{section}.{name}" if section else name
    recipe, settings = (each.get(section, {}) if section else each for each in (stated.recipe, stated.settings))
    if key in stated.typed:
        return "command line"
    if name in settings:
        return f"recipe {_recipe_name(stated)}" if name in recipe else "derived from optimizer.compat"
    return "default; the recipe's gave way to the command line's" if name in recipe else "default"


def _recipe_name(stated: Stated) -> str:
    shipped = Path(__file__).parents[1] / "recipes"
    assert stated.path is not None
    return stated.path.stem if stated.path.parent == shipped else str(stated.path)


def _line(name: str, value: Any, origin: str) -> str:
    shown = f"# {name}: none" if value is None else f"{name} = {toml_value(value)}"
    return f"{shown:<{ORIGIN_COLUMN}}  # {origin}".replace("\n", " ")


def toml_value(value: Any) -> str:
    """A setting's value, a JSON scalar or a list of such, as TOML."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml_value, value))}]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return json.dumps(value) if isinstance(value, bool | int) else repr(float(value))
