"""A step of a run done again: from the newest checkpoint before it, in one process, as each rank of the run did it.

Weights, samples, masks and dropout of a step are functions of the checkpoint, the seed and the step, so the losses are those of the run: to
the bit where it ran on one process, and where it ran on several but for the order in which their parts are added.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megainter.errors import UsageError
from megainter.files import read_json
from megainter.training import checkpoint, engine, zero_state
from megainter.training.ema import decay_at
from megainter.training.guard import poisoned
from megainter.training.job import Job, RunSettings, summarise
from megainter.training.loop import counted, dropout_seed, starting_model, steps_of
from megainter.training.metrics import read_metrics
from megainter.training.optimizer import learning_rate
from megainter.training.passed_over import read_passed_over
from megainter.training.precision import with_precision
from megainter.training.renewing import FOLDER
from megainter.training.world import World

COMPARED = 1e-6  # relative, between what one process and what several add up


@dataclass(frozen=True)
class Sample:
    """One sample of the step: who ran it, what it is, and its losses by objective, not divided by anything."""

    sample: str
    rank: int
    losses: dict[str, float]
    shown: str = ""


@dataclass(frozen=True)
class Replayed:
    """A step done again: from which finished step on, by how many ranks in turn, at which rate, its mean losses and its samples; and the
    newest step that the run's folder knows as finished."""

    step: int
    reached: int
    begun_at: int
    ranks: int
    learning_rate: float
    values: dict[str, float]
    samples: list[Sample]


def ranks_of(folder: Path) -> int:
    """How many processes the run had when it was last started."""
    found = read_json(folder / "ds_config.json")
    portion = found["train_micro_batch_size_per_gpu"] * found["gradient_accumulation_steps"]
    return int(found["train_batch_size"] // portion)


def nearest_checkpoint(folder: Path, step: int, most: int) -> checkpoint.Checkpoint | None:
    """The newest whole checkpoint before finished step ``step``; None for the beginning of the run.

    ``UsageError`` where more than ``most`` steps would have to be done before it: the line says which steps can be replayed so, and how
    long this one takes.
    """
    names = sorted(path for path in (folder / "checkpoints").glob("step_*") if checkpoint.damage(path) is None)
    known = [checkpoint.open_checkpoint(path) for path in names]
    before = [found for found in known if found.step < step]
    begun = before[-1].step if before else 0
    if step - 1 - begun > most:
        ranges = ", ".join(f"{at + 1:,} to {at + 1 + most:,}" for at in [0, *(found.step for found in known)])
        times = [record["step_seconds"] for record in read_metrics(folder / "metrics.jsonl", "train")][-5:]
        hint = f", about {(step - begun) * sum(times) / len(times) * ranks_of(folder) / 60:.0f} min" if times else ""
        raise UsageError(
            f"step {step:,} lies {step - 1 - begun:,} steps after the nearest checkpoint{hint}; "
            f"give --at-most {step - 1 - begun}, or one of the steps {ranges}"
        )
    return before[-1] if before else None


def replay(config: RunSettings, open_job: Callable[[RunSettings, World], Job], run: Path, step: int, most: int) -> Replayed:
    """Do finished step ``step`` of the run in folder ``run`` again. ``config.output`` is another folder: nothing is written to ``run``.

    ``UsageError`` where the step is passed over, is none of the run's, or is too far from a checkpoint (``nearest_checkpoint``).
    """
    ranks, passed_over = ranks_of(run), {entry["step"] for entry in read_passed_over(run)}
    if step in passed_over:
        raise UsageError(f"step {step:,} is passed over by this run (left_out.json): it has no losses")
    if config.training.steps is not None:  # else the data say how many there are
        _require_step(step, config.training.steps)
    saved = nearest_checkpoint(run, step, most)
    with engine.distributed() as world:
        config = with_precision(config, world.device)
        jobs = [open_job(config, World(rank, ranks, world.device)) for rank in range(ranks)]
        total = steps_of(config, jobs[0].samples)
        _require_step(step, total)
        if saved is not None and saved.state["digests"] != dict(jobs[0].digests):
            raise UsageError(f"the data are not those that {saved.folder} was made of: {_unlike(saved.state['digests'], jobs[0].digests)}")
        trained = _open(config, jobs, saved, world)
        begun = saved.step if saved is not None else 0
        for earlier in range(begun, step - 1):
            _renew(jobs, trained, earlier, begun)
            if earlier + 1 not in passed_over:
                _update(config, jobs, trained, earlier, total)
        _renew(jobs, trained, step - 1, begun)
        values, samples = _judge(config, jobs, trained, step - 1, total)
    return Replayed(step, _reached(run), begun, ranks, learning_rate(config.optimizer, step - 1, total), values, samples)


def _require_step(step: int, total: int) -> None:
    if not 1 <= step <= total:
        raise UsageError(f"the run has steps 1 to {total:,}, not {step:,}")


def _reached(run: Path) -> int:
    """The newest step that a record or a checkpoint of the run is of; 0 where there is none."""
    names = [path.name.removeprefix("step_") for path in (run / "checkpoints").glob("step_*")]
    records = read_metrics(run / "metrics.jsonl", "train") if (run / "metrics.jsonl").exists() else []
    return max([0, *(int(name) for name in names if name.isdecimal()), *(record["step"] for record in records)])


def _unlike(theirs: dict[str, str], ours: Any) -> str:
    return ", ".join(sorted(name for name in {*theirs, *ours} if theirs.get(name) != ours.get(name)))


def _open(config: RunSettings, jobs: list[Job], saved: checkpoint.Checkpoint | None, world: World) -> Any:
    """The engine of one process that takes the micro-batches of all ranks in turn, in the state of ``saved``."""
    model = starting_model(config, jobs[0], saved)
    micros = sum(job.accumulation for job in jobs)
    trained = engine.build_engine(jobs[0].build_step(model), config.engine, config.optimizer, config.training, world, micros)
    if saved is not None:
        with checkpoint.reader(saved) as read:
            zero_state.restore_state(trained, read, saved.state["updates"])
        engine.restore_decisions(trained, saved.state)
    return trained


def _renew(jobs: list[Job], trained: Any, step: int, begun: int) -> None:
    """What batches hang on beside the step, where a run that goes on at ``begun`` makes it (``Job.renew``)."""
    for job in jobs:
        if job.renew is not None and (step == begun or (job.renew_every and step % job.renew_every == 0)):
            job.renew(trained, step)


def _update(
    config: RunSettings, jobs: list[Job], trained: Any, step: int, total: int, seen: Callable[[int, int, Any], None] | None = None
) -> tuple[Tensor, Tensor]:
    """One update of all ranks' micro-batches; gives tallies [2, K] and counts [K]. ``seen(rank, micro, batch)`` is called before each."""
    by_rank = [job.batches[step] for job in jobs]
    if (prepare := jobs[0].prepare_step) is not None:
        by_rank = list(prepare(trained, step, dict(enumerate(by_rank))).values())
    counts = torch.stack([counted(batches) for batches in by_rank]).sum(dim=0).to(trained.device)
    divisors, micros = counts.clamp(min=1), sum(map(len, by_rank))
    engine.set_learning_rate(trained, learning_rate(config.optimizer, step, total))
    tallies, share, done = torch.zeros(2, len(counts), device=trained.device), torch.zeros((), device=trained.device), 0
    for rank, batches in enumerate(by_rank):
        own = torch.zeros_like(tallies)
        for micro, batch in enumerate(batches):
            here = batch.to(trained.device)
            if seen is not None:
                seen(rank, micro, here)
            torch.manual_seed(dropout_seed(config.training.seed, step, micro, rank))
            loss, parts = trained(here, divisors)
            trained.backward(poisoned(loss, micros))
            own, share, done = own + parts, share + loss.detach(), done + 1
            if done == micros:
                engine.expect_loss(trained, share)
            trained.step()
        tallies += own
    engine.average_weights(trained, decay_at(config.training, step + 1))
    return tallies.cpu(), counts.cpu()


def _judge(config: RunSettings, jobs: list[Job], trained: Any, step: int, total: int) -> tuple[dict[str, float], list[Sample]]:
    """The step's mean losses, and the losses of each sample by a forward of its own micro-batch, with the same dropout."""
    names, shown = jobs[0].sample_ids(step), jobs[0].shown(step) if jobs[0].shown is not None else None
    samples: list[Sample] = []

    def each(rank: int, micro: int, batch: Any) -> None:
        torch.manual_seed(dropout_seed(config.training.seed, step, micro, rank))
        with torch.no_grad():
            losses = trained(batch, None, each=True).float().tolist()
        for place, row in zip(jobs[rank].places(step)[micro].tolist(), losses, strict=True):
            by_name = dict(zip(jobs[rank].objectives, row, strict=True))
            samples.append(Sample(names[place], rank, by_name, shown[place] if shown is not None else ""))

    tallies, counts = _update(config, jobs, trained, step, total, each)
    return summarise(jobs[0], tallies, counts) | {"gradient_norm": engine.gradient_norm(trained)}, samples


def against_metrics(found: Replayed, run: Path) -> str:
    """One line: whether the losses are those that metrics.jsonl has of this step."""
    records = read_metrics(run / "metrics.jsonl", "train")
    record = next((record for record in records if record["step"] == found.step), None)
    left_out = _left_out(run)
    if record is None:
        lacking = (
            f"losses of step {found.step:,}, as its update was left out" if found.step in left_out else f"record at step {found.step:,}"
        )
        return f"metrics.jsonl has no {lacking}: nothing to compare with"
    others = max((other["step"] for other in records if other["step"] < found.step), default=0)
    if not left_out.issuperset(range(others + 1, found.step)):
        return f"the record at step {found.step:,} is a mean over steps {others + 1:,} to {found.step:,}: not this step's alone"
    then, now = record["learning_rate"], found.learning_rate
    if not math.isclose(then, now, rel_tol=COMPARED):
        return (
            "the run has gone on with other settings since this step: its learning rate was "
            f"{then:.4g} then, and is {now:.4g} by config.json: nothing to compare with"
        )
    unlike = {name: value for name, value in found.values.items() if name != "gradient_norm" and record[name] != value}
    if not unlike:
        return "the losses are the recorded ones, to the bit"
    worst = max(abs(record[name] - value) / max(abs(value), abs(record[name])) for name, value in unlike.items())
    verdict = "equal but for rounding" if worst <= COMPARED else "NOT THE RECORDED ONES"
    return f"{verdict}: {', '.join(sorted(unlike))} differ by at most {worst:.1e} (relative)"


def _left_out(run: Path) -> set[int]:
    """Steps whose losses are in no record: their updates were left out, or their batches passed over."""
    records = [*read_metrics(run / "metrics.jsonl", "skipped"), *read_metrics(run / "metrics.jsonl", "spike")]
    steps = {record["step"] for record in records if record.get("left_out", True)}
    return steps | {entry["step"] for entry in read_passed_over(run)}


def without_output(config: RunSettings, folder: Path, run: Path) -> RunSettings:
    """The settings of ``run`` with ``folder`` in the place of its folder, which sees the run's checkpoints and what they go on with."""
    (folder / "checkpoints").symlink_to((run / "checkpoints").resolve())
    (folder / FOLDER).mkdir()
    for made in (run / FOLDER).glob("step_*"):  # one by one, so that new ones do not go there
        (folder / FOLDER / made.name).symlink_to(made.resolve())
    changed: RunSettings = replace(config, output=folder)  # type: ignore[type-var]
    return changed
