"""The reference pages, from the source: settings from their dataclasses, verbs from their help, classes from their docstrings."""

import dataclasses
import html
import re
from collections.abc import Sequence

import megainter
from megainter.cli import app
from megainter.config.help import default_text, meaning_of, type_name
from megainter.config.reading import COMPAT
from megainter.config.settings import OptimizerConfig, RunConfig
from megainter.verbs.finetune import TASKS, kind_of

# What scripts of others call, beside the classes of `megainter` itself.
OTHER_NAMES = {
    "Regions": (
        "megainter.data.feature_store.FeatureStore",
        "preprocessing.detector.detector.load_detector",
        "preprocessing.detector.detector.Detector",
    ),
    "Tables": (
        "megainter.data.tables.pairs.Pair",
        "megainter.data.tables.pairs.write_pairs",
        "megainter.data.tables.boxes.ImageBoxes",
        "megainter.data.tables.boxes.write_boxes",
    ),
    "Conversion": ("megainter.conversion.bert.BertStart", "megainter.conversion.bert.convert_bert"),
}
API_OPTIONS = "    options:\n      heading_level: 3"


def reference_pages() -> dict[str, tuple[str, str]]:
    """Path below docs/ -> title in the navigation and Markdown."""
    runs = {"pretrain": RunConfig} | {f"finetune {task}": kind_of(task) for task in TASKS}
    settings = {
        f"reference/settings-{verb.replace(' ', '-')}.md": (f"Settings of {verb}", settings_page(verb, runs[verb])) for verb in runs
    }
    return settings | {
        "reference/commands.md": ("Commands", commands_page()),
        "reference/api.md": ("Python", api_page()),
    }


def settings_path(verb: str) -> str:
    """Where the settings of a verb stand, below docs/."""
    return f"reference/settings-{verb.replace(' ', '-')}.md"


def settings_page(verb: str, kind: type) -> str:
    """Every setting of a kind of run, a table for each section."""
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    lines = [f"# Settings of {verb}", ""]
    lines += [
        f"Of a recipe (TOML) and of the command line, where `--section.key value` wins: `megainter {verb} --help` lists the same.",
        "", "A recipe has the keys of a section under `[section]`.", "",
    ]  # fmt: skip
    lines += ["## The run", "", *_table([field for field in fields if not dataclasses.is_dataclass(field.type)], kind, "")]
    for field in fields:
        if dataclasses.is_dataclass(field.type):
            summary = " ".join((field.type.__doc__ or "").split("\n\n")[0].split())
            lines += [f"## {field.name}", "", _prose(summary.replace("``", "`")), ""]
            lines += _table(dataclasses.fields(field.type), field.type, f"{field.name}.")
    return "\n".join(lines) + "\n"


def _table(fields: Sequence[dataclasses.Field], owner: object, prefix: str) -> list[str]:
    rows = ["| setting | values | default | meaning |", "|---|---|---|---|"]
    for field in fields:
        default = "required" if field.default is dataclasses.MISSING else f"<code>{_cell(default_text(field))}</code>"
        rows.append(f"| {_name(prefix + field.name)} | {_values(field.type)} | {default} | {_prose(meaning_of(field.name, owner))} |")
    if owner is OptimizerConfig:
        rows.append(
            f"| {_name('optimizer.compat')} | {_code('|'.join(COMPAT))} | | Stands for several of these: [fidelity](../fidelity.md). |"
        )
    return [*rows, ""]


def _name(name: str) -> str:
    """A setting's name, with an anchor, breakable at its dot and underscores."""
    breakable = re.sub(r"([._])", r"\1<wbr>", name)
    return f'<code id="{name}">{breakable}</code>'


def _values(kind: object) -> str:
    return _code(type_name(kind))


def _code(text: str) -> str:
    return "<br>".join(f"<code>{_cell(part)}</code>" for part in text.split("|"))


def _cell(text: str) -> str:
    return html.escape(text, quote=False).replace("|", "&#124;")


def _prose(text: str) -> str:
    """A sentence of a docstring as Markdown in a table's cell; pages that it names become links."""
    return re.sub(r"docs/([\w/-]+)\.md", r"[\1](../\1.md)", _escaped(text).replace("|", "&#124;"))


def commands_page() -> str:
    """Every verb with its arguments and options, as `--help` has them."""
    text = app.generate_docs(output_format="markdown", recursive=True)
    text = re.sub(r"^# megainter$", "# Commands", text, count=1, flags=re.MULTILINE)
    text = re.sub(r"^## Table of Contents\n.*?(?=^\*\*Commands)", "", text, count=1, flags=re.DOTALL | re.MULTILINE)
    text = _escaped(text).replace("(#megainter-install-", "(#megainter---install-")
    for verb in ("pretrain", *(f"finetune {task}" for task in TASKS)):
        link = f"All of its settings: [{verb}]({settings_path(verb).removeprefix('reference/')})."
        text = re.sub(rf"^(#+ megainter {verb}\n)", rf"\1\n{link}\n", text, count=1, flags=re.MULTILINE)
    return text


def _escaped(text: str) -> str:
    """Outside of code, what Markdown would take for HTML or for a reference stands for itself; links stay."""
    parts = re.split(r"(```.*?```|`[^`\n]*`(?:\]\(\S+\))?)", text, flags=re.DOTALL)
    return "".join(part if part.startswith("`") else re.sub(r"<(?=[\w/!])", "&lt;", _without_references(part)) for part in parts)


def _without_references(text: str) -> str:
    return re.sub(r"\[(?=[^\]\n]+\](?!\())", r"\[", text)


def api_page() -> str:
    """The names that scripts of others call; mkdocstrings puts their docstrings in."""
    classes = sorted(f"{megainter._HOMES[name]}.{name}" for name in megainter.__all__ if name in megainter._HOMES)
    lines = ["# Python", "", "What [From Python](../python.md) shows by example, name by name.", ""]
    for title, names in {"Models": tuple(classes), **OTHER_NAMES}.items():
        lines += [f"## {title}", ""]
        for name in names:
            lines += [f"::: {name}", API_OPTIONS, ""]
    return "\n".join(lines)
