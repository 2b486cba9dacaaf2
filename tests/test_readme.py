"""The README's commands and Python, run as they stand, on a few composed scenes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from preprocessing.scenes.scenes import write_scenes
from tests.places import ROOT
from tests.synthetic import environment
from tests.tasks.retrieval.web.server import started

# The shipped recipes are for real runs: a test keeps their settings and makes the model small and the run short.
SHORT = "--training.steps 2 --training.global_batch 8 --training.micro_batch 4 --data.workers 0 --engine.precision fp32"
SMALL = (
    f"{SHORT} --model.hidden_size 32 --model.num_attention_heads 4 --model.intermediate_size 32 --model.num_interaction_layers 1 "
    "--model.num_text_layers 1 --model.num_region_layers 1"
)

# What only runs leave that start from weights by name, that hang, that leave samples out, that are followed, or not over.
OF_OTHER_RUNS = {"origin.json", "logs/hang-*", "left_out.json", "logs/tracking/", "watch/"}


def blocks(language: str, page: str = "README.md") -> list[str]:
    """The fenced blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photos/ and captions.jsonl, as the README supposes.

    The detector for photos needs a package that the tests do without (test_photos.py has it); the demo's takes its place.
    """
    folder = tmp_path_factory.mktemp("readme")
    files = write_scenes(folder, {"train": 24, "val": 8, "test": 8}, seed=3, progress=False)
    files.images.rename(folder / "photos")
    lines = [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]
    bare = [json.dumps({key: value for key, value in line.items() if key != "split"}) for line in lines]
    (folder / "captions.jsonl").write_text("\n".join(bare) + "\n")
    for command in "\n".join(blocks("sh")).strip().splitlines():
        command = command.replace("--weights photos", "--weights demo")
        words = command + (f" {SMALL}" if " pretrain " in command else f" {SHORT}" if " finetune " in command else "")
        bin_folder = Path(sys.executable).parent
        done = subprocess.run(
            words, shell=True, cwd=folder, capture_output=True, text=True, check=False, timeout=300,
            env=environment() | {"PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}"},
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return folder


def test_commands_leave_what_they_promise(workplace: Path) -> None:
    files = ("pairs.parquet", "regions.store/store.json", "run/metrics.jsonl", "model/model.safetensors", "scores.json", "page.html")
    for name in (*files, "photos.index/index.json"):
        assert (workplace / name).exists(), name


def test_the_road_ends_in_a_page_that_answers(workplace: Path) -> None:
    with started(workplace / "photos.index") as (_, client, _):
        assert client.get("/").status == 200
        assert client.get("/api/search?q=two%20apples").status == 200


def test_run_folder_is_as_documented(workplace: Path) -> None:
    documented = re.findall(r"^\| `([^|]*?)` \|", (ROOT / "docs" / "run-folder.md").read_text(), flags=re.MULTILINE)
    assert len(documented) >= 6
    for cell in documented:
        for name in cell.split("`, `"):
            if "step_" not in name and name not in OF_OTHER_RUNS:
                assert (workplace / "run" / name).exists(), name


@pytest.mark.parametrize("page", ["README.md", "docs/python.md"])
def test_python_runs(page: str, workplace: Path) -> None:
    for code in blocks("python", page):
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=workplace, capture_output=True, text=True, check=False, timeout=120, env=environment()
        )
        assert done.returncode == 0, done.stderr
