"""The curves of a run: losses and validation accuracies over steps, from its metrics.jsonl."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megainter.errors import UsageError
from megainter.training.metrics import read_metrics
from megainter.view.pictures import data_uri

OBJECTIVES = {
    "msm": ("masked segments", "#3b6fd4"), "mrm": ("masked regions", "#d9692b"), "itm": ("matching", "#1f9d57"),
    "itc": ("contrast", "#8e5bc4"),
}  # fmt: skip
INK = "#808a99"  # readable on light and on dark
SMOOTHED_POINTS = 40  # from so many points on, a running mean is drawn over the raw line


def draw_curves(metrics: Path) -> dict[str, str]:
    """``picture``, a PNG as a URI, and ``note``, what the last records say. ``UsageError`` where there are no training records."""
    if not metrics.is_file():
        raise UsageError(f"{metrics} does not exist; give a run folder with metrics.jsonl")
    training, validation = read_metrics(metrics, "train"), read_metrics(metrics, "validation")
    if not training:
        raise UsageError(f"{metrics} has no training records yet; look again after some steps")
    figure = Figure(figsize=(12, 3.6), layout="constrained", facecolor="none")
    losses, accuracies = figure.subplots(1, 2)
    trained = {key: look for key, look in OBJECTIVES.items() if any(f"{key}_loss" in record for record in training)}
    for key, (name, colour) in trained.items():
        _line(losses, training, f"{key}_loss", name, colour)
        _dots(losses, validation, f"{key}_loss", "none", colour, None)
        _dots(accuracies, validation, f"{key}_accuracy", "-", colour, name)
    _dress(losses, "loss (line: training, dots: validation)", None)
    _dress(accuracies, "validation accuracy", 1.0)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return {"picture": data_uri(buffer.getvalue(), "image/png"), "note": _note(training, validation)}


def _line(axes: Axes, records: list[dict[str, Any]], key: str, name: str, colour: str) -> None:
    steps, values = _column(records, key)
    if len(steps) < SMOOTHED_POINTS:
        axes.plot(steps, values, color=colour, label=name)
        return
    width = len(steps) // 20
    axes.plot(steps, values, color=colour, alpha=0.25, linewidth=1)
    smooth = np.convolve(values, np.ones(width) / width, mode="valid")
    axes.plot(steps[width - 1 :], smooth, color=colour, label=name)


def _dots(axes: Axes, records: list[dict[str, Any]], key: str, line: str, colour: str, name: str | None) -> None:
    steps, values = _column(records, key)
    axes.plot(steps, values, color=colour, linestyle=line, marker="o", markersize=4.5, label=name if len(steps) else None)


def _column(records: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of the records that have ``key``."""
    points = [(record["step"], record[key]) for record in records if record.get(key) is not None]
    return [step for step, _ in points], [value for _, value in points]


def _dress(axes: Axes, title: str, top: float | None) -> None:
    axes.set_title(title, color=INK, fontsize=11)
    axes.set_xlabel("step", color=INK)
    axes.set_ylim(0, top)
    axes.tick_params(colors=INK)
    axes.set_facecolor("none")
    axes.grid(color=INK, alpha=0.25)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(INK)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, labelcolor=INK)


def _note(training: list[dict[str, Any]], validation: list[dict[str, Any]]) -> str:
    last = training[-1]
    parts = [f"{last['step']:,} steps"]
    if "samples_per_second" in last:
        parts.append(f"{np.median([record['samples_per_second'] for record in training]):,.0f} samples/s")
    if validation:
        found = [
            f"{name} {validation[-1][f'{key}_accuracy']:.1%}"
            for key, (name, _) in OBJECTIVES.items()
            if f"{key}_accuracy" in validation[-1]
        ]
        parts.append("last validation accuracies: " + ", ".join(found))
    return " · ".join(parts)
