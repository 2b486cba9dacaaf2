"""``python -m benchmarks.saving``: what a checkpoint of the base model costs while it is saved beside training.

The data and the trainer of ``benchmarks.trainer``, with a save every so many steps. Prints one JSON object: the stall of a save, how much
longer the steps beside its writing took, the whole as a share of five minutes, and the memory of the copy as the system counts it.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import machine
from benchmarks.trainer import Load, words, write_data

WARM = 2  # steps that are not counted
INTERVAL = 300.0  # seconds between two checkpoints


@dataclass
class Seen:
    """Largest memory of the rank and of its writer, GB by the name that /proc/PID/status has for it."""

    largest: dict[str, float] = field(default_factory=dict)

    def look(self, pid: int, who: str) -> None:
        """Note the memory of a process, if it is there."""
        with suppress(OSError):
            for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                name, _, value = line.partition(":")
                if name in ("RssAnon", "RssShmem"):
                    key = f"{who} {name}"
                    self.largest[key] = max(self.largest.get(key, 0.0), int(value.split()[0]) / 1e6)


def run(folder: Path, load: Load, every: int) -> Seen:
    """Train, and look at the memory on the way."""
    command = [sys.executable, "-m", "megainter", "pretrain", *words(folder, load), "--checkpoint.every_steps", str(every)]
    seen, child = Seen(), subprocess.Popen(command, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, stdout=sys.stderr)
    while child.poll() is None:
        seen.look(child.pid, "rank")
        with suppress(OSError):
            for pid in Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split():
                if b"megainter.training.writing" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    seen.look(int(pid), "writer")
        time.sleep(0.1)
    if child.returncode:
        raise SystemExit(f"the trainer ended with {child.returncode}")
    return seen


def figures(records: list[dict[str, Any]], every: int) -> dict[str, float]:
    """Medians over the saves amid the run: the first finds new memory, and nothing trains beside the last."""
    steps = {record["step"]: record["step_seconds"] for record in records if record["kind"] == "train"}
    saves = [record for record in records if record["kind"] == "checkpoint" and every < record["step"] < max(steps)]
    beside, plain = set[int](), statistics.median([seconds for step, seconds in steps.items() if step > WARM])
    for save in saves:
        left, step = save["duration_seconds"] - save["stall_seconds"], save["step"] + 1
        while left > 0 and step in steps:
            beside.add(step)
            left, step = left - steps[step], step + 1
    alone = [seconds for step, seconds in steps.items() if step > WARM and step not in beside]
    plain = statistics.median(alone) if alone else plain
    longer = sum(steps[step] - plain for step in beside) / len(saves)
    stall = statistics.median(save["stall_seconds"] for save in saves)
    return {
        "stall_seconds": stall,
        "step_seconds_without_a_save": plain,
        "step_seconds_beside_a_save": statistics.median(steps[step] for step in beside),
        "duration_seconds": statistics.median(save["duration_seconds"] for save in saves),
        "longer_steps_seconds_of_a_save": longer,
        "share_of_five_minutes": (stall + longer) / INTERVAL,
        "bytes": saves[0]["bytes"],
        "saves": len(saves),
    }


def main() -> None:
    """Write the data, train, and print."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--samples", type=int, default=64, help="of a step")
    options.add_argument("--every", type=int, default=5, help="steps between two saves")
    options.add_argument("--saves", type=int, default=6)
    given = options.parse_args()
    load = Load(samples=given.samples, steps=given.every * given.saves, profiled=0)
    with tempfile.TemporaryDirectory() as name:
        write_data(Path(name), load.records)
        seen = run(Path(name), load, given.every)
        records = [json.loads(line) for line in (Path(name) / "run/metrics.jsonl").read_text().splitlines()]
    about = {"date": date.today().isoformat(), "machine": machine(torch.device("cpu")), "samples_per_step": given.samples}
    print(json.dumps({**about, **figures(records, given.every), **seen.largest}, indent=2))


if __name__ == "__main__":
    main()
