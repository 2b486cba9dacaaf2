"""The steps of a run whose batches hang on something that is made anew from the weights every so many steps.

Loader processes make batches ahead and know no weights. So they end at each renewal and new ones begin after it: a step's batches are a
function of what stood when its stretch of steps began, on every rank.
"""

from collections.abc import Iterator
from typing import Any, Self

from megainter.data.stream.loader import StepLoader, make_loader
from megainter.training import hangs
from megainter.training.job import Job
from megainter.training.watchdog import Watchdog

FOLDER = "candidates"  # in the run folder: what was made, as long as a checkpoint goes on with it


class Steps(Iterator[list[Any]]):
    """The micro-batches of steps ``start`` to ``stop`` - 1, in order. Close it as a ``StepLoader``."""

    def __init__(self, job: Job, trained: Any, start: int, stop: int, watch: Watchdog) -> None:
        self._job, self._trained, self._stop, self._watch = job, trained, stop, watch
        self._until = start  # the first step that the loader does not give
        self._loader: StepLoader[list[Any]] | None = None

    def renew(self, step: int) -> bool:
        """Before ``step`` is asked for: begin a new stretch where the last one ended. Whether something was renewed. Collective."""
        if step < self._until:
            return False
        if self._loader is not None:
            self._loader.close()
        every, renew = self._job.renew_every, self._job.renew
        if renew is not None:
            self._watch.at(hangs.VALIDATION, step)  # it looks at data without training, and may take as long
            renew(self._trained, step)
        self._until = min(self._stop, (step // every + 1) * every) if every and renew is not None else self._stop
        self._loader = make_loader(self._job.batches, step, self._until, workers=self._job.workers)
        return renew is not None

    def __next__(self) -> list[Any]:
        assert self._loader is not None  # renew comes first
        return next(self._loader)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._loader is not None:
            self._loader.__exit__(kind, error, trace)
