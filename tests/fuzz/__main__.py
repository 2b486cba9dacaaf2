"""Fuzz every parser for so many seconds: `python -m tests.fuzz [--seconds 300] [--inputs N] [--keep FOLDER] [NAME ...]`.

The first part is guided by coverage where atheris is installed (`pip install '.[fuzz]'`). Ends with a table; the exit code is 1 where a
promise was broken, and the inputs that broke it are in ``--keep``.
"""

import argparse
import hashlib
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from tests.fuzz.child import HEAD, STATE
from tests.fuzz.judging import SECONDS
from tests.fuzz.targets import TARGETS, Target, named
from tests.places import ROOT

MEMORY_MB = 6144  # of a process, its libraries included
LEAST = 2  # seconds of one target; a process is not started for less than one
MOST_DEATHS = 20  # of one target, from which on it is left


@dataclass
class Outcome:
    """What came of one target."""

    name: str
    inputs: int = 0
    seconds: float = 0.0
    faults: dict[str, str] = field(default_factory=dict)  # kind -> the input's file

    def row(self) -> str:
        return f"{self.name:24} {self.inputs:>12,} {self.inputs / max(self.seconds, 1e-9):>10,.0f} {len(self.faults):>9}"


def main(tokens: Sequence[str] | None = None) -> int:
    """Run the targets that are named, or all, one after the other."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"targets; without any all: {', '.join(one.name for one in TARGETS)}")
    parser.add_argument("--seconds", type=float, default=300, help="time for all targets together (default %(default)s)")
    parser.add_argument("--inputs", type=int, default=0, help="inputs of each target, where its time has not ended by then; 0: no limit")
    parser.add_argument("--seed", type=int, default=0, help="seed of the mutations; 0: another each time")
    parser.add_argument(
        "--guided",
        type=float,
        default=0.25,
        help="share of time and inputs that are guided by coverage, the first ones (default %(default)s)",
    )
    parser.add_argument("--keep", type=Path, help="folder for the grown corpus and for inputs that broke a promise")
    options = parser.parse_args(tokens)

    targets = [named(name) for name in options.names] or TARGETS
    if options.seconds < LEAST * len(targets):
        parser.error(f"--seconds {options.seconds:g} is less than {LEAST} for each of {len(targets)} target(s): nothing would be tried")
    keep = options.keep or Path(tempfile.mkdtemp(prefix="fuzz-"))
    outcomes = []
    print(f"{'target':24} {'inputs':>12} {'inputs/s':>10} {'findings':>9}", flush=True)
    for target in targets:
        outcomes.append(fuzz(target, options.seconds / len(targets), options.inputs, options.seed, options.guided, keep / target.name))
        print(outcomes[-1].row(), flush=True)
    broken = [(one.name, kind, path) for one in outcomes for kind, path in one.faults.items()]
    print(f"{sum(one.inputs for one in outcomes):,} inputs, {len(broken)} findings" + (f" in {keep}" if broken else ""))
    for name, kind, path in broken:
        print(f"  {name}: {kind} ({path})")
    return 1 if broken else 0


def fuzz(target: Target, seconds: float, inputs: int, seed: int, share: float, folder: Path) -> Outcome:
    """One target for so long, or so many inputs: at first guided, then blindly from what that found; started again where a process dies."""
    corpus, seeds = folder / "corpus", folder / "seeds"
    for place in (corpus, seeds):
        place.mkdir(parents=True, exist_ok=True)
    for number, content in enumerate(target.inputs()):
        (seeds / f"{number:04d}").write_bytes(content)
    (folder / "tokens").write_text("".join(f'"{"".join(f"{chr(92)}x{byte:02x}" for byte in token)}"\n' for token in target.tokens))
    (folder / "state").write_bytes(bytes(STATE))
    for old in (*folder.glob("*.input"), *folder.glob("*.json"), *folder.glob("died-*")):
        old.unlink()

    outcome, begin = Outcome(target.name), time.monotonic()
    guided = share if find_spec("atheris") is not None else 0.0
    for way, until in (("guided", guided), ("blind", 1.0)):
        _run(way, outcome, target, begin, seconds * until, int(inputs * until), seed, folder)
    outcome.seconds, outcome.inputs = time.monotonic() - begin, _count(folder)
    for told in folder.glob("*.json"):
        outcome.faults[json.loads(told.read_text())["kind"]] = str(told.with_suffix(".input"))
    return outcome


def _run(way: str, outcome: Outcome, target: Target, begin: float, seconds: float, inputs: int, seed: int, folder: Path) -> None:
    deaths = 0
    while (left := seconds - (time.monotonic() - begin)) > 1 and deaths < MOST_DEATHS:
        rest = inputs - _count(folder) if inputs else 1 << 62
        if rest <= 0:
            return
        places = [str(folder / "corpus"), str(folder / "seeds")]
        if way == "guided":
            limits = [f"-max_total_time={int(left)}", f"-timeout={int(3 * SECONDS)}", f"-rss_limit_mb={MEMORY_MB}",
                      f"-max_len={target.longest}", f"-seed={seed}", f"-dict={folder / 'tokens'}",
                      f"-artifact_prefix={folder}/died-"]  # fmt: skip
            limits += [f"-runs={rest}"] if inputs else []
        else:
            limits = ["--seconds", str(left), "--inputs", str(rest), "--seed", str(seed + deaths + 1)]
        with open(folder / "log", "ab") as log:
            command = [sys.executable, "-m", "tests.fuzz.child", target.name, str(folder), way, *places, *limits]
            code = subprocess.run(command, stdout=log, stderr=log, cwd=ROOT, check=False).returncode
        if code == 0:
            return
        deaths += 1
        outcome.faults |= _death(folder, code)


def _count(folder: Path) -> int:
    with open(folder / "state", "rb") as file:
        return int.from_bytes(file.read(8), "little")


def _death(folder: Path, code: int) -> dict[str, str]:
    """What ended a process, and the input that it had in hand."""
    content = (folder / "state").read_bytes()
    data = content[HEAD : HEAD + int.from_bytes(content[8:HEAD], "little")]
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    path = folder / f"died-{how.replace(' ', '-')}-{hashlib.sha256(data).hexdigest()[:8]}"
    path.write_bytes(data)
    return {f"the process died: {how}": str(path)}


if __name__ == "__main__":
    sys.exit(main())
