"""Pretraining as a job of the training loop: its objectives on captions and regions."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from megainter.config.settings import RunConfig
from megainter.model.configuration import DROPOUTS, InterBertConfig
from megainter.model.flops import BatchCounts, alone_flops, forward_flops
from megainter.model.folder import read_config
from megainter.model.interbert import InterBertForPreTraining
from megainter.tasks.contrast import Gathering, PrepareStep, compare_in_steps, contrasting
from megainter.tasks.pretraining.batches import PretrainBatch, validation_batches
from megainter.tasks.pretraining.fresh import with_fresh_captions
from megainter.tasks.pretraining.objective import ObjectiveWeights, PretrainingStep
from megainter.tasks.pretraining.sources import Sources, model_configuration, open_sources
from megainter.tasks.pretraining.starting import with_start
from megainter.tasks.retrieval.recall import HeldOut, open_held_out, recall_figures
from megainter.training.collective import summed
from megainter.training.job import Job, summarise
from megainter.training.loop import counted, steps_of, train
from megainter.training.run_folder import recorded
from megainter.training.world import World

_OF_THE_RUN = (
    "max_regions", "max_text_tokens", "itc_size", "itc_pooling", "itc_regions", "itm_similarity", "itm_vectors", "region_mean",
    "region_deviation", "detector", "detector_name", "region_classes",
)  # fmt: skip
FEW_STEPS, ENOUGH_FOR_FEW = 100, 150  # below how many a run is warned about, and how many it is told to take: minutes for some dozen photos


def pretrain(config: RunConfig) -> Path:
    """Pretrain as ``config`` says, alone or as one rank of any launcher. Returns the last checkpoint's folder; raises as ``loop.train``."""
    return train(config, lambda world: open_job(config, world))


def open_job(config: RunConfig, world: World) -> Job:
    """Open captions, regions and vocabulary on every rank. Collective."""
    config = with_start(config)
    sources = open_sources(config, world.rank, world.size)
    architecture = model_configuration(config, sources.vocabulary.size, sources.store)
    training = config.training
    weights = ObjectiveWeights(training.msm_weight, training.mrm_weight, training.itm_weight, training.itc_weight)
    captions = f"{sources.samples:,} captions, {len(sources.store):,} images with regions, vocabulary of {sources.vocabulary.size}"
    held_out, validates = _held_out(config, sources), sources.validation is not None
    recalled = () if held_out is None else (held_out.told(config.validation.split),)
    lacking = () if validates else (f"no captions of split {config.validation.split!r}: no validation",)
    job = Job(
        objectives=weights.objectives,
        weights=weights.values,
        batches=sources.training,
        accumulation=sources.training.steps.accumulation,
        samples=sources.samples,
        sample_ids=sources.training.sample_ids,
        places=sources.training.places,
        shown=sources.training.shown,
        build_model=lambda saved: starting_model(config, architecture) if saved is None else InterBertForPreTraining(saved),
        build_step=lambda model: PretrainingStep(model, weights),
        flops=_forward_flops,
        vocabulary=(config.output / "vocab.txt").read_bytes(),
        lowercase=config.data.lowercase,
        digests=sources.digests,
        detector=architecture.detector,
        started=(captions, *lacking, *recalled, *(_too_few_steps(config, sources.samples) if recorded(config.output) is None else ())),
        workers=config.data.workers,
        gradient_checkpointing=config.model.gradient_checkpointing,
        validate=(lambda trained, world: _validate(config, sources, held_out, job, trained, world)) if validates else None,
        validate_every=config.validation.every_steps,
        best=config.validation.best_by if held_out is not None else None,
        prepare_step=_contrasting(config, sources, world) if training.itc_weight > 0 else None,
    )
    return job


def _too_few_steps(config: RunConfig, samples: int) -> Iterator[str]:
    """A line where epochs of few captions are so few steps that fresh weights learn next to nothing in them."""
    steps = steps_of(config, samples)
    if config.training.epochs is not None and config.model.start_from is None and steps < FEW_STEPS:
        yield (
            f"{steps:,} steps ({config.training.epochs:g} epochs of {samples:,} captions) teach fresh weights next to nothing: "
            f"give --training.steps {ENOUGH_FOR_FEW}, or a start (--model.start_from)"
        )


def _contrasting(config: RunConfig, sources: Sources, world: World) -> PrepareStep:
    sampler = sources.training.sampler
    redraw = partial(with_fresh_captions, sampler=sampler) if config.data.batch_negatives > 0 else None
    return contrasting(config.training.global_batch, config.training.seed, world, redraw)


def _forward_flops(config: InterBertConfig, batch: PretrainBatch) -> int:
    """The pass of pairs, and with contrast that of both sides alone; the one before it, without gradients, does not count."""
    counts = BatchCounts.of(batch.inputs.text_lengths, batch.inputs.region_lengths, len(batch.msm_positions), len(batch.mrm_positions))
    if batch.sides is None:
        return forward_flops(config, counts)
    return forward_flops(config, counts) + alone_flops(config, batch.sides.text_lengths, batch.sides.region_lengths)


def starting_model(config: RunConfig, settings: InterBertConfig) -> InterBertForPreTraining:
    """The model with the weights of ``model.start_from``, dropouts and lengths as in ``settings``, or fresh ones (``with_start``).

    Vectors of contrast begin anew where the start has none, and are left behind where the run does not train them.
    """
    start = config.model.start_from
    if start is None:
        return InterBertForPreTraining(settings)
    transformers_logging.disable_progress_bar()
    found = read_config(start)
    for name in (*DROPOUTS, *_OF_THE_RUN):
        setattr(found, name, getattr(settings, name))
    started: InterBertForPreTraining = InterBertForPreTraining.from_pretrained(start, config=found)
    return started


def _held_out(config: RunConfig, sources: Sources) -> HeldOut | None:
    """The gallery that recall is measured on; None where it is not asked for, or the split has no captions."""
    wanted = config.validation
    if not wanted.images or sources.validation is None:
        return None
    return open_held_out(
        wanted.pairs or config.data.pairs, sources.validation.sampler.store, wanted.split, wanted.images, wanted.captions_per_image,
        sources.vocabulary, config.data.max_text_tokens, config.data.max_regions, config.data.max_bad,
    )  # fmt: skip


def _validate(config: RunConfig, sources: Sources, held_out: HeldOut | None, job: Job, trained: Any, world: World) -> dict[str, float]:
    """The losses and accuracies on the fixed validation samples, each counted once over all ranks; and recall on the gallery.

    Contrast compares as many of them at a time as a training step does, the first ones, the next ones, and so on.
    """
    assert sources.validation is not None
    kinds, contrasts = len(job.objectives), config.training.itc_weight > 0
    tallies, counts, ones = torch.zeros(2, kinds, device=world.device), torch.zeros(kinds), torch.ones(kinds, device=world.device)
    batches = validation_batches(sources.validation, config.validation.samples)
    gathering = Gathering(batches.count, world)
    for number in range(len(batches)):
        batch = batches[number]
        here = batch.to(world.device)
        tallies += trained(here, ones)[1]
        counts += counted([batch])
        if contrasts:
            gathering.add(batch, trained(here, None))
    tallies = summed(tallies)
    if contrasts:
        tallies[:, -1] = compare_in_steps(gathering.all(), config.training.global_batch)
    figures = summarise(job, tallies, summed(counts.to(world.device)))
    return figures if held_out is None else figures | recall_figures(trained, held_out, config.validation.candidates, world)
