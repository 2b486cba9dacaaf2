"""`megainter preflight`: is everything there that a long run needs?"""

from typing import Annotated

from cyclopts import Parameter

from launcher.options import THIS_MACHINE, Placement
from megainter.verbs.as_json import lines_aside, print_object


def preflight(
    *settings: Annotated[str, Parameter(allow_leading_hyphen=True)],
    placement: Annotated[Placement, Parameter(name="*", negative_iterable=())] = THIS_MACHINE,
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

    placement.check()
    words = tuple(settings_of_pretrain(settings, "preflight"))
    config = load_config(*split_config(words))
    asked = LaunchSettings(arguments=words, training=config.training, output=config.output, placement=placement)
    with lines_aside(json):
        checks = check(config, asked, dry_run_step=steps)
    if json:
        print_object({"passed": all(each.passed for each in checks), "checks": checks})
    require_passed(checks)
