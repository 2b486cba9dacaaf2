"""Pretraining as a job of the training loop: the three objectives on captions and regions."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from megainter.config.settings import ModelSettings, RunConfig
from megainter.errors import UsageError
from megainter.model.configuration import InterBertConfig
from megainter.model.flops import BatchCounts, forward_flops
from megainter.model.folder import read_config
from megainter.model.interbert import InterBertForPreTraining
from megainter.tasks.pretraining.batches import PretrainBatch, validation_batches
from megainter.tasks.pretraining.objective import OBJECTIVES, ObjectiveWeights, PretrainingStep
from megainter.tasks.pretraining.sources import Sources, model_configuration, open_sources
from megainter.training.collective import summed
from megainter.training.job import Job, summarise
from megainter.training.loop import counted, train
from megainter.training.world import World

DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "region_hidden_dropout_prob")


def pretrain(config: RunConfig) -> Path:
    """Pretrain as ``config`` says, alone or as one rank of any launcher. Returns the last checkpoint's folder; raises as ``loop.train``."""
    return train(config, lambda world: open_job(config, world))


def open_job(config: RunConfig, world: World) -> Job:
    """Open captions, regions and vocabulary on every rank. Collective."""
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
    """The model with the weights of ``model.start_from``, or fresh ones.

    A start brings its architecture; dropouts are the run's. ``UsageError`` where the data, or a size that [model] states, contradicts it.
    """
    start = config.model.start_from
    if start is None:
        return InterBertForPreTraining(settings)
    transformers_logging.disable_progress_bar()
    found = read_config(start)
    stated = [field.name for field in dataclasses.fields(ModelSettings) if getattr(config.model, field.name) != field.default]
    of_the_data = ["vocab_size", "region_feature_size", "num_region_classes"]
    changeable = ("start_from", "gradient_checkpointing", *DROPOUTS)
    unlike = [
        f"{name} ({getattr(found, name)}, not {getattr(settings, name)})"
        for name in dict.fromkeys(of_the_data + stated)
        if name not in changeable and getattr(found, name) != getattr(settings, name)
    ]
    if unlike:
        raise UsageError(f"model.start_from {start} differs from this run in {', '.join(unlike)}")
    for name in (*DROPOUTS, "max_regions", "max_text_tokens"):
        setattr(found, name, getattr(settings, name))
    return InterBertForPreTraining.from_pretrained(start, config=found)


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
