"""`megainter replay`: which task a run folder is of, and what is printed of a step that was done again."""

import contextlib
import dataclasses
import json
import math
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from megainter.config.reading import path_settings
from megainter.config.settings import RunConfig
from megainter.errors import UsageError
from megainter.files import read_json
from megainter.kinds import instead, task_of
from megainter.tasks.classification import training as classification
from megainter.tasks.classification.settings import ClassificationConfig
from megainter.tasks.pretraining import training as pretraining
from megainter.tasks.retrieval import training as retrieval
from megainter.tasks.retrieval.settings import RetrievalConfig
from megainter.tasks.vcr import training as vcr
from megainter.tasks.vcr.settings import VcrConfig
from megainter.training.job import Job
from megainter.training.replay import Replayed, against_metrics, replay, without_output

NOT_SETTINGS = ("digests", "asked", "detector")  # of config.json
SUMS = "loss sums of each sample"


def replay_run(run: Path, step: int, at_most: int, compare: bool, as_json: bool) -> str:
    """Do ``step`` of ``run`` again; what is to be printed. ``UsageError`` where ``run`` is no run folder."""
    config, open_job = settings_of(run)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):  # the answer has the output to itself
        found = replay(without_output(config, Path(folder), run), open_job, run, step, at_most)
    verdict = against_metrics(found, run) if compare else None
    if as_json:
        return json.dumps(dataclasses.asdict(found) | ({"against_metrics": verdict} if verdict else {}))
    return _told(found, verdict)


def settings_of(run: Path) -> tuple[Any, Callable[..., Job]]:
    """The settings that a run folder records, and what opens its data. ``UsageError`` where ``run`` is none, or of another version."""
    kind, open_job = _task(run)
    settings = {key: value for key, value in read_json(run / "config.json").items() if key not in NOT_SETTINGS}
    try:
        config = TypeAdapter(kind).validate_python(settings)
    except ValidationError as error:
        raise UsageError(f"{run / 'config.json'} is of another version: {error.errors()[0]['msg']}") from None
    return _from_anywhere(config, run), open_job


def _from_anywhere(config: Any, run: Path) -> Any:
    """The settings with paths that were typed relative to where the run was begun, and are not there from here, as they are from there."""
    try:
        began = Path(read_json(run / "environment.json")["folder"])
    except (UsageError, KeyError, TypeError):  # of an older version
        return config
    for name in path_settings(type(config)):
        section, _, key = name.partition(".")
        path = getattr(getattr(config, section), key)
        if path is not None and not path.exists() and (began / path).exists():
            config = dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **{key: began / path})})
    return config


def _task(run: Path) -> tuple[Any, Callable[..., Job]]:
    """The kind of configuration of the run, and what opens its data."""
    if not (run / "config.json").is_file():
        raise UsageError(f"{run} is no run folder: it has no config.json{instead(run)}")
    settings = read_json(run / "config.json")
    if not isinstance(settings, dict) or "training" not in settings:
        raise UsageError(f"{run} is no run folder: its config.json has no settings of training{instead(run)}")
    match task_of(settings):
        case "vcr":
            return VcrConfig, vcr.open_job
        case "classification":
            return ClassificationConfig, classification.open_job
        case "retrieval":
            return RetrievalConfig, retrieval.open_job
    return RunConfig, pretraining.open_job


def _told(found: Replayed, verdict: str | None) -> str:
    what = "again" if found.step <= found.reached else f"as it would be (the run's folder knows of {found.reached:,} steps)"
    done = f"step {found.step:,} {what}, from step {found.begun_at:,} on" + (f", {found.ranks} ranks in turn" if found.ranks > 1 else "")
    lines = [done, "", *(f"{name:<24}{value:.9g}" for name, value in found.values.items()), ""]
    samples = sorted(found.samples, key=lambda one: -sum(one.losses.values()))
    width = max([len(SUMS), *(len(sample.sample) for sample in samples)])
    lines += [f"{SUMS:<{width}}" + "".join(f"{name:>13}" for name in samples[0].losses)] if samples else []
    for sample in samples:
        losses = "".join(f"{_short(value):>13}" for value in sample.losses.values())
        lines.append(f"{sample.sample:<{width}}{losses}" + (f"  {sample.shown}" if sample.shown else ""))
    return "\n".join([*lines, *(["", verdict] if verdict else [])])


def _short(loss: float) -> str:
    """A loss with four decimals, or as a power of ten where a run that went wrong has one too long for its column."""
    return f"{loss:.4f}" if abs(loss) < 1e6 or not math.isfinite(loss) else f"{loss:.4e}"
