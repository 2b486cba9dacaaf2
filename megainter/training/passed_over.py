"""Steps that a run passes over after it went back to a checkpoint because of them: ``left_out.json`` in the run folder."""

from pathlib import Path
from typing import Any

from megainter.errors import DamagedError
from megainter.files import read_json, write_json

FILE = "left_out.json"


def read_passed_over(folder: Path) -> list[dict[str, Any]]:
    """Its entries, in the order they were made; none where there is no such file. ``DamagedError`` where it is not as it was written."""
    path = folder / FILE
    if not path.exists():
        return []
    try:
        entries: list[dict[str, Any]] = read_json(path)["steps"]
        [int(entry["step"]) for entry in entries]
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedError(f"{path} cannot be read: {error}; restore it, or remove it and its steps are trained on again") from None
    return entries


def pass_over(folder: Path, entry: dict[str, Any]) -> None:
    """Add the entry of a step: its number once finished, and whatever else is worth knowing."""
    write_json(folder / FILE, {"steps": [*read_passed_over(folder), entry]})
