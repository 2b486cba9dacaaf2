"""`megainter plan`: memory, time and goodput of a recipe on a cluster, before renting it."""

from typing import Annotated

from cyclopts import Parameter

from launcher.planning.settings import PlanSettings
from megainter.verbs.as_json import lines_aside, print_object
from megainter.verbs.pretrain import settings_of_pretrain


def plan(
    *settings: Annotated[str, Parameter(allow_leading_hyphen=True)],
    options: Annotated[PlanSettings, Parameter(name="*")],
    json: bool = False,
) -> None:
    """What a recipe needs on N devices: memory by part, step time, days, goodput; recommends ZeRO stage and micro-batch.

    Arithmetic on peaks and stated assumptions, not a measurement; docs/plan.md says what it was compared with.

    Parameters
    ----------
    settings
        Settings laid over the recipe, such as --training.global_batch 4096.
    json
        Print one JSON object for scripts, with every layout and all figures.
    """
    from launcher.planning.report import tell

    with lines_aside(json):
        figures = tell(options, settings_of_pretrain(settings, "plan"))
    if json:
        print_object(figures)
