"""Time of a step from operations, launches, memory traffic and communication volume. Arithmetic on peaks, on what was measured where the
device's row says so (``launcher.planning.calibration``), and else on stated assumptions."""

import difflib
import re
import tomllib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from launcher.planning.device_memory import Layout, flops_per_step
from launcher.planning.shape import Load, Shape, parameters, tensors
from megainter.errors import UsageError
from megainter.paths import require_file
from megainter.precision import PREFERRED, Units

# Shares of the peak that products reach, and the host's time, where nobody has measured them: chosen so that whole steps of 768 and 1,024
# wide models come out at the shares of the peak that others report for batches of 16,000 to 65,000 tokens (docs/plan.md).
PRODUCTS = 0.74  # of products so large and wide that neither counts
HALF_TOKENS = 2000.0  # of a micro-batch, at which half of that is reached
HALF_WIDTH = 256.0  # hidden size, likewise: short sums do not fill a product's pipeline
LAUNCH = 12e-6  # s, a third of what a slow core took for one (autograd and Python included)

LAYER_LAUNCHES = 117  # of a layer, forward and backward: 2,165 in a step of 18 layers at stage 0, by a stand-in for CUDA's driver
OTHER_LAUNCHES = 60  # of a micro-batch, however large the model (tests/training/test_launches.py)
COPIES = (0, 0, 1, 2)  # launches a micro-batch for each parameter tensor, by ZeRO stage, in bf16 (the same test)


@dataclass(frozen=True)
class Device:
    """A device: GiB, peak FLOP/s by precision, memory bytes/s, bytes/s one way to its neighbours in the node; what it reaches.

    ``products``: share of the peak in large and wide products; ``half_tokens``: micro-batch that reaches half of it; ``launch``: seconds of
    the host for one launch. ``measured``: the day on which ``benchmarks/gpu`` gave these three, None where nobody has; ``off``: by how much
    the step times, and the memory, that were measured then differ at most from the plan's.
    """

    name: str
    memory: float
    flops: dict[str, float]
    hbm: float
    link: float
    source: str
    products: float = PRODUCTS
    half_tokens: float = HALF_TOKENS
    launch: float = 0.0
    measured: str | None = None
    off: tuple[float, float] = (0.0, 0.0)

    @property
    def units(self) -> Units:
        """What it computes: what the table has a peak for."""
        return Units(self.name, frozenset(name for name in PREFERRED if name in self.flops))

    @property
    def standing(self) -> str:
        """How much its figures are worth, in words."""
        if self.measured is None:
            return "estimated, never measured on this GPU"
        return f"measured on {self.measured}: the plan was within {self.off[0]:.0%} of the step times and {self.off[1]:.0%} of the memory"


@dataclass(frozen=True)
class Cluster:
    """``per_node`` devices a node; ``network`` bytes/s one way between nodes per device; shares of the peaks that are reached."""

    device: Device
    per_node: int = 8
    network: float = 25e9  # a 200 Gbit/s port for each device
    host_link: float = 25e9  # bytes/s one way between a device and its host: PCIe 4 x16 in practice
    host_memory: float = 50e9  # bytes/s that a server's memory moves for one process
    efficiency: float | None = None  # of peak FLOP/s in matrix products; None: by their size
    traffic_efficiency: float = 0.7  # of memory bandwidth in everything else
    overlap: float = 0.7  # of the backward pass hides communication
    latency: float = 2e-5  # seconds a collective


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimiser step, by part; ``communication`` is what compute does not hide, ``idle`` what the device waits for its host.

    ``efficiency``: share of the peak that the matrix products reach.
    """

    matmul: float
    elementwise: float
    optimizer: float
    communication: float
    idle: float
    efficiency: float

    @property
    def total(self) -> float:
        return self.matmul + self.elementwise + self.optimizer + self.communication + self.idle


def device(name: str) -> Device:
    """A device of the table by name, or of the user's own TOML file with one table of the same form."""
    path = Path(name)
    of_a_file = path.suffix == ".toml"
    if of_a_file:
        require_file(path)
    text = (path if of_a_file else resources.files("launcher.planning") / "gpus.toml").read_text()
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{name} is not valid TOML: {error}") from None
    chosen = next(iter(table)) if of_a_file and len(table) == 1 else _spelt(name, table)
    if not table:
        raise UsageError(f"{name} is empty; it needs one table like those of launcher/planning/gpus.toml")
    if chosen not in table:
        near = [known for known in table if known.startswith(chosen)] or difflib.get_close_matches(chosen, table, n=1)
        hint = f"did you mean {' or '.join(near)}? " if near and chosen else ""
        raise UsageError(f"no device {name!r}; {hint}known: {', '.join(table)}; or give a TOML file with one table like them")
    try:
        facts = table[chosen]
        peaks = {key: float(facts[key]) * 1e12 for key in ("bf16", "fp16", "fp32") if key in facts}
        rates = float(facts["hbm"]) * 1e9, float(facts["link"]) * 1e9
        return Device(chosen, float(facts["memory"]), peaks, *rates, str(facts.get("source", path)), **_reached(facts))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UsageError(f"device {chosen} in {name} lacks a number: {error}; see launcher/planning/gpus.toml for the form") from None


def _spelt(name: str, table: dict[str, Any]) -> str:
    """A name as the table has it: RTX 4090 and rtx-4090 are rtx4090."""
    bare = re.sub(r"[\s_-]|nvidia|geforce|tesla", "", name.lower())
    return next((known for known in table if known.replace("-", "") == bare), name.lower())


def _reached(facts: dict[str, Any]) -> dict[str, Any]:
    """What a device reaches by its table; the assumptions where that is not measured."""
    if not facts.get("measured", False):
        return {"launch": LAUNCH}
    return {
        "measured": str(facts["measured"]), "products": float(facts["products"]), "half_tokens": float(facts["half_tokens"]),
        "launch": float(facts["launch"]) * 1e-6, "off": (float(facts["off_time"]), float(facts["off_memory"])),
    }  # fmt: skip


def efficiency(shape: Shape, load: Load, device: Device) -> float:
    """Share of the peak that the products of a micro-batch reach: more with more tokens and with width, and never all."""
    tokens = load.samples * (load.text + load.regions)
    return device.products * tokens / (tokens + device.half_tokens) * shape.hidden_size / (shape.hidden_size + HALF_WIDTH)


def launches(shape: Shape, layout: Layout) -> float:
    """Kernels that the host launches in one optimiser step; with checkpointing the forward pass, a third of them, comes twice.

    Contrast takes all layers a second time, and a forward pass before.
    """
    layers = LAYER_LAUNCHES * shape.layers
    model = layers * (4 / 3 if layout.checkpointing else 1)
    model = 2 * model + layers / 3 if shape.itc_size else model
    return layout.accumulation * (model + OTHER_LAUNCHES + COPIES[layout.stage] * tensors(shape))


def step_time(shape: Shape, load: Load, layout: Layout, cluster: Cluster) -> StepTime:
    """One optimiser step of ``layout`` on ``cluster``; ``UsageError`` where the device lacks the precision."""
    peak = cluster.device.flops.get(layout.precision) or (cluster.device.flops.get("fp32") if layout.precision == "fp32" else None)
    if peak is None:
        others = " or ".join(f"--engine.precision {name}" for name in cluster.device.flops)
        raise UsageError(f"no {layout.precision} rate of {cluster.device.name} is known; give {others}")
    reached = cluster.efficiency or efficiency(shape, load, cluster.device)
    matmul = flops_per_step(shape, load, layout) / (peak * reached)
    elementwise = layout.accumulation * traffic(shape, load, layout) / (cluster.device.hbm * cluster.traffic_efficiency)
    hidden = cluster.overlap * (matmul + elementwise) * 2 / 3
    update = update_time(shape, layout, cluster)
    busy = matmul + elementwise + (0.0 if layout.offload else update)  # a host that updates launches nothing meanwhile
    idle = max(0.0, launches(shape, layout) * cluster.device.launch - busy)
    return StepTime(
        matmul=matmul,
        elementwise=elementwise,
        optimizer=update,
        communication=max(0.0, communication_time(shape, layout, cluster) - hidden),
        idle=idle,
        efficiency=reached,
    )


def traffic(shape: Shape, load: Load, layout: Layout) -> float:
    """Bytes that activations, norms, residuals and dropout move in forward and backward of a micro-batch: three times what is kept; with
    contrast twice that, and once more for the pass before."""
    passes = 4 if layout.checkpointing else 3
    passes = 2 * passes + 1 if shape.itc_size else passes
    return passes * load.rows(shape) * (8 * shape.hidden_size + 2 * shape.intermediate_size) * layout.width


def update_time(shape: Shape, layout: Layout, cluster: Cluster) -> float:
    """AdamW on the rank's share: 28 bytes read and written a number; with offload over the host link, gradients out and weights in."""
    share = parameters(shape) / (layout.ranks if layout.stage else 1)
    if layout.offload:
        return share * (4 + 2) / cluster.host_link + share * 28 / cluster.host_memory
    return share * 28 / (cluster.device.hbm * cluster.traffic_efficiency)


def communication_bytes(shape: Shape, layout: Layout) -> float:
    """Bytes one rank sends in one optimiser step (ring algorithms): gradients out, in fp32 or in bf16, and working weights in.

    Stage 0 all-reduces once. Stage 1 all-reduces once and gathers the weights; stage 2 all-reduces at every micro-batch: DeepSpeed 0.19
    sums whole buckets on all ranks, of which each keeps its share (``use_multi_rank_bucket_allreduce``). Stage 3 reduces to shares, and
    gathers the weights for the forward and the backward pass of every micro-batch, with contrast for each of its passes.
    """
    if layout.ranks == 1:
        return 0.0
    count = parameters(shape) * (layout.ranks - 1) / layout.ranks
    weights, gradients = count * layout.width, count * (2 if layout.communication == "bf16" else 4)
    if layout.stage == 0:
        return 2 * gradients
    if layout.stage == 1:
        return 2 * gradients + weights
    if layout.stage == 2:
        return 2 * gradients * layout.accumulation + weights
    gathers = 3 if layout.checkpointing else 2
    gathers = 2 * gathers + 1 if shape.itc_size else gathers
    return (gradients + gathers * weights) * layout.accumulation


def communication_time(shape: Shape, layout: Layout, cluster: Cluster) -> float:
    """Seconds of communication were nothing hidden: the slowest link of the ring decides; latency for each layer's collectives."""
    within = layout.ranks <= cluster.per_node
    speed = cluster.device.link if within else min(cluster.device.link, cluster.network)
    collectives = (layout.accumulation * shape.layers * 3 if layout.stage == 3 else 4 + layout.accumulation) if layout.ranks > 1 else 0
    return communication_bytes(shape, layout) / speed + collectives * cluster.latency * max(1, layout.ranks).bit_length()
