"""Trackers: what is new is sent once, whatever resumes or fails; the real packages, offline, hold what metrics.jsonl says."""

import json
import logging
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from megainter.config.reading import read_settings
from megainter.config.settings import RunConfig
from megainter.errors import UsageError
from megainter.tracking import TRACKERS, require_trackers, trackers_named
from megainter.training.following import Records
from megainter.training.metrics import MetricsLog
from megainter.training.tracked import tracked
from megainter.verbs.track import track
from tests.synthetic import environment, losses, settings, train, write_data

STEPS = 5


def write_run(folder: Path, steps: int = STEPS) -> Path:
    """A run folder with records of two kinds."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"training": {"steps": steps}, "tensorboard": True}))
    log = MetricsLog(folder, 0, tensorboard=False)
    for step in range(1, steps + 1):
        log.write("train", step, {"loss": 10.0 / step, "note": "no number", "deep": {"x": 1}})
    log.write("validation", steps, {"recall": 0.25})
    log.close()
    return folder


def keys(records: list[dict[str, Any]]) -> list[tuple[str, int]]:
    return [(record["kind"], record["step"]) for record in records]


def test_records_come_once_whole_and_also_where_the_file_was_written_anew(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    reader = Records(path)
    assert reader.new() == []
    log = MetricsLog(tmp_path, 0, tensorboard=False)
    for step in (1, 2, 3):
        log.write("train", step, {})
    assert keys(reader.new()) == [("train", 1), ("train", 2), ("train", 3)]
    assert reader.new() == []

    # A torn line waits for its rest.
    line = json.dumps({"kind": "train", "step": 4, "time": time.time()}) + "\n"
    log.file.write(line[:20])
    log.file.flush()
    assert reader.new() == []
    log.file.write(line[20:])
    log.close()
    assert keys(reader.new()) == [("train", 4)]

    # Back to step 2: the steps after it are done again, and only these are new, for this reader and for one that begins with its state.
    time.sleep(0.002)
    log = MetricsLog(tmp_path, 2, tensorboard=False)
    log.write("train", 3, {})
    later = Records(path, reader.time, reader.same)
    assert keys(reader.new()) == keys(later.new()) == [("train", 3)]
    log.write("train", 4, {})
    assert keys(reader.new()) == keys(later.new()) == [("train", 4)]
    log.close()


def test_records_of_one_moment_are_neither_lost_nor_sent_twice(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"kind": kind, "step": 1, "time": 5.0}) + "\n" for kind in "abc"]
    path.write_text("".join(lines[:2]))
    first = Records(path)
    assert [kind for kind, _ in keys(first.new())] == ["a", "b"]
    path.write_text("".join(lines))
    assert [kind for kind, _ in keys(Records(path, first.time, first.same).new())] == ["c"]


def test_settings_take_names_apart_by_commas() -> None:
    words = ["--tracking", "wandb, mlflow"]
    assert read_settings(RunConfig, Path("small"), words).tracking == ("wandb", "mlflow")
    assert read_settings(RunConfig, Path("small"), ["--tracking", "none"]).tracking == ()
    with pytest.raises(UsageError, match="tracking"):
        read_settings(RunConfig, Path("small"), ["--tracking", "wanb"])


def test_a_package_that_is_not_there_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megainter.tracking.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'megainter\[wandb\]'"):
        require_trackers(["wandb"])


def test_a_tracker_that_crashes_is_told_and_nothing_else_comes_of_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run, broken = write_run(tmp_path / "run"), tmp_path / "broken"
    broken.mkdir()
    (broken / "wandb.py").write_text("raise RuntimeError('no such host')\n")
    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.WARNING, "megainter"):
        patch.setenv("PYTHONPATH", os.pathsep.join([str(broken), environment().get("PYTHONPATH", "")]))
        with tracked(run, ["wandb"]):
            deadline = time.monotonic() + 60
            while "tracking to wandb ended with 1" not in caplog.text and time.monotonic() < deadline:
                time.sleep(0.05)
            assert f"megainter track {run} --to wandb" in caplog.text
    assert "no such host" in (run / "logs" / "tracking" / "wandb.log").read_text()


def test_a_tracker_that_hangs_is_waited_for_no_longer_than_its_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, slow = write_run(tmp_path / "run"), tmp_path / "slow"
    slow.mkdir()
    (slow / "wandb.py").write_text("import time\ntime.sleep(8)\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(slow), environment().get("PYTHONPATH", "")]))
    monkeypatch.setattr("megainter.training.tracked.PATIENCE", 0.5)
    start = time.monotonic()
    with tracked(run, ["wandb"]), caplog.at_level(logging.WARNING, "megainter"):
        pass
    assert time.monotonic() - start < 4
    assert "did not take all records" in caplog.text


def sent(tracker: str, folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) by figure of what the tracker keeps of its only run, read with its own package in a process of its own."""
    code = {
        "tensorboard": """
            from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
            events = EventAccumulator("run/logs/tensorboard"); events.Reload()
            out = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}""",
        "wandb": """
            import struct
            from pathlib import Path
            from wandb.proto import wandb_internal_pb2 as pb
            out, head, block = {}, 7, 32768  # LevelDB's log format: pieces with a head of checksum, length and kind, in blocks
            for path in sorted(Path("run/logs/wandb").glob("offline-run-*/*.wandb")):
                data, place, whole = path.read_bytes(), head, b""
                while place + head <= len(data):
                    if block - place % block < head:
                        place += block - place % block
                        continue
                    _, length, kind = struct.unpack_from("<IHB", data, place)
                    whole += data[place + head : place + head + length]
                    place += head + length
                    if kind in (1, 4):  # whole, or a last piece
                        record, whole = pb.Record.FromString(whole), b""
                        row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                        for name in (name for name in row if "/" in name):
                            out.setdefault(name, []).append((row["step"], row[name]))""",
        "trackio": """
            import sqlite3
            from pathlib import Path
            (file,) = Path("trackio").glob("*.db")
            out = {}
            for step, metrics in sqlite3.connect(file).execute("select step, metrics from metrics order by id"):
                for name, value in json.loads(metrics).items():
                    out.setdefault(name, []).append((step, value))""",
        "mlflow": """
            from mlflow import MlflowClient
            client = MlflowClient()
            (run,) = client.search_runs([client.get_experiment_by_name("megainter").experiment_id])
            out = {name: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)] for name in run.data.metrics}""",
    }[tracker]
    lines = "\n".join(line.removeprefix(12 * " ") for line in code.splitlines())
    done = subprocess.run(
        [sys.executable, "-c", f"import json{lines}\nprint('OUT' + json.dumps(out))"], cwd=folder, env=offline(folder), capture_output=True,
        text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = next(line for line in done.stdout.splitlines() if line.startswith("OUT"))
    return {name: [tuple(row) for row in rows] for name, rows in json.loads(found.removeprefix("OUT")).items()}


def offline(folder: Path) -> dict[str, str]:
    """Variables with which every tracker keeps what it is sent in this folder."""
    own = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "TRACKIO_DIR": str(folder / "trackio"), "DO_NOT_TRACK": "true"}
    return {**environment(), **own, "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db", "HF_HUB_OFFLINE": "1"}


@pytest.mark.slow
def test_a_run_and_its_resumption_are_followed_and_a_broken_tracker_changes_no_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs, store = write_data(tmp_path, images=12)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "wandb.py").write_text("raise RuntimeError('no such host')\n")
    own = environment() | {"PYTHONPATH": os.pathsep.join([str(tmp_path / "broken"), environment()["PYTHONPATH"]])}
    monkeypatch.setattr("tests.synthetic.environment", lambda: own)
    common = {"training__log_every": 1, "checkpoint__every_steps": 4}

    for steps in (4, 6):
        words = settings(pairs, store, tmp_path / "run", training__steps=steps, tracking="tensorboard,wandb", **common)
        done = train(words)
        assert done.returncode == 0, done.stderr
        assert "tracking to wandb ended with 1; the run goes on" in done.stdout + done.stderr
    for steps in (4, 6):
        assert train(settings(pairs, store, tmp_path / "plain", training__steps=steps, **common)).returncode == 0

    found, wanted = sent("tensorboard", tmp_path), losses(tmp_path / "plain")
    assert [step for step, _ in found["train/loss"]] == [1, 2, 3, 4, 5, 6]
    assert [value for _, value in found["train/loss"]] == pytest.approx(wanted)


@pytest.mark.slow
@pytest.mark.parametrize("tracker", TRACKERS)
def test_the_real_package_holds_each_figure_of_the_file_once(tracker: str, tmp_path: Path) -> None:
    """Sent as a finished run, then the same command again, then three steps more, as after a resume."""
    if find_spec(tracker) is None:
        pytest.skip(f"{tracker} is not installed; `make test-slow` installs it")
    run = write_run(tmp_path / "run")
    command = [sys.executable, "-m", "megainter", "track", "run", "--to", tracker]

    def track() -> str:
        done = subprocess.run(command, cwd=tmp_path, env=offline(tmp_path), capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, done.stderr
        told = next(line for line in done.stdout.splitlines() if line.startswith("run: "))
        return told.removesuffix("; `tensorboard --logdir run/logs/tensorboard` shows them")

    assert track() == f"run: {STEPS + 1} records sent to {tracker}"
    assert track() == f"run: 0 records sent to {tracker}"
    log = MetricsLog(run, STEPS, tensorboard=False)
    for step in range(STEPS + 1, STEPS + 4):
        log.write("train", step, {"loss": 10.0 / step})
    log.close()
    assert track() == f"run: 3 records sent to {tracker}"

    found = sent(tracker, tmp_path)
    assert set(found) == {"train/loss", "validation/recall"}
    assert [step for step, _ in found["train/loss"]] == list(range(1, STEPS + 4))
    assert [value for _, value in found["train/loss"]] == pytest.approx([10.0 / step for step in range(1, STEPS + 4)])
    assert found["validation/recall"] == [(STEPS, 0.25)]


def test_events_that_the_run_wrote_itself_are_not_written_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run")
    log = MetricsLog(run, 0, tensorboard=True)
    log.write("train", STEPS + 1, {"loss": 1.0})
    log.close()
    before = {path: path.read_bytes() for path in (run / "logs" / "tensorboard").iterdir()}
    track(run, to=["tensorboard"])
    told = capsys.readouterr().out
    assert told == f"{run}: events were written as it ran; `tensorboard --logdir {run}/logs/tensorboard` shows them\n"
    assert {path: path.read_bytes() for path in (run / "logs" / "tensorboard").iterdir()} == before


def test_trackers_are_named_apart_by_commas() -> None:
    assert trackers_named("wandb, mlflow,wandb") == ["wandb", "mlflow"]
    with pytest.raises(UsageError, match="--to 'wandbb' is no tracker; choose tensorboard, wandb, trackio, mlflow"):
        trackers_named("wandbb")
