"""The list of what could not be used, beside what came of the rest: tab-separated, one line each, whatever the names contain."""

from collections.abc import Iterable
from pathlib import Path

from megainter.files import write_atomically

MAX_CHARACTERS = 4096  # of a cell: every image id has room, and no value of a file fills the list


def write_failures(path: Path, columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> None:
    """Write the list, or remove an earlier one where there is nothing to list. Bytes that are not UTF-8 are escaped, tabs and ends too."""
    escape = str.maketrans({"\t": "\\t", "\n": "\\n", "\r": "\\r"})
    lines = ["\t".join(cell[:MAX_CHARACTERS].translate(escape) for cell in row) + "\n" for row in rows]
    if not lines:
        return path.unlink(missing_ok=True)
    write_atomically(path, "".join(["\t".join(columns) + "\n", *lines]).encode("utf-8", "backslashreplace"))
