"""``python -m benchmarks.plan [--memory]``: what `megainter plan` predicts against real runs on the CPU.

First constants of this machine, each with as many processes running as the run will have: matrix products of the shapes of each size, an
all-reduce over gloo, the time of runs whose model is next to nothing but has as many layers, and the memory speeds that explain runs of
two sizes that are not in the table: a small one whose tensors mostly stay in the processor's cache, and a larger one. Then three sizes at
one and two processes (fp32, ZeRO stage 2), trained for some steps: the median step, and the largest resident memory of a rank before it
saves; medians of ``REPEATS`` runs, since the heap places large blocks differently from run to run. One thread a process. Prints one JSON
object; ``--memory`` leaves times out, which need a machine with nothing else on it.
"""

import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path

import numpy as np
import torch

from launcher.planning.device_memory import Layout, memory
from launcher.planning.shape import Load, Shape, load_of, parameters, shape_of
from launcher.planning.timing import Cluster, Device, step_time
from megainter.config.reading import load_config
from megainter.data.feature_store.reader import FeatureStore
from megainter.data.feature_store.record import RegionRecord, StoreSchema
from megainter.data.feature_store.writer import FeatureStoreWriter, seal_store
from megainter.data.tables.pairs import Pair, write_pairs

SIZES = {"3 M": (192, 2), "17 M": (384, 3), "39 M": (512, 4)}  # hidden size, layers of each kind
TINY, TALL = (16, 1), (16, 4)
CALIBRATION = ((160, 2), (320, 3))  # of which the memory speeds are measured
FEATURES, CLASSES, REGIONS, WORDS = 256, 100, 16, 18
GLOBAL_BATCH, MICRO_BATCH, STEPS, FIRST = 16, 8, 12, 3  # the first steps are not timed
REPEATS = 3


@dataclass(frozen=True)
class Measured:
    """Of one run, or medians of several: the median step in seconds, the largest memory of a rank in bytes before saving."""

    seconds: float
    memory: float


@dataclass(frozen=True)
class Constants:
    """Measured with so many processes running: FLOP/s by hidden size, bytes/s of memory and all-reduce, runs of next to no model."""

    flops: dict[int, float]
    memory_speeds: dict[int, float]  # by parameters
    all_reduce: float
    tiny: Measured
    seconds_a_layer: float  # of each of the three kinds


def main() -> None:
    """Measure constants and runs, and print the table."""
    timed = "--memory" not in sys.argv[1:]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder)
        constants = {ranks: measured_constants(folder, ranks, timed) for ranks in (1, 2)}
        rows = []
        for size, numbers in SIZES.items():
            for ranks in (1, 2):
                rows.append(compared(folder, size, numbers, ranks, constants[ranks], timed))
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, 1 thread a process"
    measured = {f"constants_of_{ranks}": asdict(found) for ranks, found in constants.items()}
    about = {"date": date.today().isoformat(), "machine": machine, "torch": torch.__version__}
    print(json.dumps({**about, **measured, "rows": rows}, indent=2))


def compared(folder: Path, size: str, numbers: tuple[int, int], ranks: int, constants: Constants, timed: bool) -> dict[str, float | str]:
    """One row: predicted and measured memory, and seconds."""
    shape, load, layout = described(folder, numbers, ranks)
    small = described(folder, TINY, ranks)[0]
    space = memory(shape, load, layout, cpu=True).device - memory(small, load, layout, cpu=True).device + constants.tiny.memory
    real = run(folder, numbers, ranks)
    row: dict[str, float | str] = {
        "size": size, "parameters": parameters(shape), "ranks": ranks, "predicted_memory": space, "memory": real.memory,
        "memory_error": space / real.memory - 1,
    }  # fmt: skip
    if timed:
        seconds = predicted_seconds(shape, load, layout, constants, numbers)
        row |= {"predicted_seconds": seconds, "seconds": real.seconds, "time_error": seconds / real.seconds - 1}
    return row


def predicted_seconds(shape: Shape, load: Load, layout: Layout, constants: Constants, numbers: tuple[int, int]) -> float:
    """The plan's step time with the constants measured here, over the time of a run with as many layers and next to no model."""
    device = Device(
        name="cpu",
        memory=0,
        flops={"fp32": constants.flops[numbers[0]]},
        hbm=memory_speed(constants, shape),
        link=constants.all_reduce,
        source="measured here",
    )
    cluster = Cluster(device, network=constants.all_reduce, efficiency=1.0, traffic_efficiency=1.0, overlap=0.0)
    return step_time(shape, load, layout, cluster).total + without_model(constants, numbers[1])


def without_model(constants: Constants, layers: int) -> float:
    """Seconds of a step whose model has so many layers of each kind, and next to no parameters."""
    return constants.tiny.seconds + (layers - TINY[1]) * constants.seconds_a_layer


def memory_speed(constants: Constants, shape: Shape) -> float:
    """Bytes/s for a model of this size: between those of the calibrating runs, by the logarithm of the parameters."""
    sizes = sorted(constants.memory_speeds)
    return float(np.interp(np.log(parameters(shape)), np.log(sizes), [constants.memory_speeds[size] for size in sizes]))


def measured_constants(folder: Path, ranks: int, timed: bool) -> Constants:
    """The machine as the plan sees one while so many processes run on it."""
    tiny = run(folder, TINY, ranks)
    if not timed:
        return Constants({}, {}, 1.0, tiny, 0.0)
    widths = sorted({hidden for hidden, _ in (*CALIBRATION, *SIZES.values())})
    flops = {hidden: matmul_speed(hidden, ranks) for hidden in widths}
    tall = run(folder, TALL, ranks)
    first = Constants(flops, {}, all_reduce_speed(folder), tiny, (tall.seconds - tiny.seconds) / (TALL[1] - TINY[1]))
    return replace(first, memory_speeds=dict(calibrated(folder, numbers, ranks, first) for numbers in CALIBRATION))


def calibrated(folder: Path, numbers: tuple[int, int], ranks: int, constants: Constants) -> tuple[int, float]:
    """Parameters of a size, and the bytes/s of memory that explain what its run takes beside the other parts."""
    shape, load, layout = described(folder, numbers, ranks)
    device = Device(
        name="cpu", memory=0, flops={"fp32": constants.flops[numbers[0]]}, hbm=1.0, link=constants.all_reduce, source="measured here"
    )
    cluster = Cluster(device, network=constants.all_reduce, efficiency=1.0, traffic_efficiency=1.0, overlap=0.0)
    bare = step_time(shape, load, layout, cluster)  # at one byte a second
    rest = run(folder, numbers, ranks).seconds - without_model(constants, numbers[1]) - bare.matmul - bare.communication
    return parameters(shape), (bare.elementwise + bare.optimizer) / max(rest, 1e-3)


def matmul_speed(hidden: int, ranks: int) -> float:
    """FLOP/s of one of ``ranks`` processes that multiply at the same time, the products of a feed-forward block and its gradients."""
    command = [sys.executable, "-c", f"from benchmarks.plan import time_products; time_products({hidden})"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    children = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(ranks)]
    return statistics.mean(float(child.communicate()[0]) for child in children)


def time_products(hidden: int, seconds: float = 3.0) -> None:
    """Print the FLOP/s of fp32 products of the shapes that a model of this width has: forward, and the gradients of input and weight."""
    torch.set_num_threads(1)
    rows, inner = MICRO_BATCH * (WORDS + 2 + REGIONS + 1), 4 * hidden
    x, weight, gradient = torch.randn(rows, hidden), torch.randn(inner, hidden), torch.randn(rows, inner)
    found, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        for _ in range(10):
            torch.nn.functional.linear(x, weight)
            gradient @ weight
            gradient.T @ x
        found.append(10 * 3 * 2 * rows * hidden * inner / (time.perf_counter() - start))
    print(statistics.median(found))


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
    """Medians of some runs."""
    found = [run_once(folder, numbers, ranks) for _ in range(REPEATS)]
    print(f"hidden size {numbers[0]}, {ranks} ranks: {found}", file=sys.stderr, flush=True)
    return Measured(statistics.median(one.seconds for one in found), statistics.median(one.memory for one in found))


def run_once(folder: Path, numbers: tuple[int, int], ranks: int) -> Measured:
    """Train for some steps; memory is watched from outside until the last step but one is logged."""
    output = Path(tempfile.mkdtemp(dir=folder)) / "run"
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "--module", "megainter.pretrain"]
    largest = launch(command, words(folder, numbers, output), output / "metrics.jsonl")
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    seconds = [record["step_seconds"] for record in records if record["kind"] == "train"][FIRST:]
    return Measured(statistics.median(seconds), largest)


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
