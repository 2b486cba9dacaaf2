"""The precision of a run whose ``engine.precision`` is "auto": one for all ranks, and the same when the run is taken up again."""

import dataclasses
import logging
from typing import Any, TypeVar

import torch

from megainter.devices import units_of
from megainter.precision import automatic_in_training
from megainter.training.collective import gathered, on_first_rank
from megainter.training.job import RunSettings
from megainter.training.run_folder import recorded

log = logging.getLogger("megainter")
Settings = TypeVar("Settings", bound=RunSettings)


def with_precision(config: Settings, device: torch.device) -> Settings:
    """``config`` with what its ``engine.precision`` "auto" stands for, the same on all ranks; the log says which and why. Collective.

    A resumed run goes on in what it was begun in where every rank's ``device`` computes it. A DeepSpeed JSON that enables a precision has
    asked for it.
    """
    if config.engine.precision != "auto":
        return config
    everywhere = gathered(units_of(device))
    before = on_first_rank(lambda: recorded(config.output))
    begun = before["engine"]["precision"] if before is not None else None
    precision, why = automatic_in_training(everywhere, config.engine.zero_stage, config.engine.deepspeed, begun)
    log.info("%s", why)
    whole: Any = config  # a dataclass, though its type does not say so
    settled: Settings = dataclasses.replace(whole, engine=dataclasses.replace(config.engine, precision=precision))
    return settled
