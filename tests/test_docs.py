"""The pages: links lead somewhere, names exist, commands parse. Nothing is run here; what the README shows runs in `test_readme`."""

import ast
import importlib
import importlib.util
import re
import shlex
import tomllib
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
from cyclopts import App, CycloptsError

from megainter.cli import app
from megainter.config.reading import load_config
from megainter.errors import UsageError
from megainter.verbs.finetune import configuration
from megainter.verbs.pretrain import PRINT_CONFIG, split_config
from tests.commands import FENCE, blocks
from tests.pictures import PICTURES
from tests.places import ROOT

OURS = ("megainter", "preprocessing", "launcher", "benchmarks", "tests", "examples", "website")
PAGES = sorted([*ROOT.glob("*.md"), *(page for folder in (*OURS, "docs", "ds_configs") for page in (ROOT / folder).rglob("*.md"))])
PICTURE = re.compile(r"!\[[^\]]+\]\(([^)\s]+)\)")
INLINE = re.compile(r"`([^`\n]+)`")
# What a line that ends in "..." leaves out; what it says itself wins.
LEFT_OUT = ["--data.pairs", "pairs.parquet", "--data.store", "regions.store", "--output", "run", "--training.steps", "1"]
TASKS = ("retrieval", "vcr", "classification")  # of `finetune`, that take a recipe

every_page = pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return FENCE.sub("", page.read_text())


def anchors(page: Path) -> set[str]:
    """What GitHub calls the page's headings."""
    found, seen = set(), Counter[str]()
    for heading in re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower().strip()
        name = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        found.add(f"{name}-{seen[name]}" if seen[name] else name)
        seen[name] += 1
    return found


@every_page
def test_links_and_anchors_lead_somewhere(page: Path) -> None:
    text = INLINE.sub("", prose(page))
    lost = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        if not there.exists() or not there.is_relative_to(ROOT) or (anchor and anchor not in anchors(there)):
            lost.append(target)
    assert lost == []


def test_the_index_names_every_page() -> None:
    index = ROOT / "docs" / "README.md"
    named = {(index.parent / target.partition("#")[0]).resolve() for target in re.findall(r"\]\(([^)\s]+)\)", index.read_text())}
    pages = {page for page in PAGES if page.is_relative_to(ROOT / "docs") or page.is_relative_to(ROOT / "examples")} - {index}
    assert pages - named == set()


@every_page
def test_prose_has_short_lines(page: Path) -> None:
    fenced = {line for _, block in FENCE.findall(page.read_text()) for line in block.splitlines()}
    lines = [line for line in page.read_text().splitlines() if not line.startswith(("|", "![")) and line not in fenced]
    assert [line for line in lines if len(line) > 110] == []


@every_page
def test_files_and_modules_that_are_named_exist(page: Path) -> None:
    if page.name == "CHANGELOG.md":
        pytest.skip("it names what was")
    lost = [name for name in INLINE.findall(prose(page)) if not exists(name)]
    assert lost == []


def exists(name: str) -> bool:
    """Whether a path or a dotted name of ours is there; True for anything else."""
    if re.fullmatch(rf"(?:{'|'.join(OURS)}|docs|ds_configs|\.ci)/[\w./*-]*", name):
        return any(ROOT.glob(name.rstrip("/")))
    if re.fullmatch(rf"(?:{'|'.join(OURS)})(?:\.\w+)+", name) and name not in ("megainter.task",):  # a key of a file's metadata
        return resolves(name)
    return True


def resolves(name: str) -> bool:
    """Whether a dotted name is a module, or an attribute of one."""
    module, _, attribute = name.rpartition(".")
    try:
        if importlib.util.find_spec(name) is not None:
            return True
    except ModuleNotFoundError:
        pass
    return bool(module) and importlib.util.find_spec(module) is not None and hasattr(importlib.import_module(module), attribute)


def has(module: ModuleType, name: str) -> bool:
    """Whether ``from module import name`` finds something: an attribute, or a module below that nobody has imported yet."""
    return hasattr(module, name) or importlib.util.find_spec(f"{module.__name__}.{name}") is not None


@every_page
def test_python_imports_what_it_names(page: Path) -> None:
    for language, block in FENCE.findall(page.read_text()):
        if language == "python":
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.Import):
                    for alias in node.names:
                        importlib.import_module(alias.name)
                elif isinstance(node, ast.ImportFrom):
                    module = importlib.import_module(str(node.module))
                    assert [alias.name for alias in node.names if not has(module, alias.name)] == [], node.module


@every_page
def test_commands_parse(page: Path) -> None:
    wrong = []
    for line in commands(page):
        try:
            parse(shlex.split(line, comments=True))
        except (CycloptsError, UsageError, AssertionError) as error:
            wrong.append(f"{line}: {error}")
    assert wrong == []


@every_page
def test_commands_in_the_text_have_verbs_and_options_that_exist(page: Path) -> None:
    wrong = []
    for span in INLINE.findall(prose(page)):
        words = span.split()
        if words[:1] == ["megainter"] and len(words) > 1 and not words[1].isupper():
            wrong += [f"{span}: {problem}" for problem in unknown(words[1:])]
    assert wrong == []


def test_the_first_run_has_the_same_commands_outputs_and_pictures_in_both_languages() -> None:
    english, chinese = ((ROOT / "docs" / name).read_text() for name in ("first-run.md", "first-run.zh.md"))
    assert len(FENCE.findall(english)) >= 10
    assert FENCE.findall(chinese) == FENCE.findall(english)
    assert PICTURE.findall(chinese) == PICTURE.findall(english) == list(PICTURES)


def test_every_picture_has_a_page_that_shows_it_and_a_command_that_makes_it() -> None:
    shown = {(page.parent / name).resolve() for page in PAGES for name in PICTURE.findall(page.read_text())}
    there = {file for kind in ("webp", "png", "jpg", "svg") for file in (ROOT / "docs").rglob(f"*.{kind}")}
    made = {ROOT / "docs" / name for name in PICTURES}
    assert shown == there == made


def commands(page: Path) -> Iterator[str]:
    """The command lines of a page's code blocks that run something of ours, continued lines joined."""
    indented = [line[4:] for line in prose(page).splitlines() if line.startswith("    ")]
    for line in "\n".join([*blocks(str(page.relative_to(ROOT)), "", "sh"), *indented]).replace("\\\n", " ").splitlines():
        line = re.sub(r" > [\w.-]+$", "", line)  # what the shell does with the output
        line = re.sub(r"^\s*(?:do |\$ )?(?:[A-Z_0-9]+=\S+ )*", "", line)
        if re.match(r"(?:megainter|deepspeed|torchrun|mpirun|srun|docker run|make|python3?) ", line):
            yield line


def parse(words: list[str]) -> None:
    """Parse one command line down to what it runs; raises where a verb, an option, a setting or a target does not exist."""
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        assert set(words[1:]) <= set(targets), "no such target"
    elif "--module" in words or "-m" in words:
        place = words.index("--module" if "--module" in words else "-m")
        parse_module(words[place + 1], words[place + 2 :])
    elif words[0].startswith("python") and words[1] != "-":
        assert (ROOT / words[1]).is_file(), "no such file"
        parse_with(importlib.import_module(words[1].removesuffix(".py").replace("/", ".")).app, words[2:])
    elif "megainter" in words:
        parse_verb(words[words.index("megainter") + 1 :])


def parse_module(module: str, words: list[str]) -> None:
    """``python -m MODULE``, or a launcher's ``--module MODULE``."""
    if module.partition(".")[0] not in OURS:
        return
    if module in ("megainter", "megainter.pretrain", "megainter.finetune"):
        return parse_verb([*module.split(".")[1:], *words])
    file = ROOT / module.replace(".", "/")
    file = file / "__main__.py" if file.is_dir() else file.with_suffix(".py")
    assert file.is_file(), "no such module"
    source = file.read_text()
    if "app = App(" in source:
        return parse_with(importlib.import_module(module).app, words)
    assert 'if __name__ == "__main__"' in source, "nothing to run"

    # Options of argparse are declared in the file, or in one of ours that it imports them from.
    near = [ROOT / f"{name.replace('.', '/')}.py" for name in re.findall(r"^from (benchmarks[\w.]*) import", source, flags=re.MULTILINE)]
    known = source + "".join(path.read_text() for path in near if path.is_file())
    end = words.index("--") if "--" in words else len(words)
    assert [word for word in words[:end] if word.startswith("--") and f'"{word}"' not in known] == [], "no such option"
    if words[end + 1 :]:
        parse_verb(words[end + 1 :])


def parse_verb(words: list[str]) -> None:
    """The words behind ``megainter``."""
    assert unknown(words) == []
    if "--help" in words:
        return

    given = [word for word in words if word not in ("...", PRINT_CONFIG)]
    more = LEFT_OUT if "..." in words else []
    match given:
        case ["pretrain", *settings]:
            load_config(*split_config([*more, *settings]))
        case ["finetune", task, *settings] if task in TASKS:
            configuration([task, *settings])
        case ["launch", *options]:
            end = options.index("--")
            parse_with(app, given)
            parse_verb([*options[end + 1 :], *words[len(given) :]])
        case ["plan" | "preflight", *_]:
            parse_with(app, given)
            recipe, rest = split_config(given)
            load_config(recipe, [word for name, value in pairwise(rest) if "." in name and name.startswith("--") for word in (name, value)])
        case _ if not more:
            parse_with(app, given)


def parse_with(runner: App, words: list[str]) -> None:
    """Raises ``CycloptsError`` where the app does not take these words."""
    runner.parse_args(words, exit_on_error=False, print_error=False)


def unknown(words: list[str]) -> list[str]:
    """What of a verb's words does not exist: the verb itself, or options of it. Values are not looked at."""
    group, rest = app, list(words)
    while rest and re.fullmatch(r"[a-z0-9-]+", rest[0]) and rest[0] in [name for name in group if not name.startswith("-")]:
        group = group[rest.pop(0)]
    if group is app and rest and not rest[0].startswith("-"):
        return [f"no verb {rest[0]}"]

    # What stands behind a "--" is another command.
    end = rest.index("--") if "--" in rest else len(rest)
    arguments = group.assemble_argument_collection() if group.default_command is not None else []
    names = {name for argument in arguments for name in argument.names}
    settings = any(argument.parameter.allow_leading_hyphen for argument in arguments)
    options = [word.partition("=")[0] for word in rest[:end] if re.match(r"--[a-z]", word)]
    taken = {*names, *group, "--help", "--version"}  # a group has commands that look like options
    return [f"no option {option}" for option in options if option not in taken and not (settings and is_setting(option))]


def is_setting(option: str) -> bool:
    """Whether this is the form of a setting; whether there is such a one is told by the configuration that is read."""
    return "." in option or option in ("--config", "--output", "--tensorboard", "--tracking", PRINT_CONFIG)


def test_the_map_of_the_house_is_complete() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    block = re.search(r"^## The map\n.*?^```text\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    assert block is not None
    folders: list[tuple[int, Path]] = []
    named = set()
    for line in block[1].splitlines():
        depth, name = len(line) - len(line.lstrip()), line.split()[0] if line.split() else ""
        if name.endswith("/"):
            folders = [(deep, folder) for deep, folder in folders if deep < depth]
            folder = (folders[-1][1] if folders else ROOT) / name
            assert folder.is_dir(), line
            folders.append((depth, folder))
            named.add(folder)
    packages = {file.parent for root in OURS[:3] for file in (ROOT / root).rglob("*.py") if file.parent.name != "__pycache__"}
    assert packages - named == set()


def test_the_import_rule_is_the_one_that_is_checked() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["name"] == "Imports point down only")
    text = (ROOT / "docs" / "architecture.md").read_text()
    block = re.search(r"^## The import rule\n.*?^```text\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    assert block is not None
    assert block[1].splitlines() == [layer.replace("megainter.", "") for layer in layers]


@pytest.mark.parametrize("recipe", sorted((ROOT / "megainter" / "recipes").glob("*.toml")), ids=lambda path: path.stem)
def test_a_recipe_opens_with_a_command_that_parses(recipe: Path) -> None:
    command = recipe.read_text().partition("\n")[0].removeprefix("# ")
    assert f"--config {recipe.stem} " in command
    parse(shlex.split(command))
