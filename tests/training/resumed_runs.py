"""Tiny runs in one process, resumed from copies of their folders; prints one JSON object. Not a test's process: DeepSpeed joins one group.

python -m tests.training.resumed_runs spikes FOLDER
python -m tests.training.resumed_runs every-step FOLDER [--first 1] [--steps 200] [--after 20]
"""

import argparse
import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import torch

from megainter.config.reading import load_config
from megainter.config.settings import RunConfig
from megainter.errors import NumericsError, StoppedEarly
from megainter.tasks.pretraining.training import open_job
from megainter.training import engine
from megainter.training.checkpoint import step_name
from megainter.training.loop import train
from tests.synthetic import settings, write_data

NOT_COMPARED = (
    "skipped_steps",
    "time",
    "samples_per_second",
    "tokens_per_second",
    "data_wait_share",
    "step_seconds",
    "memory_bytes",
    "slowest_rank",
    "slowest_share",
)


class StoppingAt:
    """The batches of a run, and the wish to stop when step ``last`` is asked for: the loop then ends before it."""

    def __init__(self, batches: Any, last: int) -> None:
        self.batches, self.last = batches, last

    def __getitem__(self, step: int) -> Any:
        if step == self.last:
            os.kill(os.getpid(), signal.SIGUSR1)
        return self.batches[step]


def run(config: RunConfig, until: int | None = None) -> None:
    """Train, to the end or ``until`` so many steps are finished."""

    def job(world: Any) -> Any:
        opened = open_job(config, world)
        return opened if until is None else dataclasses.replace(opened, batches=StoppingAt(opened.batches, until))

    try:
        train(config, job)
    except StoppedEarly:
        assert until is not None


def records(folder: Path, after: int = 0, until: int = 10**9) -> list[dict[str, Any]]:
    """What metrics.jsonl says of the steps after ``after``, without what a clock says or counts from the start of a process."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = [line for line in lines if after < line["step"] <= until and line["kind"] in ("train", "spike", "skipped", "rolled_back")]
    return [{key: value for key, value in line.items() if key not in NOT_COMPARED} for line in kept]


def copy(whole: Path, folder: Path, step: int) -> Path:
    """The run folder as it was after ``step``: its files are links, and only that step's checkpoint is there."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder, copy_function=os.link, ignore=shutil.ignore_patterns("step_*", "metrics.jsonl", "logs", "*.lock"))
    shutil.copy(whole / "metrics.jsonl", folder / "metrics.jsonl")
    shutil.copytree(whole / "checkpoints" / step_name(step), folder / "checkpoints" / step_name(step), copy_function=os.link)
    (folder / "checkpoints/latest").unlink()
    (folder / "checkpoints/latest").write_text(step_name(step))
    return folder


def spikes(base: Path) -> dict[str, Any]:
    """Runs that leave spikes out, and that go back for them; resumed in between, at the end, and made anew with what they passed over."""
    pairs, store = write_data(base)

    def config(name: str, action: str, every: int, **more: object) -> RunConfig:
        given = {"spike_sigma": 0.9, "spike_window": 8, "spike_action": action, "steps": 24, "global_batch": 8, "max_skipped": 20}
        words = {f"training__{key}": value for key, value in given.items()}
        return load_config(None, settings(pairs, store, base / name, **words, checkpoint__every_steps=every, checkpoint__keep=100, **more))

    run(config("skip", "skip", 1))
    copy(base / "skip", base / "resumed", 13)
    run(config("resumed", "skip", 1))
    log = base / "resumed/logs/train.log"
    before = log.read_text()
    run(config("resumed", "skip", 1))
    again = log.read_text().removeprefix(before)
    run(config("roll_back", "roll_back", 5))
    (base / "anew").mkdir()
    shutil.copy(base / "roll_back/left_out.json", base / "anew")
    run(config("anew", "roll_back", 5))
    ended = ""
    try:
        run(config("bounded", "roll_back", 5, training__max_roll_backs=0))
    except NumericsError as error:
        ended = str(error)
    found: dict[str, Any] = {name: records(base / name) for name in ("skip", "resumed", "roll_back", "anew")}
    return found | {"left_out": json.loads((base / "roll_back/left_out.json").read_text())["steps"], "ended": ended, "again": again}


def every_step(base: Path, first: int, steps: int, after: int) -> dict[str, Any]:
    """Resume after each step from ``first`` to ``steps`` and compare the ``after`` next records to the bit."""
    pairs, store = write_data(base)

    def config(folder: Path) -> RunConfig:
        given = {"training__steps": steps + after, "checkpoint__every_steps": 1, "checkpoint__keep": 10**6}
        return load_config(None, settings(pairs, store, folder, **given))

    whole = base / "whole"
    run(config(whole))
    unlike = []
    for step in range(first, steps + 1):
        again = copy(whole, base / "again", step)
        run(config(again), until=step + after)
        theirs, ours = records(whole, step, step + after), records(again, step, step + after)
        if theirs != ours or len(ours) != after:
            unlike.append(step)
        print(f"resumed after step {step}: {'equal' if theirs == ours else 'NOT EQUAL'}", flush=True)
    return {"first": first, "steps": steps, "after": after, "unlike": unlike}


def main() -> None:
    """Run one of the cases."""
    parser = argparse.ArgumentParser()
    parser.add_argument("case", choices=("spikes", "every-step"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--first", type=int, default=1)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--after", type=int, default=20)
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.folder.mkdir(parents=True, exist_ok=True)
    with engine.distributed():
        found = spikes(given.folder) if given.case == "spikes" else every_step(given.folder, given.first, given.steps, given.after)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
