"""``make gpu``, or ``python -m benchmarks.gpu``: nine minutes on one GPU that say whether megainter is right there, how fast, and why.

Every part is a process of its own with its own time limit; what fails or takes too long hides nothing else. Results go to the output
folder: ``results.jsonl`` (a line for each part), ``table.txt`` and ``table.md``, and every part's log. docs/gpu.md says what the parts
are. The exit code is 0 where all parts that ran are ok, 1 where one is not, 2 where there is no GPU.
"""

import argparse
import signal
import sys
from dataclasses import replace
from types import FrameType

from benchmarks.gpu.part import NO_GPU, add_options, check_options, has_gpu, setting_of
from benchmarks.gpu.plan import PARTS
from benchmarks.gpu.runner import FAILED, OVER, run_parts, write_line
from benchmarks.gpu.table import markdown, plain, rows_of

SECONDS = 540.0
PATIENCE = 4  # times as long for each part and for all on a CPU, which may be any


def main() -> int:
    """Run the parts, print the table, and return the exit code."""
    options = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(options)
    names = [part.name for part in PARTS]
    options.add_argument("--parts", nargs="+", choices=names, default=names, metavar="PART", help=f"only these of {', '.join(names)}")
    options.add_argument(
        "--seconds", type=float, help=f"time limit of all parts together (default: {SECONDS:g}, on a CPU {PATIENCE * SECONDS:g})"
    )
    given = options.parse_args()
    if given.device == "cpu" and not given.toy:
        options.error("--device cpu goes with --toy: the real sizes would take a CPU hours")
    if given.seconds is not None and given.seconds <= 0:
        options.error(f"--seconds {given.seconds:g} leaves no time; give a number above 0")
    check_options(options, given)
    if given.device == "cuda" and not has_gpu():
        print(NO_GPU, file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, _stop)
    setting = setting_of(given)
    setting.output.mkdir(parents=True, exist_ok=True)
    (setting.output / "results.jsonl").unlink(missing_ok=True)
    patience = PATIENCE if given.device == "cpu" else 1
    parts = [replace(part, seconds=patience * part.seconds) for part in PARTS if part.name in given.parts]
    results = []
    for result in run_parts(parts, setting, given.seconds or patience * SECONDS):
        write_line(result, setting.output)
        results.append(result)
        print(f"{result.part}: {result.outcome}, {result.seconds:.0f} s", file=sys.stderr, flush=True)
        rows = rows_of(results)
        (setting.output / "table.txt").write_text(plain(rows), encoding="utf-8")
        (setting.output / "table.md").write_text(markdown(rows), encoding="utf-8")
    print(plain(rows_of(results)), end="")
    return 1 if any(result.outcome in (FAILED, OVER) for result in results) else 0


def _stop(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)  # the parts that run are ended on the way out


if __name__ == "__main__":
    sys.exit(main())
