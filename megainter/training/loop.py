"""Pretraining: one straight loop over global batches, resumable at any published step."""

import logging
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megainter import kernels
from megainter.config import RunConfig, accumulation_steps
from megainter.data.batch import PretrainBatch, validation_batches
from megainter.data.loader import make_loader
from megainter.errors import NoSpaceError, NumericsError, StoppedEarly, UsageError
from megainter.model.configuration import InterBertConfig
from megainter.model.flops import BatchCounts, forward_flops
from megainter.model.interbert import InterBertForPreTraining
from megainter.training import checkpoint, engine
from megainter.training.collective import on_first_rank, summed
from megainter.training.heartbeat import Heartbeat
from megainter.training.metrics import MetricsLog, Throughput, peak_flops
from megainter.training.objectives import ObjectiveWeights, PretrainingStep, summarise
from megainter.training.optimizer import describe, learning_rate
from megainter.training.process import StopRequest, folder_lock
from megainter.training.run_folder import open_run_folder, removed_where_nothing_began, start_log
from megainter.training.sources import Sources, model_configuration, open_sources

log = logging.getLogger("megainter")
PREFIX = "model."  # of parameter names inside PretrainingStep
FAILED_SAVES = 3  # in a row, after which a run that cannot save stops


def pretrain(config: RunConfig) -> Path:
    """Train until ``training.steps``; publishes checkpoints, writes metrics, resumes by itself. Returns the last checkpoint's folder.

    Runs alone or as one rank of any launcher. Raises ``StoppedEarly`` after SIGTERM or SIGINT (state saved), ``NumericsError`` where
    the loss is no longer finite, ``UsageError`` for settings or data that cannot be used.
    """
    stop = StopRequest()
    with ExitStack() as stack:
        world = stack.enter_context(engine.distributed())
        first = world.rank == 0
        if first:
            stack.enter_context(removed_where_nothing_began(config.output))
        start_log(config.output if first else None)
        accumulation = accumulation_steps(config.training, world.size)
        on_first_rank(lambda: _lock(stack, config.output))
        sources = open_sources(config, world.rank, world.size)
        on_first_rank(
            lambda: open_run_folder(
                config, engine.deepspeed_config(config.engine, config.optimizer, config.training, world.size), sources.digests
            )
        )
        total_steps = steps_of(config, sources.samples)
        weights = ObjectiveWeights(config.training.msm_weight, config.training.mrm_weight, config.training.itm_weight)
        saved = on_first_rank(lambda: checkpoint.newest(config.output / "checkpoints", log.warning))
        architecture = model_configuration(config, sources.vocabulary.size, sources.store)
        model = _model(config, architecture, saved)
        train = engine.build_engine(PretrainingStep(model, weights), config.engine, config.optimizer, config.training, world)
        start = _resume(train, saved)
        _describe(config, sources, world, start, total_steps)
        log.info("%s", describe(config.optimizer, engine.inner_optimizer(train).param_groups))
        metrics = MetricsLog(config.output, start, config.tensorboard) if first else None
        steps = stack.enter_context(make_loader(sources.training, start, total_steps, workers=config.data.workers))
        peak = peak_flops(world.device, config.engine.precision)
        meter, (tallies, counts) = Throughput(), _interval(saved, world)
        pulse = Heartbeat(start, total_steps, accumulation)
        failed_saves = 0
        finished = start
        for step in range(start, total_steps):
            waiting = time.perf_counter()
            batches = next(steps)
            meter.waited += time.perf_counter() - waiting
            agreed = summed(torch.cat([_counts(batches), torch.tensor([float(stop.signal_name is not None)])]).to(world.device))
            if agreed[3] > 0:
                break
            clamped = agreed[:3].clamp(min=1)
            engine.set_learning_rate(train, learning_rate(config.optimizer, step, total_steps))
            for micro, batch in enumerate(batches):
                torch.manual_seed(_dropout_seed(config.training.seed, step, micro, world.rank))
                loss, parts = train(batch.to(world.device), clamped)
                train.backward(loss * (world.size * accumulation))
                train.step()
                tallies += parts
                meter.tokens += batch.tokens()
                meter.samples += len(batch.inputs)
                meter.flops += 3 * _forward_flops(architecture, batch)
                pulse.micro_batch(step, micro + 1)
            engine.average_weights(train, config.training.ema_decay)
            counts += agreed[:3]
            finished = step + 1
            meter.steps += 1
            due = finished % config.training.log_every == 0 or finished == total_steps
            if due:
                _report(config, train, metrics, meter, summarise(summed(tallies), counts, weights), finished, total_steps, world, peak)
                tallies, counts = torch.zeros_like(tallies), torch.zeros_like(counts)
                meter.reset()
            pulse.step(finished, reported=due)
            if sources.validation is not None and _due(config.validation.every_steps, finished, total_steps):
                _validate(config, train, sources, weights, world, metrics, finished)
                meter.reset()
            if finished % config.checkpoint.every_steps == 0 and finished < total_steps:
                failed_saves = 0 if _save(config, train, sources, finished, world, summed(tallies), counts) else failed_saves + 1
                if failed_saves >= FAILED_SAVES:
                    raise NoSpaceError(
                        f"{failed_saves} checkpoints in a row could not be written to {config.output}; free space and run the same command"
                    )
                meter.reset()
        if finished > start and not _save(config, train, sources, finished, world, summed(tallies), counts):
            raise NoSpaceError(f"the last checkpoint could not be written to {config.output}; free space and run the same command")
        if metrics is not None:
            metrics.close()
        if finished < total_steps:
            raise StoppedEarly(f"stopped at step {finished:,} of {total_steps:,} on request; run the same command to go on")
        log.info("finished: %s", config.output / "checkpoints" / checkpoint.step_name(finished))
    return config.output / "checkpoints" / checkpoint.step_name(finished)


def steps_of(config: RunConfig, samples: int) -> int:
    """Optimiser steps of the run: as set, or epochs of ``samples`` in global batches."""
    if config.training.steps is not None:
        return config.training.steps
    assert config.training.epochs is not None  # one of the two is set, by config
    return max(1, round(config.training.epochs * samples / config.training.global_batch))


def _lock(stack: ExitStack, output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    stack.enter_context(folder_lock(output))


def _due(every: int, finished: int, total: int) -> bool:
    return finished == total or (every > 0 and finished % every == 0)


def _dropout_seed(seed: int, step: int, micro: int, rank: int) -> int:
    """Dropout is a function of (seed, step, micro-batch, rank): a resumed run repeats it without saving generators."""
    return (((seed * 1_000_003 + step) * 4_099 + micro) * 65_537 + rank) % (1 << 63)


def _counts(batches: list[PretrainBatch]) -> Tensor:
    """Masked tokens, scored regions and samples of this rank's micro-batches, float64-exact in float32 up to 16 M."""
    return torch.tensor([batch.counts() for batch in batches], dtype=torch.float32).sum(dim=0)


def _forward_flops(config: InterBertConfig, batch: PretrainBatch) -> int:
    counts = BatchCounts.of(batch.inputs.text_lengths, batch.inputs.region_lengths, len(batch.msm_positions), len(batch.mrm_positions))
    return forward_flops(config, counts)


def _model(config: RunConfig, settings: InterBertConfig, saved: checkpoint.Checkpoint | None) -> InterBertForPreTraining:
    """The model with the weights of the checkpoint, of ``model.start_from``, or fresh ones drawn by the seed."""
    torch.manual_seed(config.training.seed)
    if saved is None and config.model.start_from is not None:
        model = InterBertForPreTraining.from_pretrained(config.model.start_from)
        unlike = [
            name
            for name in ("vocab_size", "hidden_size", "region_feature_size", "num_region_classes")
            if getattr(model.config, name) != getattr(settings, name)
        ]
        if unlike:
            raise UsageError(f"model.start_from {config.model.start_from} differs from this run in {', '.join(unlike)}")
        model.config.max_regions, model.config.max_text_tokens = settings.max_regions, settings.max_text_tokens
    else:
        model = InterBertForPreTraining(settings)
    if config.model.gradient_checkpointing:
        model.activation_checkpointing_enable()
    if saved is not None:
        load_weights(model, saved)
    return model.float().train()


def load_weights(model: InterBertForPreTraining, saved: checkpoint.Checkpoint) -> None:
    """Copy a checkpoint's fp32 weights into ``model``, by name; ``DamagedError`` where one is missing."""
    with checkpoint.reader(saved) as read, torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(read(engine.WEIGHTS, PREFIX + name))


def _resume(train: Any, saved: checkpoint.Checkpoint | None) -> int:
    """Restore the optimiser; returns the number of finished steps."""
    if saved is None:
        return 0
    with checkpoint.reader(saved) as read:
        engine.restore_state(train, read, saved.state["updates"])
    engine.set_loss_scale(train, saved.state["loss_scale"])
    log.info("resuming from %s", saved.folder)
    return saved.step


def _interval(saved: checkpoint.Checkpoint | None, world: engine.World) -> tuple[Tensor, Tensor]:
    """Tallies [2, 3] (this rank's) and counts [3] since the last record of the metrics, as the checkpoint has them."""
    tallies, counts = torch.zeros(2, 3), torch.zeros(3)
    since = saved.state.get("since_record") if saved is not None else None
    if since is not None:
        counts = torch.tensor(since["counts"])
        tallies = torch.tensor(since["tallies"]) if world.rank == 0 else tallies
    return tallies.to(world.device), counts.to(world.device)


def _save(config: RunConfig, train: Any, sources: Sources, finished: int, world: engine.World, tallies: Tensor, counts: Tensor) -> bool:
    """Publish a checkpoint on all ranks; False (and a loud line) where it could not be written."""
    began = time.perf_counter()
    state = {"step": finished, "updates": engine.update_count(train), "samples": finished * config.training.global_batch,
             "loss_scale": engine.loss_scale(train), "digests": sources.digests, "lowercase": config.data.lowercase,
             "since_record": {"tallies": tallies.tolist(), "counts": counts.tolist()}}  # fmt: skip
    files = {
        "config.json": train.module.model.config.to_json_string(use_diff=False).encode(),
        "vocab.txt": (config.output / "vocab.txt").read_bytes(),
    }
    failure = checkpoint.publish(config.output / "checkpoints", state, engine.owned_state(train, world), files, config.checkpoint.keep)
    if failure is not None:
        log.error("checkpoint of step %d NOT written: %s; older checkpoints stand, training goes on", finished, failure)
        return False
    log.info("checkpoint %s in %.1f s", checkpoint.step_name(finished), time.perf_counter() - began)
    return True


@torch.no_grad()
def _validate(
    config: RunConfig,
    train: Any,
    sources: Sources,
    weights: ObjectiveWeights,
    world: engine.World,
    metrics: MetricsLog | None,
    finished: int,
) -> None:
    """The three losses and accuracies on the fixed validation samples, each counted once over all ranks."""
    assert sources.validation is not None
    train.eval()
    tallies, counts = torch.zeros(2, 3, device=world.device), torch.zeros(3)
    ones = torch.ones(3, device=world.device)
    batches = validation_batches(sources.validation, config.validation.samples)
    for number in range(len(batches)):
        batch = batches[number]
        tallies += train(batch.to(world.device), ones)[1]
        counts += _counts([batch])
    train.train()
    values = summarise(summed(tallies), summed(counts.to(world.device)), weights)
    if metrics is not None:
        metrics.write("validation", finished, values)
    parts = ", ".join(f"{name} {values[f'{name}_loss']:.3f} ({values[f'{name}_accuracy']:.1%})" for name in ("msm", "mrm", "itm"))
    log.info("validation at step %d: loss %.3f; %s", finished, values["loss"], parts)


def _report(
    config: RunConfig, train: Any, metrics: MetricsLog | None, meter: Throughput, values: dict[str, float], finished: int, total: int,
    world: engine.World, peak: float | None,
) -> None:  # fmt: skip
    """One line, one record; collective, as throughput is summed over ranks."""
    work = summed(
        torch.tensor([meter.samples, meter.tokens, meter.flops, meter.waited / world.size], dtype=torch.float64, device=world.device)
    )
    meter.samples, meter.tokens, meter.flops, meter.waited = int(work[0]), int(work[1]), int(work[2]), float(work[3])
    rates = meter.rates(world.size, peak)
    rate = engine.current_learning_rate(train)
    values = values | {"learning_rate": rate, "gradient_norm": engine.gradient_norm(train), "loss_scale": engine.loss_scale(train)} | rates
    if metrics is not None:
        metrics.write("train", finished, values)
    left = (total - finished) * values["step_seconds"]
    utilisation = f", MFU {values['model_flop_utilisation']:.1%}" if "model_flop_utilisation" in values else ""
    log.info(
        "step %d/%d loss %.3f (msm %.3f mrm %.3f itm %.3f) lr %.2e, %.0f samples/s, %.0f tokens/s, "
        "waiting for data %.0f %%%s, %.1f min left",
        finished, total, values["loss"], values["msm_loss"], values["mrm_loss"], values["itm_loss"], rate, values["samples_per_second"],
        values["tokens_per_second"], 100 * values["data_wait_share"], utilisation, left / 60,
    )  # fmt: skip
    if not torch.isfinite(torch.tensor(values["loss"])):
        raise NumericsError(
            f"the loss is no longer finite at step {finished}; go on from the last checkpoint with a lower optimizer.learning_rate"
        )


def _describe(config: RunConfig, sources: Sources, world: engine.World, start: int, total: int) -> None:
    """The start-up lines: what is trained on what, and which form of each kernel runs and why."""
    log.info("%d process(es) on %s, %s, ZeRO stage %d", world.size, world.device.type, config.engine.precision, config.engine.zero_stage)
    captions, images = f"{sources.samples:,}", f"{len(sources.store):,}"
    log.info("%s captions, %s images with regions, vocabulary of %d", captions, images, sources.vocabulary.size)
    log.info("steps %d to %d of %d samples", start, total, config.training.global_batch)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[config.engine.precision]
    for choice in kernels.choices(world.device, dtype, config.model.attention_probs_dropout_prob):
        log.info("kernel %s", choice)
    if sources.validation is None:
        log.info("no captions of split %r: no validation", config.validation.split)
