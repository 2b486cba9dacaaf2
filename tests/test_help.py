"""Every option of every verb says what it does."""

import io

import pytest
from cyclopts import App
from rich.console import Console

from megainter.cli import app


def verbs_of(group: App, name: str) -> list[tuple[str, App]]:
    """(words, app) of every command below ``group`` that runs something."""
    below = [(word, group[word]) for word in group if not word.startswith("-")]
    here = [(name, group)] if group.default_command is not None else []
    return here + [found for word, sub in below for found in verbs_of(sub, f"{name} {word}")]


VERBS = verbs_of(app, "megainter")


def test_all_verbs_are_found() -> None:
    names = {name for name, _ in VERBS}
    assert {"megainter extract", "megainter evaluate retrieval", "megainter convert zero", "megainter detector train"} <= names


@pytest.mark.parametrize(("name", "verb"), VERBS, ids=[name for name, _ in VERBS])
def test_every_option_is_explained(name: str, verb: App) -> None:
    every = verb.assemble_argument_collection(parse_docstring=True)
    arguments = [argument for argument in every if argument.parameter.name and argument.name != "*"]  # "*": a dataclass, its fields apart
    assert [argument.name for argument in arguments if not argument.parameter.help] == [], f"{name} --help leaves these unexplained"


@pytest.mark.parametrize(("name", "verb"), VERBS, ids=[name for name, _ in VERBS])
def test_lines_break_only_where_the_page_ends(name: str, verb: App) -> None:
    """On a wide page every description is one line, so that nothing stands under it but the next name."""
    console = Console(width=2000, file=io.StringIO(), force_terminal=False)
    app.help_print([*name.split()[1:]], console=console)
    page = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    indents = [len(line) - len(line[1:].lstrip(" *")) for line in page if line.startswith("\u2502")]
    assert all(indent < 10 for indent in indents), f"{name} --help breaks a line in a sentence"
    said = "\n".join(page).partition("\u256d")[0].strip().split("\n\n")
    assert all("\n" not in paragraph.strip() for paragraph in said), said
