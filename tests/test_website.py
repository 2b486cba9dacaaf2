"""The site's pages: the reference has all that the source has, the navigation every page, and links lead somewhere."""

import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from cyclopts import App

import megainter
from megainter.cli import app
from megainter.config.help import describe_settings
from megainter.config.settings import RunConfig
from megainter.verbs.finetune import TASKS, kind_of
from tests.places import ROOT
from tests.test_docs import PAGES, anchors, prose
from website.pages import lay, navigation, slug
from website.reference import api_page, commands_page, reference_pages, settings_page

RUNS = {"pretrain": RunConfig} | {f"finetune {task}": kind_of(task) for task in TASKS}


@pytest.mark.parametrize("verb", RUNS)
def test_the_settings_page_has_what_the_help_lists(verb: str) -> None:
    page = settings_page(verb, RUNS[verb])
    listed = re.findall(r"^  --(\S+) ", describe_settings(RUNS[verb]), flags=re.MULTILINE)
    assert len(listed) > 30
    assert sorted(re.findall(r'<code id="([\w.]+)">', page)) == sorted(listed)
    assert all(line.count("|") == 5 for line in page.splitlines() if line.startswith("|")), "a bar in a cell ends it"


def test_the_page_of_commands_has_every_verb_with_its_options() -> None:
    sections = dict(re.findall(r"^#+ (megainter .+?)\n(.*?)(?=^#|\Z)", commands_page(), flags=re.DOTALL | re.MULTILINE))
    verbs = dict(below(app, "megainter"))
    assert sorted(sections) == sorted(verbs)
    for words, verb in verbs.items():
        arguments = verb.assemble_argument_collection() if verb.default_command is not None else []
        assert [argument.name for argument in arguments if argument.show and argument.name not in sections[words]] == [], words


def below(group: App, words: str) -> Iterator[tuple[str, App]]:
    for name in group:
        if name not in ("--help", "-h", "--version"):
            yield f"{words} {name}", group[name]
            yield from below(group[name], f"{words} {name}")


def test_the_page_of_python_names_every_public_class_and_only_what_exists() -> None:
    named = re.findall(r"^::: (\S+)", api_page(), flags=re.MULTILINE)
    assert {name for name in megainter.__all__ if name != "__version__"} <= {name.rpartition(".")[2] for name in named}
    for name in named:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name


def test_the_navigation_has_every_page_once() -> None:
    found = list(paths(navigation({})))
    expected = [str(page.relative_to(ROOT)) for page in PAGES if page.parts[len(ROOT.parts)] in ("docs", "examples")]
    assert sorted(found) == sorted([*expected, "README.md", "CHANGELOG.md", "CONTRIBUTING.md"])


def paths(entry: object) -> Iterator[str]:
    if isinstance(entry, str):
        yield entry
    elif isinstance(entry, dict):
        yield from paths([*entry.values()])
    elif isinstance(entry, list):
        for part in entry:
            yield from paths(part)


def test_links_lead_somewhere_in_the_laid_pages_too(tmp_path: Path) -> None:
    lay(tmp_path / "pages", {f"docs/{path}": text for path, (_, text) in reference_pages().items()})
    lost, seen = [], 0
    for page in (tmp_path / "pages").rglob("*.md"):
        text = re.sub(r"`[^`\n]+`", "", prose(page))
        for target in re.findall(r"\]\(([^)\s#]+)(?:#\S*)?\)", text):
            if not re.match(r"[a-z]+:", target):
                seen += 1
                lost += [] if (page.parent / target).exists() else [f"{page.name}: {target}"]
    assert lost == []
    assert seen > 300
    assert (tmp_path / "pages/megainter/recipes/base.toml.md").read_text().startswith("# megainter/recipes/base.toml\n")


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent.name == "docs"], ids=lambda page: page.stem)
def test_headings_have_the_anchors_of_github(page: Path) -> None:
    headings = re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
    plain = {slug(re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading), "-") for heading in headings}
    assert plain >= {anchor for anchor in anchors(page) if not re.search(r"-\d+$", anchor)}
