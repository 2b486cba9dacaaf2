"""Experiment trackers: where records of metrics.jsonl are sent. Each is opened by name, for a run folder, and closed at the end."""

import json
import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, cast

from megainter.errors import UsageError
from megainter.files import read_json
from megainter.tracking import Tracker

PROJECT = "megainter"  # where the environment names none
AT_ONCE = 100  # parameters that MLflow takes in one request


class Sink(Protocol):
    """An opened tracker. ``id`` is that of the run there: with it a later process goes on with the same run."""

    id: str

    def send(self, record: Mapping[str, Any]) -> None:
        """Send one record of metrics.jsonl: its numbers as ``kind/name``, at its step and time."""

    def close(self) -> None:
        """Send what waits, and end."""


def open_tracker(name: Tracker, run: Path, known: str | None) -> Sink:
    """The tracker, with the run of id ``known`` taken up again; None: a new one. Raises whatever the package raises."""
    opened: dict[Tracker, Callable[[Path, str | None], Sink]] = {
        "tensorboard": TensorBoard, "wandb": WeightsAndBiases, "trackio": Trackio, "mlflow": Mlflow,
    }  # fmt: skip
    return opened[name](run, known)


def written_as_it_ran(run: Path) -> Path | None:
    """The folder of TensorBoard's events where the run itself wrote them (its setting ``tensorboard``), and no tracker; else None."""
    events, settings = run / "logs" / "tensorboard", _settings(run)
    own = settings.get("tensorboard") is True and not (run / "logs" / "tracking" / "tensorboard" / "sent.json").exists()
    return events if own and any(events.glob("events.*")) else None


def numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a record by ``kind/name``."""
    figures = {name: value for name, value in record.items() if name not in ("kind", "step", "time")}
    return {f"{record['kind']}/{name}": value for name, value in figures.items() if isinstance(value, int | float)}


def _settings(run: Path) -> dict[str, Any]:
    """The run's settings by ``section.key``."""
    sections = read_json(run / "config.json") if (run / "config.json").is_file() else {}
    flat = {name: values if isinstance(values, dict) else {"": values} for name, values in sections.items()}
    return {f"{section}.{key}".rstrip("."): value for section, values in flat.items() for key, value in values.items()}


def _name(run: Path) -> str:
    return run.resolve().name


class TensorBoard:
    """Events in the run folder's logs/tensorboard; steps that a resumed run does again replace the earlier ones."""

    def __init__(self, run: Path, known: str | None) -> None:
        self.id, self.run, self.again, self.writer = "events", run, known is not None, cast(Any, None)

    def send(self, record: Mapping[str, Any]) -> None:
        """As ``Sink``."""
        from torch.utils.tensorboard import SummaryWriter

        if self.writer is None:
            purge = record["step"] if self.again else None
            self.writer = SummaryWriter(str(self.run / "logs" / "tensorboard"), purge_step=purge)  # type: ignore[no-untyped-call]
        for name, value in numbers(record).items():
            self.writer.add_scalar(name, value, record["step"], walltime=record["time"])

    def close(self) -> None:
        """As ``Sink``."""
        if self.writer is not None:
            self.writer.close()


class WeightsAndBiases:
    """wandb, as WANDB_PROJECT, WANDB_MODE and its other variables say; what it keeps on disk is in the run folder's logs."""

    def __init__(self, run: Path, known: str | None) -> None:
        import wandb

        self.id = known or uuid.uuid4().hex[:12]
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        (run / "logs").mkdir(exist_ok=True)
        self.to = wandb.init(project=project, name=_name(run), id=self.id, resume="allow", dir=str(run / "logs"), config=_settings(run))
        self.to.define_metric("step")
        self.to.define_metric("*", step_metric="step")  # wandb's own count of steps only rises; a resumed run goes back

    def send(self, record: Mapping[str, Any]) -> None:
        """As ``Sink``."""
        self.to.log({**numbers(record), "step": record["step"], "time": record["time"]})

    def close(self) -> None:
        """As ``Sink``."""
        self.to.finish()


class Trackio:
    """trackio, in the project that TRACKIO_PROJECT names; local unless its own variables name a Space."""

    def __init__(self, run: Path, known: str | None) -> None:
        import trackio

        self.id = known or f"{_name(run)}-{uuid.uuid4().hex[:6]}"
        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        settings = json.loads(json.dumps(_settings(run)))
        self.to = trackio.init(project=project, name=self.id, config=settings, resume="allow", embed=False, auto_log_gpu=False)

    def send(self, record: Mapping[str, Any]) -> None:
        """As ``Sink``."""
        self.to.log(numbers(record), step=record["step"])

    def close(self) -> None:
        """As ``Sink``."""
        self.to.finish()


class Mlflow:
    """MLflow, at MLFLOW_TRACKING_URI, in the experiment that MLFLOW_EXPERIMENT_NAME names."""

    def __init__(self, run: Path, known: str | None) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self.client = MlflowClient()
        if known is not None:
            self.id = known
            self.client.update_run(known, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self.client.get_experiment_by_name(name)
        place = experiment.experiment_id if experiment is not None else self.client.create_experiment(name)
        self.id = str(self.client.create_run(place, run_name=_name(run)).info.run_id)
        params = [Param(key, str(value)) for key, value in _settings(run).items()]
        for start in range(0, len(params), AT_ONCE):
            self.client.log_batch(self.id, params=params[start : start + AT_ONCE])

    def send(self, record: Mapping[str, Any]) -> None:
        """As ``Sink``."""
        from mlflow.entities import Metric

        moment = round(1000 * record["time"])
        self.client.log_batch(self.id, metrics=[Metric(name, value, moment, record["step"]) for name, value in numbers(record).items()])

    def close(self) -> None:
        """As ``Sink``."""
        self.client.set_terminated(self.id)


def require_records(run: Path) -> Path:
    """The run's metrics.jsonl; ``UsageError`` where there is none."""
    if not (run / "metrics.jsonl").is_file():
        raise UsageError(f"{run} has no metrics.jsonl; give the folder of a run of `megainter pretrain` or `finetune`")
    return run / "metrics.jsonl"
