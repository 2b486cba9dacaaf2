"""`megainter track`: a run's records sent to experiment trackers."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from megainter.tracking import Tracker, require_trackers


def track(run: Path, /, *, to: Annotated[list[Tracker], Parameter(negative="")]) -> None:
    """Send what metrics.jsonl of a run says to an experiment tracker; what was sent before is not sent again.

    Parameters
    ----------
    run
        Run folder of `megainter pretrain` or `megainter finetune`.
    to
        The tracker; may be repeated. Its own environment variables say where it sends to.
    """
    require_trackers(to)
    from megainter.training.following import follow
    from megainter.training.trackers import require_records

    require_records(run)
    for name in to:
        print(f"{run}: {follow(run, name, lambda: True):,} records sent to {name}", flush=True)
