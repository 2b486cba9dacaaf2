"""Where a training step's time goes: which kernels, how many launches, how long the device has nothing to do."""

import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.batches import make_batch
from benchmarks.contenders import Step, Way, our_step
from benchmarks.gpu.part import Report, Setting, run_part
from benchmarks.timing import finish
from megainter.model.interbert import InterBertForPreTraining
from megainter.training import engine

STEPS, TOP = 3, 15
TRITON = ("_attention_", "_norm_", "_gelu_", "_cross_entropy", "_soft_label_kl")  # how their names begin in megainter/kernels/triton
# A kernel's kind by a word of its name, the first that fits.
KINDS = {
    "matrix products": ("gemm", "cutlass", "nvjet", "xmma", "cublas"),
    "attention": ("flash", "fmha", "attention", "cudnn"),
    "copies and fills": ("memcpy", "memset", "copy", "fill"),
    "communication": ("nccl",),
    "optimiser and norms of gradients": ("multi_tensor", "adam", "lpnorm", "norm_kernel", "foreach"),
}


@dataclass(frozen=True)
class Span:
    """A piece of work of the device: microseconds."""

    name: str
    start: float
    end: float


def check(setting: Setting, report: Report) -> None:
    """Ours through its engine at ZeRO stages 0 and 1, at a small micro-batch and a large one."""
    way = Way(setting.device, toy=setting.toy)
    with engine.distributed() as world:
        for stage in (1,) if setting.toy else (0, 1):
            torch.manual_seed(0)
            step = our_step(InterBertForPreTraining(way.config()), "bf16", stage, world)
            for samples in (4,) if setting.toy else (64, 512):
                _profiled(report, step, samples, f"stage {stage}, {samples} samples", world.device)
            del step
            torch.cuda.empty_cache()


def _profiled(report: Report, step: Step, samples: int, name: str, device: torch.device) -> None:
    batches = [make_batch(samples, seed) for seed in range(STEPS)]
    batches = [batch.pin_memory() for batch in batches] if device.type == "cuda" else batches
    wall, host = _seconds(step, batches, device)
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * (device.type == "cuda")]
    with profile(activities=activities) as watched:
        for batch in batches:
            step(batch)
        finish(device)
    spans = spans_of(watched, device)
    busy, gaps = busy_and_gaps(spans)
    report.tell(**{name: {
        "step_ms": 1000 * wall, "host_ms": 1000 * host, "device_busy_ms": busy / 1000 / STEPS, "launches": len(spans) / STEPS,
        "gaps_over_10_us": sum(gap > 10 for gap in gaps) / STEPS, "kinds_ms": kinds(spans), "top": top(spans),
    }})  # fmt: skip
    asked = f"{1000 * wall:.1f} ms a step, of which the host asks for {1000 * host:.1f} ms with {len(spans) / STEPS:,.0f} launches"
    pauses = f"{sum(gap > 10 for gap in gaps) / STEPS:,.0f} pauses of more than 10 us"
    report.row(name, f"{asked}; the device is busy for {busy / 1000 / STEPS:.1f} ms ({busy / 1e6 / STEPS / wall:.0%}), with {pauses}")
    said = ", ".join(f"{kind} {ms:.2f}" for kind, ms in sorted(kinds(spans).items(), key=lambda item: -item[1]))
    report.row(f"{name}: ms by kind", said)
    for kernel, ms, count in top(spans)[:5]:
        report.row(f"{name}: dominated by", f"{ms:.2f} ms in {count:,.0f} launches of {kernel[:90]}")


def _seconds(step: Step, batches: list[Any], device: torch.device) -> tuple[float, float]:
    """Seconds of a step without the profiler, and those after which the host has asked for all of it."""
    for batch in [*batches, *batches]:
        step(batch)
    finish(device)
    began = time.perf_counter()
    for batch in batches:
        step(batch)
    asked = time.perf_counter() - began
    finish(device)
    return (time.perf_counter() - began) / len(batches), asked / len(batches)


def spans_of(watched: profile, device: torch.device) -> list[Span]:
    """What the device did; on a CPU the operations that call no others, which stand for it at toy sizes."""
    wanted = DeviceType.CUDA if device.type == "cuda" else DeviceType.CPU
    events = [event for event in watched.events() or () if event.device_type == wanted and not event.is_user_annotation]
    if wanted == DeviceType.CPU:
        events = [event for event in events if not event.cpu_children]
    return [Span(event.name, event.time_range.start, event.time_range.end) for event in events]


def busy_and_gaps(spans: list[Span]) -> tuple[float, list[float]]:
    """Microseconds in which at least one piece of work ran, and the lengths of the pauses between.

    >>> busy_and_gaps([Span("a", 0, 4), Span("b", 2, 6), Span("c", 9, 10)])
    (7.0, [3.0])
    """
    busy, gaps, until = 0.0, [], None
    for span in sorted(spans, key=lambda span: span.start):
        if until is None or span.start > until:
            gaps += [float(span.start - until)] if until is not None else []
            busy += span.end - span.start
            until = span.end
        elif span.end > until:
            busy += span.end - until
            until = span.end
    return float(busy), gaps


def kind_of(name: str) -> str:
    """What a kernel is for, by its name."""
    if name.startswith(TRITON):
        return "our Triton kernels"
    low = name.lower()
    return next((kind for kind, words in KINDS.items() if any(word in low for word in words)), "everything else")


def kinds(spans: list[Span]) -> dict[str, float]:
    """Milliseconds a step by kind."""
    found: dict[str, float] = defaultdict(float)
    for span in spans:
        found[kind_of(span.name)] += (span.end - span.start) / 1000 / STEPS
    return dict(found)


def top(spans: list[Span]) -> list[tuple[str, float, float]]:
    """(name, milliseconds, launches) a step of the kernels that take most."""
    time_of: dict[str, float] = defaultdict(float)
    count: dict[str, int] = defaultdict(int)
    for span in spans:
        time_of[span.name] += span.end - span.start
        count[span.name] += 1
    names = sorted(time_of, key=lambda name: -time_of[name])[:TOP]
    return [(name[:160], time_of[name] / 1000 / STEPS, count[name] / STEPS) for name in names]


if __name__ == "__main__":
    run_part("breakdown", check)
