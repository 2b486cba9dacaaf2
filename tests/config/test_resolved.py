"""`--print-config`: what is printed gives the same settings again, and every origin is right."""

import re
from pathlib import Path

import pytest

from megainter.config.reading import read_settings
from megainter.config.resolved import resolved_settings
from megainter.config.settings import RunConfig
from megainter.verbs.finetune import read_task_settings
from megainter.verbs.pretrain import pretrain
from tests.config.test_starter import every_recipe


def origins(text: str) -> dict[str, str]:
    """Where each setting's value came from, by ``section.key``."""
    found, section = {}, ""
    for line in text.splitlines():
        section = f"{line.strip('[]')}." if line.startswith("[") else section
        if key := re.match(r"(?:# )?([a-z_0-9]+)(?: = |: )", line):
            found[section + key[1]] = line.rpartition("  # ")[2]
    return found


@every_recipe
def test_what_is_printed_of_a_recipe_gives_it_again(name: str, kind: type, tmp_path: Path) -> None:
    config = read_settings(kind, Path(name))
    (tmp_path / "again.toml").write_text(resolved_settings(config, Path(name), []))
    assert read_settings(kind, tmp_path / "again.toml") == config


def test_every_kind_of_origin_is_told(tmp_path: Path) -> None:
    words = [
        "--training.steps",
        "50",
        "--model.start_from",
        "m",
        "--optimizer.compat=official",
        "--data.pairs",
        'odd "name"\\ \x7f.parquet',
    ]
    config = read_settings(RunConfig, Path("small"), words)
    text = resolved_settings(config, Path("small"), words)
    told = origins(text)
    assert told["training.steps"] == told["data.pairs"] == "command line"
    assert told["training.epochs"] == "default; the recipe's gave way to the command line's"
    assert told["training.global_batch"] == "recipe small"
    assert told["optimizer.clip"] == told["optimizer.start_rate"] == "derived from optimizer.compat"
    assert told["optimizer.beta1"] == told["tensorboard"] == "default"

    (tmp_path / "again.toml").write_text(text)
    assert read_settings(RunConfig, tmp_path / "again.toml") == config
    assert origins(resolved_settings(config, tmp_path / "again.toml", []))["optimizer.clip"] == f"recipe {tmp_path / 'again.toml'}"


def test_sizes_that_a_start_brings_are_not_told_as_the_defaults_they_are_not() -> None:
    words = ["--model.start_from", "start"]
    text = resolved_settings(read_settings(RunConfig, Path("small"), words), Path("small"), words)
    assert origins(text)["model.hidden_size"] == "taken from model.start_from"
    assert not re.search(r"^hidden_size", text, flags=re.MULTILINE)
    assert origins(text)["model.hidden_dropout_prob"] == "recipe small"


def test_the_flag_prints_and_trains_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    pretrain("--print-config", "--config", "small", "--training.steps", "7")
    assert origins(capsys.readouterr().out)["training.steps"] == "command line"
    assert read_task_settings("retrieval", ["--config", "retrieval", "--training.epochs", "3", "--print-config"]) is None
    assert origins(capsys.readouterr().out)["training.epochs"] == "command line"
    assert list(tmp_path.iterdir()) == []
