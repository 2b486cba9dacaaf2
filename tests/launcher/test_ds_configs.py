"""The DeepSpeed files that ship: each is accepted, each trains on two processes, and the page about them names them all."""

import json
import re
from pathlib import Path

import pytest

from megainter.config.reading import load_config
from megainter.errors import UsageError
from tests.places import ROOT
from tests.synthetic import NO_DROPOUT, losses, settings, train, write_data

FILES = sorted((ROOT / "ds_configs").glob("*.json"))


def flags(path: Path) -> dict[str, object]:
    """The engine settings that go with a file."""
    content = json.loads(path.read_text())
    precision = next((name for name in ("bf16", "fp16") if content.get(name, {}).get("enabled")), "fp32")
    zero = content["zero_optimization"]
    return {
        "engine__deepspeed": path, "engine__zero_stage": zero["stage"], "engine__precision": precision,
        "engine__offload_optimizer": str("offload_optimizer" in zero).lower(),
    }  # fmt: skip


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_engine_takes_it(path: Path, tmp_path: Path) -> None:
    from megainter.training.engine import deepspeed_config

    config = load_config(None, settings(tmp_path, tmp_path, tmp_path, **flags(path)))
    merged = deepspeed_config(config.engine, config.optimizer, config.training, 2)
    content = json.loads(path.read_text())
    assert merged["zero_optimization"].items() >= content["zero_optimization"].items()
    assert {name: merged[name] for name in content if name != "zero_optimization"} == {
        name: value for name, value in content.items() if name != "zero_optimization"
    }


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_trains_on_two_processes(path: Path, tmp_path: Path) -> None:
    pairs, store = write_data(tmp_path, images=12)
    done = train(settings(pairs, store, tmp_path / "run", training__steps=3, **flags(path), **NO_DROPOUT), processes=2)
    if path.stem == "zero2_fp16":
        import torch

        if not torch.cuda.is_available():
            assert done.returncode != 0
            assert "fp16 needs a CUDA device" in done.stderr
            pytest.skip("fp16 needs a GPU; it is refused here, in one line")
    assert done.returncode == 0, done.stdout + done.stderr
    plain = train(settings(pairs, store, tmp_path / "plain", training__steps=3, engine__zero_stage=0, **NO_DROPOUT), processes=2)
    assert plain.returncode == 0
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "plain"), rel=0.02)


def test_the_page_names_every_file() -> None:
    named = set(re.findall(r"`(\w+\.json)`", (ROOT / "docs" / "ds-configs.md").read_text()))
    assert named == {path.name for path in FILES}


def test_a_misspelt_setting_is_an_error(tmp_path: Path) -> None:
    from megainter.training.engine import deepspeed_config

    (tmp_path / "ds.json").write_text('{"zero_optimisation": {"stage": 2}}')
    config = load_config(None, settings(tmp_path, tmp_path, tmp_path, engine__deepspeed=tmp_path / "ds.json"))
    with pytest.raises(UsageError, match="zero_optimization"):
        deepspeed_config(config.engine, config.optimizer, config.training, 2)
