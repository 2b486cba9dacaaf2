"""What the pages about clusters show: commands that parse, manifests and batch files of the right form."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.places import ROOT
from tests.synthetic import environment


def commands(page: str, verb: str) -> list[list[str]]:
    """The words of the commands with this verb in a page's fenced blocks."""
    blocks = re.findall(r"^```\n(.*?)^```", (ROOT / "docs" / page).read_text(), flags=re.DOTALL | re.MULTILINE)
    lines = [line.split("  #")[0] for block in blocks for line in block.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith(f"megainter {verb}")]


def run(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """One command in a folder of its own."""
    command = [sys.executable, "-m", "megainter", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=environment())


@pytest.mark.parametrize("words", commands("plan.md", "plan"), ids=lambda words: words[2])
def test_plans_are_made(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "my_gpu.toml").write_text("[my_gpu]\nmemory = 80\nbf16 = 500\nhbm = 3000\nlink = 300\n")
    done = run(words, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "recommended: --engine.zero_stage" in done.stdout
    for option, content in (("--ds-config", b"{"), ("--simulate", b"\x89PNG")):
        if option in words:
            assert (tmp_path / words[words.index(option) + 1]).read_bytes().startswith(content)


@pytest.mark.parametrize("words", commands("launch.md", "launch"), ids=lambda words: words[1])
def test_launches_can_be_printed(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("a slots=8\nb slots=8\nc slots=8\nd slots=8\n")
    (tmp_path / "hosts").chmod(0o600)
    for name in ("pairs.parquet", "regions.store", "MODEL"):
        (tmp_path / name).touch()
    run_folder = tmp_path / "run"
    words = [word.replace("/shared/run", str(run_folder)) for word in words]
    done = run([words[0], "--dry-run", *words[1:]], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "megainter" in done.stdout
    assert not run_folder.exists()


@pytest.mark.parametrize("name", ["mpijob.yaml", "pytorchjob.yaml"])
def test_manifests_have_the_operators_form(name: str) -> None:
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    manifest = yaml.safe_load((ROOT / "docs" / "kubernetes" / name).read_text())
    kind, specs, roles = {
        "mpijob.yaml": ("MPIJob", "mpiReplicaSpecs", {"Launcher", "Worker"}),
        "pytorchjob.yaml": ("PyTorchJob", "pytorchReplicaSpecs", {"Master", "Worker"}),
    }[name]
    assert manifest["kind"] == kind
    assert set(manifest["spec"][specs]) == roles
    for role in manifest["spec"][specs].values():
        pod = role["template"]["spec"]
        assert pod["terminationGracePeriodSeconds"] > 120  # the launcher's own grace
        assert pod["containers"][0]["image"].startswith("megainter")


def test_mistakes_in_a_plan_are_one_line(tmp_path: Path) -> None:
    for words, named in (
        (["--gpus", "0"], "--gpus"),
        (["--gpus", "3", "--training.micro_batch", "64"], "not a multiple"),
        (["--gpus", "8", "--efficiency", "2"], "--efficiency"),
    ):
        done = run(["plan", "--config", "base", "--gpu", "h100", *words], tmp_path)
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert named in done.stderr
