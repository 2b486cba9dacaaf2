"""`megainter launch`: training on many devices or machines, supervised."""

import difflib
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from launcher.options import NO_RESTARTS, NOTHING_SAID, THIS_MACHINE, Placement, SlurmOptions, Supervision
from megainter.errors import UsageError

if TYPE_CHECKING:
    from megainter.config.settings import FinetuneConfig, RunConfig


def launch(
    *command: Annotated[str, Parameter(allow_leading_hyphen=True)],
    slurm: bool = False,
    placement: Annotated[Placement, Parameter(name="*", negative_iterable=())] = THIS_MACHINE,
    supervision: Annotated[Supervision, Parameter(name="*")] = NO_RESTARTS,
    batch: Annotated[SlurmOptions, Parameter(name="*", negative_iterable=())] = NOTHING_SAID,
    dry_run: bool = False,
) -> None:
    """Start pretraining or fine-tuning on the devices of this machine, of a hostfile's or of a Slurm job, and stay until it is done.

    megainter launch --hostfile hosts --restarts 3 -- pretrain --config base --output run. The exact command is written to
    RUN/launch. SIGTERM or Ctrl-C saves a checkpoint and ends with 75; a second one ends at once.

    Parameters
    ----------
    command
        After "--": pretrain or finetune TASK, and its settings.
    slurm
        Write and submit a batch job; inside a job, run it there.
    dry_run
        Print what would run, with --slurm the batch file, and run nothing: --dry-run > job.sbatch.
    """
    from launcher.command import check_arguments
    from launcher.launch import LaunchSettings
    from launcher.launch import launch as run

    if placement.hostfile is not None and slurm:
        raise UsageError("give --hostfile or --slurm, not both: Slurm chooses the hosts")
    placement.check()
    supervision.check()
    check_arguments([*command, *map(str, (placement.hostfile, placement.include, placement.exclude))], remote=False)
    config = _configuration(command)
    _check_paths(config, here=placement.hostfile is None and not slurm)
    request = batch.request(placement.processes, supervision.min_nodes) if slurm else None
    if batch.given and not slurm:
        raise UsageError(f"{batch.given[0]} is for Slurm; give --slurm too, or a --hostfile with the hosts")
    settings = LaunchSettings(
        arguments=command[1:],
        training=config.training,
        output=config.output,
        placement=placement,
        supervision=supervision,
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


def _check_paths(config: "RunConfig | FinetuneConfig", here: bool) -> None:
    """``UsageError`` where a path of the settings is not there and the job runs ``here`` alone; else a warning, as hosts may have it."""
    from megainter.verbs.pretrain import require_paths

    try:
        require_paths(config)
    except UsageError as error:
        if here:
            raise
        print(f"warning: not on this machine: {error}; the hosts need it under this path", file=sys.stderr, flush=True)


def _not_launched(command: list[str]) -> str:
    """What is wrong with words that are no training command: a mistyped one, another verb, or an option of launch itself."""
    usage = "megainter launch [options] -- pretrain --config RECIPE.toml ... (or finetune TASK --config ...)"
    if not command:
        return f"say what to launch: {usage}"
    word = command[0]
    if word.startswith("-"):
        names = [*(each.name for kind in (Placement, Supervision, SlurmOptions) for each in fields(kind)), "slurm", "dry_run"]
        options = [f"--{name.replace('_', '-')}" for name in names]
        near = difflib.get_close_matches(word.partition("=")[0], options, n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; settings stand after the command: {usage}"
        return f"launch has no option {word!a:.80}{hint} (see megainter launch --help)"
    if word == "megainter":
        return f"leave out {word!r} after --: {usage}"
    near = difflib.get_close_matches(word, ("pretrain", "finetune"), n=1)
    return f"{word!a:.80} is nothing to launch" + (f"; did you mean {near[0]}?" if near else f": {usage}")
