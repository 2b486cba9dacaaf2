"""What a run trains: everything in which pretraining and the fine-tuning tasks differ, as plain values and functions.

The loop (``training/loop.py``) knows only this. K is the number of objectives.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from megainter.config.settings import CheckpointConfig, EngineConfig, HangConfig, OptimizerConfig, TrainingConfig
from megainter.data.integers import Int64s
from megainter.data.packed import PackedInputs
from megainter.model.configuration import InterBertConfig
from megainter.tracking import Tracker


class RunSettings(Protocol):
    """The sections that every run has, whatever it trains."""

    @property
    def output(self) -> Path: ...
    @property
    def training(self) -> TrainingConfig: ...
    @property
    def optimizer(self) -> OptimizerConfig: ...
    @property
    def engine(self) -> EngineConfig: ...
    @property
    def checkpoint(self) -> CheckpointConfig: ...
    @property
    def hangs(self) -> HangConfig: ...
    @property
    def tensorboard(self) -> bool: ...
    @property
    def tracking(self) -> tuple[Tracker, ...]: ...


class Batch(Protocol):
    """A micro-batch. A filler (run so that all ranks run as many forwards) counts nothing."""

    @property
    def inputs(self) -> PackedInputs: ...

    def counts(self) -> tuple[int, ...]:
        """What each of the K loss sums is divided by, once summed over the global batch; zeros for a filler."""

    def tokens(self) -> int:
        """Real tokens, text and regions."""

    def to(self, device: torch.device | str) -> Any:
        """The same batch on ``device``."""

    def pin_memory(self) -> Any:
        """The same batch in page-locked memory, for a copy that the host does not wait for."""


@dataclass(frozen=True)
class Job:
    """What is trained on what.

    ``batches[step]`` is the list of this rank's micro-batches of a global step, a pure function of (seed, step, rank, world size).
    ``build_model(None)`` gives the model with its starting weights, ``build_model(configuration)`` the bare model of a checkpoint, whose
    weights the loop loads. ``build_step`` wraps it for the engine: a module with the model as attribute ``model`` and
    ``forward(batch, counts [K]) -> (loss share, tallies [2, K])``, where tallies are loss sums and numbers of right predictions (see
    ``tasks/pretraining/objective.py``). ``validate(engine, world)`` runs on every rank, in evaluation mode and without gradients, and
    gives the same figures everywhere; ``best`` names the one (larger is better) by which the best checkpoint is kept.

    ``prepare_step(engine, step, by_rank)`` makes of a step's micro-batches those that are trained on, for objectives over the whole global
    batch: they see all of it before its first backward. It runs on every rank and may be collective. ``by_rank`` are the micro-batches
    that this process runs: its own, or where one process does again what several did, those of all ranks.

    ``renew(engine, step)`` makes what batches hang on beside (seed, step, rank, world size), such as lists of candidates, from the weights:
    before step 0, before each step that ``renew_every`` divides (0: before no other), and before the first step of a run that goes on. It
    runs on every rank and may be collective.

    ``started`` are lines for the log: what is trained on what. ``sample_ids(step)`` names all samples of a
    global step, in the order of the sequence, for whoever must look at them; ``shown(step)`` says of each what it shows, and
    ``places(step)`` which of them each of this rank's micro-batches has, in its order. The step module's
    ``forward(batch, None, each=True)`` gives each sample's loss sums [S, K].
    """

    objectives: tuple[str, ...]
    weights: tuple[float, ...]
    batches: Dataset[list[Any]]
    accumulation: int  # micro-batches of a step
    samples: int  # of one epoch
    sample_ids: Callable[[int], list[str]]
    places: Callable[[int], list[Int64s]]
    build_model: Callable[[InterBertConfig | None], PreTrainedModel]
    build_step: Callable[[Any], nn.Module]  # of the model
    flops: Callable[[Any, Any], int]  # (model configuration, micro-batch) -> floating-point operations of one forward
    vocabulary: bytes  # vocab.txt, into every checkpoint
    lowercase: bool
    digests: Mapping[str, str]  # SHA-256 of the data by name: a resumed run must have the same
    shown: Callable[[int], list[str]] | None = None
    started: tuple[str, ...] = ()
    workers: int = 0  # loader processes of each rank
    gradient_checkpointing: bool = False
    validate: Callable[[Any, Any], dict[str, float]] | None = None
    validate_every: int = 0  # steps; 0: only at the end
    best: str | None = None
    prepare_step: Callable[[Any, int, dict[int, list[Any]]], dict[int, list[Any]]] | None = None
    detector: str | None = None  # whose regions are trained on, for the run's config.json
    renew: Callable[[Any, int], None] | None = None
    renew_every: int = 0
    files: Mapping[str, bytes] = field(default_factory=dict)  # more files for every checkpoint


def summarise(job: Job, tallies: Tensor, counts: Tensor) -> dict[str, float]:
    """Mean losses, accuracies and the weighted total from global ``tallies`` [2, K] and ``counts`` [K] (not clamped).

    An objective of weight 0 has no figures: nothing is masked or mismatched for it.
    """
    means = (tallies / counts.clamp(min=1)).tolist()
    values = {"loss": sum(weight * mean for weight, mean in zip(job.weights, means[0]))}
    for name, weight, loss, accuracy in zip(job.objectives, job.weights, *means, strict=True):
        if weight > 0:
            values[f"{name}_loss"], values[f"{name}_accuracy"] = loss, accuracy
    return values


def trained_on_what_is_validated(config: Any) -> str | None:
    """What is said where validation measures the very examples that are trained on; None where it does not. ``config`` of any task."""
    data, validation = config.data, config.validation
    table = next(name for name in ("pairs", "questions", "examples") if hasattr(data, name))
    if getattr(validation, table) not in (None, getattr(data, table)) or validation.split != data.split:
        return None
    return f"validation is on what is trained on, split {data.split!r}: its figures say nothing of others"
