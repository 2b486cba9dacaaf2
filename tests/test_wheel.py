"""What a user installs: a wheel of this checkout holds every module and every data file, and works where no checkout is."""

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.places import ROOT

PACKAGES = ("megainter", "preprocessing", "launcher")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built without a network from a copy of the packages, so that nothing is left in the checkout."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    for file in [*_files_of_the_packages(), "pyproject.toml", "README.md", "LICENSE"]:
        (source / file).parent.mkdir(parents=True, exist_ok=True)
        (source / file).write_bytes((ROOT / file).read_bytes())

    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    done = subprocess.run([*build, "--wheel-dir", str(built), str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (found,) = built.glob("megainter-*.whl")
    return found


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that holds the wheel's packages, as site-packages would."""
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def _files_of_the_packages() -> list[str]:
    """Every file of the packages, relative to the checkout: what a package holds is meant to be installed."""
    listed = (path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file())
    return sorted(str(path.relative_to(ROOT)) for path in listed if path.suffix != ".pyc" and not path.name.startswith("."))


def _elsewhere(unpacked: Path, folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run Python in an empty folder, where the unpacked wheel is found before any checkout."""
    own = {**os.environ, "PYTHONPATH": str(unpacked)}
    return subprocess.run([sys.executable, *command], cwd=folder, env=own, capture_output=True, text=True, timeout=60, check=False)


def test_the_wheel_holds_every_file_of_the_packages_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == set(_files_of_the_packages())


def test_the_wheel_bears_its_licences(wheel: Path) -> None:
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["license-files"]
    wanted = {str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern)}
    with zipfile.ZipFile(wheel) as archive:
        held = {name.partition(".dist-info/licenses/")[2] for name in archive.namelist()}
    assert "LICENSE" in wanted
    assert wanted <= held


def test_the_command_line_starts_from_the_wheel(unpacked: Path, tmp_path: Path) -> None:
    done = _elsewhere(unpacked, tmp_path, "-m", "megainter", "--help")
    assert done.returncode == 0, done.stderr
    assert "pretrain" in done.stdout


def test_a_plan_from_the_wheel_finds_its_recipe_and_its_table_of_gpus(unpacked: Path, tmp_path: Path) -> None:
    done = _elsewhere(unpacked, tmp_path, "-m", "megainter", "plan", "--config", "small", "--gpus", "8", "--gpu", "h100")
    assert done.returncode == 0, done.stderr


def test_the_public_names_and_data_come_from_the_wheel(unpacked: Path, tmp_path: Path) -> None:
    code = "import megainter, preprocessing, launcher; print(*(p.__file__ for p in (megainter, preprocessing, launcher)), sep='\\n')"
    done = _elsewhere(unpacked, tmp_path, "-c", code)
    assert done.returncode == 0, done.stderr
    assert [Path(line).parents[1] for line in done.stdout.splitlines()] == [unpacked] * 3
