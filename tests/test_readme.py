"""The commands of the README and of the first run, and the README's Python, run as they stand, on a few composed scenes or photos."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from preprocessing.scenes.scenes import write_scenes
from tests.commands import blocks, lines, run_line
from tests.places import ROOT
from tests.preprocessing.detector.test_photos import sample_photo
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


# Lines of the first run that only a person's machine runs: the demo has tests of its own, and a test's environment is set up.
BY_THE_READER = ("make demo", "source .venv/bin/activate")


def shortened(line: str, weights: str = "demo") -> str:
    """A page's line with a small model, few steps, and the detector ``weights`` in the place of the one for photos."""
    more = f" {SMALL}" if " pretrain " in line else f" {SHORT}" if " finetune " in line else ""
    return line.replace("--weights photos", f"--weights {weights}") + more


def follow(page: list[str], folder: Path, weights: str = "demo") -> None:
    """Run lines of a page in ``folder``, shortened; what serves must answer."""
    for line in page:
        if line.startswith("megainter serve "):
            with started(folder / line.split()[2]) as (_, client, _):
                assert client.get("/").status == 200
                assert client.get("/api/search?q=two%20apples").status == 200
        else:
            run_line(shortened(line, weights), folder)


def first_run() -> list[str]:
    """The lines of the first run that a test can follow."""
    return [line for line in lines("docs/first-run.md") if line not in BY_THE_READER]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photos/ and captions.jsonl, as the README supposes.

    The detector for photos needs a package that the tests do without (test_photos.py has it); the demo's takes its place.
    """
    folder = tmp_path_factory.mktemp("readme")
    files = write_scenes(folder, {"train": 24, "val": 8, "test": 8}, seed=3, progress=False)
    files.images.rename(folder / "photos")
    rows = [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]
    bare = [json.dumps({key: value for key, value in line.items() if key != "split"}) for line in rows]
    (folder / "captions.jsonl").write_text("\n".join(bare) + "\n")
    follow(lines("README.md"), folder)
    return folder


def test_commands_leave_what_they_promise(workplace: Path) -> None:
    files = ("pairs.parquet", "regions.store/store.json", "run/metrics.jsonl", "model/model.safetensors", "scores.json", "page.html")
    for name in (*files, "photos.index/index.json"):
        assert (workplace / name).exists(), name


@pytest.fixture(scope="module")
def demo_run(workplace: Path) -> Path:
    """A finished demo, of the workplace's small model, with the scene that the first run looks at."""
    folder = workplace / "demo-run"
    shutil.copytree(workplace / "photos", folder / "images")
    for line in first_run():
        for name in re.findall(r"demo-run/images/([\w-]+\.jpg)", line):
            shutil.copyfile(workplace / "photos" / "scene-000000.jpg", folder / "images" / name)
    for name in ("model", "pairs.parquet", "regions.store"):
        (folder / name).symlink_to(workplace / name)
    (folder / "index.html").symlink_to(workplace / "page.html")
    return folder


def test_the_first_run_goes_through(workplace: Path, demo_run: Path) -> None:
    """Lines that the README has too ran with it, in the same folder; pages answer at both ends."""
    known = lines("README.md")
    here = [line for line in first_run() if line not in known]
    follow(here, workplace)
    assert len(here) < len(first_run()) - 6, "most lines are the README's"
    assert (demo_run / "believes.html").exists()


@pytest.mark.slow
def test_the_first_run_goes_through_with_photos(tmp_path: Path) -> None:
    """The part with one's own photos, by the detector that the page names."""
    pytest.importorskip("efficientnet_lite_pytorch", reason="the detector for photos needs the imagenet extra")
    write_photos(tmp_path)
    here = [line for line in first_run() if "demo-run" not in line]
    follow(here, tmp_path, weights="photos")
    assert len(here) >= 8
    assert (tmp_path / "page.html").exists()


def write_photos(folder: Path) -> None:
    """photos/ and captions.jsonl: pieces of the two photos that scikit-learn ships."""
    (folder / "photos").mkdir()
    described = {"flower": ["A pink flower.", "A flower before dark leaves."], "china": ["A temple.", "The roofs of a temple."]}
    rows = []
    for name, captions in described.items():
        whole = sample_photo(name)
        for number in range(20):
            piece = whole.crop((8 * number, 4 * number, 440 + 8 * number, 330 + 4 * number))
            piece.save(folder / "photos" / f"{name}-{number}.jpg")
            rows.append({"image": f"{name}-{number}.jpg", "captions": captions})
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_run_folder_is_as_documented(workplace: Path) -> None:
    documented = re.findall(r"^\| `([^|]*?)` \|", (ROOT / "docs" / "run-folder.md").read_text(), flags=re.MULTILINE)
    assert len(documented) >= 6
    for cell in documented:
        for name in cell.split("`, `"):
            if "step_" not in name and name not in OF_OTHER_RUNS:
                assert (workplace / "run" / name).exists(), name


@pytest.mark.parametrize("page", ["README.md", "docs/python.md"])
def test_python_runs(page: str, workplace: Path) -> None:
    for code in blocks(page, "python"):
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=workplace, capture_output=True, text=True, check=False, timeout=120, env=environment()
        )
        assert done.returncode == 0, done.stderr
