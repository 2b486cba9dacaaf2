"""A plan as text: the table of layouts, and what the recommended one means."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from launcher.planning.device_memory import checkpoint_bytes
from launcher.planning.goodput import Reliability, curve, draw_curve
from launcher.planning.layouts import Choice, Corpus, choices, deepspeed_settings, recommended, summary
from launcher.planning.settings import PlanSettings
from launcher.planning.shape import Shape, parameters, shape_of
from launcher.planning.timing import Cluster, device
from megainter.config.reading import load_config, read_stated
from megainter.config.settings import RunConfig
from megainter.files import write_json
from megainter.progress import shown_time

GIB = 2**30


def tell(options: PlanSettings, overrides: Sequence[str]) -> dict[str, Any]:
    """Print the plan of a recipe under ``overrides``, write the files that are asked for; all figures as JSON types.

    ``layouts`` has every layout, bytes and seconds; the rest is of the recommended one.
    """
    run = load_config(options.config, overrides)
    cluster = _cluster(options)
    regions = options.regions if options.regions is not None else run.data.max_regions + 1
    corpus = Corpus(options.pairs, options.text_tokens, regions)
    layouts, shape = choices(run, options.gpus, cluster, corpus, read_stated(options.config, overrides).typed), shape_of(run)

    # The best layout first, and what all of it rests on.
    best = recommended(layouts)
    size = checkpoint_bytes(shape, best.layout.averaged)
    stall, write = size / options.gpus / (options.copy * 1e9), size / (options.disk * 1e9)
    reliability = Reliability(options.mtbf_hours * 3600, stall, options.restart, options.straggle, write)
    figures = summary(run, best, corpus, reliability)
    what = f"{parameters(shape):,} parameters, {options.gpus} x {options.gpu}"
    print(f"{options.config}: {what} ({cluster.device.memory:g} GiB; {cluster.device.source})\n")
    _print_recommended(figures, best, cluster, options, run.training.global_batch)
    _print_unfilled(best, run.training.global_batch / options.gpus, corpus)
    assumptions = assumed(run, shape, corpus, options, offload=any(each.layout.offload for each in layouts))
    print(f"\nassumed: {'; '.join(assumptions)}")
    print(f"step times and memory: {cluster.device.standing}; precision {layouts[0].layout.precision}")

    # Every layout, and what the best one means.
    print("\nGiB of one device, by part, and milliseconds of a step of", run.training.global_batch, "samples; micro: samples at a time:\n")
    _print_table(layouts)
    _print_summary(figures, options)

    # Files.
    if options.ds_config is not None:
        write_json(options.ds_config, deepspeed_settings(best.layout))
    rows = curve(reliability, [2**power for power in range(13)]) if options.simulate is not None else []
    if options.simulate is not None:
        draw_curve(rows, f"goodput of {options.config}, MTBF {options.mtbf_hours:,.0f} h a device", options.simulate)
    if options.report is not None:
        write_json(options.report, figures | {"goodput_curve": rows, "assumed": assumptions})
    return figures | {"goodput_curve": rows, "assumed": assumptions, "layouts": [asdict(layout) for layout in layouts]}


def _cluster(options: PlanSettings) -> Cluster:
    return Cluster(
        device(options.gpu),
        options.per_node,
        network=options.network * 1e9,
        host_link=options.host_link * 1e9,
        host_memory=options.host_memory * 1e9,
        efficiency=options.efficiency,
    )


def assumed(run: RunConfig, shape: Shape, corpus: Corpus, options: PlanSettings, offload: bool) -> list[str]:
    """What the plan rests on beside the recipe, each with what changes it: sizes that a run takes from its data, the corpus, the cluster.

    ``offload``: some layouts update on the host.
    """
    sizes = [
        ("a vocabulary of", shape.vocab_size, "entries", "model.vocab_size", run.model.vocab_size),
        ("features of", shape.region_feature_size, "numbers a region", "model.region_feature_size", run.model.region_feature_size),
    ]
    if run.training.mrm_weight > 0 and run.model.region_objective == "class":
        sizes.append(("", shape.targets, "classes of regions", "model.num_region_classes", run.model.num_region_classes))
    told = [f"{before} {size:,} {what} ({'the recipe' if given else f'--{name}'})".strip() for before, size, what, name, given in sizes]
    regions = "--regions" if options.regions is None else "as given"
    told.append(
        f"{corpus.pairs:,} captions (--pairs) of {corpus.text:g} tokens (--text-tokens) with {corpus.regions:g} regions ({regions})"
    )
    if options.gpus > options.per_node:
        rest = options.gpus % options.per_node
        told.append(f"{options.per_node} devices a node (--per-node){f', {rest} in the last' if rest else ''}")
        told.append(f"{options.network:g} GB/s between nodes (--network)")
    if offload:
        told.append(
            f"an offloaded update moves {options.host_memory:g} GB/s of host memory for each device (--host-memory) and "
            f"{options.host_link:g} GB/s to it (--host-link)"
        )
    return told


def _print_table(options: list[Choice]) -> None:
    head = ("stage", "offload", "recompute", "micro", "weights", "grads", "optim", "activ", "logits", "buffers", "other", "sum", "ms/step")
    print(" ".join(f"{name:>9}" for name in head))
    for choice in options:
        memory, layout = choice.memory, choice.layout
        parts = (memory.weights, memory.gradients, memory.optimizer, memory.activations, memory.logits, memory.buffers, memory.overhead)
        words = [str(layout.stage), "yes" if layout.offload else "no", "yes" if layout.checkpointing else "no", str(choice.micro_batch)]
        words += [f"{part / GIB:.2f}" for part in (*parts, memory.device)]
        words.append(f"{1000 * choice.time.total:,.1f}" if choice.fits else "too large")
        print(" ".join(f"{word:>9}" for word in words))


def _print_recommended(figures: dict[str, Any], best: Choice, cluster: Cluster, options: PlanSettings, batch: int) -> None:
    print(f"recommended: {figures['settings']}")
    print(
        f"  {1000 * figures['step_seconds']:,.1f} ms a step, {figures['samples_per_second']:,.0f} samples/s, "
        f"{figures['tokens_per_second']:,.0f} tokens/s on {options.gpus} devices; "
        f"{best.memory.device / GIB:.1f} of {cluster.device.memory:g} GiB of each"
    )
    length = shown_time(86400 * figures["days"])
    passes = round(figures["epochs"], 2)
    epochs = f"{passes:,g} epoch{'s' * (passes != 1)} of {options.pairs:,} pairs, {batch:,} pairs a step"
    useful = f"{figures['goodput']:.2%} useful time (failures and checkpoints; no stragglers)"
    print(f"  {figures['steps']:,} steps ({epochs}) in {length} at {useful}")


def _print_unfilled(best: Choice, samples: float, corpus: Corpus) -> None:
    """Say where the ``samples`` that a device has of a step are far from the tokens that a micro-batch may hold."""
    tokens = samples * (corpus.text + corpus.regions)
    if best.micro_tokens is None or tokens >= 0.8 * best.micro_tokens:
        return
    print(
        f"  micro_tokens {best.micro_tokens:,} is the most that a micro-batch may hold; a device has {samples:,.0f} samples of a step, "
        f"about {tokens:,.0f} tokens: a larger training.global_batch would fill it"
    )


def _print_summary(figures: dict[str, Any], options: PlanSettings) -> None:
    time, gpus = figures["time"], options.gpus
    names = ("matmul", "elementwise", "optimizer", "communication", "idle")
    matmul, elementwise, update, communication, idle = (f"{1000 * time[name]:,.1f}" for name in names)
    print(
        f"\na step of the recommended layout, in ms: matrix products {matmul} (at {time['efficiency']:.0%} of the peak), elsewhere "
        f"{elementwise}, update {update}, communication not hidden {communication}, waiting for the host {idle}"
    )
    often = f"best every {figures['checkpoint_every_seconds'] / 60:.0f} min"
    if figures["checkpoint_every_steps"] < figures["steps"]:
        often += f" (--checkpoint.every_steps {figures['checkpoint_every_steps']})"
    else:
        often += ": longer than the run, so keep the recipe's checkpoint.every_steps"
    print(
        f"checkpoint {figures['checkpoint_bytes'] / 1e9:.1f} GB: training waits {figures['checkpoint_stall_seconds']:.2f} s for the copy, "
        f"it is there {figures['checkpoint_write_seconds']:.1f} s later; {often}"
    )
    copy = figures["memory"]["copy"] / GIB
    print(f"the copy takes {copy:.2f} GiB of the host's memory for each device, {copy * min(options.per_node, gpus):.1f} GiB a node")
    if gpus > 1 and time["communication"] > figures["step_seconds"] / 2:
        print(
            "more than half of a step is communication: fewer devices, a faster --network, a larger training.global_batch or "
            "engine.communication bf16 will use them better"
        )
    if time["idle"] > figures["step_seconds"] / 3:
        print("much of a step waits for the host: fewer devices or a larger training.global_batch will use them better")
