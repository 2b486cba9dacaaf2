"""`megainter plan`: memory, time and goodput of a recipe on a cluster, before renting it."""

from typing import Annotated

from cyclopts import Parameter

from launcher.planning.settings import PlanSettings


def plan(
    *settings: Annotated[str, Parameter(allow_leading_hyphen=True)],
    options: Annotated[PlanSettings, Parameter(name="*")],
) -> None:
    """What a recipe needs on N devices: memory by part, step time, days, goodput; recommends ZeRO stage and micro-batch.

    Arithmetic on peaks and stated assumptions, not a measurement; docs/plan.md says what it was compared with.

    Parameters
    ----------
    settings
        Settings laid over the recipe, such as --training.global_batch 4096.
    """
    from launcher.planning.report import tell

    tell(options, settings)
