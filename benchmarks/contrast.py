"""``python -m benchmarks.contrast [--size base|small] [--samples N]``: what image-text contrast adds to a training step on this machine.

A step as the trainer runs it (ZeRO stage 1, bf16 where the CPU computes it, one process), without contrast and with it, each in a process
of its own, in turn: the median seconds of a step, by the clock and of the processor, and the largest resident memory. Where others use the
machine the processor's count, of one thread (OMP_NUM_THREADS=1). With contrast a step has its pass before, without gradients, the
comparison, and both sides alone in the pass itself. Prints one JSON object.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from datetime import date
from pathlib import Path

import numpy as np
import torch

from benchmarks.batches import make_batch
from benchmarks.sizes import BASE
from launcher.planning.device_memory import Layout, flops_per_step
from launcher.planning.shape import Load, shape_of
from megainter.config.reading import load_config
from megainter.config.settings import EngineConfig, OptimizerConfig, TrainingConfig
from megainter.data.integers import Int64s
from megainter.model.configuration import InterBertConfig
from megainter.model.interbert import InterBertForPreTraining
from megainter.tasks.contrast import Gathering, add_vectors, answered, compare
from megainter.tasks.pretraining.batches import PretrainBatch
from megainter.tasks.pretraining.objective import ObjectiveWeights, PretrainingStep
from megainter.tasks.pretraining.sampling import Draws
from megainter.tasks.pretraining.sides import Sides
from megainter.training import engine
from megainter.training.arrival import Arrivals
from megainter.training.loop import counted

VECTOR = 256


def main() -> None:
    """Time both, or one of them as a child."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--size", choices=("base", "small"), default="base")
    options.add_argument("--samples", type=int, default=32)
    options.add_argument("--steps", type=int, default=4)
    options.add_argument("--repeats", type=int, default=1)
    options.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    options.add_argument("--only", choices=("without", "with"), help="this one alone, in this process")
    given = options.parse_args()
    if given.only is not None:
        print(json.dumps(timed(given.size, given.samples, given.steps, given.precision, given.only == "with")))
        return

    found: dict[str, list[dict[str, float]]] = {"without": [], "with": []}
    for _ in range(given.repeats):
        for name, runs in found.items():
            command = [sys.executable, "-m", "benchmarks.contrast", *sys.argv[1:], "--only", name]
            done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"DS_ACCELERATOR": "cpu"})
            runs.append(json.loads(done.stdout.splitlines()[-1]))
            print(name, runs[-1], file=sys.stderr, flush=True)
    figures = {name: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for name, runs in found.items()}
    ratios = {key: figures["with"][key] / figures["without"][key] for key in figures["with"]}
    about = {"date": date.today().isoformat(), "size": given.size, "samples": given.samples, "precision": given.precision,
             "threads": torch.get_num_threads(), "planned_operations": planned(given.size)}  # fmt: skip
    print(json.dumps(about | figures | {"ratios": ratios}, indent=1))


def configuration(size: str, vectors: int) -> InterBertConfig:
    """The official base model, or that of the recipe `small`, over the same features and words."""
    if size == "base":
        return InterBertConfig(**BASE, itc_size=vectors)
    model = load_config(Path("small"), ["--data.pairs", "p", "--data.store", "s"]).model
    known = InterBertConfig().to_dict().keys() - {"itc_size"}
    names = [name for name in vars(model) if name in known and getattr(model, name) is not None]
    return InterBertConfig(**{name: getattr(model, name) for name in names}, itc_size=vectors)


def planned(size: str) -> float:
    """By the plan: operations of a step with contrast over those without."""
    words = ["--data.pairs", "p", "--data.store", "s", "--output", "o"]
    load, layout = Load(1, 13.7, 29.8, 13.7 / 3, 29.8 / 8), Layout(1, 1)
    without, contrast = (shape_of(load_config(Path(size), [*words, "--training.itc_weight", weight])) for weight in ("0", "1"))
    return flops_per_step(contrast, load, layout) / flops_per_step(without, load, layout)


def timed(size: str, samples: int, steps: int, precision: str, contrasts: bool) -> dict[str, float]:
    """Median seconds of a step after the first, by the clock and of the processor, and the process's largest resident memory in GB."""
    weights = ObjectiveWeights(itc=1.0 if contrasts else 0.0)
    torch.manual_seed(0)
    with engine.distributed() as world:
        model = InterBertForPreTraining(configuration(size, VECTOR if contrasts else 0)).train()
        training = TrainingConfig(steps=steps, global_batch=samples, micro_batch=samples)
        settings = EngineConfig(precision=precision, zero_stage=1)  # type: ignore[arg-type]
        trained = engine.build_engine(PretrainingStep(model, weights), settings, OptimizerConfig(), training, world)
        batch, arrivals, found, worked = make_batch(samples, 1), Arrivals(world.device), [], []
        batches = [with_sides(batch) if contrasts else batch]
        for _ in range(steps):
            start, busy, ready = time.perf_counter(), time.process_time(), batches
            if contrasts:
                gathering = Gathering(samples, world)
                add_vectors(gathering, trained, arrivals, batches, torch.manual_seed)
                ready = answered(batches, compare(gathering.all()))
            torch.manual_seed(0)
            loss, _ = trained(ready[0], counted(ready).clamp(min=1))
            trained.backward(loss)
            trained.step()
            found.append(time.perf_counter() - start)
            worked.append(time.process_time() - busy)
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    seconds, processor = statistics.median(found[1:]), statistics.median(worked[1:])
    return {"seconds": seconds, "processor_seconds": processor, "gigabytes": int(peak.split()[1]) * 1024 / 1e9}


def with_sides(batch: PretrainBatch) -> PretrainBatch:
    """Each sample's text as its own caption, and what masking took from its regions; every image and every text is another one."""
    samples = len(batch.itm_labels)
    numbers: Int64s = np.arange(samples, dtype=np.int64)
    rows = (batch.inputs.region_features.abs().sum(1) == 0).nonzero()[:, 0]
    sides = Sides(
        places=torch.from_numpy(numbers),
        keys=torch.from_numpy(np.stack([numbers] * 3, axis=1)),
        text_lengths=batch.inputs.text_lengths,
        input_ids=batch.inputs.input_ids,
        hidden_rows=rows,
        hidden_features=torch.rand(len(rows), batch.inputs.region_features.shape[1]).half(),
        draws=Draws(numbers, numbers, numbers, numbers, batch.itm_labels.numpy()),
    )
    return replace(batch, sides=sides)


if __name__ == "__main__":
    main()
