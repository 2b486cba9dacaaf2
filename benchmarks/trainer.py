"""``python -m benchmarks.trainer``: the whole trainer on the recipe `base`, reading from a store: how long it waits for data.

A store of records with 10 to 100 regions of 2048 features and 1601 class probabilities, captions of Flickr8k's lengths; then
``megainter pretrain --config base`` with smaller batches. Prints one JSON object with medians over the logged steps, after which stands
the trainer's own table of where a step's time goes, by module.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
import torch

from benchmarks.batches import CAPTIONS_BY_LENGTH
from benchmarks.reading_records import image_id, write_ours
from benchmarks.sizes import TOY
from benchmarks.timing import machine
from megainter.data.tables.pairs import Pair, write_pairs

PROFILED = 2
FIRST = 3 + PROFILED  # steps that are not counted: the profile is of those that follow the first three
FIGURES = ("step_seconds", "samples_per_second", "tokens_per_second", "data_wait_share")


@dataclass(frozen=True)
class Load:
    """What is trained on what; ``toy``: a model of next to no size. ``log_every``: steps between two records, for each of which a GPU is
    waited for."""

    records: int = 160
    samples: int = 32
    steps: int = 14
    workers: int = 1
    device: str = "cpu"
    zero_stage: int | None = None
    log_every: int = 1
    profiled: int = PROFILED
    toy: bool = False


def main() -> None:
    """Write the data, train, and print."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--records", type=int, default=Load.records)
    options.add_argument("--samples", type=int, default=Load.samples, help="samples per step")
    options.add_argument("--steps", type=int, default=Load.steps)
    options.add_argument("--workers", type=int, default=Load.workers)
    options.add_argument("--device", choices=("cpu", "cuda"), default=Load.device)
    options.add_argument("--zero-stage", type=int, help="instead of the recipe's")
    options.add_argument("--log-every", type=int, default=Load.log_every)
    given = Load(**vars(options.parse_args()))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder, given.records)
        medians = trained(folder, given)
        table = (folder / "run/profile/modules.txt").read_text()
    about = {"date": date.today().isoformat(), "machine": machine(torch.device(given.device)), "samples_per_step": given.samples,
             "workers": given.workers}  # fmt: skip
    print(json.dumps({**about, **medians}, indent=2))
    print(table)


def write_data(folder: Path, records: int) -> None:
    """Regions and captions of drawn images."""
    write_ours(folder, records)
    write_captions(folder / "pairs.parquet", records)


def trained(folder: Path, given: Load) -> dict[str, float]:
    """Train on the data in ``folder``; medians over the records after the first steps, of what the trainer writes about itself."""
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if given.device == "cpu" else {}  # the trainer takes a GPU wherever it sees one
    command = [sys.executable, "-m", "megainter", "pretrain", *words(folder, given)]
    subprocess.run(command, env=os.environ | hidden, check=True, stdout=sys.stderr)
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "train" and line["step"] > FIRST + given.log_every - 1]
    return {key: statistics.median(step[key] for step in steps) for key in FIGURES}


def write_captions(path: Path, records: int) -> None:
    """Five captions for each record, words drawn from 400 made-up ones."""
    rng = np.random.default_rng(0)
    vocabulary = [a + b + c for a in ("ba", "de", "fi", "go", "lu", "mo", "ni", "pa", "re", "su") for b in "bdfglmnp" for c in "aeiou"]
    share = np.array(CAPTIONS_BY_LENGTH) / sum(CAPTIONS_BY_LENGTH)
    counts = 2 + rng.choice(len(share), (records, 5), p=share)  # the shortest has two words beside [CLS] and [SEP]
    rows = [
        Pair(f"{image_id(number)}#{turn}", image_id(number), f"{image_id(number)}.jpg", " ".join(rng.choice(vocabulary, count)), "train")
        for number in range(records)
        for turn, count in enumerate(counts[number])
    ]
    write_pairs(path, rows)


def words(folder: Path, given: Load) -> list[str]:
    """Settings of the run."""
    values = {
        "config": "base", "output": folder / "run", "data.pairs": folder / "pairs.parquet", "data.store": folder / "regions.store",
        "data.workers": given.workers, "training.steps": given.steps, "training.global_batch": given.samples,
        "training.micro_batch": given.samples, "training.log_every": given.log_every, "training.profile_steps": given.profiled,
        "validation.every_steps": 0, "checkpoint.every_steps": given.steps, "tensorboard": "false",
    }  # fmt: skip
    values |= {} if given.zero_stage is None else {"engine.zero_stage": given.zero_stage}
    values |= {f"model.{key}": value for key, value in TOY.items()} if given.toy else {}
    return [word for key, value in values.items() for word in (f"--{key}", str(value))]


if __name__ == "__main__":
    main()
