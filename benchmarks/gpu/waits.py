"""Where the host waits for the GPU in a training step: every place, ours and DeepSpeed's apart, by PyTorch's own watch."""

import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import megainter
from benchmarks.gpu.part import Report, Setting, run_part
from benchmarks.gpu.training import SMALL, TOY
from benchmarks.trainer import write_data
from megainter.config.settings import (
    CheckpointConfig,
    DataConfig,
    EngineConfig,
    ModelSettings,
    PretrainingConfig,
    RunConfig,
    ValidationConfig,
)
from megainter.tasks.pretraining.training import pretrain
from megainter.training import engine

FEW, MANY = 4, 12  # steps of two runs: what differs are the waits of steps, not those of start and end
SYNCHRONISING = "synchronizing CUDA operation"  # as PyTorch words it
OURS, THEIRS = str(Path(megainter.__file__).parent), "/deepspeed/"


def check(setting: Setting, report: Report) -> None:
    """The whole trainer for a few steps and for more, at each ZeRO stage; no place of ours may wait in a step that is not reported."""
    folder = setting.work("waits")
    write_data(folder, 10 if setting.toy else 160)
    failures = []
    with engine.distributed():
        for stage in (1,) if setting.toy else (0, 1, 2, 3):
            few, many = (places_of(_config(folder, setting, stage, steps)) for steps in (FEW, MANY))
            per_step = {place: (many[place] - few[place]) / (MANY - FEW) for place in many if many[place] > few[place]}
            ours = {place: count for place, count in per_step.items() if place.startswith("megainter")}
            report.tell(**{f"stage {stage}": per_step})
            report.row(f"stage {stage}: ours", told(ours))
            report.row(f"stage {stage}: DeepSpeed's and PyTorch's", told({place: n for place, n in per_step.items() if place not in ours}))
            failures += [f"stage {stage}: {place} waits {count:g} times a step" for place, count in ours.items()]
    if failures:
        report.tell(failures=failures)


def told(places: dict[str, float]) -> str:
    """How often a step waits, and where."""
    where = "; ".join(f"{place} ({count:g})" for place, count in sorted(places.items(), key=lambda item: -item[1]))
    return f"{sum(places.values()):g} waits a step" + (f": {where}" if where else "")


def places_of(config: RunConfig) -> Counter[str]:
    """Train, and count the waits by place."""
    with watched() as found:
        pretrain(config)
    return found


def _config(folder: Path, setting: Setting, stage: int, steps: int) -> RunConfig:
    """No step is reported, validated or saved but the last."""
    samples = 4 if setting.toy else 32
    return RunConfig(
        output=folder / f"stage-{stage}-{steps}",
        data=DataConfig(
            pairs=folder / "pairs.parquet", store=folder / "regions.store", workers=0 if setting.toy else 2, vocabulary_size=500
        ),
        training=PretrainingConfig(steps=steps, global_batch=samples, micro_batch=samples, log_every=1000),
        model=ModelSettings(**(TOY if setting.toy else SMALL)),
        validation=ValidationConfig(every_steps=0),
        engine=EngineConfig(precision="bf16", zero_stage=stage),
        checkpoint=CheckpointConfig(every_steps=1000),
        tensorboard=False,
    )


@contextmanager
def watched() -> Iterator[Counter[str]]:
    """Counts the waits within by the innermost place in our code, else in DeepSpeed's, else wherever. On a CPU nobody waits."""
    places: Counter[str] = Counter()
    shown = warnings.showwarning

    def show(message: Any, *rest: Any, **more: Any) -> None:
        if SYNCHRONISING in str(message):
            places[place_of(sys._getframe(1))] += 1
        else:
            shown(message, *rest, **more)

    cuda = torch.cuda.is_available()
    with warnings.catch_warnings():
        warnings.filterwarnings("always", message=f".*{SYNCHRONISING}")
        warnings.showwarning = show
        if cuda:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            if cuda:
                torch.cuda.set_sync_debug_mode("default")


def place_of(frame: FrameType | None) -> str:
    """ "megainter/training/loop.py train:75", the innermost frame of ours or DeepSpeed's; what they call counts as theirs."""
    innermost = None
    while frame is not None:
        path = frame.f_code.co_filename
        for base, name in ((OURS, "megainter"), (THEIRS, "deepspeed")):
            if base in path:
                return f"{name}/{path.rpartition(f'/{name}/')[2]} {frame.f_code.co_name}:{frame.f_lineno}"
        if innermost is None and "warnings" not in path and path != __file__:
            innermost = f"{Path(path).name} {frame.f_code.co_name}:{frame.f_lineno}"
        frame = frame.f_back
    return innermost or "a thread without Python"


if __name__ == "__main__":
    run_part("waits", check)
