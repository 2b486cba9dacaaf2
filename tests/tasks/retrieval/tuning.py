"""Fine-tuning runs for retrieval in real processes, from a model that was pretrained for some steps."""

import subprocess
import sys
from pathlib import Path

from tests.synthetic import settings, train

Data = tuple[Path, Path, Path]  # a model, pairs and their store
CONTRAST = {"training__itc_weight": 1, "model__itc_size": 12, "training__steps": 20}


def pretrained(folder: Path, pairs: Path, store: Path, **changes: object) -> Data:
    """A model in ``folder``."""
    done = train(settings(pairs, store, folder / "run", **({"training__log_every": 10} | changes)))
    assert done.returncode == 0, done.stderr
    command = [sys.executable, "-m", "megainter", "convert", "zero", folder / "run", folder / "model"]
    assert subprocess.run(command, check=False).returncode == 0
    return folder / "model", pairs, store


def arguments(start: Data, output: Path, **changes: object) -> list[object]:
    model, pairs, store = start
    values = {
        "output": output, "data.pairs": pairs, "data.store": store, "model.start_from": model, "data.workers": 0,
        "training.steps": 24, "training.global_batch": 16, "training.micro_batch": 8, "training.log_every": 8, "training.ema_decay": 0.5,
        "validation.every_steps": 8, "optimizer.learning_rate": 0.002, "engine.precision": "fp32", "engine.zero_stage": 1,
        "checkpoint.every_steps": 8, "tensorboard": "false", "model.hidden_dropout_prob": 0, "model.region_hidden_dropout_prob": 0,
        "model.attention_probs_dropout_prob": 0,
    }  # fmt: skip
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    return [text for key, value in values.items() for text in (f"--{key}", value)]


def finetune(arguments: list[object], processes: int = 1) -> subprocess.CompletedProcess[str]:
    alone = ["megainter.finetune"]
    several = ["torch.distributed.run", "--standalone", "--nproc-per-node", processes, "--module", "megainter.finetune"]
    command = [sys.executable, "-m", *map(str, alone if processes == 1 else several), "retrieval", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
