"""A model folder whose weights are a pickle that would run something: every command that takes a folder refuses it, and runs nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conversion.test_hostile_files import PICKLES, zipped
from tests.synthetic import environment, write_data
from tests.tasks.retrieval.test_evaluation import write_model

COMMANDS = [
    "pretrain --data.pairs {pairs} --data.store {store} --model.start_from {model} --output {out} --training.steps 1",
    "finetune retrieval --data.pairs {pairs} --data.store {store} --model.start_from {model} --output {out} --training.steps 1",
    "finetune prefilter {model} --pairs {pairs} --store {store} --output {out}",
    "evaluate retrieval {model} --pairs {pairs} --store {store} --split train --output {out}",
    "index {model} --pairs {pairs} --store {store} --output {out}",
    "convert hf {model} {out}",
    "convert official {model} {out}.bin",
    "convert bert {model} {out}",
]


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command.split()[:2]))
def test_a_folder_with_a_pickle_in_place_of_its_weights_is_refused(command: str, tmp_path: Path) -> None:
    pairs, store = write_data(tmp_path, images=8)
    model, ran = write_model(tmp_path / "model", pairs), tmp_path / "ran"
    (model / "model.safetensors").unlink()
    (model / "checksums.json").unlink(missing_ok=True)
    for make in PICKLES[:2]:  # all go through one reader, as test_hostile_files shows
        (model / "pytorch_model.bin").write_bytes(zipped(make(f"touch {ran}")))
        words = command.format(pairs=pairs, store=store, model=model, out=tmp_path / "out").split()
        done = subprocess.run([sys.executable, "-m", "megainter", *words], capture_output=True, text=True, check=False, env=environment())
        assert not ran.exists(), make.__name__
        assert done.returncode in (2, 4), (make.__name__, done.returncode, done.stdout, done.stderr)
        assert "Traceback" not in done.stderr
        assert not (tmp_path / "out" / "model.safetensors").exists()
