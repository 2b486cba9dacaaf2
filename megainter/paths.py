"""Paths that users give: whether something is there, and what of nearly that name is; light, asked before anything heavy is imported."""

import difflib
from contextlib import suppress
from pathlib import Path

from megainter.errors import UsageError


def require_there(path: Path | None, option: str, made_by: str = "") -> None:
    """``UsageError`` where ``path`` is given and nothing is there, with the nearest name, or with what makes such a file."""
    if path is not None and not path.exists():
        raise UsageError(f"{option} {path} does not exist{did_you_mean(path) or (f'; {made_by}' if made_by else '')}")


def require_file(path: Path) -> None:
    """``UsageError`` where ``path`` is no file, with the nearest name."""
    if not path.is_file():
        raise UsageError(not_a_file(path))


def not_a_file(path: Path) -> str:
    """What is said of a path where a file is wanted and none is."""
    return f"{path} does not exist or is not a file{did_you_mean(path)}"


def did_you_mean(path: Path) -> str:
    """The end of a message about ``path``: the nearest name beside it, or nothing."""
    near = near_paths(path)
    return f"; did you mean {near[0]}?" if near else ""


def near_paths(path: Path) -> list[str]:
    """At most one path beside ``path`` of nearly its name."""
    with suppress(OSError):
        others = [each.name for each in path.parent.iterdir() if each.name != path.name]
        return [str(path.parent / name) for name in difflib.get_close_matches(path.name, others, n=1, cutoff=0.75)]
    return []


def short_names(paths: list[Path]) -> list[str]:
    """Each path's last part, with as many before it as tell all apart."""
    parts = [path.resolve().parts for path in paths]
    longest = max(len(part) for part in parts)
    for length in range(1, longest + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(set(parts)):
            return names
    return [str(path) for path in paths]
