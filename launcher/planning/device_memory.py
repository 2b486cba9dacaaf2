"""Memory of one rank by part: what ZeRO's stages leave on it, what a packed batch needs, what stays aside. Bytes throughout."""

from dataclasses import dataclass, fields

from launcher.planning.shape import (
    Load,
    Shape,
    alone_flops,
    forward_flops,
    kept_rows_bytes,
    kept_scores_bytes,
    of_pairs,
    of_sides,
    parameters,
    spared_bytes,
)
from megainter.precision import Precision

BUCKET = 200_000_000  # numbers: reduce and all-gather buckets of the configurations in ds_configs/
CPU_BUCKET = 25_000_000  # numbers: the trainer's own bucket on the CPU (`megainter.training.engine`)
LIVE = 1_000_000_000  # numbers: DeepSpeed's stage3_max_live_parameters
CUDA_CONTEXT = 1.5 * 2**30  # context, NCCL's and cuBLAS's own buffers: an assumption, not a measurement


@dataclass(frozen=True)
class Layout:
    """How the work is divided: ZeRO ``stage`` over ``ranks``, each running ``accumulation`` micro-batches of a step."""

    stage: int
    ranks: int
    precision: Precision = "bf16"
    offload: bool = False  # optimiser state and fp32 weights in host memory
    checkpointing: bool = False  # activations recomputed layer by layer
    accumulation: int = 1
    communication: str = "fp32"  # of gradients while they are summed over ranks
    averaged: bool = False  # a moving average of the weights is kept, and saved

    @property
    def width(self) -> int:
        """Bytes of a number in activations."""
        return 4 if self.precision == "fp32" else 2


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank. Outside the device: ``host`` (offloaded state), and ``copy``, its share of the state for a checkpoint."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    buffers: float
    overhead: float
    host: float
    copy: float

    @property
    def device(self) -> float:
        """All parts that lie on the device."""
        return sum(getattr(self, field.name) for field in fields(self) if field.name not in ("host", "copy"))


def memory(shape: Shape, load: Load, layout: Layout, cpu: bool = False) -> Memory:
    """Peak memory of a rank. ``cpu``: the plain attention form of the CPU, no context; else CUDA with fused attention."""
    count = parameters(shape)
    weights, gradients, optimizer = _states(count, layout)
    host = optimizer if layout.offload else 0.0
    return Memory(
        weights=weights,
        gradients=0.0 if cpu and layout.stage else gradients,  # among the buffers there, as not all lie at one time
        optimizer=0.0 if layout.offload else optimizer,
        activations=activations(shape, load, layout, cpu),
        logits=logits(shape, load, layout.width),
        buffers=_cpu_buffers(shape, load, layout) if cpu else _buffers(count, layout),
        overhead=0.0 if cpu else CUDA_CONTEXT,
        host=host,
        copy=checkpoint_bytes(shape, layout.averaged) / layout.ranks,
    )


def _states(count: int, layout: Layout) -> tuple[float, float, float]:
    """Working weights, gradients, and fp32 weights with two moments, in bytes on one rank.

    Gradients are accumulated and reduced in fp32 (as `megainter.training.engine` sets). Stage 1 accumulates whole gradients, stages
    2 and 3 only the rank's share.
    """
    share = count / layout.ranks
    half = layout.precision != "fp32" and layout.stage > 0
    if layout.stage == 0:  # bf16 runs under autocast here, over fp32 weights
        return 4.0 * count, 4.0 * count, 8.0 * count
    width = 2 if half else 4
    live = min(count, LIVE) if layout.stage == 3 else 0
    weights = width * (share + live if layout.stage == 3 else count)
    gradients = 4.0 * (count if layout.stage == 1 else share)
    return weights, gradients, 12.0 * share


def _buffers(count: int, layout: Layout) -> float:
    """Two buckets of the reductions, as communication overlaps, and the fp32 share of gradients in hand at the update."""
    if layout.stage == 0:
        return 0.0
    share = 4.0 * count / layout.ranks
    width = 4 if layout.stage == 1 else layout.width  # stage 1 stages its fp32 accumulator
    return share + BUCKET * width * 2


def _cpu_buffers(shape: Shape, load: Load, layout: Layout) -> float:
    """What a rank on the CPU holds besides weights, optimiser and one micro-batch's activations; compared with real runs at stage 2.

    From the system: the bucket that all gradients are copied to, and with several ranks its flat copy on the way to the others. In the
    heap, which keeps what was freed: the weights as they were built, before DeepSpeed made them one tensor (activations come to lie
    there); the rank's share of the gradients, cut out of the bucket, and its flat form for the optimiser. An accumulated share stays
    where activations were, so that those of the next micro-batch need room of their own.
    """
    count = parameters(shape)
    own = activations(shape, load, layout, cpu=True)
    built = max(0.0, 4.0 * count - own)
    if layout.stage == 0:
        return built
    bucket = min(CPU_BUCKET, count) * layout.width  # pages that are never touched take no memory
    copied = bucket if layout.ranks > 1 else 0.0
    return built + bucket + copied + 8.0 * count / layout.ranks + (own if layout.accumulation > 1 else 0.0)


def activations(shape: Shape, load: Load, layout: Layout, cpu: bool = False) -> float:
    """What the forward pass keeps of a micro-batch until its backward pass, logits aside; with contrast of both sides alone too, the same
    rows again."""
    pairs = _kept_of_pass(shape, of_pairs(shape, load), layout, cpu, alone=False)
    passes = (shape.itc_size > 0) + shape.itm_vectors
    return pairs + (passes * _kept_of_pass(shape, of_sides(shape, load), layout, cpu, alone=True) if passes else 0.0)


def _kept_of_pass(shape: Shape, load: Load, layout: Layout, cpu: bool, alone: bool) -> float:
    width = layout.width
    rows = load.rows(shape)
    scores = kept_scores_bytes(shape, load, width, alone) if cpu else 0.0
    embedded = load.samples * (
        load.regions * shape.region_feature_size * (2 + width) + (load.text + load.regions) * shape.hidden_size * 4 * width
    )
    if not layout.checkpointing:
        return rows * kept_rows_bytes(shape, width, cpu) - spared_bytes(shape, load, width, cpu) + scores + embedded
    one_layer = load.samples * (load.text + load.regions) * kept_rows_bytes(shape, width, cpu) + scores / max(shape.layers, 1)
    return rows * shape.hidden_size * width + one_layer + embedded


def logits(shape: Shape, load: Load, width: int) -> float:
    """Logits at masked places: themselves, their fp32 log-probabilities, and both gradients while the loss is differentiated."""
    numbers = load.samples * (load.masked_text * shape.vocab_size + load.masked_regions * shape.targets)
    return numbers * (2 * width + 8)


def checkpoint_bytes(shape: Shape, averaged: bool = False) -> float:
    """Size of one checkpoint: fp32 weights, both moments, and the average of the weights where there is one."""
    return (16.0 if averaged else 12.0) * parameters(shape)


def flops_per_step(shape: Shape, load: Load, layout: Layout) -> float:
    """Operations of one rank in one optimiser step: forward, twice that backward, and forward again with checkpointing; with contrast both
    sides alone before it all."""
    before = alone_flops(shape, load) if shape.itc_size else 0.0
    return layout.accumulation * ((4 if layout.checkpointing else 3) * forward_flops(shape, load) + before)
