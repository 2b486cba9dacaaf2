"""Time of a step from operations, memory traffic and communication volume. Arithmetic on peaks and stated assumptions."""

import tomllib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from launcher.memory import Layout, flops_per_step
from launcher.shape import Load, Shape, parameters
from megainter.errors import UsageError


@dataclass(frozen=True)
class Device:
    """A device: GiB, peak FLOP/s by precision, memory bytes/s, bytes/s one way to its neighbours in the node."""

    name: str
    memory: float
    flops: dict[str, float]
    hbm: float
    link: float
    source: str


@dataclass(frozen=True)
class Cluster:
    """``per_node`` devices a node; ``network`` bytes/s one way between nodes per device; shares of the peaks that are reached."""

    device: Device
    per_node: int = 8
    network: float = 25e9  # a 200 Gbit/s port for each device
    host_link: float = 25e9  # PCIe 4 x16 in practice
    efficiency: float = 0.4  # of peak FLOP/s in matrix products of this size
    traffic_efficiency: float = 0.7  # of memory bandwidth in everything else
    overlap: float = 0.7  # of the backward pass hides communication
    latency: float = 2e-5  # seconds a collective


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimiser step, by part; ``communication`` is what compute does not hide."""

    matmul: float
    elementwise: float
    optimizer: float
    communication: float

    @property
    def total(self) -> float:
        return self.matmul + self.elementwise + self.optimizer + self.communication


def device(name: str) -> Device:
    """A device of the table by name, or of the user's own TOML file with one table of the same form."""
    path = Path(name)
    text = path.read_text() if path.suffix == ".toml" and path.is_file() else (resources.files("launcher") / "gpus.toml").read_text()
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{name} is not valid TOML: {error}") from None
    chosen = next(iter(table)) if path.suffix == ".toml" and len(table) == 1 else name.lower()
    if not table:
        raise UsageError(f"{name} is empty; it needs one table like those of launcher/gpus.toml")
    if chosen not in table:
        raise UsageError(f"no device {name!r}; known: {', '.join(table)}; or give a TOML file with one table like them")
    try:
        facts = table[chosen]
        peaks = {key: float(facts[key]) * 1e12 for key in ("bf16", "fp16", "fp32") if key in facts}
        return Device(chosen, float(facts["memory"]), peaks, facts["hbm"] * 1e9, facts["link"] * 1e9, str(facts.get("source", path)))
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"device {chosen} in {name} lacks a number: {error}; see launcher/gpus.toml for the form") from None


def step_time(shape: Shape, load: Load, layout: Layout, cluster: Cluster) -> StepTime:
    """One optimiser step of ``layout`` on ``cluster``; ``UsageError`` where the device lacks the precision."""
    peak = cluster.device.flops.get(layout.precision) or (cluster.device.flops.get("fp32") if layout.precision == "fp32" else None)
    if peak is None:
        others = " or ".join(f"--engine.precision {name}" for name in cluster.device.flops)
        raise UsageError(f"{cluster.device.name} has no {layout.precision}; give {others}")
    matmul = flops_per_step(shape, load, layout) / (peak * cluster.efficiency)
    elementwise = layout.accumulation * traffic(shape, load, layout) / (cluster.device.hbm * cluster.traffic_efficiency)
    hidden = cluster.overlap * (matmul + elementwise) * 2 / 3
    return StepTime(matmul, elementwise, update_time(shape, layout, cluster), max(0.0, communication_time(shape, layout, cluster) - hidden))


def traffic(shape: Shape, load: Load, layout: Layout) -> float:
    """Bytes that activations, norms, residuals and dropout move in forward and backward of a micro-batch: three times what is kept."""
    passes = 4 if layout.checkpointing else 3
    return passes * load.rows(shape) * (8 * shape.hidden_size + 2 * shape.intermediate_size) * layout.width


def update_time(shape: Shape, layout: Layout, cluster: Cluster) -> float:
    """AdamW on the rank's share: 28 bytes read and written a number; with offload over the host link, gradients out and weights in."""
    share = parameters(shape) / (layout.ranks if layout.stage else 1)
    if layout.offload:
        return share * (4 + 2) / cluster.host_link + share * 28 / 50e9  # a server's memory moves about 50 GB/s for one process
    return share * 28 / (cluster.device.hbm * cluster.traffic_efficiency)


def communication_bytes(shape: Shape, layout: Layout) -> float:
    """Bytes one rank sends in one optimiser step (ring algorithms): fp32 gradients out, working weights in.

    Stage 0 all-reduces once. Stage 1 all-reduces once and gathers the weights; stage 2 all-reduces at every micro-batch: DeepSpeed 0.19
    sums whole buckets on all ranks, of which each keeps its share (``use_multi_rank_bucket_allreduce``). Stage 3 reduces to shares, and
    gathers the weights for the forward and the backward pass of every micro-batch.
    """
    if layout.ranks == 1:
        return 0.0
    count = parameters(shape) * (layout.ranks - 1) / layout.ranks
    weights = count * layout.width
    if layout.stage == 0:
        return 8 * count
    if layout.stage == 1:
        return 8 * count + weights
    if layout.stage == 2:
        return 8 * count * layout.accumulation + weights
    gathers = 3 if layout.checkpointing else 2
    return (4 * count + gathers * weights) * layout.accumulation


def communication_time(shape: Shape, layout: Layout, cluster: Cluster) -> float:
    """Seconds of communication were nothing hidden: the slowest link of the ring decides; latency for each layer's collectives."""
    within = layout.ranks <= cluster.per_node
    speed = cluster.device.link if within else min(cluster.device.link, cluster.network)
    collectives = (layout.accumulation * shape.layers * 3 if layout.stage == 3 else 4 + layout.accumulation) if layout.ranks > 1 else 0
    return communication_bytes(shape, layout) / speed + collectives * cluster.latency * max(1, layout.ranks).bit_length()
