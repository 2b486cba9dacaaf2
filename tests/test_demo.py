"""The demo: killed anywhere it goes on, finished stages are not redone, and its score is learned, not leaked."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megainter import demo
from tests.synthetic import environment


@pytest.mark.slow
def test_killed_training_leaves_no_rank_behind(tmp_path: Path) -> None:
    """SIGKILL of the demo alone: extraction workers and ranks notice and end, so that the next start finds the folder free."""
    child = start(tmp_path)
    deadline = time.monotonic() + 240
    while not (tmp_path / "run" / "metrics.jsonl").exists() and time.monotonic() < deadline:
        assert child.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.5)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert wait_until(lambda: not processes_of(tmp_path), 20), processes_of(tmp_path)
    stages = sorted(path.stem for path in (tmp_path / "stages").iterdir())
    assert stages == ["extract", "prepare", "scenes"]


@pytest.mark.slow
def test_demo_killed_again_and_again_finishes_and_scores(tmp_path: Path) -> None:
    """SIGKILL at random moments (seeded), each time the same command; then R@1 of at least 0.70 among 100."""
    moments = random.Random(5)
    for _ in range(6):
        child = start(tmp_path)
        try:
            child.wait(timeout=moments.uniform(5, 90))
        except subprocess.TimeoutExpired:
            os.kill(child.pid, signal.SIGKILL)
            child.wait()
    records = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "stages").iterdir()}
    child = start(tmp_path)
    assert child.wait(timeout=1800) == 0, (tmp_path / "log").read_text()
    assert all((tmp_path / "stages" / name).stat().st_mtime_ns == moment for name, moment in records.items())
    assert recall_at_1(tmp_path) >= 0.70
    assert (tmp_path / "index.html").exists()


@pytest.mark.slow
def test_shuffled_captions_fall_to_chance(tmp_path: Path) -> None:
    """The same run with the training captions dealt to other images: what is left is chance (0.01 among 100 images)."""
    stages = {stage.name: stage for stage in demo.stages_of(tmp_path)}
    stages["scenes"].run()
    shuffle_training_captions(tmp_path / "captions.jsonl")
    for name in ("prepare", "extract", "pretrain", "export", "evaluate"):
        stages[name].run()
    assert recall_at_1(tmp_path) <= 0.05


def shuffle_training_captions(path: Path) -> None:
    """Deal the captions of the training scenes to each other at random."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    training = [row for row in rows if row["split"] == "train"]
    captions = [row["captions"] for row in training]
    random.Random(0).shuffle(captions)
    for row, dealt in zip(training, captions, strict=True):
        row["captions"] = dealt
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def start(output: Path) -> subprocess.Popen[bytes]:
    """Start the demo in a session of its own, its output appended to ``log``."""
    output.mkdir(exist_ok=True)
    with open(output / "log", "ab") as log:
        command = [sys.executable, "-m", "megainter", "demo", "--output", str(output)]
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment(), start_new_session=True)


def processes_of(folder: Path) -> list[str]:
    """Command lines of living processes that name ``folder``."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(folder) in words and str(os.getpid()) != path.parent.name and "pytest" not in words:
            found.append(words)
    return found


def wait_until(condition: object, seconds: float) -> bool:
    """Whether ``condition()`` becomes true in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():  # type: ignore[operator]
            return True
        time.sleep(0.2)
    return False


def recall_at_1(output: Path) -> float:
    """Text-to-image R@1 of the demo's evaluation, of both stages together."""
    return json.loads((output / "retrieval.json").read_text())["both_stages"]["text_to_image"]["r_at_1"]
