"""From a run of ``python -m benchmarks.gpu`` to a measured row of ``launcher/planning/gpus.toml``.

    python -m launcher.planning.calibration gpu-run/results.jsonl h100

reads the training steps of the base model that the part "throughput" timed, by micro-batch and ZeRO stage; finds the three numbers by which
the plan comes nearest to them (``timing.Device``); and prints the row, with how far the plan remains from what was measured.
"""

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from launcher.planning.device_memory import Layout, memory
from launcher.planning.shape import Load, Shape, load_of, shape_of
from launcher.planning.timing import Cluster, Device, device, efficiency, launches, step_time
from megainter.config.reading import load_config
from megainter.errors import UsageError

STAGES = {"ours-bf16-zero0": 0, "ours-bf16": 1}  # contenders of benchmarks.against_peers that the plan describes, and their ZeRO stage
TEXT_SHARE = 0.34  # of the tokens of a sample there (Flickr8k's captions, 10 to 36 regions and the global one)
FEWEST = 3  # micro-batches, for three numbers
BOUNDS = {"products": (0.05, 1.0), "half_tokens": (50.0, 50_000.0), "launch": (5e-7, 2e-4)}
GRID, ROUNDS = 41, 7  # points a number and round
UNSETTLED = 1e-7  # weight of a number's distance from what was assumed, in squares of logarithms


@dataclass(frozen=True)
class Timed:
    """A training step that was timed: micro-batch, ZeRO stage, seconds, and the peak of PyTorch's tensors in bytes."""

    load: Load
    stage: int
    seconds: float
    peak: float


def calibrated(results: Path, known: Device) -> Device:
    """The device ``known`` with what ``results`` (a results.jsonl) measured on it; ``UsageError`` where that is not enough to say."""
    tables = list(_tables(results))
    timed = [step for table in tables for step in _steps(table)]
    shape = shape_of(load_config(Path("base")))
    if len({step.load.samples for step in timed}) < FEWEST:
        raise UsageError(
            f"{results} has no training steps at {FEWEST} micro-batches on a GPU; run `python -m benchmarks.gpu --parts throughput` there"
        )
    products, half_tokens, launch = _fitted(shape, timed, known)
    found = replace(known, products=products, half_tokens=half_tokens, launch=launch, measured=str(tables[0]["date"]))
    return replace(found, off=(max(map(abs, _differences(shape, timed, found))), _off_memory(shape, timed)))


def row(found: Device, facts: dict[str, Any]) -> str:
    """The device's table as it stands in gpus.toml: its data sheet's ``facts``, then what was measured."""
    measured = {
        "measured": found.measured, "products": round(found.products, 3), "half_tokens": round(found.half_tokens),
        "launch": round(found.launch * 1e6, 2), "off_time": round(found.off[0], 3), "off_memory": round(found.off[1], 3),
    }  # fmt: skip
    lines = [f"{key} = {json.dumps(value)}" for key, value in (facts | measured).items()]
    return "\n".join([f"[{found.name}]", *lines])


def _tables(results: Path) -> Iterator[dict[str, Any]]:
    """The tables of the part "throughput", one for each micro-batch, of the last run in the file."""
    try:
        lines = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    except (OSError, json.JSONDecodeError) as error:
        raise UsageError(f"{results} cannot be read: {error}") from None
    parts = [line for line in lines if line.get("part") == "throughput"]
    for name, table in (parts[-1].get("figures", {}) if parts else {}).items():
        if name.endswith(" samples") and isinstance(table, dict):
            yield table


def _steps(table: dict[str, Any]) -> Iterator[Timed]:
    samples, tokens = table["samples_per_step"], table["real_tokens_per_step"]
    text = tokens / samples * TEXT_SHARE
    load = load_of(load_config(Path("base")), samples, text, tokens / samples - text)
    for name, stage in STAGES.items():
        if name in table["seconds_per_step"]:
            yield Timed(load, stage, table["seconds_per_step"][name], table["peak_mib"][name] * 2**20)


def _differences(shape: Shape, timed: list[Timed], found: Device) -> list[float]:
    """How far the plan's step times are from the measured ones, as shares of the latter."""
    return [step_time(shape, step.load, Layout(step.stage, 1), Cluster(found)).total / step.seconds - 1 for step in timed]


def _off_memory(shape: Shape, timed: list[Timed]) -> float:
    """The largest such difference of peak memory; the context of CUDA is not among PyTorch's tensors."""
    planned = ((memory(shape, step.load, Layout(step.stage, 1)), step.peak) for step in timed)
    return max(abs((each.device - each.overhead) / peak - 1) for each, peak in planned)


def _fitted(shape: Shape, timed: list[Timed], known: Device) -> list[float]:
    """The numbers within ``BOUNDS``, in their order, by which the plan's step times are nearest (least squares of relative differences).

    A dense grid of equal ratios, again and again around its best point: which steps wait for their host changes from point to point, so
    that there is no slope to follow. A number that the run does not settle stays near what was assumed.
    """
    alone = [step_time(shape, step.load, Layout(step.stage, 1), Cluster(replace(known, launch=0.0), efficiency=1.0)) for step in timed]
    matmul, rest = np.array([each.matmul for each in alone]), np.array([each.total - each.matmul for each in alone])
    count, seconds = np.array([launches(shape, Layout(step.stage, 1)) for step in timed]), np.array([step.seconds for step in timed])
    assumed = np.log([known.products, known.half_tokens, known.launch])
    low, high = np.log(np.array(list(BOUNDS.values()))).T
    bounds, best = (low, high), assumed
    for _ in range(ROUNDS):
        axes = np.linspace(low, high, GRID).T
        costs = np.empty((GRID, GRID, GRID))
        for n, half in enumerate(axes[1]):
            share = np.array([efficiency(shape, step.load, replace(known, products=1.0, half_tokens=math.exp(half))) for step in timed])
            device_P1S = (matmul / share / np.exp(axes[0])[:, None] + rest)[:, None]
            planned_PLS = np.maximum(device_P1S, count * np.exp(axes[2])[:, None])
            costs[:, n] = ((planned_PLS / seconds - 1) ** 2).sum(-1)
        away = [(axis - here) ** 2 for axis, here in zip(axes, assumed, strict=True)]
        costs += UNSETTLED * (away[0][:, None, None] + away[1][:, None] + away[2])
        place = np.unravel_index(costs.argmin(), costs.shape)
        best = np.array([axis[n] for axis, n in zip(axes, place, strict=True)])
        reach = 6 * (high - low) / (GRID - 1)
        low, high = np.maximum(bounds[0], best - reach), np.minimum(bounds[1], best + reach)
    found: list[float] = np.exp(best).tolist()
    return found


def main() -> None:
    """Print the measured row of a device that gpus.toml knows."""
    options = argparse.ArgumentParser(
        prog="python -m launcher.planning.calibration", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("results", type=Path, help="results.jsonl of a run on that device")
    options.add_argument("name", help="its name in launcher/planning/gpus.toml, or a TOML file with a table like those there")
    given = options.parse_args()
    try:
        known = device(given.name)
        peaks = {name: flops / 1e12 for name, flops in known.flops.items()}
        facts = {"memory": known.memory, **peaks, "hbm": known.hbm / 1e9, "link": known.link / 1e9, "source": known.source}
        print(row(calibrated(given.results, known), facts))
    except UsageError as error:
        options.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
