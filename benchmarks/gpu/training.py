"""Starting `megainter pretrain` of a small model as a user does, and reading what it left."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.part import Setting, Wrong
from megainter.process import free_port

SMALL = {
    "hidden_size": 256, "num_attention_heads": 4, "num_region_attention_heads": 4, "intermediate_size": 1024, "pooler_size": 256,
    "num_interaction_layers": 2, "num_text_layers": 2, "num_region_layers": 2,
}  # fmt: skip
TOY = {
    "hidden_size": 32, "num_attention_heads": 2, "num_region_attention_heads": 2, "intermediate_size": 64, "pooler_size": 32,
    "num_interaction_layers": 1, "num_text_layers": 1, "num_region_layers": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A run in ``output`` over the data beside it; ``settings`` as on the command line. Its own lines go to ``OUTPUT.log``."""

    output: Path
    settings: Mapping[str, object]
    launcher: bool = True  # DeepSpeed's, with one process

    @classmethod
    def small(cls, folder: Path, name: str, setting: Setting, steps: int, launcher: bool = True, **changes: object) -> "Run":
        """A small model for some steps over the data in ``folder``; in ``changes`` two underscores stand for a dot."""
        values: dict[str, object] = {
            "data.pairs": folder / "pairs.parquet", "data.store": folder / "regions.store", "data.workers": 0 if setting.toy else 2,
            "data.vocabulary_size": 500, "training.steps": steps, "training.global_batch": 4 if setting.toy else 32,
            "training.micro_batch": 2 if setting.toy else 16, "training.log_every": 1, "validation.every_steps": 0,
            "checkpoint.every_steps": 100_000, "tensorboard": "false", "optimizer.learning_rate": 0.0005,
        }  # fmt: skip
        values |= {f"model.{key}": value for key, value in (TOY if setting.toy else SMALL).items()}
        values |= {key.replace("__", "."): value for key, value in changes.items()}
        return cls(folder / name, values, launcher)

    @property
    def log(self) -> Path:
        return self.output.with_name(f"{self.output.name}.log")

    def start(self) -> subprocess.Popen[bytes]:
        """Begin, or go on with what is in the folder."""
        words = [word for key, value in ({"output": self.output} | dict(self.settings)).items() for word in (f"--{key}", str(value))]
        runner = ["-m", "deepspeed.launcher.runner", "--num_gpus", "1", "--master_port", str(free_port()), "--module", "megainter.pretrain"]
        command = [sys.executable, *(runner if self.launcher else ["-m", "megainter.pretrain"]), *words]
        with open(self.log, "ab") as log:
            return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=subprocess.STDOUT)

    def lines(self) -> list[dict[str, Any]]:
        """What the run has recorded of its steps, a line that is being written left out."""
        path = self.output / "metrics.jsonl"
        whole = path.read_text(encoding="utf-8").rpartition("\n")[0].splitlines() if path.exists() else []
        return [line for line in map(json.loads, whole) if line["kind"] == "train"]

    def losses(self) -> list[float]:
        """Of every step."""
        return [line["loss"] for line in self.lines()]

    def end(self, process: subprocess.Popen[bytes], codes: tuple[int, ...] = (0,)) -> int:
        """Wait for the end; raises `Wrong`, with what the run said, for an exit code that is not among ``codes``."""
        code = process.wait()
        if code not in codes:
            said = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if "rror" in line] or ["nothing"]
            raise Wrong(f"{self.output.name} ended with exit code {code}: {said[-1][:300]}")
        return code


def kill(process: subprocess.Popen[bytes]) -> None:
    """As a machine that fails."""
    process.send_signal(signal.SIGKILL)
    process.wait()
