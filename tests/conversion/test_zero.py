"""A run's checkpoint into a folder: averaged weights, damage, and the memory it takes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megainter import InterBertConfig, InterBertForPreTraining
from megainter.conversion.hugging_face import convert_hugging_face
from megainter.conversion.mapping import expected_shapes
from megainter.conversion.zero import convert
from megainter.errors import DamagedError, UsageError
from megainter.files import sha256_of, write_json
from megainter.training.checkpoint import step_name
from tests.model.tiny import tiny_config
from tests.synthetic import environment


def write_checkpoint(run: Path, config: InterBertConfig, kinds: tuple[str, ...] = ("weights", "exp_avg"), ranks: int = 2) -> dict:
    """A checkpoint as training publishes it, its tensors dealt to ``ranks``; returns the tensors by kind."""
    folder = run / "checkpoints" / step_name(7)
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    state = {k: {n: torch.randn(s, generator=generator) for n, s in expected_shapes(config).items()} for k in kinds}
    for kind, tensors in state.items():
        for rank in range(ranks):
            share = {f"model.{name}": tensor for number, (name, tensor) in enumerate(tensors.items()) if number % ranks == rank}
            save_file(share, folder / f"{kind}-{rank:05d}-of-{ranks:05d}.safetensors")
    write_json(folder / "config.json", config.to_dict())
    write_json(folder / "trainer.json", {"step": 7, "lowercase": True})
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n")
    files = [{"file": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in sorted(folder.iterdir())]
    write_json(folder / "manifest.json", {"format": 1, "files": files})
    (run / "checkpoints" / "latest").write_text(step_name(7) + "\n")
    return state


@pytest.mark.parametrize("kind", ["weights", "ema"])
def test_trained_or_averaged_weights(kind: str, tmp_path: Path) -> None:
    state = write_checkpoint(tmp_path / "run", tiny_config(), ("weights", "ema", "exp_avg"))
    convert(tmp_path / "run", tmp_path / "hf", ema=kind == "ema", verify=True)
    model = InterBertForPreTraining.from_pretrained(tmp_path / "hf")
    assert all(torch.equal(parameter, state[kind][name]) for name, parameter in model.named_parameters())
    assert (tmp_path / "hf" / "vocab.txt").is_file()


def test_the_folder_says_what_lengths_the_model_was_trained_with(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "run", tiny_config(max_regions=24, max_text_tokens=20))
    convert(tmp_path / "run", tmp_path / "hf")
    convert_hugging_face(tmp_path / "hf", tmp_path / "half", dtype="bf16")
    for folder in ("hf", "half"):
        config = InterBertConfig.from_pretrained(tmp_path / folder)
        assert (config.max_regions, config.max_text_tokens) == (24, 20)


def test_other_users_can_read_the_folder(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "run", tiny_config())
    before = os.umask(0o022)
    try:
        convert(tmp_path / "run", tmp_path / "hf")
    finally:
        os.umask(before)
    assert {oct(path.stat().st_mode & 0o777) for path in (tmp_path / "hf").iterdir()} == {"0o644"}


def test_without_averages(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "run", tiny_config())
    with pytest.raises(UsageError, match="leave --ema out"):
        convert(tmp_path / "run", tmp_path / "hf", ema=True)


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "run", tiny_config())
    folder = tmp_path / "run" / "checkpoints" / step_name(7)
    write_json(folder / "config.json", tiny_config(num_text_layers=2).to_dict())
    (folder / "manifest.json").write_text('{"format": 1, "files": []}')
    with pytest.raises(DamagedError, match="lacks 16 tensors"):
        convert(tmp_path / "run", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


MEASURE = """
import sys
from pathlib import Path
from megainter.conversion import zero

def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

before = peak()
plan = zero.convert(Path(sys.argv[1]), Path(sys.argv[2]))
print("ratio", (peak() - before) / (4 * plan.parameters))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read from /proc")
def test_memory_stays_near_the_models_size(tmp_path: Path) -> None:
    """At most 1.3 times the fp32 model above what the imports take, the files' memory-mapped pages counted."""
    layers = {f"num_{stream}_layers": 3 for stream in ("interaction", "text", "region")}
    config = InterBertConfig(vocab_size=2000, hidden_size=640, intermediate_size=2560, num_attention_heads=10, **layers)
    write_checkpoint(tmp_path / "run", config, ("weights",))
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "run"), str(tmp_path / "hf")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment())
    assert done.returncode == 0, done.stderr
    ratio = float(done.stdout.rpartition("ratio ")[2])
    assert ratio <= 1.3, f"{ratio:.2f} times the model"
