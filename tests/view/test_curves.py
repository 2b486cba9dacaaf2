"""The curves are those that the run has, whatever it trained."""

import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from megainter.view.curves import charts_of, draw_curves

Records = list[dict[str, Any]]


def run_of(losses: list[str], measured: dict[str, float]) -> tuple[Records, Records]:
    """Training of some objectives over ten steps, and two validations, the second of twice the first."""
    training: Records = [
        {"kind": "train", "step": step, "time": 1.0, "loss": 2.0 / step, "step_seconds": 0.1}
        | {f"{name}_loss": number + 1.0 / step for number, name in enumerate(losses)}
        | {f"{name}_accuracy": 0.5 for name in losses}
        for step in range(1, 11)
    ]
    validation: Records = [
        {"kind": "validation", "step": step, "time": 1.0} | {key: value * step / 5 for key, value in measured.items()} for step in (5, 10)
    ]
    return training, validation if measured else []


def drawn(figure: Figure) -> dict[str, list[float]]:
    """Named curves of a chart."""
    return {
        str(line.get_label()): [float(value) for value in line.get_ydata()]
        for line in figure.axes[0].get_lines()
        if not str(line.get_label()).startswith("_")
    }


RUNS = {
    "retrieval": (["matching"], {"text_to_image_r_at_1": 0.1, "image_to_text_r_at_10": 0.2}, ["text to image R@1", "image to text R@10"]),
    "vcr": (["answer", "rationale"], {"answer_accuracy": 0.3, "both_accuracy": 0.1}, ["answer", "both"]),
    "classification": (["label"], {"accuracy": 0.4, "matthews": -0.2, "loss": 0.7}, ["accuracy", "matthews"]),
    "pretraining": (["msm", "mrm", "itm"], {"msm_loss": 0.5, "msm_accuracy": 0.2, "itm_accuracy": 0.3}, ["masked segments", "matching"]),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_of_any_task_has_its_losses_and_what_was_measured(name: str) -> None:
    losses, measured, names = RUNS[name]
    training, validation = run_of(losses, measured)
    (_, losses_chart), (title, measured_chart) = charts_of(training, validation)
    left, right = drawn(losses_chart), drawn(measured_chart)
    assert title == "validation"
    assert len(left) == len(losses)
    for (_, values), loss in zip(left.items(), losses, strict=True):
        assert values == [record[f"{loss}_loss"] for record in training]
    assert list(right) == names
    shown = [key for key in measured if not key.endswith("loss")]
    assert list(right.values()) == [pytest.approx([measured[key], 2 * measured[key]]) for key in shown]
    lowest, highest = measured_chart.axes[0].get_ylim()
    assert all(lowest <= value <= highest for values in right.values() for value in values)
    dots = [line for line in losses_chart.axes[0].get_lines() if len(line.get_xdata()) == 2]
    assert len(dots) == sum(key.endswith("loss") for key in measured)


def test_upright_axes_say_what_they_count() -> None:
    units = {"retrieval": "recall", "vcr": "share that is right", "classification": "figure", "pretraining": "share that is right"}
    for name, (losses, measured, _) in RUNS.items():
        (_, left), (_, right) = charts_of(*run_of(losses, measured))
        assert (left.axes[0].get_ylabel(), right.axes[0].get_ylabel()) == ("loss", units[name])


def test_legends_lie_below_their_charts() -> None:
    """However many names: no curve runs through them, and the chart keeps its height."""
    heights = []
    for count in (1, 8):
        names = [f"objective_{number}" for number in range(count)]
        (_, figure), *_ = charts_of(*run_of(names, {}))
        figure.draw_without_rendering()
        (legend,), (axes,) = figure.legends, figure.axes
        assert axes.get_legend() is None
        assert legend.get_window_extent().y1 <= axes.get_tightbbox().y0
        heights.append(axes.get_window_extent().height)
    assert heights[1] > 0.9 * heights[0]


def test_the_note_says_what_its_shares_are_of(tmp_path: Path) -> None:
    training, validation = run_of(["msm", "label"], {"msm_accuracy": 0.2, "label_accuracy": 0.1, "text_to_image_r_at_1": 0.3})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in training + validation))
    told = "accuracy of masked segments 40.0%, label accuracy 20.0%, text to image R@1 60.0%"
    assert draw_curves(tmp_path / "metrics.jsonl")["note"] == f"10 steps · last validation: {told}"


def test_without_validation_training_is_shown() -> None:
    training, _ = run_of(["matching"], {})
    _, (title, figure) = charts_of(training, [])
    assert drawn(figure) == {"matching": [0.5] * 10}
    assert title == "accuracy in training"
    bare = [{"kind": "train", "step": 1, "loss": 2.0}, {"kind": "train", "step": 2, "loss": 1.0}]
    ((_, figure),) = charts_of(bare, [])  # no empty chart beside it
    assert drawn(figure) == {"loss": [2.0, 1.0]}


def test_one_record_is_seen_and_steps_are_whole_numbers() -> None:
    training, _ = run_of(["matching"], {})
    (_, figure), *_ = charts_of(training[4:5], [])
    (losses,) = figure.axes
    assert [line.get_marker() for line in losses.get_lines() if line.get_label() == "matching"] == ["o"]
    figure.draw_without_rendering()
    assert all(float(tick).is_integer() for tick in losses.get_xticks())
