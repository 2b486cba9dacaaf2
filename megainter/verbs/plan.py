"""`megainter plan`: memory, time and goodput of a recipe on a cluster, before renting it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

if TYPE_CHECKING:
    from launcher.planning.layouts import Choice

GIB = 2**30


def plan(
    *settings: Annotated[str, Parameter(allow_leading_hyphen=True)],
    config: Path,
    gpus: int,
    gpu: str,
    per_node: int = 8,
    network: float = 25.0,
    efficiency: float | None = None,
    pairs: int = 4_000_000,
    text_tokens: float = 16.0,
    regions: float | None = None,
    disk: float = 2.0,
    restart: float = 300.0,
    mtbf_hours: float = 50_000.0,
    straggle: float = 0.0,
    ds_config: Path | None = None,
    report: Path | None = None,
    simulate: Path | None = None,
) -> None:
    """What a recipe needs on N devices: memory by part, step time, days, goodput; recommends ZeRO stage and micro-batch.

    Arithmetic on peaks and stated assumptions, not a measurement; docs/plan.md says what it was compared with.

    Parameters
    ----------
    settings
        Settings laid over the recipe, such as --training.global_batch 4096.
    config
        Recipe: a TOML file, or base, large, xl, 10b.
    gpus
        Number of devices.
    gpu
        v100, a100-40g, a100-80g, h100, h200, b200, mi300x, or a TOML file with one table like those of launcher/gpus.toml.
    per_node
        Devices of a node.
    network
        GB/s between nodes, one way, for each device.
    efficiency
        Share of the peak that matrix products reach; by default it follows from the tokens of a micro-batch and the model's width.
    pairs
        Captions of one epoch.
    text_tokens
        Mean length of a caption in tokens.
    regions
        Mean number of regions, the global one included; default the most the recipe allows.
    disk
        GB/s at which a checkpoint is written, all ranks together.
    restart
        Seconds from a failure to the first step after it.
    mtbf_hours
        Mean time between failures of one device and its share of the rest; 50,000 h is what Llama 3's 16,384 GPUs had.
    straggle
        Standard deviation of a device's step time, as a share of it.
    ds_config
        Write the recommended DeepSpeed JSON here.
    report
        Write all figures as JSON here.
    simulate
        Write the goodput of 1 to 4,096 devices as PNG here.
    """
    from launcher.planning.device_memory import checkpoint_bytes
    from launcher.planning.goodput import Reliability, curve, draw_curve
    from launcher.planning.layouts import Corpus, choices, deepspeed_settings, recommended, summary
    from launcher.planning.shape import parameters, shape_of
    from launcher.planning.timing import Cluster, device
    from megainter.config.reading import load_config
    from megainter.errors import UsageError
    from megainter.files import write_json

    for name, value in {
        "gpus": gpus,
        "per-node": per_node,
        "network": network,
        "pairs": pairs,
        "disk": disk,
        "mtbf-hours": mtbf_hours,
    }.items():
        if not value > 0:
            raise UsageError(f"--{name} is {value}; give a number above 0")
    if efficiency is not None and not 0 < efficiency <= 1:
        raise UsageError(f"--efficiency is {efficiency}; give a share of the peak, above 0 and at most 1")
    for path in (ds_config, report, simulate):
        if path is not None and not path.parent.is_dir():
            raise UsageError(f"{path}: there is no folder {path.parent}; make it first")
    run = load_config(config, settings)
    cluster = Cluster(device(gpu), per_node, network * 1e9, efficiency=efficiency)
    corpus = Corpus(pairs, text_tokens, regions if regions is not None else run.data.max_regions + 1)
    options = choices(run, gpus, cluster, corpus)
    shape = shape_of(run)
    reliability = Reliability(mtbf_hours * 3600, checkpoint_bytes(shape) / (disk * 1e9), restart, straggle)
    print(f"{config}: {parameters(shape):,} parameters, {gpus} x {gpu} ({cluster.device.memory:g} GiB; {cluster.device.source})")
    print(f"step times and memory: {cluster.device.standing}; precision {options[0].layout.precision}")
    print("GiB of one device, by part, and seconds of a step of", run.training.global_batch, "samples:\n")
    _print_table(options)
    best = recommended(options)
    figures = summary(run, best, corpus, reliability)
    _print_summary(figures, gpus)
    tokens = run.training.global_batch / gpus * (corpus.text + corpus.regions)
    if best.micro_tokens is not None and tokens < 0.8 * best.micro_tokens:
        filled = f"training.micro_tokens {best.micro_tokens:,} is filled by a larger training.global_batch"
        print(f"a device has {tokens:,.0f} tokens of a step: {filled}")
    if ds_config is not None:
        write_json(ds_config, deepspeed_settings(best.layout))
    rows = curve(reliability, [2**power for power in range(13)]) if simulate is not None else []
    if simulate is not None:
        draw_curve(rows, f"goodput of {config}, MTBF {mtbf_hours:,.0f} h a device", simulate)
    if report is not None:
        write_json(report, figures | {"goodput_curve": rows})


def _print_table(options: "list[Choice]") -> None:
    head = ("stage", "offload", "recompute", "micro", "weights", "grads", "optim", "activ", "logits", "buffers", "other", "sum", "s/step")
    print(" ".join(f"{name:>9}" for name in head))
    for choice in options:
        memory, layout = choice.memory, choice.layout
        parts = (memory.weights, memory.gradients, memory.optimizer, memory.activations, memory.logits, memory.buffers, memory.overhead)
        words = [str(layout.stage), "yes" if layout.offload else "no", "yes" if layout.checkpointing else "no", str(choice.micro_batch)]
        words += [f"{part / GIB:.2f}" for part in (*parts, memory.device)]
        words.append(f"{choice.time.total:.3f}" if choice.fits else "too large")
        print(" ".join(f"{word:>9}" for word in words))


def _print_summary(figures: dict, gpus: int) -> None:
    time = figures["time"]
    print(f"\nrecommended: {figures['settings']}")
    print(
        f"step {figures['step_seconds']:.3f} s (matrix products {time['matmul']:.3f} at {time['efficiency']:.0%} of the peak, elsewhere "
        f"{time['elementwise']:.3f}, update {time['optimizer']:.3f}, communication not hidden {time['communication']:.3f}, "
        f"waiting for the host {time['idle']:.3f})"
    )
    print(f"{figures['samples_per_second']:,.0f} samples/s, {figures['tokens_per_second']:,.0f} tokens/s on {gpus} devices")
    often = f"best every {figures['checkpoint_every_seconds'] / 60:.0f} min"
    if figures["checkpoint_every_steps"] < figures["steps"]:
        often += f" (--checkpoint.every_steps {figures['checkpoint_every_steps']})"
    else:
        often += ": longer than the run, so keep the recipe's checkpoint.every_steps"
    print(f"checkpoint {figures['checkpoint_bytes'] / 1e9:.1f} GB, {figures['checkpoint_stall_seconds']:.1f} s each; {often}")
    days, useful = figures["days"], figures["goodput"]
    length = f"{days:.2f} days" if days >= 1 else f"{24 * days:.1f} hours" if days >= 1 / 24 else f"{1440 * days:.0f} minutes"
    print(f"{figures['steps']:,} steps, {length} at {useful:.2%} useful time (failures and checkpoints; no stragglers)")
    if gpus > 1 and time["communication"] > figures["step_seconds"] / 2:
        print(
            "more than half of a step is communication: fewer devices, a faster --network, a larger training.global_batch or "
            "engine.communication bf16 will use them better"
        )
    if time["idle"] > figures["step_seconds"] / 3:
        print("much of a step waits for the host: fewer devices or a larger training.global_batch will use them better")
