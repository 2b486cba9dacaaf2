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
    from megainter.training.trackers import require_records, written_as_it_ran

    require_records(run)
    for name in to:
        events = written_as_it_ran(run) if name == "tensorboard" else None
        told = "events were written as it ran" if events else f"{follow(run, name, lambda: True):,} records sent to {name}"
        look = f"; `tensorboard --logdir {run / 'logs' / 'tensorboard'}` shows them" if name == "tensorboard" else ""
        print(f"{run}: {told}{look}", flush=True)
