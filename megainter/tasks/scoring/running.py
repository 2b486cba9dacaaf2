"""A whole evaluation's scores: what is not done yet, chunk by chunk, into the score file, with progress."""

import time
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from megainter.progress import Progress
from megainter.tasks.scoring.file import ScoreFile
from megainter.tasks.scoring.processes import Scorer, score_chunks


class Work(Protocol):
    """What is scored: ``len(work)`` chunks."""

    def __len__(self) -> int: ...

    def places(self, chunk: int) -> NDArray[np.int64]:
        """Rows of the score file that a chunk's scores go to."""

    def units(self, chunk: int) -> int:
        """How many pairs, questions or examples a chunk has."""

    def scorer(self, device: torch.device) -> Scorer:
        """Its model on a device."""


def run(
    work: Work, file: ScoreFile, devices: list[torch.device], unit: str, check: Callable[[int, NDArray[np.float32]], None]
) -> tuple[float, float]:
    """Score what is not done yet, on ``devices``; the seconds it took, and the units per second.

    ``check(chunk, scores)`` raises ``NumericsError`` naming what has a score that is not a number; such scores are not kept.
    """
    units = [work.units(chunk) for chunk in range(len(work))]
    todo = file.todo()
    left = sum(units[chunk] for chunk in todo)
    with Progress("scoring", sum(units), unit, done=sum(units) - left) as progress:
        start = time.monotonic()
        for chunk, scores in score_chunks(work, todo, devices):
            check(chunk, scores)
            file.put(chunk, work.places(chunk), scores)
            progress.update(units[chunk])
        seconds = time.monotonic() - start
    return round(seconds, 3), round(left / max(seconds, 1e-9), 1)
