"""``python -m benchmarks.plan``: what `megainter plan` predicts against real runs on the CPU, with constants measured here first.

Constants: speed of matrix products and memory, of an all-reduce, and time and memory of a run whose model is next to nothing. Then
three sizes at one and two processes (fp32, ZeRO stage 2), trained for some steps: the fastest step, and the largest memory of a rank before
it saves. One thread a process. Prints one JSON object.
"""

import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
import torch

from launcher.memory import Layout, memory
from launcher.shape import Load, Shape, load_of, parameters, shape_of
from launcher.timing import Cluster, Device, step_time
from megainter.config import load_config
from megainter.data.feature_store import FeatureStore
from megainter.data.manifest import Pair, write_pairs
from megainter.data.record import RegionRecord, StoreSchema
from megainter.data.store_writer import FeatureStoreWriter, seal_store

SIZES = {"4 M": (192, 2), "18 M": (384, 3), "43 M": (512, 4)}  # hidden size, layers of each kind
TINY, MIDDLE = (16, 1), (256, 3)
FEATURES, CLASSES, REGIONS, WORDS = 256, 100, 16, 18
GLOBAL_BATCH, MICRO_BATCH, STEPS = 16, 8, 8


@dataclass(frozen=True)
class Measured:
    """One run: parameters, the fastest step in seconds, the largest memory of a rank in bytes before saving."""

    seconds: float
    memory: float


def main() -> None:
    """Measure constants and runs, and print the table."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder)
        tiny = {ranks: run(folder, TINY, ranks) for ranks in (1, 2)}
        cluster = measured_cluster(folder, tiny[1])
        rows = []
        for size, numbers in SIZES.items():
            for ranks in (1, 2):
                rows.append(compared(folder, size, numbers, ranks, tiny[ranks], cluster))
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, 1 thread a process"
    rates = {"matmul_flops": cluster.device.flops["fp32"], "memory_bytes_s": cluster.device.hbm, "all_reduce_bytes_s": cluster.network}
    print(json.dumps({"date": date.today().isoformat(), "machine": machine, "torch": torch.__version__, **rates, "rows": rows}, indent=2))


def compared(folder: Path, size: str, numbers: tuple[int, int], ranks: int, tiny: Measured, cluster: Cluster) -> dict[str, float | str]:
    """One row: predicted and measured seconds and memory."""
    shape, load, layout = described(folder, numbers, ranks)
    small, _, _ = described(folder, TINY, ranks)
    seconds = step_time(shape, load, layout, cluster).total - step_time(small, load, layout, cluster).total + tiny.seconds
    space = memory(shape, load, layout, cpu=True).device - memory(small, load, layout, cpu=True).device + tiny.memory
    real = run(folder, numbers, ranks)
    return {
        "size": size, "parameters": parameters(shape), "ranks": ranks, "predicted_seconds": seconds, "seconds": real.seconds,
        "time_error": seconds / real.seconds - 1, "predicted_memory": space, "memory": real.memory, "memory_error": space / real.memory - 1,
        "memory_error_of_what_the_model_adds": (space - tiny.memory) / (real.memory - tiny.memory) - 1,
    }  # fmt: skip


def measured_cluster(folder: Path, tiny: Measured) -> Cluster:
    """The machine as the plan sees one: rates of matrix products and all-reduce, and the memory speed that explains a middle-sized run."""
    flops, network = matmul_speed(), all_reduce_speed(folder)
    shape, load, layout = described(folder, MIDDLE, 1)
    device = Device("cpu", 0, {"fp32": flops}, 1.0, network, "measured here")
    bare = step_time(shape, load, layout, Cluster(device, network=network, efficiency=1.0, traffic_efficiency=1.0, overlap=0.0))
    bytes_moved = bare.elementwise + bare.optimizer  # at one byte a second
    rest = run(folder, MIDDLE, 1).seconds - tiny.seconds - bare.matmul
    speed = bytes_moved / max(rest, 1e-3)
    cpu = Device("cpu", 0, {"fp32": flops}, speed, network, "measured here")
    return Cluster(cpu, network=network, efficiency=1.0, traffic_efficiency=1.0, overlap=0.0)


def matmul_speed(rounds: int = 7) -> float:
    """FLOP/s of the best fp32 product of the shapes a middle-sized model has."""
    torch.set_num_threads(1)
    rows, hidden = MICRO_BATCH * (WORDS + 2 + REGIONS + 1), 256
    a, b = torch.randn(rows, hidden), torch.randn(hidden, 4 * hidden)
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(20):
            a @ b
        best = min(best, (time.perf_counter() - start) / 20)
    return 2 * rows * hidden * 4 * hidden / best


def all_reduce_speed(folder: Path) -> float:
    """Bytes/s one way of an all-reduce of two processes over gloo, from the preflight's own probe."""
    answer = folder / "collective.json"
    launch(
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--module", "megainter.preflight_probe"],
        ["collective", str(answer)],
    )
    return json.loads(answer.read_text())["gigabytes_per_second"] * 1e9


def described(folder: Path, numbers: tuple[int, int], ranks: int) -> tuple[Shape, Load, Layout]:
    """What the plan needs to know of a run."""
    config = load_config(None, words(folder, numbers, folder / "unused"))
    with FeatureStore(folder / "regions.store") as store:
        shape = shape_of(config, 64, store.schema.feature_size, store.schema.num_classes)
    return (
        shape,
        load_of(config, MICRO_BATCH, WORDS + 2, REGIONS + 1),
        Layout(2, ranks, "fp32", accumulation=GLOBAL_BATCH // MICRO_BATCH // ranks),
    )


def words(folder: Path, numbers: tuple[int, int], output: Path) -> list[str]:
    """Settings of a run of this size."""
    hidden, layers = numbers
    values = {
        "output": output, "data.pairs": folder / "pairs.parquet", "data.store": folder / "regions.store", "data.vocabulary_size": 64,
        "data.workers": 0, "data.max_regions": REGIONS, "data.max_text_tokens": WORDS + 2, "training.steps": STEPS, "training.log_every": 1,
        "training.global_batch": GLOBAL_BATCH, "training.micro_batch": MICRO_BATCH, "engine.precision": "fp32", "engine.zero_stage": 2,
        "validation.every_steps": 0, "tensorboard": "false", "model.hidden_size": hidden, "model.intermediate_size": 4 * hidden,
        "model.num_attention_heads": 4, "model.num_region_attention_heads": 4, "model.pooler_size": hidden,
        "model.num_interaction_layers": layers, "model.num_text_layers": layers, "model.num_region_layers": layers,
    }  # fmt: skip
    return [word for key, value in values.items() for word in (f"--{key}", str(value))]


def run(folder: Path, numbers: tuple[int, int], ranks: int) -> Measured:
    """Train for some steps; memory is watched from outside until the last step but one is logged."""
    output = folder / f"run-{numbers[0]}-{numbers[1]}-{ranks}"
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "--module", "megainter.pretrain"]
    largest = launch(command, words(folder, numbers, output), output / "metrics.jsonl")
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    seconds = [record["step_seconds"] for record in records if record["kind"] == "train"][2:]
    return Measured(min(seconds), largest)


def launch(command: list[str], arguments: list[str], metrics: Path | None = None) -> float:
    """Run it to its end; the largest resident memory of any rank until ``metrics`` holds all steps but the last."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the child
    child = subprocess.Popen([sys.executable, *command, *arguments], env=environment, stdout=subprocess.DEVNULL, stderr=errors)
    largest = 0.0
    while child.poll() is None:
        if metrics is not None and (not metrics.exists() or metrics.read_text().count("\n") < STEPS):
            largest = max([largest, *map(peak_memory, children_of(child.pid))])
        time.sleep(0.01)
    if child.returncode:
        errors.seek(0)
        raise SystemExit(f"a run ended with {child.returncode}:\n{errors.read().decode(errors='replace')}")
    return largest


def children_of(pid: int) -> list[int]:
    """Process ids of the ranks that an agent started."""
    with contextlib.suppress(OSError):
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def peak_memory(pid: int) -> float:
    """Largest resident set so far, bytes."""
    with contextlib.suppress(OSError, StopIteration):
        line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM"))
        return float(line.split()[1]) * 1024
    return 0.0


def write_data(folder: Path, images: int = 64) -> None:
    """Captions and regions that are all equally long, so that a batch is what the plan supposes."""
    rng = np.random.default_rng(0)
    names = ("__background__", *(f"class {number}" for number in range(1, CLASSES)))
    schema = StoreSchema(FEATURES, CLASSES, names, "benchmark")
    vocabulary = [f"{a}{b}" for a in "bdfg" for b in "aeiou"]
    rows = []
    with FeatureStoreWriter(folder / "regions.store", schema) as writer:
        for number in range(images):
            corners = rng.uniform(0, 50, (REGIONS, 2))
            boxes = np.concatenate([corners, corners + 20], axis=1).astype(np.float32)
            probs = rng.dirichlet(np.ones(CLASSES), REGIONS).astype(np.float32)
            features = rng.standard_normal((REGIONS, FEATURES)).astype(np.float16)
            writer.add(f"i{number}", RegionRecord(boxes=boxes, features=features, class_probs=probs, width=100, height=100))
            caption = " ".join(rng.choice(vocabulary, WORDS))
            rows.append(Pair(f"i{number}#0", f"i{number}", f"i{number}.jpg", caption, "val" if number < 8 else "train"))
    seal_store(folder / "regions.store")
    write_pairs(folder / "pairs.parquet", rows)


if __name__ == "__main__":
    main()
