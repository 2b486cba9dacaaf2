"""What `megainter launch` and `preflight` are asked about hosts and Slurm; light, since the command line reads it for its help."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from launcher.slurm import SlurmRequest
from megainter.errors import UsageError

Engine = Literal["deepspeed", "torchrun", "mpirun", "srun"]
RemoteShell = Literal["pdsh", "openmpi", "mpich"]


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where a job's processes run, and what starts them."""

    hostfile: Path | None = None
    """Lines of "host slots=8"."""
    include: str = ""
    """Hosts and devices to use: "a@b:0,2" is all of host a and two devices of b."""
    exclude: str = ""
    """Hosts and devices to leave out."""
    processes: int | None = None
    """Processes on this machine (default one per GPU), or on each Slurm node (no default)."""
    engine: Engine | None = None
    """What starts the processes; default deepspeed, and srun in Slurm jobs."""
    remote_shell: RemoteShell = "pdsh"
    """How the deepspeed engine reaches other hosts."""
    master_addr: str | None = None
    """Host where ranks meet; default the first."""
    port: int | None = None
    """Port where ranks meet; default a free one."""
    env: tuple[str, ...] = ()
    """NAME=VALUE for every rank; may be repeated."""

    def check(self) -> None:
        """``UsageError`` for a number out of its limits."""
        _within("processes", self.processes, 1, 1024)
        _within("port", self.port, 1024, 65535)


@dataclass(frozen=True, kw_only=True)
class Supervision:
    """What a job does when something fails or it is to stop."""

    restarts: int = 0
    """Starts again after a failure, from the newest whole checkpoint, at most so many times."""
    min_nodes: int | None = None
    """Go on with so few hosts where others stay away; the global batch stays. Default: all."""
    grace: float = 120.0
    """Seconds that a stopped job gets to save."""

    def check(self) -> None:
        """``UsageError`` for a number out of its limits."""
        _within("restarts", self.restarts, 0, 1000)
        _within("grace", self.grace, 1, 86400)


@dataclass(frozen=True, kw_only=True)
class SlurmOptions:
    """What is asked of Slurm; None where nothing was said."""

    nodes: int | None = None
    """Slurm nodes; default 1."""
    time: str | None = None
    """Slurm time limit, days-hours:minutes:seconds; default 24:00:00."""
    partition: str | None = None
    """Slurm partition."""
    account: str | None = None
    """Slurm account."""
    gpus: bool | None = None
    """Ask Slurm for a GPU per process; the default, where --gres names none."""
    gres: str | None = None
    """Slurm's generic resources of each node: "gpu:a100:8"."""
    mem: str | None = None
    """Memory of each Slurm node: "200G"; "0" is all of it."""
    cpus_per_task: int | None = None
    """CPU cores of each process in Slurm."""
    qos: str | None = None
    """Slurm quality of service."""
    constraint: str | None = None
    """Features that Slurm nodes must have."""
    module: tuple[str, ...] | None = None
    """Environment module to load in the Slurm job; may be repeated."""

    @property
    def given(self) -> list[str]:
        """The options that were given, as they are typed."""
        return [f"--{each.name.replace('_', '-')}" for each in fields(self) if getattr(self, each.name) is not None]

    def request(self, processes: int | None, min_nodes: int | None) -> SlurmRequest:
        """What is asked of Slurm for so many processes a node; ``UsageError`` where their number is not said."""
        if processes is None:
            raise UsageError("--slurm needs --processes: how many on each node, one per GPU there (this machine may have others)")
        return SlurmRequest(
            nodes=1 if self.nodes is None else self.nodes,
            processes=processes,
            time="24:00:00" if self.time is None else self.time,
            min_nodes=min_nodes,
            partition=self.partition,
            account=self.account,
            gpus=self.gpus is not False,
            gres=self.gres,
            mem=self.mem,
            cpus_per_task=self.cpus_per_task,
            qos=self.qos,
            constraint=self.constraint,
            modules=self.module or (),
        )


# The defaults, as one object each.
THIS_MACHINE, NO_RESTARTS, NOTHING_SAID = Placement(), Supervision(), SlurmOptions()


def _within(name: str, value: float | None, least: int, most: int) -> None:
    if value is not None and not least <= value <= most:
        raise UsageError(f"--{name} is {value}; give {least} to {most}")
