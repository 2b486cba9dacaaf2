"""Which ZeRO stage, micro-batch and accumulation: every layout's memory and time for a recipe on a number of devices, and the best."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from launcher.planning.device_memory import BUCKET, Layout, Memory, checkpoint_bytes, memory
from launcher.planning.goodput import Reliability, best_interval, goodput
from launcher.planning.shape import Shape, largest_load, load_of, longest_sample, shape_of
from launcher.planning.timing import Cluster, Device, StepTime, step_time
from megainter.config.portions import multiples_around
from megainter.config.settings import RunConfig
from megainter.data.integers import Int64s
from megainter.data.stream.portions import accumulation
from megainter.errors import UsageError
from megainter.precision import automatic

HEADROOM = 0.92  # of a device's memory: allocators fragment
NEARLY = 1.03  # within so much of the fastest, the simpler layout is taken


@dataclass(frozen=True)
class Choice:
    """One layout with the largest micro-batch that fits (the smallest, where none does)."""

    layout: Layout
    micro_batch: int
    memory: Memory
    time: StepTime
    fits: bool
    micro_tokens: int | None = None  # where the recipe counts these; then ``micro_batch`` is a mean

    def settings(self) -> str:
        """The choice as settings of ``megainter pretrain``."""
        portion = f"micro_batch {self.micro_batch}" if self.micro_tokens is None else f"micro_tokens {self.micro_tokens}"
        words = [f"--engine.zero_stage {self.layout.stage}", f"--training.{portion}"]
        words += ["--engine.offload_optimizer true"] if self.layout.offload else []
        words += ["--model.gradient_checkpointing true"] if self.layout.checkpointing else []
        return " ".join(words)


@dataclass(frozen=True)
class Corpus:
    """What is trained on: captions, and the mean length of a sample in text tokens and regions (the global one included)."""

    pairs: int
    text: float
    regions: float


STAGE, OFFLOAD, CHECKPOINTING, MICRO_BATCH = (
    "engine.zero_stage", "engine.offload_optimizer", "model.gradient_checkpointing", "training.micro_batch",
)  # fmt: skip


def choices(config: RunConfig, ranks: int, cluster: Cluster, corpus: Corpus, typed: Sequence[str] = ()) -> list[Choice]:
    """One choice for each ZeRO stage, with and without offload and checkpointing; of a recipe's ``micro_tokens`` as they are.

    Of what is ``typed`` only what the configuration says: a stage, offload, checkpointing, a micro-batch. ``UsageError`` where no layout
    has all that, and where the micro-batch does not divide what a device has of a step.
    """
    training = config.training
    if training.micro_tokens is None and training.global_batch % ranks:
        raise UsageError(_undivided(training.global_batch, ranks))
    fixed = training.micro_batch if MICRO_BATCH in typed else None
    if fixed is not None and (share := training.global_batch // ranks) % fixed:
        near = [size for size in range(1, share + 1) if share % size == 0 and fixed / 2 <= size <= 2 * fixed] or [share]
        parts = f"the {share} samples that each of {ranks} devices has of a step"
        raise UsageError(f"{MICRO_BATCH} {fixed} does not divide {parts}: give {' or '.join(map(str, near))}")

    shape, wanted = shape_of(config), {STAGE: config.engine.zero_stage, OFFLOAD: config.engine.offload_optimizer}
    wanted |= {CHECKPOINTING: config.model.gradient_checkpointing}
    layouts = [layout for layout in _layouts(config, ranks, cluster.device) if _is_as_typed(layout, wanted, typed)]
    if not layouts:
        said = ", ".join(f"--{name} {str(wanted[name]).lower()}" for name in wanted if name in typed)
        raise UsageError(f"no layout has {said}: offload needs ZeRO stage 1 to 3, and so does fp16")
    return [_choice(config, shape, layout, cluster, corpus, fixed) for layout in layouts]


def _is_as_typed(layout: Layout, wanted: dict[str, Any], typed: Sequence[str]) -> bool:
    has = {STAGE: layout.stage, OFFLOAD: layout.offload, CHECKPOINTING: layout.checkpointing}
    return all(has[name] == wanted[name] for name in wanted if name in typed)


def _undivided(batch: int, ranks: int) -> str:
    """What helps where ``ranks`` devices cannot share a batch out: the nearest batches that they can, and numbers of devices that can."""
    batches = multiples_around(batch, ranks)
    fewer = next(count for count in range(min(ranks, batch), 0, -1) if batch % count == 0)
    more = next((count for count in range(ranks, batch + 1) if batch % count == 0), fewer)
    counts = " or ".join(map(str, dict.fromkeys((fewer, more))))
    return (
        f"training.global_batch {batch} is not a multiple of {ranks} devices: add --training.global_batch "
        f"{' or '.join(map(str, batches))}, or plan for --gpus {counts}"
    )


def _layouts(config: RunConfig, ranks: int, device: Device) -> Iterator[Layout]:
    asked = config.engine.precision
    precision = automatic([device.units])[0] if asked == "auto" else asked
    for stage in range(1 if precision == "fp16" else 0, 4):
        for offload in (False, True) if stage else (False,):
            for checkpointing in (False, True):
                yield Layout(
                    stage=stage,
                    ranks=ranks,
                    precision=precision,
                    offload=offload,
                    checkpointing=checkpointing,
                    communication=config.engine.communication,
                    averaged=config.training.ema_decay > 0,
                )


def _choice(config: RunConfig, shape: Shape, layout: Layout, cluster: Cluster, corpus: Corpus, fixed: int | None) -> Choice:
    if config.training.micro_tokens is not None:
        return _choice_by_tokens(config, shape, layout, cluster, corpus)
    share = config.training.global_batch // layout.ranks
    room = cluster.device.memory * 2**30 * HEADROOM
    sizes = [size for size in range(share, 0, -1) if share % size == 0] if fixed is None else [fixed]
    fitting = (size for size in sizes if memory(shape, load_of(config, size), layout).device <= room)
    size = next(fitting, 0)
    fits, size = size > 0, size or fixed or 1
    layout = replace(layout, accumulation=share // size)
    mean = load_of(config, size, corpus.text, corpus.regions)
    return Choice(layout, size, memory(shape, load_of(config, size), layout), step_time(shape, mean, layout, cluster), fits)


def _choice_by_tokens(config: RunConfig, shape: Shape, layout: Layout, cluster: Cluster, corpus: Corpus) -> Choice:
    """Micro-batches of the recipe's ``micro_tokens``: as many as the trainer takes for samples of the corpus's mean length."""
    training = config.training
    layout = replace(layout, accumulation=accumulation(training, layout.ranks, lambda step: _lengths(config, corpus)))
    samples = training.global_batch / (layout.ranks * layout.accumulation)
    need = memory(shape, largest_load(config, layout.ranks), layout)
    time = step_time(shape, load_of(config, samples, corpus.text, corpus.regions), layout, cluster)
    fits = need.device <= cluster.device.memory * 2**30 * HEADROOM
    return Choice(layout=layout, micro_batch=round(samples), memory=need, time=time, fits=fits, micro_tokens=training.micro_tokens)


def _lengths(config: RunConfig, corpus: Corpus) -> Int64s:
    """Lengths [global_batch] of samples as a step may have them: from next to nothing to the longest, with the corpus's mean.

    Quantiles of longest x u^k for u uniform, whose mean is longest / (k + 1).
    """
    longest = longest_sample(config)
    mean = min(corpus.text + corpus.regions, longest)
    places = (np.arange(config.training.global_batch) + 0.5) / config.training.global_batch
    return np.ceil(longest * places ** (longest / mean - 1)).astype(np.int64)


def recommended(options: list[Choice]) -> Choice:
    """The fastest layout that fits; of those nearly as fast, the one with the least machinery. ``UsageError`` where none fits."""
    fitting = [choice for choice in options if choice.fits]
    if not fitting:
        least = min(options, key=lambda choice: choice.memory.device)
        tokens = least.micro_tokens
        portion = f"micro-batch {least.micro_batch}" if tokens is None else f"{tokens:,} tokens a micro-batch"
        remedy = "" if tokens is None else "lower training.micro_tokens, "
        raise UsageError(
            f"nothing fits: even stage {least.layout.stage} with {portion} needs {least.memory.device / 2**30:.1f} GiB a device; "
            f"{remedy}use more devices, or devices with more memory"
        )
    limit = NEARLY * min(choice.time.total for choice in fitting)
    return min(
        (choice for choice in fitting if choice.time.total <= limit),
        key=lambda choice: (choice.layout.offload, choice.layout.checkpointing, choice.layout.stage, choice.time.total),
    )


def deepspeed_settings(layout: Layout) -> dict[str, Any]:
    """The DeepSpeed JSON of a layout, for ``--engine.deepspeed`` and for the stock command; batch and optimiser are the run's."""
    zero: dict[str, Any] = {"stage": layout.stage}
    if layout.stage:
        zero |= {"overlap_comm": True, "contiguous_gradients": True, "reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET}
    if layout.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    settings: dict[str, Any] = {"zero_optimization": zero, "communication_data_type": "fp32"}
    if layout.precision != "fp32" and layout.stage:
        settings |= {layout.precision: {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    if layout.offload:
        settings["zero_force_ds_cpu_optimizer"] = False
    return settings


def summary(config: RunConfig, choice: Choice, corpus: Corpus, reliability: Reliability) -> dict[str, Any]:
    """The run in figures: tokens/s, steps, days, checkpoint size, how often to save, and the useful share of the time."""
    shape = shape_of(config)
    training = config.training
    steps = training.steps or max(1, round((training.epochs or 0) * corpus.pairs / training.global_batch))
    seconds = choice.time.total
    ranks = choice.layout.ranks
    interval = best_interval(reliability, ranks)
    share = goodput(reliability, ranks, interval)
    return {
        "step_seconds": seconds,
        "samples_per_second": training.global_batch / seconds,
        "tokens_per_second": training.global_batch * (corpus.text + corpus.regions) / seconds,
        "steps": steps,
        "epochs": steps * training.global_batch / corpus.pairs,
        "checkpoint_bytes": checkpoint_bytes(shape, choice.layout.averaged),
        "checkpoint_stall_seconds": reliability.stall,
        "checkpoint_write_seconds": reliability.write,
        "checkpoint_every_seconds": interval,
        "checkpoint_every_steps": max(1, round(interval / seconds)),
        "goodput": share,
        "days": steps * seconds / max(share, 1e-9) / 86400,
        "settings": choice.settings(),
        "memory": asdict(choice.memory),
        "time": asdict(choice.time),
    }
