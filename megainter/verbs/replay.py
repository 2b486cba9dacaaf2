"""`megainter replay`: a step of a run done again."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

Positive = Annotated[int, Parameter()]


def replay(run: Path, /, *, step: int, against: Literal["metrics"] | None = None, at_most: int = 200, json: bool = False) -> None:
    """Do a step of a run again, in one process: its losses, and those of each of its samples with what it shows.

    Begins at the newest checkpoint before the step; the run folder is only read.

    Parameters
    ----------
    run
        Run folder of `megainter pretrain` or `megainter finetune`.
    step
        The step, counted from 1 as in metrics.jsonl.
    against
        metrics: say whether the losses are those that metrics.jsonl has of this step (training.log_every 1).
    at_most
        Steps that may be done between the checkpoint and this one.
    json
        Print one JSON object.
    """
    from megainter.tasks.replaying import replay_run

    print(replay_run(run, step, at_most, against is not None, json))
