"""``make bench-check``: the ratios of the benchmarks against those on record, so that a change that makes something slower is seen.

Ratios alone are compared: both sides run in turn on the same machine, so that they hold on another one, where times would not. A ratio
below ``ENOUGH`` of the recorded one is a failure (exit code 1). ``--record`` writes what was measured into ``benchmarks/ratios.json``.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from datetime import date
from pathlib import Path

RECORD = Path(__file__).with_name("ratios.json")
ENOUGH = 0.8  # of the recorded ratio: two cores that others use, too, give or take a tenth


@dataclass(frozen=True)
class Ratio:
    """One figure of a benchmark: ``module`` with ``options``, and the keys that lead to it in the JSON it prints."""

    name: str
    module: str
    options: tuple[str, ...]
    keys: tuple[str, ...]


PRETRAIN = ("--samples", "16", "--rounds", "3", "--only", "ours-bf16", "bert-bf16")
RATIOS = (
    Ratio("packed step against padded step", "benchmarks.packed_step", (), ("speedup",)),
    Ratio("our step against BERT-base in bf16", "benchmarks.against_peers", PRETRAIN, ("speedup_of_ours_bf16", "bert-bf16")),
    Ratio("scoring a grid against packed pairs", "benchmarks.retrieval", (), ("speedup", "packed")),
)


def main() -> int:
    """Measure, print one line for each ratio, and return the exit code."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--record", action="store_true", help="put the measured ratios on record")
    given = options.parse_args()
    if not given.record and not RECORD.exists():
        print(f"{RECORD} does not exist; run `python -m benchmarks.check --record` on a quiet machine, before the change to be judged")
        return 2
    measured = {ratio.name: measure(ratio) for ratio in RATIOS}
    if given.record:
        RECORD.write_text(json.dumps({"date": date.today().isoformat(), "ratios": measured}, indent=2) + "\n")
        print(f"{RECORD}: {len(measured)} ratios")
        return 0
    recorded: dict[str, float] = json.loads(RECORD.read_text())["ratios"]
    slower = verdicts(measured, recorded)
    return 1 if slower else 0


def measure(ratio: Ratio) -> float:
    """Run the benchmark in a process of its own and take the figure out of what it prints."""
    done = subprocess.run([sys.executable, "-m", ratio.module, *ratio.options], stdout=subprocess.PIPE, text=True, check=True)
    value = json.loads(done.stdout[done.stdout.index("{") :])
    for key in ratio.keys:
        value = value[key]
    return round(float(value), 3)


def verdicts(measured: dict[str, float], recorded: dict[str, float]) -> list[str]:
    """Print how each ratio stands; returns the names of those that fell below ``ENOUGH`` of the record, or have none."""
    slower = [name for name, value in measured.items() if value < ENOUGH * recorded.get(name, float("inf"))]
    for name, value in measured.items():
        print(f"{'SLOWER' if name in slower else 'ok':<7} {name}: {value:.2f}, on record {recorded.get(name, float('nan')):.2f}")
    return slower


if __name__ == "__main__":
    sys.exit(main())
