"""The record of a run: metrics.jsonl is the truth, TensorBoard is fed from it; throughput and model FLOP utilisation."""

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megainter.files import write_atomically

# Dense peak of one device for the named precision, FLOP/s, from the vendors' data sheets (without sparsity).
PEAK_FLOPS: dict[str, dict[str, float]] = {
    "H200": {"bf16": 989e12, "fp16": 989e12, "fp32": 67e12},
    "H100": {"bf16": 989e12, "fp16": 989e12, "fp32": 67e12},
    "A100": {"bf16": 312e12, "fp16": 312e12, "fp32": 19.5e12},
    "L40S": {"bf16": 362e12, "fp16": 362e12, "fp32": 91.6e12},
    "A10": {"bf16": 125e12, "fp16": 125e12, "fp32": 31.2e12},
    "V100": {"fp16": 125e12, "fp32": 15.7e12},
    "T4": {"fp16": 65e12, "fp32": 8.1e12},
}


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Peak FLOP/s of one device at ``precision``; None where it is not known (every CPU, other GPUs)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peaks.get(precision) for model, peaks in PEAK_FLOPS.items() if model in name), None)


class MetricsLog:
    """Appends one JSON object per line to ``metrics.jsonl`` and the same numbers to TensorBoard (rank 0 only)."""

    def __init__(self, folder: Path, resumed_step: int, tensorboard: bool) -> None:
        self.path = folder / "metrics.jsonl"
        drop_after(self.path, resumed_step)
        self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()
        self.board = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder / "logs" / "tensorboard"), purge_step=resumed_step + 1)

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Record ``values`` of ``kind`` ("train", "validation", "skipped", "spike") at ``step``; flushed to the system at once."""
        record = {"kind": kind, "step": step, "time": round(time.time(), 3), **values}
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        if self.board is not None:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self.board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Flush to the disk and close."""
        os.fsync(self.file.fileno())
        self.file.close()
        if self.board is not None:
            self.board.close()


def drop_after(path: Path, step: int) -> None:
    """Keep only the records up to ``step``: what a resumed run does again would otherwise stand twice; torn lines go too."""
    if path.exists():
        kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
        write_atomically(path, "".join(line + "\n" for line in kept))


def read_metrics(path: Path, kind: str) -> list[dict[str, Any]]:
    """All records of ``kind`` in file order."""
    return [record for record in read_records(path) if record["kind"] == kind]


def read_records(path: Path) -> list[dict[str, Any]]:
    """All records in file order, without a last line that is still being written."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in (lines[:-1] if lines and _step_of(lines[-1]) == math.inf else lines)]


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return math.inf


def memory_held(device: torch.device) -> int:
    """Bytes: on a GPU the most that this process's tensors have taken so far, else what the process has in memory now (0: not told)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


class Throughput:
    """Counts work between two log lines: steps, samples, real tokens, FLOPs, and seconds spent waiting for data."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start a new interval."""
        self.start = time.perf_counter()
        self.steps = self.samples = self.tokens = self.flops = 0
        self.waited = 0.0

    def add(self, tokens: int, samples: int, flops: int) -> None:
        """Count the work of a micro-batch."""
        self.tokens += tokens
        self.samples += samples
        self.flops += flops

    def rates(self, world_size: int, peak: float | None) -> dict[str, float]:
        """Samples/s and real tokens/s of all ranks, share of time waiting for data, seconds of a step, and MFU where ``peak`` is known."""
        seconds = max(time.perf_counter() - self.start, 1e-9)
        rates = {
            "samples_per_second": self.samples / seconds,
            "tokens_per_second": self.tokens / seconds,
            "data_wait_share": self.waited / seconds,
            "step_seconds": seconds / max(self.steps, 1),
        }
        if peak is not None:
            rates["model_flop_utilisation"] = self.flops / seconds / (peak * world_size)
        return rates


def shown_figures(values: Mapping[str, float]) -> str:
    """Figures of a validation on one line, recalls at several ranks together.

    >>> shown_figures({"msm_loss": 4.97, "text_to_image_r_at_1": 0.1, "text_to_image_r_at_5": 0.355, "itm_accuracy": 0.8})
    'msm loss 4.970, text to image R@1/5 0.100/0.355, itm accuracy 0.800'
    """
    parts: dict[str, list[tuple[str, float]]] = {}
    for name, value in values.items():
        of, found, rank = name.rpartition("_r_at_")
        parts.setdefault(of if found else name, []).append((rank if found else "", value))
    return ", ".join(f"{name.replace('_', ' ')} {_together(figures)}" for name, figures in parts.items())


def _together(figures: list[tuple[str, float]]) -> str:
    values = "/".join(f"{value:.3f}" for _, value in figures)
    ranks = "/".join(rank for rank, _ in figures)
    return f"R@{ranks} {values}" if ranks else values
