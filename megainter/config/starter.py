"""A recipe to begin one's own from (`megainter init`): a shipped one, every setting with its meaning, and what is often changed."""

import dataclasses
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

from megainter.config.help import meaning_of, type_name
from megainter.config.resolved import toml_value

# Shown at their defaults, as comments, where a recipe does not state them.
OFTEN_CHANGED = {
    "data": ("split", "vocabulary", "masking", "lowercase", "workers"),
    "validation": ("split", "samples", "every_steps"),
    "model": ("start_from", "gradient_checkpointing"),
    "training": ("seed", "micro_tokens", "log_every", "ema_decay", "itc_weight", "spike_action"),
    "optimizer": ("name", "learning_rate", "warmup", "weight_decay", "clip_norm"),
    "engine": ("precision", "zero_stage", "offload_optimizer", "deepspeed"),
    "checkpoint": ("every_steps", "keep", "keep_every"),
}
WIDTH = 118
KEY = re.compile(r"([a-z_0-9]+) *=")


def commented_recipe(recipe: Path, kind: type) -> str:
    """The text of a shipped ``recipe`` for a ``kind`` of run, a comment above each setting; it gives the same settings as the recipe."""
    sections = {field.name: field.type for field in dataclasses.fields(kind)}
    lines: list[str] = []
    section, owner, said = "", kind, set[str]()
    for line in recipe.read_text(encoding="utf-8").replace(f"--config {recipe.stem} ", "--config my.toml ", 1).splitlines():
        if line.startswith("["):
            lines = [*_ended(lines), *_often(section, owner, said), ""] if section else lines
            section = line.strip("[]")
            owner, said = _class_of(sections[section]), set()
        elif key := KEY.match(line):
            lines += [""] if lines and lines[-1].startswith("#") and not said else []
            said.add(key[1])
            lines += _comment(meaning_of(key[1], owner))
        lines.append(line)
    return "\n".join([*_ended(lines), *_often(section, owner, said)]) + "\n"


def _ended(lines: list[str]) -> list[str]:
    """Without the empty lines at the end."""
    return lines if not lines or lines[-1] else _ended(lines[:-1])


def _class_of(kind: object) -> type:
    assert isinstance(kind, type)
    return kind


def _often(section: str, owner: type, said: set[str]) -> Iterator[str]:
    """What is often changed and the recipe does not state, commented out."""
    fields = {field.name: field for field in dataclasses.fields(owner)}  # type: ignore[arg-type]
    for name in OFTEN_CHANGED.get(section, ()):
        if name in fields and name not in said and fields[name].default is not dataclasses.MISSING:
            default = fields[name].default
            yield from _comment(meaning_of(name, owner))
            yield f"# {name} = {type_name(fields[name].type)}" if default is None else f"# {name} = {toml_value(default)}"


def _comment(text: str) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(text, WIDTH)]
