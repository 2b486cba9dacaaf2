"""What publishes: workflows that take nothing unpinned and no secrets, versions by tag, containers of the same files."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.places import ROOT

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
every_workflow = pytest.mark.parametrize("path", WORKFLOWS, ids=[path.stem for path in WORKFLOWS])


def steps(path: Path) -> list[dict[str, Any]]:
    """The steps of all jobs of a workflow."""
    return [step for job in yaml.safe_load(path.read_text())["jobs"].values() for step in job["steps"]]


def test_lint_tests_and_wheel_have_a_workflow_each() -> None:
    assert [path.stem for path in WORKFLOWS] == ["lint", "tests", "wheel"]


@every_workflow
def test_actions_are_pinned_to_a_commit_with_its_version_beside_it(path: Path) -> None:
    used = [step["uses"] for step in steps(path) if "uses" in step]
    pinned = re.findall(r"uses: ([\w./-]+@[0-9a-f]{40})  # v\d+\.\d+\.\d+$", path.read_text(), flags=re.MULTILINE)
    assert used == pinned
    assert used


@every_workflow
def test_a_workflow_reads_the_checkout_and_no_secrets(path: Path) -> None:
    text = path.read_text()
    assert yaml.safe_load(text)["permissions"] == {"contents": "read"}
    assert "secrets" not in text
    assert "pull_request_target" not in text


@every_workflow
def test_a_workflow_runs_targets_that_exist_and_ends_by_itself(path: Path) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    made = [word for step in steps(path) for word in re.findall(r"^make (\S+)$", step.get("run", ""), flags=re.MULTILINE)]
    assert set(made) <= set(targets)
    assert all(job["timeout-minutes"] <= 60 for job in yaml.safe_load(path.read_text())["jobs"].values())


def copied(dockerfile: str) -> list[str]:
    """What a container takes from the checkout."""
    lines = re.findall(r"^COPY (.+) \S+$", (ROOT / dockerfile).read_text(), flags=re.MULTILINE)
    return [name for line in lines for name in line.split()]


def test_both_containers_hold_the_same_files_of_the_checkout() -> None:
    assert copied("Dockerfile") == copied("Dockerfile.cpu")
    assert [name for name in copied("Dockerfile") if not (ROOT / name).exists()] == []


def version(folder: Path) -> str:
    """The version that a build in this folder would have, in a process of its own."""
    (folder / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
    done = subprocess.run([sys.executable, "-m", "setuptools_scm"], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def git(folder: Path, *words: str) -> None:
    own = ["-c", "user.name=somebody", "-c", "user.email=somebody@example.org", "-c", "commit.gpgsign=false", "-c", "tag.gpgsign=false"]
    subprocess.run(["git", *own, *words], cwd=folder, check=True, capture_output=True)


def test_a_version_is_the_newest_tags_and_there_is_one_without_tags_and_without_history(tmp_path: Path) -> None:
    assert version(tmp_path) == "0.1.0.dev0"

    git(tmp_path, "init", "--initial-branch", "main")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--message", "first")
    assert re.fullmatch(r"0\.1\.0\.dev1\+g[0-9a-f]+", version(tmp_path))

    git(tmp_path, "tag", "v1.4.0")
    assert version(tmp_path) == "1.4.0"
    git(tmp_path, "commit", "--allow-empty", "--message", "second")
    assert re.fullmatch(r"1\.4\.1\.dev1\+g[0-9a-f]+", version(tmp_path))
