"""What may differ between a run and its resumption."""

from pathlib import Path

from megainter.config import as_dict, load_config
from megainter.training.run_folder import differences

GIVEN = ["--output", "run", "--data.pairs", "p", "--data.store", "s", "--training.steps", "10"]


def settings(*more: str) -> dict:
    return as_dict(load_config(Path("base"), [*GIVEN, *more]))


def test_a_setting_that_decides_the_numbers_may_not_change() -> None:
    assert differences(settings(), settings("--optimizer.learning_rate", "0.5")) == ["optimizer.learning_rate: 0.0001 -> 0.5"]
    assert differences(settings(), settings("--checkpoint.keep", "7")) == []


def test_a_run_from_before_a_setting_existed_had_its_default() -> None:
    old = settings()
    for section, key in (("data", "hard_negatives"), ("data", "conditional_masking"), ("training", "ema_decay"), ("optimizer", "clip")):
        del old[section][key]
    assert differences(old, settings()) == []
    assert differences(old, settings("--training.ema_decay", "0.5")) == ["training.ema_decay: 0.0 -> 0.5"]
