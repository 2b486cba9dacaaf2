"""Fine-tuning for classification and regression: of texts alone, of texts about an image, of texts about two.

From a pretrained model to the folder that `megainter evaluate classification` takes. Text alone goes through the text path only (paper
section on single-modal tasks); with an image the two pooled vectors are fused as in pretraining.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megainter.data.feature_store.reader import FeatureStore
from megainter.data.integers import Int64s
from megainter.data.stream.portions import Portions
from megainter.data.tables.labelled import Examples, TaskFacts, has_examples, read_examples
from megainter.errors import UsageError
from megainter.model.configuration import InterBertConfig
from megainter.model.detector import require_same_detector
from megainter.model.interbert import InterBertForSequenceClassification
from megainter.tasks.classification.batches import (
    ClassificationStream,
    EncodedExamples,
    encode_examples,
    fixed_batches,
    with_regions,
)
from megainter.tasks.classification.head import describe_classifier, outcome
from megainter.tasks.classification.metrics import LARGER_IS_BETTER, figures
from megainter.tasks.classification.objective import ClassificationStep
from megainter.tasks.classification.settings import ClassificationConfig
from megainter.tasks.scoring.models import USUAL_LENGTH
from megainter.tasks.starting import Start, finetune_job, inputs_flops, open_start
from megainter.training.collective import summed
from megainter.training.job import Job
from megainter.training.world import World


def finetune(config: ClassificationConfig) -> Path:
    """Fine-tune as ``config`` says, alone or as one rank of any launcher; returns the folder of the result (``tasks.starting``)."""
    return finetune_job(config, lambda world: open_job(config, world))


def open_job(config: ClassificationConfig, world: World) -> Job:
    """Open the starting model, examples and regions on every rank."""
    task = open_task(config)
    start = task.start
    return task_job(
        config, task, world, lambda saved: start.build(InterBertForSequenceClassification, saved, fresh="classifier.")
    )  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class OpenTask:
    """What a run reads. ``start.config`` already describes the classifier; ``figure`` is the one the best checkpoint is chosen by."""

    start: Start
    facts: TaskFacts
    training: EncodedExamples
    validation: EncodedExamples | None
    figure: str | None
    digests: dict[str, str]
    told: tuple[str, ...]


def open_task(config: ClassificationConfig) -> OpenTask:
    """Read and encode everything. ``UsageError`` where files, labels, model or settings do not fit each other."""
    data = config.data
    examples, store = _with_store(read_examples(data.examples, data.split), data.examples, data.store, data.max_bad, "data")
    start = open_start(config.model, config.output, data.max_text_tokens, data.max_regions, store, data.other_detector)
    if examples.images:
        start.config.max_regions = start.config.max_regions or USUAL_LENGTH
    elif data.max_regions is not None:
        raise UsageError("data.max_regions is for examples with images, and these have none; leave it out")
    describe_classifier(start.config, examples.task, examples.images)
    training = _encoded(examples, start, store, examples.task.classes)
    require_labels(training, f"{data.examples}, split {data.split!r}")
    held_out = _validation(config, examples, store)
    validation = _encoded(held_out[0], start, held_out[1], examples.task.classes) if held_out is not None else None
    if validation is not None:
        require_labels(validation, f"the validation split {config.validation.split!r}")
    digests = {"examples": examples.digest, "vocabulary": start.vocabulary.digest}
    digests |= {"store": store.digest} if store is not None else {}
    figure = _figure(config, examples.task) if validation is not None else None
    return OpenTask(
        start=start,
        facts=examples.task,
        training=training,
        validation=validation,
        figure=figure,
        digests=digests,
        told=_told(config, examples, validation),
    )


def task_job(
    config: ClassificationConfig, task: OpenTask, world: World, build_model: Callable[[InterBertConfig | None], Any]
) -> Job:  # fmt: skip
    """The job of training a model that ``build_model`` gives on an open task."""
    training = config.training
    portions = Portions(training.seed, training.global_batch, training.micro_batch, training.micro_tokens)
    stream = ClassificationStream(task.training, portions, world.rank, world.size)
    return Job(
        objectives=("label",),
        weights=(1.0,),
        batches=stream,
        accumulation=stream.steps.accumulation,
        samples=len(task.training),
        sample_ids=stream.sample_ids,
        places=stream.places,
        build_model=build_model,
        build_step=ClassificationStep,
        flops=lambda config, batch: inputs_flops(config, batch.inputs),
        vocabulary=task.start.vocabulary_file,
        lowercase=task.start.vocabulary.lowercase,
        digests=task.digests,
        detector=task.start.config.detector,
        started=task.told,
        workers=config.data.workers,
        gradient_checkpointing=config.model.gradient_checkpointing,
        validate=_validate(task.validation, config.validation.batch) if task.validation is not None else None,
        validate_every=config.validation.every_steps,
        best=task.figure,
    )


def _with_store(
    examples: Examples, path: Path, store_path: Path | None, max_bad: float, section: str
) -> tuple[Examples, FeatureStore | None]:  # fmt: skip
    """Those examples whose images have regions, and their store; texts alone need none."""
    if not examples.images:
        if store_path is not None:
            raise UsageError(f"the examples of {path} have no images; leave {section}.store out")
        return examples, None
    if store_path is None:
        raise UsageError(f"the examples of {path} have images; give their regions as {section}.store")
    store = FeatureStore(store_path)
    return with_regions(examples, store, max_bad, path), store


def _validation(
    config: ClassificationConfig, examples: Examples, store: FeatureStore | None
) -> tuple[Examples, FeatureStore | None] | None:  # fmt: skip
    """Held-out examples of the same task; None where the split has none."""
    wanted, path = config.validation, config.validation.examples or config.data.examples
    if wanted.examples is None and not has_examples(path, wanted.split):
        return None
    held_out = read_examples(path, wanted.split)
    if (held_out.task.problem, held_out.images) != (examples.task.problem, examples.images):
        what = f"{held_out.task.problem} with {held_out.images} images"
        raise UsageError(f"{path} is for {what}, the training data for {examples.task.problem} with {examples.images}")
    store_path = wanted.store or config.data.store
    held_out, own = _with_store(held_out, path, store_path, config.data.max_bad, "validation")
    if own is not None and store is not None:
        require_same_detector(store, own, "validation.store")
    return held_out, own


def _encoded(examples: Examples, start: Start, store: FeatureStore | None, classes: tuple[str, ...]) -> EncodedExamples:
    tokens, regions = start.config.max_text_tokens or USUAL_LENGTH, start.config.max_regions or USUAL_LENGTH
    return encode_examples(examples, classes, start.vocabulary, tokens, store, regions, start.config.region_feature_size)


def require_labels(examples: EncodedExamples, where: str) -> None:
    """``UsageError`` where a label is not public."""
    unknown = int((~examples.labels.known).sum())
    if unknown:
        raise UsageError(f"{unknown:,} of {len(examples):,} examples of {where} have no label; take another split, or only labelled ones")


def _figure(config: ClassificationConfig, task: TaskFacts) -> str:
    figure = config.validation.figure or task.figure
    if figure not in LARGER_IS_BETTER:
        raise UsageError(f"validation.figure {figure!r} is unknown; choose one of {', '.join(LARGER_IS_BETTER)}")
    return figure


def _told(config: ClassificationConfig, examples: Examples, validation: EncodedExamples | None) -> tuple[str, str]:
    task, images = examples.task, {0: "no image", 1: "an image each", 2: "two images each"}[examples.images]
    what = f"{len(task.classes):,} classes" if task.classes else "a value"
    first = f"{task.name}: {len(examples):,} examples with {images}, {what} ({task.problem.replace('_', ' ')})"
    if validation is None:
        return first, f"no examples of split {config.validation.split!r}: no validation, the last checkpoint is the result"
    return first, f"validation: {len(validation):,} examples of split {config.validation.split!r}"


def _validate(examples: EncodedExamples, size: int) -> Callable[[Any, World], dict[str, float]]:
    """The function that measures the task's figures; see ``Job.validate``."""
    batches = fixed_batches(examples, size)

    def validate(trained: Any, world: World) -> dict[str, float]:
        found = predictions(trained.module.model, examples, batches, world)
        return figures(examples.labels, found[0]) | {"loss": float(found[2].mean())}

    return validate


@torch.no_grad()
def predictions(model: Any, examples: EncodedExamples, batches: list[Int64s], world: World) -> NDArray[np.float64]:
    """The ``outcome`` of all examples, [3, N], their batches shared out over ranks. Collective; the same on every rank.

    All ranks run as many forwards (the last may repeat a batch): at ZeRO stage 3 they gather weights together.
    """
    found = torch.zeros(3, len(examples), dtype=torch.float64)
    for turn in range(-(-len(batches) // world.size)):
        mine = turn * world.size + world.rank
        rows = batches[min(mine, len(batches) - 1)]
        batch = examples.batch(rows).to(world.device)
        kept = outcome(model.score_packed(batch.inputs), batch.labels, model.config)
        if mine < len(batches):
            found[:, torch.from_numpy(rows)] = torch.from_numpy(kept)
    return summed(found.to(world.device)).cpu().numpy()
