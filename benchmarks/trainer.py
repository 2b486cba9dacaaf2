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
from datetime import date
from pathlib import Path

import numpy as np
import torch

from benchmarks.batches import CAPTIONS_BY_LENGTH
from benchmarks.data import image_id, write_ours
from benchmarks.timing import machine
from megainter.data.manifest import Pair, write_pairs

PROFILED = 2
FIRST = 3 + PROFILED  # steps that are not counted: the profile is of those that follow the first three


def main() -> None:
    """Write the data, train, and print."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--records", type=int, default=160)
    options.add_argument("--samples", type=int, default=32, help="samples per step")
    options.add_argument("--steps", type=int, default=14)
    options.add_argument("--workers", type=int, default=1)
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options.add_argument("--zero-stage", type=int, default=None, help="instead of the recipe's")
    given = options.parse_args()
    environment = os.environ | (
        {"CUDA_VISIBLE_DEVICES": ""} if given.device == "cpu" else {}
    )  # the trainer takes a GPU wherever it sees one
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_ours(folder, given.records)
        write_captions(folder / "pairs.parquet", given.records)
        subprocess.run(
            [sys.executable, "-m", "megainter", "pretrain", *words(folder, given)], env=environment, check=True, stdout=sys.stderr
        )
        lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
        table = (folder / "run/profile/modules.txt").read_text()
    steps = [line for line in lines if line["kind"] == "train"][FIRST:]
    medians = {
        key: statistics.median(step[key] for step in steps)
        for key in ("step_seconds", "samples_per_second", "tokens_per_second", "data_wait_share")
    }
    about = {
        "date": date.today().isoformat(),
        "machine": machine(torch.device(given.device)),
        "samples_per_step": given.samples,
        "workers": given.workers,
    }
    print(json.dumps({**about, **medians}, indent=2))
    print(table)


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


def words(folder: Path, given: argparse.Namespace) -> list[str]:
    """Settings of the run."""
    values = {
        "config": "base", "output": folder / "run", "data.pairs": folder / "pairs.parquet", "data.store": folder / "regions.store",
        "data.workers": given.workers, "training.steps": given.steps, "training.global_batch": given.samples,
        "training.micro_batch": given.samples, "training.log_every": 1, "training.profile_steps": PROFILED,
        "validation.every_steps": 0, "checkpoint.every_steps": given.steps, "tensorboard": "false",
    }  # fmt: skip
    values |= {} if given.zero_stage is None else {"engine.zero_stage": given.zero_stage}
    return [word for key, value in values.items() for word in (f"--{key}", str(value))]


if __name__ == "__main__":
    main()
