"""The page of failures: its codes are the errors', its cases are all there, its tests exist, and its messages are those of the source."""

import ast
import inspect
import re
from collections import Counter
from collections.abc import Iterator

import pytest

from megainter import errors
from tests.places import ROOT

PAGE = (ROOT / "docs" / "failures.md").read_text()
CASES = range(1, 51)
ALWAYS = {0, 1}  # codes that no error of the user's has
SHORTEST = 8  # characters of a message that are looked for; shorter ones are in any source
CODES, CASE, TESTS = 3, 5, 2  # cells of a row of the three kinds of tables


def rows(cells: int) -> Iterator[list[str]]:
    """The rows of tables of so many columns, cell by cell."""
    for line in PAGE.splitlines():
        found = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("| ") and len(found) == cells:
            yield found


def documented_codes() -> set[int]:
    """The exit codes of the page's first table."""
    return {int(row[0]) for row in rows(CODES) if row[0].isdigit()}


def test_the_codes_are_those_of_the_errors() -> None:
    classes = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, errors.MegainterError)]
    assert documented_codes() == ALWAYS | {kind.exit_code for kind in classes}


def test_a_case_ends_with_documented_codes() -> None:
    for number, *_, codes, _ in rows(CASE):
        if number.isdigit():
            given = {int(code) for code in re.findall(r"(?<![+\w])\d+", codes)}
            assert given <= documented_codes() | {128, 137}, number


@pytest.mark.parametrize("cells", [CASE, TESTS])
def test_every_case_is_there_once(cells: int) -> None:
    assert Counter(int(row[0]) for row in rows(cells) if row[0].isdigit()) == Counter(CASES)


def test_the_tests_that_are_named_exist() -> None:
    for number, names in rows(TESTS):
        if not number.isdigit():
            continue
        named = re.findall(r"`([^`:]+)::(\w+)`", names)
        assert named, number
        for file, name in named:
            there = [node.name for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)]
            assert name in there, f"case {number}: {file} has no {name}"


def texts() -> str:
    """All literal text of the programs, that of f-strings piece by piece, between line breaks."""
    found = []
    for root in ("megainter", "preprocessing", "launcher"):
        for path in (ROOT / root).rglob("*.py"):
            nodes = ast.walk(ast.parse(path.read_text()))
            found += [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return "\n".join(found)


def test_messages_are_those_of_the_programs() -> None:
    source, lost = texts(), []
    for number, _, what, _, _ in rows(CASE):
        for quoted in re.findall(r"`(?!megainter )([^`]+)`", what):
            parts = [part.strip(" (;,:") for part in quoted.split("\u2026")]
            lost += [f"case {number}: {part!r}" for part in parts if " " in part and len(part) >= SHORTEST and part not in source]
    assert lost == []
