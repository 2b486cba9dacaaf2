"""The curves of a run: losses and what validation measured over steps, from its metrics.jsonl."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from megainter.errors import UsageError
from megainter.training.metrics import read_metrics
from megainter.view.pages import counted
from megainter.view.pictures import data_uri

# Of pretraining by name and colour; what else a run trains or measures is drawn in the others, by the name that its records have.
KNOWN = {
    "msm": ("masked segments", "#3b6fd4"), "mrm": ("masked regions", "#d9692b"), "itm": ("matching", "#1f9d57"),
    "itc": ("contrast", "#8e5bc4"),
}  # fmt: skip
COLOURS = ("#1f9d57", "#3b6fd4", "#d9692b", "#8e5bc4", "#2aa3b5", "#c2467c", "#8a7a2c", "#6a6f7a")
INK = "#808a99"  # readable on light and on dark
FEW = 6  # recalls of one order, both ways, are drawn together
SMOOTHED_POINTS = 40  # from so many points on, a running mean is drawn over the raw line
NAMES_IN_A_ROW = 2  # of a legend
ROUNDED = 10  # samples per second from which no tenths are told
LEGEND_ROW = 0.22  # inches
SIZE = (4.5, 2.65)  # inches of a chart, so small that its letters can be read across a phone
RECALL = "_r_at_"  # in the name of a recall, before its K


def draw_curves(metrics: Path) -> dict[str, Any]:
    """``charts``, each a ``name`` and a ``picture``, which is a PNG as a URI, and ``note``, what the last records say.

    ``UsageError`` where there are no training records.
    """
    if not metrics.is_file():
        raise UsageError(f"{metrics} does not exist; give a run folder with metrics.jsonl")
    training, validation = read_metrics(metrics, "train"), read_metrics(metrics, "validation")
    if not training:
        raise UsageError(f"{metrics} has no training records yet; look again after some steps")
    charts = [{"name": name, "picture": picture_of(figure)} for name, figure in charts_of(training, validation)]
    return {"charts": charts, "note": _note(training, validation)}


def picture_of(figure: Figure) -> str:
    """A chart as a PNG in a URI."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return data_uri(buffer.getvalue(), "image/png")


def charts_of(training: list[dict[str, Any]], validation: list[dict[str, Any]]) -> list[tuple[str, Figure]]:
    """Charts with their titles: first the losses of whatever the records say is trained.

    Then the figures of validation, else the shares of right predictions in training; no such chart where there is neither. Where recalls
    are many, or among other figures, those of the first place have a chart of their own. Each is a picture of its own, which a page can
    put below the others.
    """
    objectives = [key.removesuffix("_loss") for key in _keys(training) if key.endswith("_loss")] or ["loss"]
    figures, recalls = _figures(validation)
    measured, keys = (validation, figures) if figures else (training, [f"{objective}_accuracy" for objective in objectives])

    charts = [
        ("losses: lines of training, dots of validation", _loss_chart(training, validation, objectives)),
        ("validation" if figures else "accuracy in training", _chart(measured, keys)),
        ("recall on the validation gallery", _chart(validation, recalls)),
    ]
    return [(name, figure) for name, figure in charts if figure.axes[0].get_legend_handles_labels()[0]]


def _loss_chart(training: list[dict[str, Any]], validation: list[dict[str, Any]], objectives: list[str]) -> Figure:
    """Lines of training, dots of validation."""
    figure, axes = _empty()
    for place, objective in enumerate(objectives):
        name, colour = look(objective, place)
        line(axes, training, _loss_key(objective), name, colour)
        _dots(axes, validation, _loss_key(objective if len(objectives) > 1 else None), "none", colour, None)
    return _finished(figure, "loss", 0, None)


def _chart(records: list[dict[str, Any]], keys: list[str]) -> Figure:
    """Figures of ``keys``, a dotted line each."""
    figure, axes = _empty()
    for place, key in enumerate(keys):
        name, colour = look(key.removesuffix("_accuracy"), place)
        _dots(axes, records, key, "-", colour, name)
    return _finished(figure, _unit(records, keys), *_bounds(records, keys))


def _empty() -> tuple[Figure, Axes]:
    figure = Figure(figsize=SIZE, layout="constrained", facecolor="none")
    return figure, figure.subplots()


def _finished(figure: Figure, unit: str, bottom: float | None, top: float | None) -> Figure:
    """With axes, and below them the legend, where it lies over no curve; the figure grows by its rows."""
    (axes,) = figure.axes
    dress(axes, bottom, top)
    axes.set_ylabel(unit, color=INK)
    handles, names = axes.get_legend_handles_labels()
    if handles:
        figure.set_figheight(figure.get_figheight() + LEGEND_ROW * -(-len(names) // NAMES_IN_A_ROW))
        figure.legend(handles, names, loc="outside lower center", ncols=NAMES_IN_A_ROW, frameon=False, labelcolor=INK, fontsize=9)
    return figure


def _unit(records: list[dict[str, Any]], keys: list[str]) -> str:
    """What the upright axis counts."""
    if all(RECALL in key for key in keys):
        return "recall"
    if all(key.endswith("accuracy") for key in keys):
        return "share that is right"
    return "share" if _bounds(records, keys)[0] is not None else "figure"


def _keys(records: list[dict[str, Any]]) -> list[str]:
    """What any of the records has a number of, in the order in which it comes."""
    numbers = (key for record in records for key, value in record.items() if isinstance(value, int | float))
    return list(dict.fromkeys(numbers))


def _figures(validation: list[dict[str, Any]]) -> tuple[list[str], list[str]]:
    """What validation measured beside losses, the larger the better; and where recalls are many, or not alone, those at 1 apart."""
    figures = [key for key in _keys(validation) if key not in ("step", "time") and not key.endswith(("loss", "error"))]
    others = [key for key in figures if RECALL not in key]
    few = len(figures) - len(others) <= FEW and not others
    return (figures, []) if few or len(others) == len(figures) else (others, [key for key in figures if key.endswith(f"{RECALL}1")])


def _loss_key(objective: str | None) -> str:
    """Where the records have an objective's loss: under its name; that of the only one as "loss"."""
    return f"{objective}_loss" if objective not in (None, "loss") else "loss"


def look(key: str, place: int) -> tuple[str, str]:
    """Name and colour of what is number ``place`` in its chart."""
    return KNOWN.get(key, (words(key), COLOURS[place % len(COLOURS)]))


def _bounds(records: list[dict[str, Any]], keys: list[str]) -> tuple[float | None, float | None]:
    """Lower and upper end of the axis: 0 and 1 for shares, none for what is also below or above (correlations)."""
    values = [value for key in keys for value in column(records, key)[1]]
    return (0.0, 1.0) if all(0 <= value <= 1 for value in values) else (None, None)


def line(axes: Axes, records: list[dict[str, Any]], key: str, name: str, colour: str, style: str = "-") -> None:
    """Draw a figure of training over steps, and where there are many points a running mean over a faint line."""
    steps, values = column(records, key)
    if len(steps) < SMOOTHED_POINTS:
        alone = "o" if len(steps) == 1 else ""  # which has no line
        axes.plot(steps, values, color=colour, linestyle=style, label=name, marker=alone, markersize=4.5)
        return
    width = len(steps) // 20
    axes.plot(steps, values, color=colour, alpha=0.25, linewidth=1)
    smooth = np.convolve(values, np.ones(width) / width, mode="valid")
    axes.plot(steps[width - 1 :], smooth, color=colour, linestyle=style, label=name)


def _dots(axes: Axes, records: list[dict[str, Any]], key: str, line: str, colour: str, name: str | None) -> None:
    steps, values = column(records, key)
    axes.plot(steps, values, color=colour, linestyle=line, marker="o", markersize=4.5, label=name if len(steps) else None)


def column(records: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of the records that have ``key``."""
    points = [(record["step"], record[key]) for record in records if record.get(key) is not None]
    return [step for step, _ in points], [value for _, value in points]


def dress(axes: Axes, bottom: float | None, top: float | None) -> None:
    """Grid and colours that are readable on light and on dark; the ends of the upright axis, None: by what is drawn."""
    axes.set_xlabel("step", color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_ylim(bottom, top)
    axes.tick_params(colors=INK)
    axes.set_facecolor("none")
    axes.grid(color=INK, alpha=0.25)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(INK)


def words(key: str) -> str:
    """A figure's name for people: that of an objective as "loss of masked segments"."""
    objective, _, rest = key.partition("_")
    if objective in KNOWN:
        return f"{rest.replace('_', ' ')} of {KNOWN[objective][0]}"
    return key.replace(RECALL, " R@").replace("_", " ")


def _note(training: list[dict[str, Any]], validation: list[dict[str, Any]]) -> str:
    last = training[-1]
    parts = [counted(last["step"], "step")]
    if "samples_per_second" in last:
        rate = float(np.median([record["samples_per_second"] for record in training]))
        parts.append(f"{rate:,.{1 if rate < ROUNDED else 0}f} samples/s")
    figures, recalls = _figures(validation)
    measured = figures + recalls
    if found := [f"{words(key)} {_shown(validation[-1][key])}" for key in measured if key in validation[-1]]:
        parts.append("last validation: " + ", ".join(found))
    return " · ".join(parts)


def _shown(value: float) -> str:
    return f"{value:.1%}" if 0 <= value <= 1 else f"{value:.3f}"
