"""`megainter init`: the printed recipe is the shipped one, explained; what it offers besides are defaults."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megainter.config.help import meaning_of
from megainter.config.reading import find_recipe, read_settings, shipped_recipes
from megainter.config.settings import RunConfig
from megainter.config.starter import OFTEN_CHANGED, commented_recipe
from megainter.errors import UsageError
from megainter.verbs.finetune import TASKS, kind_of
from megainter.verbs.init import init
from tests.synthetic import environment

RECIPES = [(name, kind) for kind in (RunConfig, *map(kind_of, TASKS)) for name in shipped_recipes(kind.verb)]
every_recipe = pytest.mark.parametrize(("name", "kind"), RECIPES, ids=[name for name, _ in RECIPES])


def test_every_shipped_recipe_is_somebodys() -> None:
    assert {name for name, _ in RECIPES} == {path.stem for path in find_recipe(Path("small")).parent.glob("*.toml")}


@every_recipe
def test_the_printed_recipe_gives_the_same_settings_and_so_does_each_default_it_offers(name: str, kind: type, tmp_path: Path) -> None:
    text, mine = commented_recipe(find_recipe(Path(name)), kind), tmp_path / "my.toml"
    mine.write_text(text)
    wanted = read_settings(kind, Path(name))
    assert read_settings(kind, mine) == wanted

    offered = re.compile(r"^# ([a-z_0-9]+ = (?![A-Z]).*)$", flags=re.MULTILINE)  # where the default is none, a type stands
    mine.write_text(offered.sub(r"\1", text))
    assert offered.search(text)
    assert read_settings(kind, mine) == wanted


@every_recipe
def test_every_setting_stands_below_its_meaning(name: str, kind: type) -> None:
    said: list[str] = []
    owner: type = kind
    for line in commented_recipe(find_recipe(Path(name)), kind).splitlines():
        if line.startswith("["):
            owner = {field.name: field.type for field in dataclasses.fields(kind)}[line.strip("[]")]
        if key := re.match(r"(?:# )?([a-z_0-9]+) = ", line):
            assert " ".join(said).endswith(meaning_of(key[1], owner)), line
            said = []
        elif line.startswith("# "):
            said.append(line.removeprefix("# "))


def test_what_is_often_changed_are_settings() -> None:
    sections = [field for field in dataclasses.fields(RunConfig) if dataclasses.is_dataclass(field.type)]
    known = {field.name: {key.name for key in dataclasses.fields(field.type)} for field in sections}
    assert {name: set(keys) - known[name] for name, keys in OFTEN_CHANGED.items()} == {name: set() for name in OFTEN_CHANGED}


def test_the_verb_prints_it_and_names_the_nearest_recipe() -> None:
    def init(name: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "megainter", "init", name]
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment())

    assert init("retrieval").stdout == commented_recipe(find_recipe(Path("retrieval")), kind_of("retrieval"))
    mistyped = init("smal")
    assert (mistyped.returncode, mistyped.stderr) == (2, "megainter: there is no recipe 'smal'; did you mean small?\n")


def test_without_a_name_the_recipes_are_listed() -> None:
    with pytest.raises(UsageError, match=r"pretrain: .*small.*; finetune retrieval: .*retrieval-small"):
        init()
