"""The record of a run: resuming drops what will be done again, and torn lines."""

import json
from pathlib import Path

import pytest

from megainter.training.metrics import MetricsLog, Throughput, drop_after, read_metrics


def test_resumed_log_has_every_step_once(tmp_path: Path) -> None:
    first = MetricsLog(tmp_path, 0, tensorboard=False)
    for step in range(1, 6):
        first.write("train", step, {"loss": 1.0 / step})
    first.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "step": 6, "lo')
    second = MetricsLog(tmp_path, 3, tensorboard=False)
    second.write("train", 4, {"loss": 0.5})
    second.write("validation", 4, {"loss": 0.7})
    second.close()
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl", "train")] == [1, 2, 3, 4]
    assert [record["loss"] for record in read_metrics(tmp_path / "metrics.jsonl", "validation")] == [0.7]


def test_tensorboard_is_fed(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0, tensorboard=True)
    log.write("train", 1, {"loss": 2.0})
    log.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "logs" / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 2.0)]


def test_a_missing_log_is_nothing_to_drop(tmp_path: Path) -> None:
    drop_after(tmp_path / "metrics.jsonl", 5)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_utilisation_is_work_over_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    meter = Throughput()
    meter.start, meter.flops, meter.samples, meter.waited = 100.0, 4_000, 20, 0.5
    monkeypatch.setattr("time.perf_counter", lambda: 102.0)
    rates = meter.rates(world_size=2, peak=5_000.0)
    assert rates["model_flop_utilisation"] == pytest.approx(4_000 / 2 / 10_000)
    assert (rates["samples_per_second"], rates["data_wait_share"]) == (10.0, 0.25)
    assert "model_flop_utilisation" not in meter.rates(2, None)
    json.dumps(rates)
