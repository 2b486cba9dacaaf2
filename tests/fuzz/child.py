"""One target in a process that may die of what it is given: `python -m tests.fuzz.child NAME FOLDER guided|blind ...`.

"guided" is atheris: inputs that reach new lines of Python are kept and changed further; the arguments are libFuzzer's. "blind" changes what
is there (`CORPUS... --seconds --inputs --seed`) without watching, several times as fast. ``FOLDER`` takes how many inputs were tried and
the one in hand (``state``, kept where the process dies), and every input that broke a promise.
"""

import argparse
import contextlib
import gc
import hashlib
import json
import mmap
import random
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.fuzz.targets import Target

PURE = ["megainter", "preprocessing", "launcher", "tomllib", "hjson", "zipfile", "msgpack", "ijson"]  # read their input in Python
STATE, HEAD = 1 << 20, 16  # bytes: how many inputs, the length of the one in hand, its bytes
STUCK = 30  # seconds after which a process that makes no progress is ended


class Trial:
    """Tries inputs, counts them, and keeps the shortest of each kind that breaks a promise."""

    def __init__(self, name: str, folder: Path) -> None:
        from tests.fuzz.judging import judge
        from tests.fuzz.targets import in_memory, named

        self.target: Target = named(name)
        self.folder, self.judge = folder, judge
        self.parse = self.target.open(in_memory(name))
        with open(folder / "state", "r+b") as file:
            self.state = mmap.mmap(file.fileno(), STATE)

    def one(self, data: bytes) -> None:
        """One input."""
        self.state[: HEAD + len(data)] = (
            (int.from_bytes(self.state[:8], "little") + 1).to_bytes(8, "little") + len(data).to_bytes(8, "little") + data
        )
        fault = self.judge(self.parse, data)
        if fault is not None:
            self.keep(fault.kind, fault.detail, data)

    def keep(self, kind: str, detail: str, data: bytes) -> None:
        """An input that broke a promise, and how."""
        name = hashlib.sha256(kind.encode()).hexdigest()[:12]
        known = self.folder / f"{name}.input"
        if not known.exists() or known.stat().st_size > len(data):
            known.write_bytes(data)
            (self.folder / f"{name}.json").write_text(json.dumps({"kind": kind, "detail": detail}, indent=1))

    def changed(self, data: bytes, longest: int, chosen: random.Random, otherwise: Callable[[bytes, int], bytes], share: float) -> bytes:
        """``data`` changed within its format, or by ``otherwise``."""
        if self.target.mutate and chosen.random() < share:
            with contextlib.suppress(ValueError, RecursionError, IndexError):  # not of its format any more
                found = chosen.choice(self.target.mutate)(data, chosen)
                if len(found) <= longest:
                    return found
        return otherwise(data, longest)


def guided(name: str, folder: Path, arguments: list[str]) -> None:
    """Until libFuzzer's limits end it."""
    import atheris

    with atheris.instrument_imports(include=PURE):  # the first import of a module counts, so all are in here
        trial = Trial(name, folder)

    def mutate(data: bytes, longest: int, seed: int) -> bytes:
        return trial.changed(data, longest, random.Random(seed), atheris.Mutate, 0.6)

    atheris.Setup([sys.argv[0], *arguments], trial.one, custom_mutator=mutate if trial.target.mutate else None)
    atheris.Fuzz()


def blind(name: str, folder: Path, arguments: list[str]) -> None:
    """So many inputs, or seconds."""
    from tests.fuzz.mutating import mutate_bytes

    parser = argparse.ArgumentParser()
    parser.add_argument("corpus", nargs="+", type=Path)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--inputs", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    options = parser.parse_args(arguments)
    trial = Trial(name, folder)
    kept = [path.read_bytes() for place in options.corpus for path in sorted(place.iterdir())]
    chosen, end, seen = random.Random(options.seed), time.monotonic() + options.seconds, time.monotonic()

    def otherwise(data: bytes, longest: int) -> bytes:
        return mutate_bytes(data, longest, chosen, kept, trial.target.tokens)

    gc.freeze()
    signal.alarm(STUCK)
    for _ in range(options.inputs):
        now = time.monotonic()
        if now > end:
            break
        if now - seen > 1:
            signal.alarm(STUCK)
            seen = now
        data = chosen.choice(kept)
        for _ in range(chosen.choice((1, 1, 1, 2, 3))):
            data = trial.changed(data, trial.target.longest, chosen, otherwise, 0.5)
        trial.one(data)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    (guided if sys.argv[3] == "guided" else blind)(sys.argv[1], Path(sys.argv[2]), sys.argv[4:])
