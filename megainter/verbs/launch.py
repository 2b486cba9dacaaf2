"""`megainter launch`: training on many devices or machines, supervised."""

import difflib
import inspect
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from megainter.errors import UsageError

if TYPE_CHECKING:
    from megainter.config.settings import FinetuneConfig, RunConfig


def launch(
    *command: Annotated[str, Parameter(allow_leading_hyphen=True)],
    hostfile: Path | None = None,
    slurm: bool = False,
    include: str = "",
    exclude: str = "",
    processes: int | None = None,
    engine: Literal["deepspeed", "torchrun", "mpirun", "srun"] | None = None,
    remote_shell: Literal["pdsh", "openmpi", "mpich"] = "pdsh",
    master_addr: str | None = None,
    port: int | None = None,
    env: list[str] | None = None,
    restarts: int = 0,
    min_nodes: int | None = None,
    grace: float = 120.0,
    nodes: int | None = None,
    time: str | None = None,
    partition: str | None = None,
    account: str | None = None,
    gpus: bool | None = None,
    gres: str | None = None,
    mem: str | None = None,
    cpus_per_task: int | None = None,
    qos: str | None = None,
    constraint: str | None = None,
    module: list[str] | None = None,
    dry_run: bool = False,
) -> None:
    """Start pretraining or fine-tuning on the devices of this machine, of a hostfile's or of a Slurm job, and stay until it is done.

    megainter launch --hostfile hosts --restarts 3 -- pretrain --config base --output run. The exact command is written to
    RUN/launch. SIGTERM or Ctrl-C saves a checkpoint and ends with 75; a second one ends at once.

    Parameters
    ----------
    command
        After "--": pretrain or finetune TASK, and its settings.
    hostfile
        Lines of "host slots=8".
    slurm
        Write and submit a batch job; inside a job, run it there.
    include
        Hosts and devices to use: "a@b:0,2" is all of host a and two devices of b.
    exclude
        Hosts and devices to leave out.
    processes
        Processes on this machine (default one per GPU), or on each Slurm node (no default).
    engine
        What starts the processes; default deepspeed, and srun in Slurm jobs.
    remote_shell
        How the deepspeed engine reaches other hosts.
    master_addr
        Host where ranks meet; default the first.
    port
        Port where ranks meet; default a free one.
    env
        NAME=VALUE for every rank; may be repeated.
    restarts
        Starts again after a failure, from the newest whole checkpoint, at most so many times.
    min_nodes
        Go on with so few hosts where others stay away; the global batch stays. Default: all.
    grace
        Seconds that a stopped job gets to save.
    nodes
        Slurm nodes; default 1.
    time
        Slurm time limit, days-hours:minutes:seconds; default 24:00:00.
    partition
        Slurm partition.
    account
        Slurm account.
    gpus
        Ask Slurm for a GPU per process; the default, where --gres names none.
    gres
        Slurm's generic resources of each node: "gpu:a100:8".
    mem
        Memory of each Slurm node: "200G"; "0" is all of it.
    cpus_per_task
        CPU cores of each process in Slurm.
    qos
        Slurm quality of service.
    constraint
        Features that Slurm nodes must have.
    module
        Environment module to load in the Slurm job; may be repeated.
    dry_run
        Print what would run, and run nothing.
    """
    from launcher.command import check_arguments
    from launcher.launch import LaunchSettings
    from launcher.launch import launch as run
    from launcher.slurm import SlurmRequest

    if hostfile is not None and slurm:
        raise UsageError("give --hostfile or --slurm, not both: Slurm chooses the hosts")
    for name, value, least, most in (("restarts", restarts, 0, 1000), ("grace", grace, 1, 86400), ("port", port, 1024, 65535)):
        if value is not None and not least <= value <= most:
            raise UsageError(f"--{name} is {value}; give {least} to {most}")
    if processes is not None and not 1 <= processes <= 1024:
        raise UsageError(f"--processes is {processes}; give 1 to 1024")
    check_arguments([*command, *map(str, (hostfile, include, exclude))], remote=False)
    config = _configuration(command)
    request = None
    if slurm:
        if processes is None:
            raise UsageError("--slurm needs --processes: how many on each node, one per GPU there (this machine may have others)")
        request = SlurmRequest(
            nodes=1 if nodes is None else nodes,
            processes=processes,
            time="24:00:00" if time is None else time,
            min_nodes=min_nodes,
            partition=partition,
            account=account,
            gpus=gpus is not False,
            gres=gres,
            mem=mem,
            cpus_per_task=cpus_per_task,
            qos=qos,
            constraint=constraint,
            modules=tuple(module or ()),
        )
    for_slurm = {
        "--nodes": nodes, "--time": time, "--partition": partition, "--account": account, "--gpus": gpus, "--gres": gres, "--mem": mem,
        "--cpus-per-task": cpus_per_task, "--qos": qos, "--constraint": constraint, "--module": module,
    }  # fmt: skip
    given = [name for name, value in for_slurm.items() if value is not None]
    if given and not slurm:
        raise UsageError(f"{given[0]} is for Slurm; give --slurm too, or a --hostfile with the hosts")
    settings = LaunchSettings(
        arguments=command[1:],
        training=config.training,
        output=config.output,
        hostfile=hostfile,
        include=include,
        exclude=exclude,
        processes=processes,
        engine=engine,
        remote_shell=remote_shell,
        master=master_addr,
        port=port,
        environment=tuple(env or ()),
        restarts=restarts,
        min_nodes=min_nodes,
        grace=grace,
        request=request,
        module=f"megainter.{command[0]}",
    )
    run(settings, tuple(sys.argv[1:]), dry_run)


def _configuration(command: Sequence[str]) -> "RunConfig | FinetuneConfig":
    """The settings of the training command that is launched; ``UsageError`` for another command or wrong settings."""
    from megainter.config.reading import load_config
    from megainter.verbs.finetune import configuration
    from megainter.verbs.pretrain import split_config

    match list(command):
        case ["pretrain", *settings]:
            return load_config(*split_config(settings))
        case ["finetune", *words]:
            return configuration(words)
    raise UsageError(_not_launched([*command]))


def _not_launched(command: list[str]) -> str:
    """What is wrong with words that are no training command: a mistyped one, another verb, or an option of launch itself."""
    usage = "megainter launch [options] -- pretrain --config RECIPE.toml ... (or finetune TASK --config ...)"
    if not command:
        return f"say what to launch: {usage}"
    word = command[0]
    if word.startswith("-"):
        options = [f"--{name.replace('_', '-')}" for name in inspect.signature(launch).parameters if name != "command"]
        near = difflib.get_close_matches(word.partition("=")[0], options, n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; settings stand after the command: {usage}"
        return f"launch has no option {word!a:.80}{hint} (see megainter launch --help)"
    if word == "megainter":
        return f"leave out {word!r} after --: {usage}"
    near = difflib.get_close_matches(word, ("pretrain", "finetune"), n=1)
    return f"{word!a:.80} is nothing to launch" + (f"; did you mean {near[0]}?" if near else f": {usage}")
