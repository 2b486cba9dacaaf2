"""What `megainter plan` is asked; light, since the command line reads it for its help."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from megainter.errors import UsageError

# Commas stand between thousands alone: 1,5M is fifteen to some and one and a half to others.
COUNT = re.compile(r"([0-9]{1,3}(?:,[0-9]{3})+|[0-9]+(?:\.[0-9]+)?)(e[0-9]{1,2})?([kMG]?)", re.IGNORECASE)
TIMES = {"": 1, "k": 1_000, "m": 1_000_000, "g": 1_000_000_000}


def count(text: str) -> int:
    """A whole number as it is typed: 5000000, 5,000,000, 5M, 2.5M, 500k or 5e6; ``ValueError`` for anything else."""
    found = COUNT.fullmatch(text.replace("_", ""))
    number = float(found[1].replace(",", "") + (found[2] or "")) * TIMES[found[3].lower()] if found else 0.5
    if not number.is_integer():
        raise ValueError(f"{text!a:.80} is no whole number; give one such as 5000000, 5M, 500k or 5e6")
    return int(number)


def _counted(kind: Any, tokens: Sequence[Any]) -> int:
    """``count`` as the command line asks for it."""
    return count(tokens[0].value)


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """What `megainter plan` is asked: a recipe, a cluster, and what is assumed of the corpus and of failures."""

    config: Path
    """Recipe of pretrain: a TOML file, or one that comes along, such as base, large, xl, 10b (`megainter pretrain --help` has all)."""
    gpus: int
    """Number of devices."""
    gpu: str
    """v100, a100-40g, a100-80g, h100, h200, b200, mi300x, t4, l4, rtx3090, rtx4090, rtx5090, or a TOML file with one table like those of
    launcher/planning/gpus.toml."""
    per_node: int = 8
    """Devices of a node."""
    network: float = 25.0
    """GB/s between nodes, one way, for each device."""
    host_link: float = 25.0
    """GB/s between a device and its host, one way: what an offloaded update sends."""
    host_memory: float = 50.0
    """GB/s that the host's memory moves for each device's process: what an offloaded update reads and writes."""
    efficiency: float | None = None
    """Share of the peak that matrix products reach; by default it follows from the tokens of a micro-batch and the model's width."""
    pairs: Annotated[int, Parameter(converter=_counted)] = 4_000_000
    """Pairs of one epoch, a caption each: 5000000, 5M or 5e6."""
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
        for name in ("gpus", "per_node", "network", "host_link", "host_memory", "pairs", "disk", "copy", "mtbf_hours"):
            if not getattr(self, name) > 0:
                raise UsageError(f"--{name.replace('_', '-')} is {getattr(self, name)}; give a number above 0")
        if self.efficiency is not None and not 0 < self.efficiency <= 1:
            raise UsageError(f"--efficiency is {self.efficiency}; give a share of the peak, above 0 and at most 1")
        for path in (self.ds_config, self.report, self.simulate):
            if path is not None and not path.parent.is_dir():
                raise UsageError(f"{path}: there is no folder {path.parent}; make it first")
