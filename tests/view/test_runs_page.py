"""The page of runs: what is drawn is what metrics.jsonl says, of all runs, with the places where they were resumed."""

import base64
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megainter.errors import UsageError
from megainter.paths import short_names
from megainter.training.metrics import MetricsLog, read_records
from megainter.view.curves import COLOURS
from megainter.view.runs_page import FEW, charts_of, differences, only_some, read_run, write_runs_page
from tests.view.test_view import HOSTILE, Tags

GIB = 2**30


def write_run(folder: Path, factor: float, learning_rate: float = 0.001, name: str = "a") -> Path:
    """Ten steps, resumed after the fifth and gone back to the eighth, two validations, and a save."""
    folder.mkdir(parents=True)
    log = MetricsLog(folder, 0, tensorboard=False)
    for step in range(1, 11):
        values: dict[str, Any] = {"loss": factor / step, "msm_loss": factor, "msm_accuracy": 0.5, "samples_per_second": 9.0 * factor}
        log.write("train", step, values | {"data_wait_share": 0.1, "memory_bytes": step * GIB, "learning_rate": 0.1 * step})
        if step % 5 == 0:
            log.write("validation", step, {"loss": 2 * factor / step, "text_to_image_r_at_1": 0.1, "text_to_image_r_at_10": 0.4})
    log.write("checkpoint", 5, {"stall_seconds": 1.5, "folder": "checkpoints"})
    log.write("resumed", 5, {"ranks": 2})
    log.write("rolled_back", 8, {"spike": {}})
    log.close()
    (folder / "config.json").write_text(json.dumps({"output": str(folder), "optimizer": {"learning_rate": learning_rate, "name": name}}))
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    return [write_run(tmp_path / "one" / "run", 1.0), write_run(tmp_path / "two" / "run", 2.0, 0.002)]


def lines(figure: Any, colour: str) -> list[tuple[list[float], list[float]]]:
    """Points of what is drawn in a colour, upright lines apart."""
    drawn = [line for line in figure.axes[0].get_lines() if line.get_color() == colour and len(line.get_xdata())]
    return [(list(map(float, line.get_xdata())), list(map(float, line.get_ydata()))) for line in drawn]


def test_every_run_is_drawn_over_the_others(runs: list[Path]) -> None:
    read = [read_run(run, place) for place, run in enumerate(runs)]
    charts = {title: figure for section in charts_of(read).values() for title, figure in section}
    steps = [float(step) for step in range(1, 11)]
    for run, factor in zip(read, (1.0, 2.0), strict=True):
        drawn = lines(charts["loss"], run.colour)
        assert (steps, [factor / step for step in steps]) in drawn  # training
        assert ([5.0, 10.0], [2 * factor / 5, 2 * factor / 10]) in drawn  # validation
        assert (steps, [9.0 * factor] * 10) in lines(charts["samples per second"], run.colour)
        assert (steps, steps) in lines(charts["memory of the first rank, GiB"], run.colour)
        assert ([5.0], [1.5]) in lines(charts["seconds that training stood still for a save"], run.colour)
        recall = lines(charts["text to image: R@1 dots, R@5 squares, R@10 diamonds"], run.colour)
        assert recall[-2:] == [([5.0, 10.0], [0.1, 0.1]), ([5.0, 10.0], [0.4, 0.4])]
    assert {"loss of masked segments", "accuracy of masked segments", "share of time waiting for data", "learning rate"} <= set(charts)


def test_where_runs_went_on_or_back_is_marked(runs: list[Path]) -> None:
    read = [read_run(run, place) for place, run in enumerate(runs)]
    for _, figure in charts_of(read)["Losses"]:
        upright = [line for line in figure.axes[0].get_lines() if len(line.get_xdata()) == 2 and line.get_xdata()[0] == line.get_xdata()[1]]
        assert sorted((line.get_xdata()[0], line.get_linestyle()) for line in upright) == [(5, "--"), (5, "--"), (8, ":"), (8, ":")]


def test_axes_begin_at_zero_and_hold_what_is_drawn(runs: list[Path]) -> None:
    """The marks across, whose height is the whole chart, say nothing about its ends."""
    charts = {title: figure for section in charts_of([read_run(runs[0], 0)]).values() for title, figure in section}
    for title, most in (("share of time waiting for data", 0.1), ("memory of the first rank, GiB", 10), ("samples per second", 9)):
        assert charts[title].axes[0].get_ylim() == pytest.approx((0, 1.06 * most))


def test_names_and_settings_tell_runs_apart(runs: list[Path]) -> None:
    assert short_names(runs) == ["one/run", "two/run"]
    assert short_names(runs[:1]) == ["run"]
    read = [read_run(run, place) for place, run in enumerate(runs)]
    assert differences(read) == [("optimizer.learning_rate", ["0.001", "0.002"])]
    assert only_some(read) == []


def test_settings_that_only_some_runs_have_stand_apart_and_after_the_curves(runs: list[Path]) -> None:
    (runs[1] / "config.json").write_text(json.dumps({"optimizer": {"learning_rate": 0.002, "name": "a"}, "listwise": {"negatives": 3}}))
    read = [read_run(run, place) for place, run in enumerate(runs)]
    assert differences(read) == [("optimizer.learning_rate", ["0.001", "0.002"])]
    assert only_some(read) == [("listwise.negatives", ["", "3"])]
    page = write_runs_page(runs[0] / "page.html", "t", runs).read_text()
    places = [page.index(words) for words in ("<figure", "What they differ in (1)", "What only some of them have (1)")]
    assert places == sorted(places)
    assert page.rindex("<figure") < places[1]
    assert ["open" in details for details in Tags(page).of("details")] == [True, False]


def test_a_long_list_of_settings_is_folded(runs: list[Path]) -> None:
    for run, value in zip(runs, (1, 2), strict=True):
        (run / "config.json").write_text(json.dumps({"data": {f"setting_{number}": value for number in range(FEW + 1)}}))
    page = write_runs_page(runs[0] / "page.html", "t", runs).read_text()
    assert ["open" in details for details in Tags(page).of("details")] == [False]


def test_recalls_of_one_validation_are_told_apart_by_markers(runs: list[Path]) -> None:
    figure = dict(charts_of([read_run(runs[0], 0)])["Validation"])["text to image: R@1 dots, R@5 squares, R@10 diamonds"]
    assert [line.get_marker() for line in figure.axes[0].get_lines()][-3:] == ["o", "s", "D"]


def test_matching_is_one_chart_of_pretraining_and_fine_tuning(tmp_path: Path) -> None:
    for name, objective in (("pretrained", "itm"), ("tuned", "matching")):
        (tmp_path / name).mkdir()
        record = {"kind": "train", "step": 1, "loss": 3.0, f"{objective}_loss": 0.7, f"{objective}_accuracy": 0.5}
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    read = [read_run(tmp_path / name, place) for place, name in enumerate(("pretrained", "tuned"))]
    charts = charts_of(read)
    assert [title for title, _ in charts["Losses"]] == ["loss", "loss of matching"]
    assert [title for title, _ in charts["Accuracy"]] == ["accuracy of matching"]
    for run in read:
        assert ([1.0], [0.7]) in lines(dict(charts["Losses"])["loss of matching"], run.colour)


def test_colour_and_dashes_of_every_run_stand_beside_its_name(tmp_path: Path) -> None:
    many = [write_run(tmp_path / f"run-{number}", 1.0) for number in range(len(COLOURS) + 1)]
    page = write_runs_page(tmp_path / "page.html", "t", many).read_text()
    strip = page.partition('<p class="keys">')[2].partition("</p>")[0]
    assert [strip.index(run.name) for run in many] == sorted(strip.index(run.name) for run in many)
    looks = [(line["stroke"], line["stroke-dasharray"]) for line in Tags(strip).of("line")]
    assert len(set(looks)) == len(many)


def test_the_page_is_whole_and_inert(tmp_path: Path) -> None:
    hostile = write_run(tmp_path / "<script>alert(1)<", 1.0, name=HOSTILE)
    page = write_runs_page(tmp_path / "page.html", "<i>t</i>", [hostile, write_run(tmp_path / "b", 2.0)]).read_text()
    tags = Tags(page)
    assert not {"script", "i", "link", "iframe"} & {tag for tag, _ in tags.found}
    assert "\x1b" not in page
    pictures = [image["src"] or "" for image in tags.of("img")]
    assert len(pictures) == 9
    for picture in pictures:
        content = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture.partition(",")[2]))))
        assert len(np.unique(content.reshape(-1, content.shape[2]), axis=0)) > 10


def test_a_run_is_looked_at_while_it_writes(runs: list[Path]) -> None:
    before = read_records(runs[0] / "metrics.jsonl")
    with open(runs[0] / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "step": 11, "lo')
    assert read_records(runs[0] / "metrics.jsonl") == before


def test_what_is_no_run_is_one_line(tmp_path: Path, runs: list[Path]) -> None:
    with pytest.raises(UsageError, match="is no run folder"):
        write_runs_page(tmp_path / "p.html", "t", [tmp_path])
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    with pytest.raises(UsageError, match="no training records yet"):
        write_runs_page(tmp_path / "p.html", "t", [runs[0], tmp_path])
    with pytest.raises(UsageError, match="at least one run"):
        write_runs_page(tmp_path / "p.html", "t", [])


def test_memory_grows_with_what_is_held() -> None:
    """In a process of its own: one that has freed much takes from that."""
    words = "import torch; from megainter.training.metrics import memory_held; device = torch.device('cpu'); before = memory_held(device); "
    words += "held = torch.ones(64 << 20, dtype=torch.uint8); print(memory_held(device) - before)"
    grown = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, check=True).stdout
    assert int(grown) > (64 << 20) // 2
