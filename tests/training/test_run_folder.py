"""What may differ between a run and its resumption."""

import subprocess
from pathlib import Path

import pytest

from megainter.config.reading import load_config, read_settings
from megainter.config.settings import as_dict
from megainter.errors import UsageError
from megainter.files import write_json
from megainter.process import folder_lock
from megainter.tasks.retrieval.settings import RetrievalConfig
from megainter.training.run_folder import commit_of, differences, free_changes, open_run_folder, removed_where_nothing_began

GIVEN = ["--output", "run", "--data.pairs", "p", "--data.store", "s", "--training.steps", "10"]


def settings(*more: str) -> dict:
    return as_dict(load_config(Path("base"), [*GIVEN, *more]))


def test_a_setting_that_decides_the_numbers_may_not_change() -> None:
    assert differences(settings(), settings("--optimizer.weight_decay", "0.5")) == ["optimizer.weight_decay: 0.01 -> 0.5"]
    batch = settings()["training"]["global_batch"]
    assert differences(settings(), settings("--training.global_batch", "64")) == [f"training.global_batch: {batch} -> 64"]
    lower = settings("--optimizer.learning_rate", "0.5")  # what a run that blew up goes on with
    assert differences(settings(), lower) == []
    assert free_changes(settings(), lower) == ["optimizer.learning_rate: 0.0001 -> 0.5"]
    assert differences(settings(), settings("--checkpoint.keep", "7")) == []


def test_a_run_from_before_a_setting_existed_had_its_default() -> None:
    old = settings()
    for section, key in (("data", "hard_negatives"), ("data", "conditional_masking"), ("training", "ema_decay"), ("optimizer", "clip")):
        del old[section][key]
    assert differences(old, settings()) == []
    assert differences(old, settings("--training.ema_decay", "0.5")) == ["training.ema_decay: 0.0 -> 0.5"]


def test_what_a_run_may_go_on_with_otherwise_is_told() -> None:
    old = settings("--engine.precision", "bf16")
    assert free_changes(old, old) == []
    del old["engine"]["communication"]  # a run from before it existed
    new = settings("--engine.precision", "fp32", "--training.micro_batch", "8")
    told = ["engine.precision: bf16 -> fp32", "training.micro_batch: 64 -> 8", "training.micro_tokens: 16384 -> None"]
    assert free_changes(old, new) == told


def test_the_folder_of_a_fine_tuning_run_is_told_as_such(tmp_path: Path) -> None:
    tuned = [*GIVEN, "--model.start_from", "m", "--output", str(tmp_path)]
    write_json(tmp_path / "config.json", as_dict(read_settings(RetrievalConfig, None, tuned)))
    (tmp_path / "checkpoints" / "step_0000001").mkdir(parents=True)
    config = load_config(Path("base"), [*GIVEN, "--output", str(tmp_path)])
    with pytest.raises(UsageError, match=r"holds a run of another kind \(retrieval\); name another output folder"):
        open_run_folder(config, {}, {}, {})


def test_a_finished_run_started_again_keeps_its_records(tmp_path: Path) -> None:
    config = load_config(Path("base"), [*GIVEN, "--output", str(tmp_path)])
    open_run_folder(config, {"a": 1}, {}, {})
    (tmp_path / "checkpoints" / "step_0000001").mkdir(parents=True)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.json")}
    shorter = load_config(Path("base"), [*GIVEN, "--output", str(tmp_path), "--training.steps", "1", "--optimizer.learning_rate", "0.5"])
    open_run_folder(shorter, {"a": 2}, {}, {}, finished=True)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.json")} == before
    another = load_config(Path("base"), [*GIVEN, "--output", str(tmp_path), "--training.seed", "99"])
    with pytest.raises(UsageError, match=r"training\.seed"):
        open_run_folder(another, {}, {}, {}, finished=True)


def start_with_a_mistake(folder: Path) -> None:
    with removed_where_nothing_began(folder):
        (folder / "logs").mkdir(parents=True)
        (folder / "logs" / "train.log").write_text("precision bf16\n")
        (folder / "cache").mkdir(exist_ok=True)
        raise UsageError("a typing error")


def failing_start(folder: Path) -> None:
    with pytest.raises(UsageError, match="a typing error"):
        start_with_a_mistake(folder)


def test_a_start_that_fails_leaves_no_folder(tmp_path: Path) -> None:
    failing_start(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_else_is_in_the_folder_stays(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "vocab.txt").write_text("[PAD]")
    failing_start(tmp_path / "run")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"vocab.txt", ".lock"}


def test_the_log_of_another_run_that_is_starting_stays(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with folder_lock(tmp_path / "run"):
        failing_start(tmp_path / "run")
        assert (tmp_path / "run" / "logs" / "train.log").exists()


def test_the_commit_of_a_repository_that_merely_holds_the_installation_is_not_taken(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        who = ["-c", "user.name=somebody", "-c", "user.email=somebody@example.org"]
        return subprocess.run(["git", "-C", str(tmp_path), *who, *words], capture_output=True, text=True, check=True).stdout.strip()

    git("init", "--quiet")
    git("commit", "--quiet", "--allow-empty", "--message", "somebody's own project")
    installed = tmp_path / ".venv" / "site-packages"
    installed.mkdir(parents=True)

    assert commit_of(tmp_path) == git("rev-parse", "HEAD")
    assert commit_of(installed) is None
