"""What `megainter plan` is asked; light, since the command line reads it for its help."""

from dataclasses import dataclass
from pathlib import Path

from megainter.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """What `megainter plan` is asked: a recipe, a cluster, and what is assumed of the corpus and of failures."""

    config: Path
    """Recipe: a TOML file, or base, large, xl, 10b."""
    gpus: int
    """Number of devices."""
    gpu: str
    """v100, a100-40g, a100-80g, h100, h200, b200, mi300x, t4, l4, rtx3090, rtx4090, rtx5090, or a TOML file with one table like those of
    launcher/planning/gpus.toml."""
    per_node: int = 8
    """Devices of a node."""
    network: float = 25.0
    """GB/s between nodes, one way, for each device."""
    efficiency: float | None = None
    """Share of the peak that matrix products reach; by default it follows from the tokens of a micro-batch and the model's width."""
    pairs: int = 4_000_000
    """Captions of one epoch."""
    text_tokens: float = 16.0
    """Mean length of a caption in tokens."""
    regions: float | None = None
    """Mean number of regions, the global one included; default the most the recipe allows."""
    disk: float = 2.0
    """GB/s at which a checkpoint is written, all ranks together, beside training."""
    copy: float = 3.0
    """GB/s at which each rank copies its share of a checkpoint to the host's memory, while training stands still."""
    restart: float = 300.0
    """Seconds from a failure to the first step after it."""
    mtbf_hours: float = 50_000.0
    """Mean time between failures of one device and its share of the rest; 50,000 h is what Llama 3's 16,384 GPUs had."""
    straggle: float = 0.0
    """Standard deviation of a device's step time, as a share of it."""
    ds_config: Path | None = None
    """Write the recommended DeepSpeed JSON here."""
    report: Path | None = None
    """Write all figures as JSON here."""
    simulate: Path | None = None
    """Write the goodput of 1 to 4,096 devices as PNG here."""

    def __post_init__(self) -> None:
        """Raise ``UsageError`` for a number that cannot be, and for a file whose folder does not exist."""
        for name in ("gpus", "per_node", "network", "pairs", "disk", "copy", "mtbf_hours"):
            if not getattr(self, name) > 0:
                raise UsageError(f"--{name.replace('_', '-')} is {getattr(self, name)}; give a number above 0")
        if self.efficiency is not None and not 0 < self.efficiency <= 1:
            raise UsageError(f"--efficiency is {self.efficiency}; give a share of the peak, above 0 and at most 1")
        for path in (self.ds_config, self.report, self.simulate):
            if path is not None and not path.parent.is_dir():
                raise UsageError(f"{path}: there is no folder {path.parent}; make it first")
