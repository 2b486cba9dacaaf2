"""The page of some runs: the curves of everything that their metrics.jsonl records, over one another, and what their settings differ in."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from megainter.errors import UsageError
from megainter.files import read_json, require_page_place
from megainter.kinds import instead
from megainter.paths import short_names
from megainter.training.metrics import read_records
from megainter.view.curves import COLOURS, RECALL, SIZE, column, dress, line, picture_of, words
from megainter.view.pages import counted, plain, write_template

STYLES = {"-": "none", "--": "7 4", ":": "2 3", "-.": "7 3 2 3"}  # of more runs than there are colours, with the dashes of the key
RANKS = {1: ("o", 4, "full"), 5: ("s", 7, "none"), 10: ("D", 10, "none")}  # marker by K of recall: one within the other where all are equal
# What fine-tuning of retrieval calls otherwise than pretraining does
SAME = {"matching_loss": "itm_loss", "matching_accuracy": "itm_accuracy"}
# By section: figures of training in their order, and what they are called. Losses, accuracies and recalls bear names of their own.
SPEED = {
    "samples_per_second": "samples per second", "tokens_per_second": "tokens per second", "step_seconds": "seconds of a step",
    "model_flop_utilisation": "model FLOP utilisation",
}  # fmt: skip
MEMORY = {"memory_bytes": "memory of the first rank, GiB"}
STALLS = {"data_wait_share": "share of time waiting for data", "slowest_share": "share of time waiting for the slowest rank"}
OPTIMISER = {"learning_rate": "learning rate", "gradient_norm": "gradient norm", "loss_scale": "loss scale"}
GIB = 2**30
MARK = "mark"  # of lines that stand for a step and have no figure
NOT_TOLD = ("output", "digests", "asked")  # of config.json: other in every run, or said elsewhere
FEW = 12  # settings that are shown without asking


@dataclass(frozen=True)
class RunRecords:
    """A run by its folder's name, with its records by kind, its settings by ``section.key``, and how it is drawn."""

    name: str
    records: dict[str, list[dict[str, Any]]]
    settings: dict[str, str]
    colour: str
    style: str

    def of(self, kind: str) -> list[dict[str, Any]]:
        """Its records of a kind, in file order."""
        return self.records.get(kind, [])


def write_runs_page(output: Path, title: str, runs: list[Path]) -> Path:
    """Write the page of ``runs``, folders with a metrics.jsonl, to ``output`` and return it. ``UsageError`` for what is no such folder."""
    require_page_place(output, "--output")
    if not runs:
        raise UsageError("give the folder of at least one run")
    read = [read_run(run, place) for place, run in enumerate(runs)]
    sections = [
        {"name": name, "charts": [{"name": plain(title), "picture": picture_of(figure)} for title, figure in charts]}
        for name, charts in charts_of(read).items()
        if charts
    ]
    names = [plain(name) for name in short_names(runs)]
    shown = [_shown(run, name) for run, name in zip(read, names, strict=True)]
    facts = f"{counted(len(runs), 'run')}: {', '.join(names)}"
    values = {"title": plain(title), "facts": facts, "runs": shown, "sections": sections, "few": FEW}
    values |= {"differences": differences(read), "only_some": only_some(read)}
    write_template(output, "runs.html", values)
    return output


def read_run(folder: Path, place: int) -> RunRecords:
    """The records of a run folder, drawn as number ``place``."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise UsageError(f"{folder} is no run folder: it has no metrics.jsonl{instead(folder)}")
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for record in read_records(path):
        by_kind.setdefault(str(record.get("kind")), []).append({SAME.get(key, key): value for key, value in record.items()})
    if "train" not in by_kind:
        raise UsageError(f"{path} has no training records yet; look again after some steps")
    settings = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    told = {name: value for name, value in settings.items() if name not in NOT_TOLD} if isinstance(settings, dict) else {}
    style = list(STYLES)[place // len(COLOURS) % len(STYLES)]
    return RunRecords(folder.resolve().name, by_kind, dict(_flat(told, "")), COLOURS[place % len(COLOURS)], style)


def _flat(value: dict[str, Any], before: str) -> list[tuple[str, str]]:
    found = []
    for name, item in value.items():
        found += _flat(item, f"{before}{name}.") if isinstance(item, dict) else [(f"{before}{name}", str(item))]
    return found


def differences(runs: list[RunRecords]) -> list[tuple[str, list[str]]]:
    """Settings that all runs have and that are not the same in all: by name, with the value of each run."""
    names = [name for name in runs[0].settings if all(name in run.settings for run in runs)]
    return [_setting(runs, name) for name in names if len({run.settings[name] for run in runs}) > 1]


def only_some(runs: list[RunRecords]) -> list[tuple[str, list[str]]]:
    """Settings that a run lacks and another has: by name, with the value of each run, "" where it has none."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    return [_setting(runs, name) for name in names if any(name not in run.settings for run in runs)]


def _setting(runs: list[RunRecords], name: str) -> tuple[str, list[str]]:
    return plain(name), [plain(run.settings.get(name, ""))[:80] for run in runs]


def charts_of(runs: list[RunRecords]) -> dict[str, list[tuple[str, Figure]]]:
    """By section the charts there is something to draw for, with their titles."""
    trained = _keys(runs, "train")
    losses = [key for key in trained if key == "loss" or key.endswith("_loss")]
    accuracies = [key for key in trained if key.endswith("_accuracy")]
    measured = [key for key in _keys(runs, "validation") if key not in ("step", "time") and not key.endswith("loss")]
    recalls = list(dict.fromkeys(key.partition(RECALL)[0] for key in measured if RECALL in key))
    others = [key for key in measured if RECALL not in key and key not in accuracies]
    return {
        "Losses": [_chart(runs, key, words(key)) for key in losses],
        "Accuracy": [_chart(runs, key, words(key)) for key in accuracies],
        "Validation": [_chart(runs, key, words(key)) for key in others] + [_recall_chart(runs, recall) for recall in recalls],
        "Rate": [_chart(runs, key, name) for key, name in SPEED.items() if key in trained],
        "Memory": [_chart(runs, key, name, GIB) for key, name in MEMORY.items() if key in trained],
        "Stalls": [_chart(runs, key, name) for key, name in STALLS.items() if key in trained] + _save_charts(runs),
        "Optimiser": [_chart(runs, key, name) for key, name in OPTIMISER.items() if key in trained and _varies(runs, key)],
    }


def _keys(runs: list[RunRecords], kind: str) -> list[str]:
    """What any record of a kind has a number of, in the order in which it comes."""
    records = (record for run in runs for record in run.of(kind))
    return list(dict.fromkeys(key for record in records for key, value in record.items() if isinstance(value, int | float)))


def _varies(runs: list[RunRecords], key: str) -> bool:
    return len({record.get(key) for run in runs for record in run.of("train")}) > 1


def _chart(runs: list[RunRecords], key: str, name: str, unit: float = 1.0) -> tuple[str, Figure]:
    """Lines of training, dots of validation."""
    figure, axes = _empty(runs)
    for run in runs:
        line(axes, _in_units(run.of("train"), key, unit), key, "_", run.colour, run.style)
        steps, values = column(_in_units(run.of("validation"), key, unit), key)
        axes.plot(
            steps, values, color=run.colour, linestyle="none" if column(run.of("train"), key)[0] else run.style, marker="o", markersize=4
        )
    return name, _dressed(figure, axes)


def _in_units(records: list[dict[str, Any]], key: str, unit: float) -> list[dict[str, Any]]:
    return records if unit == 1.0 else [record | {key: record[key] / unit} for record in records if key in record]


def _recall_chart(runs: list[RunRecords], recall: str) -> tuple[str, Figure]:
    """Recalls at 1, 5 and 10, told apart by their markers."""
    figure, axes = _empty(runs)
    for run in runs:
        for at, (marker, size, filled) in RANKS.items():
            steps, values = column(run.of("validation"), f"{recall}{RECALL}{at}")
            axes.plot(steps, values, color=run.colour, linestyle=run.style, linewidth=1, marker=marker, markersize=size, fillstyle=filled)
    return f"{words(recall)}: R@1 dots, R@5 squares, R@10 diamonds", _dressed(figure, axes)


def _save_charts(runs: list[RunRecords]) -> list[tuple[str, Figure]]:
    """For how long saves stopped the steps."""
    if not any(run.of("checkpoint") for run in runs):
        return []
    figure, axes = _empty(runs)
    for run in runs:
        steps, values = column(run.of("checkpoint"), "stall_seconds")
        axes.plot(steps, values, color=run.colour, linestyle="none", marker="v", markersize=5)
    return [("seconds that training stood still for a save", _dressed(figure, axes))]


def _empty(runs: list[RunRecords]) -> tuple[Figure, Any]:
    """A chart with the places where runs went on (dashed) or went back (dotted), and its checkpoints as ticks at the bottom."""
    figure = Figure(figsize=SIZE, layout="constrained", facecolor="none")
    axes = figure.subplots()
    for run in runs:
        for kind, style in (("resumed", "--"), ("rolled_back", ":")):
            for record in run.of(kind):
                axes.axvline(record["step"], color=run.colour, linestyle=style, linewidth=1.2, alpha=0.8, gid=MARK)
        saved = [record["step"] for record in run.of("checkpoint") if record.get("folder", "checkpoints") == "checkpoints"]
        axes.plot(saved, np.zeros(len(saved)), transform=axes.get_xaxis_transform(), color=run.colour, linestyle="none", marker="^",
                  markersize=4, alpha=0.7, clip_on=False, gid=MARK)  # fmt: skip
    return figure, axes


def _dressed(figure: Figure, axes: Any) -> Figure:
    """From 0 on with room above, where nothing is negative."""
    figures = [drawn for drawn in axes.get_lines() if drawn.get_gid() != MARK]
    values = np.concatenate([np.zeros(0), *(np.asarray(drawn.get_ydata(), dtype=float) for drawn in figures)])
    from_zero, most = np.nanmin(values, initial=0) >= 0, float(np.nanmax(values, initial=0))
    dress(axes, 0 if from_zero else None, 1.06 * most if from_zero and 0 < most < np.inf else None)
    return figure


def _shown(run: RunRecords, name: str) -> dict[str, Any]:
    """A run's row of the table."""
    training, saves = run.of("train"), run.of("checkpoint")
    validated = run.of("validation")[-1:] or [{}]
    figures = [
        (words(key), f"{value:.4g}")
        for key, value in validated[0].items()
        if isinstance(value, int | float) and key not in ("step", "time") and not key.endswith(("_at_5", "_at_10"))
    ]
    rate = float(np.median([record.get("samples_per_second", np.nan) for record in training]))
    return {
        "name": name, "colour": run.colour, "dashes": STYLES[run.style],
        "steps": training[-1]["step"], "loss": training[-1].get("loss"), "rate": rate,
        "stall": sum(record.get("stall_seconds") or 0.0 for record in saves), "resumed": [record["step"] for record in run.of("resumed")],
        "back": [record["step"] for record in run.of("rolled_back")],
        "left_out": len(run.of("skipped")) + sum(bool(record.get("left_out")) for record in run.of("spike")), "saves": len(saves),
        "validation": [(plain(key), value) for key, value in figures],
    }  # fmt: skip
