"""constraints.txt is a lock of all that make installs, and within the ranges that pyproject.toml promises."""

import importlib.metadata
import tomllib
from collections.abc import Iterator

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.places import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def _pins() -> dict[str, str]:
    lines = (line for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if line and not line.startswith("#"))
    return dict(line.split("==") for line in lines)


def _asked() -> list[Requirement]:
    """What pyproject.toml names: the dependencies and every extra's."""
    lines = PROJECT["dependencies"] + [line for extra in PROJECT["optional-dependencies"].values() for line in extra]
    return [requirement for requirement in map(Requirement, lines) if requirement.name != PROJECT["name"]]


def _needs(name: str, extras: set[str]) -> Iterator[Requirement]:
    """What the installed package asks for on this machine, its extras' requirements included."""
    for need in map(Requirement, importlib.metadata.requires(name) or []):
        if need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in extras | {""}):
            yield need


def test_what_pyproject_names_is_pinned_within_its_range() -> None:
    pins = _pins()
    assert [str(asked) for asked in _asked() if not asked.specifier.contains(pins.get(canonicalize_name(asked.name), "0"))] == []


def test_whatever_a_pinned_version_needs_is_pinned_too() -> None:
    pins, installed = _pins(), {canonicalize_name(found.name): found.version for found in importlib.metadata.distributions()}
    seen, waiting = set[str](), _asked()
    while waiting:
        need = waiting.pop()
        name = canonicalize_name(need.name)
        assert name in pins, f"{need} is asked for, and constraints.txt does not pin it"

        # What another version than the pinned one would need says nothing.
        if str(need) not in seen and installed.get(name) == pins[name]:
            waiting += _needs(name, need.extras)
        seen.add(str(need))
    assert len(seen) > 50, "too little is installed in the pinned versions to judge"
