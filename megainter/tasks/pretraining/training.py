"""Pretraining as a job of the training loop: the three objectives on captions and regions."""

from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from megainter.config.settings import RunConfig
from megainter.model.configuration import InterBertConfig
from megainter.model.flops import BatchCounts, forward_flops
from megainter.model.folder import read_config
from megainter.model.interbert import InterBertForPreTraining
from megainter.tasks.pretraining.batches import PretrainBatch, validation_batches
from megainter.tasks.pretraining.objective import OBJECTIVES, ObjectiveWeights, PretrainingStep
from megainter.tasks.pretraining.sources import Sources, model_configuration, open_sources
from megainter.tasks.pretraining.starting import DROPOUTS, with_start
from megainter.training.collective import summed
from megainter.training.job import Job, summarise
from megainter.training.loop import counted, train
from megainter.training.world import World


def pretrain(config: RunConfig) -> Path:
    """Pretrain as ``config`` says, alone or as one rank of any launcher. Returns the last checkpoint's folder; raises as ``loop.train``."""
    return train(config, lambda world: open_job(config, world))


def open_job(config: RunConfig, world: World) -> Job:
    """Open captions, regions and vocabulary on every rank. Collective."""
    config = with_start(config)
    sources = open_sources(config, world.rank, world.size)
    architecture = model_configuration(config, sources.vocabulary.size, sources.store)
    weights = ObjectiveWeights(config.training.msm_weight, config.training.mrm_weight, config.training.itm_weight)
    captions = f"{sources.samples:,} captions, {len(sources.store):,} images with regions, vocabulary of {sources.vocabulary.size}"
    lacking = () if sources.validation is not None else (f"no captions of split {config.validation.split!r}: no validation",)
    job = Job(
        objectives=OBJECTIVES,
        weights=(weights.msm, weights.mrm, weights.itm),
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
        started=(captions, *lacking),
        workers=config.data.workers,
        gradient_checkpointing=config.model.gradient_checkpointing,
        validate=(lambda trained, world: _validate(config, sources, job, trained, world)) if sources.validation is not None else None,
        validate_every=config.validation.every_steps,
    )
    return job


def _forward_flops(config: InterBertConfig, batch: PretrainBatch) -> int:
    counts = BatchCounts.of(batch.inputs.text_lengths, batch.inputs.region_lengths, len(batch.msm_positions), len(batch.mrm_positions))
    return forward_flops(config, counts)


def starting_model(config: RunConfig, settings: InterBertConfig) -> InterBertForPreTraining:
    """The model with the weights of ``model.start_from``, dropouts and lengths as in ``settings``, or fresh ones (``with_start``)."""
    start = config.model.start_from
    if start is None:
        return InterBertForPreTraining(settings)
    transformers_logging.disable_progress_bar()
    found = read_config(start)
    for name in (*DROPOUTS, "max_regions", "max_text_tokens"):
        setattr(found, name, getattr(settings, name))
    started: InterBertForPreTraining = InterBertForPreTraining.from_pretrained(start, config=found)
    return started


def _validate(config: RunConfig, sources: Sources, job: Job, trained: Any, world: World) -> dict[str, float]:
    """The three losses and accuracies on the fixed validation samples, each counted once over all ranks."""
    assert sources.validation is not None
    tallies, counts = torch.zeros(2, len(OBJECTIVES), device=world.device), torch.zeros(len(OBJECTIVES))
    ones = torch.ones(len(OBJECTIVES), device=world.device)
    batches = validation_batches(sources.validation, config.validation.samples)
    for number in range(len(batches)):
        batch = batches[number]
        tallies += trained(batch.to(world.device), ones)[1]
        counts += counted([batch])
    return summarise(job, summed(tallies), summed(counts.to(world.device)))
