"""Which experiment trackers there are, and whether their packages are installed; light, since settings and verbs read it."""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Literal, get_args

from megainter.errors import UsageError

Tracker = Literal["tensorboard", "wandb", "trackio", "mlflow"]
TRACKERS: tuple[Tracker, ...] = get_args(Tracker)


def trackers_named(names: str) -> list[Tracker]:
    """The trackers of names apart by commas, each once; ``UsageError`` for another name."""
    given = dict.fromkeys(name.strip() for name in names.split(","))
    if unknown := [name for name in given if name not in TRACKERS]:
        raise UsageError(f"--to {unknown[0]!r:.80} is no tracker; choose {', '.join(TRACKERS)}")
    return [known for known in TRACKERS if known in given]


def require_trackers(names: Sequence[Tracker]) -> None:
    """``UsageError`` where the package of a tracker is not installed."""
    for name in names:
        if find_spec(name) is None:
            raise UsageError(f"tracking to {name} needs its package: pip install 'megainter[{name}]', or leave {name} out")
