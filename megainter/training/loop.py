"""Training: one straight loop over global batches, resumable at any published step. What is trained is a ``Job``."""

import logging
import math
import shlex
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from megainter import kernels
from megainter.config.portions import check_portions
from megainter.errors import NoSpaceError, NumericsError, StoppedEarly
from megainter.files import as_json
from megainter.model.configuration import InterBertConfig
from megainter.process import StopRequest, folder_lock
from megainter.training import checkpoint, engine, hangs, zero_state
from megainter.training.arrival import Arrivals
from megainter.training.collective import on_first_rank, summed
from megainter.training.ema import decay_at
from megainter.training.guard import StepGuard, Verdict, poisoned, said, told
from megainter.training.heartbeat import Heartbeat
from megainter.training.job import Job, RunSettings, summarise, trained_on_what_is_validated
from megainter.training.metrics import MetricsLog, Throughput, memory_held, peak_flops, shown_figures
from megainter.training.optimizer import describe, learning_rate
from megainter.training.passed_over import pass_over, read_passed_over
from megainter.training.precision import with_precision
from megainter.training.profile import StepProfile
from megainter.training.renewing import Steps
from megainter.training.run_folder import open_run_folder, removed_where_nothing_began, start_log
from megainter.training.saving import Outcome, Saver, Target
from megainter.training.stopping import StopVote
from megainter.training.stragglers import TOLD, OwnTime, slowest
from megainter.training.tracked import tracked
from megainter.training.verify import Repetition
from megainter.training.watchdog import Watchdog
from megainter.training.world import World
from megainter.transfers import read, sent

log = logging.getLogger("megainter")
PREFIX = "model."  # of parameter names inside the step module
BEST = "best"  # folder of the best checkpoint, beside `checkpoints`
FAILED_SAVES = 3  # in a row, after which a run that cannot save stops
NOTICED = 0.1  # s that a save waited for the one before: it is said


def train(config: RunSettings, open_job: Callable[[World], Job]) -> Path:
    """Train until ``training.steps``; publishes checkpoints, writes metrics, resumes by itself. Returns the last checkpoint's folder.

    Runs alone or as one rank of any launcher; ``open_job`` opens the data on every rank (it may be collective). Raises ``StoppedEarly``
    after SIGTERM, SIGINT or SIGUSR1 (state saved), ``NumericsError`` where updates in a row had to be left out, ``UsageError`` for settings
    or data that cannot be used.
    """
    stop = StopRequest()
    with ExitStack() as stack:
        run = _open(stack, config, open_job)
        if run.start >= run.total_steps:
            return _already_finished(run)
        if run.start and run.metrics is not None:
            run.metrics.write("resumed", run.start, {"ranks": run.world.size})
        while True:
            try:
                return _train(run, stop)
            except _RollBackError as spike:
                run = _rolled_back(run, spike.verdict)


def _train(run: "Run", stop: StopRequest) -> Path:
    """The steps of a run that is open, as ``train``; ``_RollBackError`` on all ranks where it is to go on from a checkpoint."""
    config, job, trained, world, watch = run.config, run.job, run.trained, run.world, run.watch
    with Steps(job, trained, run.start, run.total_steps, watch) as steps:
        arrivals, vote = Arrivals(world.device), StopVote(world.device)
        guard = StepGuard(world.device, searching=config.engine.precision == "fp16", spikes=run.trained.spikes)
        meter, own, (tallies, counts) = Throughput(), OwnTime(world.device), _interval(run)
        repetition = Repetition(trained, config.training.verify_every, world)
        pulse = Heartbeat(run.start, run.total_steps, job.accumulation)
        profile = StepProfile(config.training.profile_steps, trained.module, config.output, world)
        if warning := profile.warn_if_short(run.total_steps - run.start):
            log.warning("%s", warning)
        finished = run.start
        for step in range(run.start, run.total_steps):
            # The step's micro-batches, made ahead by the loader.
            if steps.renew(step):
                meter.reset()
            watch.at(hangs.DATA, step)
            waiting = time.perf_counter()
            batches = next(steps)
            waited = time.perf_counter() - waiting
            meter.waited += waited
            if job.prepare_step is not None and step not in run.passed_over:
                watch.at(hangs.FORWARD, step)
                batches = job.prepare_step(trained, step, {world.rank: batches})[world.rank]

            # What all ranks together score, whether one was asked to stop, how far a save is: one sum, which no host waits for on a GPU.
            watch.at(hangs.AGREEING, step)
            wishes = torch.tensor([float(stop.asked), run.saver.ready()])
            agreed = summed(sent(torch.cat([counted(batches), wishes]), world.device))
            scored = agreed[:-2]
            divisors = scored.clamp(min=1)
            _tell_saved(run, run.saver.note(agreed[-1]))
            if vote.passed(agreed[-2]):
                break

            # One update.
            engine.set_learning_rate(trained, learning_rate(config.optimizer, step, run.total_steps))
            before, share = tallies.clone(), torch.zeros((), device=world.device)
            passed_over = step in run.passed_over
            for micro, (batch, here) in repetition.each(step, partial(arrivals.each, batches)) if not passed_over else ():
                watch.at(hangs.FORWARD, step)
                torch.manual_seed(dropout_seed(config.training.seed, step, micro, world.rank))
                with own.forward():
                    loss, parts = trained(here, divisors)
                watch.at(hangs.BACKWARD, step)
                trained.backward(poisoned(loss, world.size * job.accumulation))  # the engine divides by both
                watch.at(hangs.UPDATE, step)
                if not repetition.held:
                    share += loss.detach()
                    if micro + 1 == len(batches):
                        engine.expect_loss(trained, share)
                trained.step()
                repetition.note(parts)
                if repetition.held:
                    continue
                tallies += parts
                meter.add(batch.tokens(), len(batch.inputs), 3 * job.flops(trained.module.model.config, batch))
                pulse.micro_batch(step, micro + 1)
            if not passed_over:
                engine.average_weights(trained, decay_at(config.training, step + 1))
            profile.step()
            finished = step + 1
            meter.steps += 1
            own.step(waited)

            # Was it made? A step whose loss or gradient is not finite is left out by all ranks, and counts for nothing.
            left_out = engine.left_out(trained) if not passed_over else 1.0
            tallies, counts = _kept(before, tallies, left_out), _kept(counts, counts + scored, left_out)
            if not passed_over:
                _tell(run, guard, guard.note(finished, engine.verdict(trained)))

            # Once in a while: report, validate, save. Here the host waits for the device.
            watch.at(hangs.REPORTING, finished)
            due = finished % config.training.log_every == 0 or finished == run.total_steps
            if due:
                _tell(run, guard, guard.settle())
                _report(run, meter, own, tallies, counts, finished, guard.total)
                tallies, counts = torch.zeros_like(tallies), torch.zeros_like(counts)
                meter.reset()
            pulse.step(finished, reported=due)
            if job.validate is not None and _due(job.validate_every, finished, run.total_steps):
                values = _validate(run, finished)
                if _sound(run, guard, finished):
                    _keep_best(run, finished, values)
                meter.reset()
            if finished % config.checkpoint.every_steps == 0 and finished < run.total_steps and _sound(run, guard, finished):
                _save(run, finished, summed(tallies), counts)
                meter.reset()

        sound = finished > run.start and _sound(run, guard, finished)
        watch.at(hangs.SAVING, finished)
        if sound:
            _save_last(run, finished, summed(tallies), counts)
        _tell_saved(run, run.saver.finish())
        if run.metrics is not None:
            run.metrics.close()
        if finished == run.total_steps and finished > run.start and not sound:
            raise NumericsError(f"the last {guard.in_a_row} updates were left out: the run did not end well; {_remedy(run)}")
        if finished < run.total_steps:
            raise StoppedEarly(f"stopped at step {finished:,} of {run.total_steps:,} on request; run the same command to go on")
        log.info("finished: %s", config.output / "checkpoints" / checkpoint.step_name(finished))
    return config.output / "checkpoints" / checkpoint.step_name(finished)


def _already_finished(run: "Run") -> Path:
    """Say that there is nothing to do, and what would be; the last checkpoint's folder."""
    if run.metrics is not None:
        run.metrics.close()
    last = run.config.output / "checkpoints" / checkpoint.step_name(run.start)
    length = "steps" if run.config.training.steps is not None else "epochs"
    more = f"a larger training.{length} goes on from there, with the learning rate of a run that long; another --output begins anew"
    asked = (
        f"{run.start} of {run.total_steps} steps" if run.start == run.total_steps else f"{run.start} steps, {run.total_steps} are asked for"
    )
    log.info("already finished: %s, %s; %s", last, asked, more)
    return last


@dataclass(frozen=True)
class Run:
    """A run that is open: what its reports, validations and checkpoints need. ``metrics`` is None on all ranks but the first."""

    config: RunSettings
    job: Job
    world: World
    trained: Any  # the DeepSpeed engine over the job's step module
    watch: Watchdog
    metrics: MetricsLog | None
    saver: Saver
    saved: checkpoint.Checkpoint | None  # where it goes on from
    start: int  # finished steps
    passed_over: frozenset[int]  # steps, from 0, whose batches are left out
    total_steps: int
    peak: float | None  # FLOP/s of one device, where known


def _open(stack: ExitStack, config: RunSettings, open_job: Callable[[World], Job]) -> Run:
    """Join the group, take the run folder, open the data, build the model and go on where the newest checkpoint stands. Collective."""
    world = stack.enter_context(engine.distributed())
    first = world.rank == 0
    if first:
        stack.enter_context(removed_where_nothing_began(config.output))
    start_log(config.output if first else None)

    check_portions(config.training, world.size)
    on_first_rank(lambda: _lock(stack, config.output))
    watch = stack.enter_context(Watchdog(config.hangs, config.output, world))
    asked, config = {"engine.precision": config.engine.precision}, with_precision(config, world.device)
    engine.check_settings(config.engine, config.optimizer, config.training, world)
    job = open_job(world)
    ds_config = engine.deepspeed_config(config.engine, config.optimizer, config.training, world.size, job.accumulation)
    total_steps = steps_of(config, job.samples)
    saved = on_first_rank(lambda: _newest(config.output))
    finished = saved is not None and saved.step >= total_steps
    on_first_rank(lambda: open_run_folder(config, ds_config, dict(job.digests), asked, job.detector, finished))

    model = starting_model(config, job, saved)
    trained = engine.build_engine(job.build_step(model), config.engine, config.optimizer, config.training, world, job.accumulation)
    start = _resume(trained, saved)
    if start < total_steps:
        _describe(config, job, model, world, start, total_steps)
    log.info("%s", describe(config.optimizer, zero_state.inner_optimizer(trained).param_groups))
    saver = stack.enter_context(Saver(trained, world))
    metrics = MetricsLog(config.output, start, _events_here(config)) if first else None
    if first:
        stack.enter_context(tracked(config.output, config.tracking))
    return Run(
        config=config,
        job=job,
        world=world,
        trained=trained,
        watch=watch,
        metrics=metrics,
        saver=saver,
        saved=saved,
        start=start,
        passed_over=_passed_over(config.output),
        total_steps=total_steps,
        peak=peak_flops(world.device, config.engine.precision),
    )


def _events_here(config: RunSettings) -> bool:
    """Whether this process writes TensorBoard's events itself: not where that is one of the trackers."""
    return config.tensorboard and "tensorboard" not in config.tracking


def steps_of(config: RunSettings, samples: int) -> int:
    """Optimiser steps of the run: as set, or epochs of ``samples`` in global batches."""
    if config.training.steps is not None:
        return config.training.steps
    assert config.training.epochs is not None  # one of the two is set, by config
    return max(1, round(config.training.epochs * samples / config.training.global_batch))


def _lock(stack: ExitStack, output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    stack.enter_context(folder_lock(output))


def _newest(output: Path) -> checkpoint.Checkpoint | None:
    """The checkpoint to go on from; what a killed run left unfinished is removed."""
    for root in (output / "checkpoints", output / BEST):
        checkpoint.remove_unfinished(root)
    return checkpoint.newest(output / "checkpoints", log.warning)


def _due(every: int, finished: int, total: int) -> bool:
    return finished == total or (every > 0 and finished % every == 0)


def dropout_seed(seed: int, step: int, micro: int, rank: int) -> int:
    """Dropout is a function of (seed, step, micro-batch, rank): a resumed run repeats it without saving generators."""
    return (((seed * 1_000_003 + step) * 4_099 + micro) * 65_537 + rank) % (1 << 63)


def counted(batches: list[Any]) -> Tensor:
    """What this rank's micro-batches count for each objective, float32 [K]: exact up to 16 M."""
    return torch.tensor([batch.counts() for batch in batches], dtype=torch.float32).sum(dim=0)


def starting_model(config: RunSettings, job: Job, saved: checkpoint.Checkpoint | None) -> PreTrainedModel:
    """The model with the weights of the checkpoint, or those it starts from, drawn by the seed where they are fresh."""
    torch.manual_seed(config.training.seed)
    model = job.build_model(InterBertConfig.from_json_file(saved.folder / "config.json") if saved is not None else None)
    model.config.architectures = [type(model).__name__]
    if job.gradient_checkpointing:
        _recompute_activations(model)
    if saved is not None:
        load_weights(model, saved)
    trainable: PreTrainedModel = model.float().train()
    return trainable


def _recompute_activations(model: PreTrainedModel) -> None:
    """Gradient checkpointing, by the name that the installed transformers has for it: it was renamed within version 5."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()


def load_weights(model: PreTrainedModel, saved: checkpoint.Checkpoint) -> None:
    """Copy a checkpoint's fp32 weights into ``model``, by name; ``DamagedError`` where one is missing."""
    with checkpoint.reader(saved) as read, torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(read(zero_state.WEIGHTS, PREFIX + name))


def _resume(trained: Any, saved: checkpoint.Checkpoint | None) -> int:
    """Restore the optimiser; returns the number of finished steps."""
    if saved is None:
        return 0
    with checkpoint.reader(saved) as read:
        zero_state.restore_state(trained, read, saved.state["updates"])
    engine.restore_decisions(trained, saved.state)
    log.info("resuming from %s", saved.folder)
    return saved.step


def _interval(run: Run) -> tuple[Tensor, Tensor]:
    """Tallies [2, K] (this rank's) and counts [K] since the last record of the metrics, as the checkpoint has them."""
    kinds = len(run.job.objectives)
    tallies, counts = torch.zeros(2, kinds), torch.zeros(kinds)
    since = run.saved.state.get("since_record") if run.saved is not None else None
    if since is not None:
        counts = torch.tensor(since["counts"])
        tallies = torch.tensor(since["tallies"]) if run.world.rank == 0 else tallies
    return tallies.to(run.world.device), counts.to(run.world.device)


def _kept(before: Tensor, after: Tensor, left_out: Tensor | float) -> Tensor:
    """``after``, or ``before`` where the step was left out; without the host's knowing where the device knows."""
    if isinstance(left_out, Tensor):
        return torch.where(left_out > 0, before, after)
    return before if left_out else after


def _tell(run: Run, guard: StepGuard, verdicts: list[Verdict]) -> None:
    """Say which updates were left out or spikes, of which samples; ``NumericsError`` where too many in a row. The same on all ranks."""
    for verdict in verdicts:
        if verdict.spike and run.config.training.spike_action == "roll_back" and _last_checkpoint(run) is not None:
            raise _RollBackError(verdict)
        if run.metrics is not None:
            kind, values = told(verdict, guard.in_a_row, engine.loss_scale(run.trained))
            run.metrics.write(kind, verdict.step, values | {"samples": run.job.sample_ids(verdict.step - 1)})
        log.warning("%s", said(verdict, guard.in_a_row))
    if verdicts and guard.in_a_row >= run.config.training.max_skipped:
        first = verdicts[-1].step - guard.in_a_row + 1
        again = shlex.join(["megainter", "replay", str(run.config.output), "--step", str(first)])
        raise NumericsError(
            f"{guard.in_a_row} updates in a row were left out, from step {first:,} on: loss or gradient not finite or a spike "
            f"(training.max_skipped); look at it: {again}; {_remedy(run, 0 if verdicts[-1].spike else first)}"
        )


class _RollBackError(Exception):
    """A spike because of which the run is to go back to its last checkpoint; raised on all ranks alike, and caught by ``train``."""

    def __init__(self, verdict: Verdict) -> None:
        self.verdict = verdict


def _last_checkpoint(run: Run) -> checkpoint.Checkpoint | None:
    """The newest whole checkpoint, one that is still being saved waited for. Collective."""
    _tell_saved(run, run.saver.finish())
    return on_first_rank(lambda: checkpoint.newest(run.config.output / "checkpoints", log.warning))


def _passed_over(output: Path) -> frozenset[int]:
    """Steps, from 0, that ``left_out.json`` names. Collective."""
    return frozenset(entry["step"] - 1 for entry in on_first_rank(lambda: read_passed_over(output)))


def _rolled_back(run: Run, spike: Verdict) -> Run:
    """The run as its last checkpoint has it, to pass over the batch of a spike; ``NumericsError`` after too many. Collective."""
    output, most = run.config.output, run.config.training.max_roll_backs
    if len(run.passed_over) >= most:
        raise NumericsError(f"{said(spike, 1)}, after {most} returns to a checkpoint (training.max_roll_backs); {_remedy(run)}")
    saved = _last_checkpoint(run)
    assert saved is not None  # looked for before
    run.watch.at(hangs.STARTING, saved.step)
    entry = {**told(spike, 1, 1.0)[1], "step": spike.step, "rolled_back_to": saved.step, "samples": run.job.sample_ids(spike.step - 1)}
    on_first_rank(lambda: pass_over(output, entry))

    with checkpoint.reader(saved) as read_saved:
        engine.roll_back(run.trained, read_saved, saved.state, run.world)
    if run.metrics is not None:
        run.metrics.close()
        metrics = MetricsLog(output, saved.step, _events_here(run.config))
        metrics.write("rolled_back", saved.step, {"spike": entry})
    log.warning("%s; back to %s, its batch is passed over from now on", said(spike, 1), saved.folder)
    return replace(
        run,
        saved=saved,
        start=saved.step,
        passed_over=_passed_over(output),
        metrics=metrics if run.metrics is not None else None,
    )


def _remedy(run: Run, first: int = 0) -> str:
    """What to do after numbers went wrong: from where the run can go on, and how. Collective, as a save in flight is waited for.

    ``first``: the step from which on nothing was finite. Where the run had begun just before it, with the newest checkpoint, another rate
    does not help.
    """
    _tell_saved(run, run.saver.finish())
    newest = checkpoint.newest(run.config.output / "checkpoints", log.warning)
    if newest is not None and newest.step == run.start == first - 1:
        return (
            f"the first of them came straight from {newest.folder}, whose weights may be too far gone: move it away, and the same command "
            "goes on from the one before it, or from the beginning (the samples are in metrics.jsonl)"
        )
    there = f"{newest.folder} stands" if newest is not None else "there is no checkpoint yet"
    return f"{there}; go on with a lower optimizer.learning_rate (the samples are in metrics.jsonl)"


def _sound(run: Run, guard: StepGuard, finished: int) -> bool:
    """Whether the last update was made: what stands after one that was left out may be what made the next ones impossible."""
    _tell(run, guard, guard.settle())
    if not guard.sound:
        log.error("checkpoint of step %d NOT written: the last %d updates were left out; those before it stand", finished, guard.in_a_row)
    return guard.sound


def _save(run: Run, finished: int, tallies: Tensor, counts: Tensor) -> None:
    """Begin to publish a checkpoint, on all ranks."""
    run.watch.at(hangs.SAVING, finished)
    settings = run.config.checkpoint
    since = {"since_record": {"tallies": tallies.tolist(), "counts": counts.tolist()}}
    _publish(run, finished, run.config.output / "checkpoints", settings.keep, settings.keep_every, since)


def _save_last(run: Run, finished: int, tallies: Tensor, counts: Tensor) -> None:
    """Publish the last checkpoint and wait for it; once more where it failed, as its process may have been killed."""
    for _ in range(2):
        _save(run, finished, tallies, counts)
        _tell_saved(run, run.saver.finish())
        if run.saver.is_published(run.config.output / "checkpoints"):
            return
    raise NoSpaceError(f"the last checkpoint could not be written to {run.config.output}; free space and run the same command")


def _publish(run: Run, finished: int, root: Path, keep: int, keep_every: int, more: dict[str, Any]) -> None:
    """Begin to publish a checkpoint in ``root``. Collective."""
    job, trained = run.job, run.trained
    state = {"step": finished, "updates": zero_state.update_count(trained), "samples": finished * run.config.training.global_batch,
             "loss_scale": engine.loss_scale(trained), "digests": dict(job.digests), "lowercase": job.lowercase,
             "spikes": trained.spikes.state() if trained.spikes is not None else None, **more}  # fmt: skip
    configuration = trained.module.model.config.to_json_string(use_diff=False).encode()
    files = {"config.json": configuration, "vocab.txt": job.vocabulary, **job.files, "trainer.json": as_json(state)}
    _tell_saved(run, run.saver.begin(Target(root, finished, files, keep, keep_every)))


def _tell_saved(run: Run, outcomes: list[Outcome]) -> None:
    """Say and record how saves ended. ``NumericsError`` where what was saved is not finite, ``NoSpaceError`` where saves fail in a row."""
    for outcome in outcomes:
        if run.metrics is not None:
            run.metrics.write("checkpoint", outcome.step, outcome.record())
        name, best = checkpoint.step_name(outcome.step), outcome.root.name == BEST
        if outcome.not_finite is not None:
            raise NumericsError(f"{outcome.not_finite} is not finite at step {outcome.step:,}: nothing was published of it; {_remedy(run)}")
        if outcome.failure is not None:
            what = "the best checkpoint so far," if best else "checkpoint of"
            log.error("%s step %d NOT written: %s; those before it stand, training goes on", what, outcome.step, outcome.failure)
        else:
            stall = f"{outcome.stall:.2f} s" + (f" ({outcome.waited:.2f} s for the one before)" if outcome.waited > NOTICED else "")
            log.info("%s is in %s after %.1f s; training stood still for %s", name, outcome.root.name, outcome.duration, stall)
        if outcome.left is not None:
            log.warning("%s", outcome.left)
        _count_failed(run, outcome)


def _count_failed(run: Run, outcome: Outcome) -> None:
    """``NoSpaceError`` after ``FAILED_SAVES`` in a row; those of the best checkpoint do not count."""
    if outcome.root.name == BEST:
        return
    run.saver.failed_in_a_row = 0 if outcome.published else run.saver.failed_in_a_row + 1
    if run.saver.failed_in_a_row >= FAILED_SAVES:
        raise NoSpaceError(
            f"{FAILED_SAVES} checkpoints in a row could not be written to {run.config.output}; free space and run the same command"
        )


@torch.no_grad()
def _validate(run: Run, finished: int) -> dict[str, float]:
    """The job's validation figures, of the averaged weights where the best checkpoint is chosen by them and there is an average."""
    assert run.job.validate is not None
    run.watch.at(hangs.VALIDATION, finished)
    run.trained.eval()
    averaged = run.config.training.ema_decay > 0 and run.job.best is not None
    with engine.averaged_weights(run.trained, run.world, averaged):
        values = run.job.validate(run.trained, run.world)
    run.trained.train()
    if run.metrics is not None:
        run.metrics.write("validation", finished, values)
    log.info("validation at step %d%s: %s", finished, " (averaged weights)" if averaged else "", shown_figures(values))
    return values


def _keep_best(run: Run, finished: int, values: dict[str, float]) -> None:
    """Begin to publish the checkpoint as the best one where its figure is above that of every earlier validation."""
    figure = run.job.best
    if figure is None:
        return
    run.watch.at(hangs.SAVING, finished)
    root = run.config.output / BEST
    _tell_saved(run, run.saver.finish())
    known = on_first_rank(lambda: checkpoint.newest(root, log.warning))
    if not math.isfinite(values[figure]):
        log.error("the best checkpoint is left as it is: %s at step %d is %s", figure.replace("_", " "), finished, values[figure])
        return
    if known is not None and known.step < finished and known.state["validation"].get(figure, -math.inf) >= values[figure]:
        return
    log.info("best %s so far: %.4f, to be kept in %s", figure.replace("_", " "), values[figure], root)
    _publish(run, finished, root, 1, 0, {"validation": values})


def _report(run: Run, meter: Throughput, own: OwnTime, tallies: Tensor, counts: Tensor, finished: int, skipped: int) -> None:
    """One line, one record; collective, as tallies and throughput are summed over ranks. The device is waited for once."""
    world, trained = run.world, run.trained
    by_rank = [0.0] * world.size
    by_rank[world.rank] = own.take()
    work = torch.tensor([meter.samples, meter.tokens, meter.flops, meter.waited / world.size, *by_rank], dtype=torch.float64)
    tallies, counts, work = read(summed(tallies), counts, summed(sent(work, world.device)))
    values = summarise(run.job, tallies, counts)
    meter.samples, meter.tokens, meter.flops, meter.waited = int(work[0]), int(work[1]), int(work[2]), float(work[3])
    rates = meter.rates(world.size, run.peak) | {"memory_bytes": memory_held(world.device)}
    if world.size > 1:
        rates |= _straggler(own, work[4:].tolist(), rates["step_seconds"])
    rate, norm, scale = engine.current_learning_rate(trained), engine.gradient_norm(trained), engine.loss_scale(trained)
    values = values | {"learning_rate": rate, "gradient_norm": norm, "loss_scale": scale, "skipped_steps": skipped} | rates
    if not counts.any():
        log.warning("step %d: no update of the last %d was made, so there are no losses to report", finished, meter.steps)
        return
    if run.metrics is not None:
        run.metrics.write("train", finished, values)

    left = (run.total_steps - finished) * values["step_seconds"]
    utilisation = f", MFU {values['model_flop_utilisation']:.1%}" if "model_flop_utilisation" in values else ""
    losses = " ".join(f"{name} {values[f'{name}_loss']:.3f}" for name in run.job.objectives if f"{name}_loss" in values)
    log.info(
        "step %d/%d loss %.3f (%s) lr %.2e, %.0f samples/s, %.0f tokens/s, waiting for data %.0f %%%s, %.1f min left",
        finished, run.total_steps, values["loss"], losses, rate, values["samples_per_second"], values["tokens_per_second"],
        100 * values["data_wait_share"], utilisation, left / 60,
    )  # fmt: skip
    if not torch.isfinite(torch.tensor(values["loss"])):
        raise NumericsError(
            f"the loss is no longer finite at step {finished}; go on from the last checkpoint with a lower optimizer.learning_rate"
        )


def _straggler(own: OwnTime, seconds: list[float], step_seconds: float) -> dict[str, float]:
    """The rank that the others wait for most, and for which share of the time, for the record; a line where it is much, twice in a row."""
    rank, share = slowest(seconds, step_seconds)
    again, own.suspect = own.suspect == rank, rank if share > TOLD else None
    if again and share > TOLD:
        line = "rank %d keeps the others waiting, for %.0f %% of the time or more (data and forward: %.2f s a step)"
        log.warning(line, rank, 100 * share, seconds[rank])
    return {"slowest_rank": rank, "slowest_share": share}


def _portion_told(config: RunSettings, job: Job, world: World) -> str:
    """What a micro-batch is, and how many a step has: where tokens count, that follows from the data."""
    training = config.training
    if training.micro_tokens is None:
        return f", {job.accumulation} micro-batch(es) of {training.micro_batch} on each rank"
    samples = training.global_batch / (job.accumulation * world.size)
    return f", {job.accumulation} micro-batch(es) of about {samples:.0f} samples and at most {training.micro_tokens:,} tokens on each rank"


def _describe(config: RunSettings, job: Job, model: PreTrainedModel, world: World, start: int, total: int) -> None:
    """The start-up lines: what is trained on what, and which form of each kernel runs and why."""
    log.info("%d process(es) on %s, %s, ZeRO stage %d", world.size, world.device.type, config.engine.precision, config.engine.zero_stage)
    if world.size > 1:
        log.info("gradients are summed over processes in %s", config.engine.communication)
    for line in job.started:
        log.info("%s", line)
    if job.validate is not None and (warning := trained_on_what_is_validated(config)):
        log.warning("%s", warning)
    log.info("steps %d to %d of %d samples%s", start, total, config.training.global_batch, _portion_told(config, job, world))
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[config.engine.precision]
    for choice in kernels.choices(world.device, dtype, model.config.attention_probs_dropout_prob):
        log.info("kernel %s", choice)
