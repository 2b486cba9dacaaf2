"""`megainter track`: a run's records sent to experiment trackers."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from megainter.tracking import require_trackers, trackers_named


def track(run: Path, /, *, to: Annotated[list[str], Parameter(negative="")]) -> None:
    """Send what metrics.jsonl of a run says to an experiment tracker; what was sent before is not sent again.

    Parameters
    ----------
    run
        Run folder of `megainter pretrain` or `megainter finetune`.
    to
        The tracker: tensorboard, wandb, trackio or mlflow; several apart by commas. Its own environment variables say where it sends to.
    """
    names = trackers_named(",".join(to))
    require_trackers(names)
    from megainter.training.following import follow
    from megainter.training.trackers import require_records, written_as_it_ran

    require_records(run)
    for name in names:
        events = written_as_it_ran(run) if name == "tensorboard" else None
        told = "events were written as it ran" if events else f"{follow(run, name, lambda: True):,} records sent to {name}"
        look = f"; `tensorboard --logdir {run / 'logs' / 'tensorboard'}` shows them" if name == "tensorboard" else ""
        print(f"{run}: {told}{look}", flush=True)
