"""Help text of a run's settings, from their docstrings."""

import dataclasses
from typing import Annotated, Any, Literal, get_args, get_origin

from megainter.config.reading import COMPAT
from megainter.config.settings import OptimizerConfig, RunConfig


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
    return [f"  --{name} {type_name(field.type)}{_default_of(field)}", f"      {meaning_of(field.name, owner)}"]


def meaning_of(name: str, owner: Any) -> str:
    """What stands under a setting of the section ``owner``."""
    owners = (base for base in owner.__mro__ if name in vars(base).get("__annotations__", {}))  # only there is it documented
    return str(next(owners).__pydantic_fields__[name].description)


def type_name(kind: Any) -> str:
    """A setting's type, for people: INT, PATH, a|b."""
    if get_origin(kind) is Annotated:
        return type_name(get_args(kind)[0])
    if get_origin(kind) is Literal:
        return "|".join(str(value) for value in get_args(kind))
    if get_args(kind):
        return "|".join(type_name(part) for part in get_args(kind) if part not in (type(None), ...))
    return {"Path": "PATH", "str": "TEXT", "bool": "true|false"}.get(kind.__name__, kind.__name__.upper())


def _default_of(field: dataclasses.Field) -> str:
    return "  (required)" if field.default is dataclasses.MISSING else f"  (default {default_text(field)})"


def default_text(field: dataclasses.Field) -> str:
    """A setting's default, for people; the setting has one."""
    if field.default == ():
        return "none"
    return str(field.default).lower() if field.default is None or isinstance(field.default, bool) else str(field.default)
