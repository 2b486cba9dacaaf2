"""The score matrix on disk while it is computed: bounded memory at any gallery size, and a killed evaluation goes on where it was."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megainter.errors import NoSpaceError, UsageError
from megainter.files import is_full, read_json, write_json
from megainter.process import folder_lock


class ScoreFile:
    """``scores`` float32 [I, C], memory-mapped, and which chunks of it are done (uint8 [chunks])."""

    def __init__(self, folder: Path, images: int, captions: int, chunks: int) -> None:
        self.scores = _mapped(folder / "scores.f32", np.float32, (images, captions))
        self.done = _mapped(folder / "done.u8", np.uint8, (chunks,))

    def todo(self) -> list[int]:
        """Chunks that are not done yet."""
        return [int(chunk) for chunk in np.flatnonzero(self.done == 0)]

    def put(self, chunk: int, images: NDArray[np.int64], scores: NDArray[np.float32]) -> None:
        """Keep the rows of a chunk. They reach the file before the mark that says so."""
        self.scores[images] = scores
        self.scores.flush()
        self.done[chunk] = 1
        self.done.flush()


@contextmanager
def open_score_file(output: Path, plan: dict[str, Any], images: int, captions: int, chunks: int) -> Iterator[ScoreFile]:
    """The score file of ``output``, in a folder beside it that is removed when the block ends well.

    What an earlier run left there is used if its ``plan`` (everything the scores depend on) is this one, and thrown away if not.
    ``LockedError`` where another process writes the same output, ``NoSpaceError`` where the disk has no room for the matrix.
    """
    folder = output.with_name(f".{output.name}.partial")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{output} cannot be written: {error.strerror}") from None
    with folder_lock(folder):
        if _plan_of(folder) != plan:
            _clear(folder)
            write_json(folder / "plan.json", plan)
        yield ScoreFile(folder, images, captions, chunks)
        shutil.rmtree(folder)


def _plan_of(folder: Path) -> dict[str, Any] | None:
    plan = folder / "plan.json"
    return read_json(plan) if plan.is_file() else None


def _clear(folder: Path) -> None:
    for name in ("plan.json", "done.u8", "scores.f32"):
        (folder / name).unlink(missing_ok=True)


def _mapped(path: Path, dtype: type[np.generic], shape: tuple[int, ...]) -> np.memmap[Any, Any]:
    """A file of zeros, or what an earlier run wrote. Its blocks are allocated: a memory map of a full disk would kill the process."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    with open(path, "ab") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if is_full(error):
                raise NoSpaceError(
                    f"{path.parent} needs {size:,} bytes for the scores; free some space and run the same command again"
                ) from None
            raise
    return np.memmap(path, dtype=dtype, mode="r+", shape=shape)
