"""`megainter preflight`: is everything there that a long run needs?"""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from megainter.verbs.as_json import lines_aside, print_object


def preflight(
    *settings: Annotated[str, Parameter(allow_leading_hyphen=True)],
    hostfile: Path | None = None,
    include: str = "",
    exclude: str = "",
    processes: int | None = None,
    engine: Literal["deepspeed", "torchrun", "mpirun", "srun"] | None = None,
    remote_shell: Literal["pdsh", "openmpi", "mpich"] = "pdsh",
    master_addr: str | None = None,
    env: list[str] | None = None,
    steps: bool = True,
    json: bool = False,
) -> None:
    """Check settings, hosts, versions, devices, data, memory, disk, network and three steps before a long pretraining run.

    megainter preflight --hostfile hosts --config base --output run: takes the settings of pretrain. Ends with 0 where all checks
    pass, else with the exit code of the first that failed.

    Parameters
    ----------
    settings
        --config RECIPE.toml, and settings laid over it.
    hostfile
        Lines of "host slots=8".
    include
        Hosts and devices to use: "a@b:0,2".
    exclude
        Hosts and devices to leave out.
    processes
        Processes on this machine; default one per GPU.
    engine
        What starts the processes; default deepspeed.
    remote_shell
        How the deepspeed engine reaches other hosts.
    master_addr
        Host where ranks meet; default the first.
    env
        NAME=VALUE for every rank; may be repeated.
    steps
        Also run three steps of the run itself.
    json
        Print one JSON object for scripts: every check, whether it passed, what was found and what to do.
    """
    from launcher.launch import LaunchSettings
    from launcher.preflight import preflight as check
    from launcher.preflight import require_passed
    from megainter.config.reading import load_config
    from megainter.verbs.pretrain import settings_of_pretrain, split_config

    words = tuple(settings_of_pretrain(settings, "preflight"))
    config = load_config(*split_config(words))
    asked = LaunchSettings(
        arguments=words,
        training=config.training,
        output=config.output,
        hostfile=hostfile,
        include=include,
        exclude=exclude,
        processes=processes,
        engine=engine,
        remote_shell=remote_shell,
        master=master_addr,
        environment=tuple(env or ()),
    )
    with lines_aside(json):
        checks = check(config, asked, dry_run_step=steps)
    if json:
        print_object({"passed": all(each.passed for each in checks), "checks": checks})
    require_passed(checks)
