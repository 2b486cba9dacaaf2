"""A real run under ``megainter launch --restarts``, struck by faults that are drawn by a seed, and what that cost.

    python -m tests.chaos --seed 1 --mtbf 60 --steps 1000 --output chaos
    python -m tests.chaos --seed 1 --mtbf 3600 --hosts hostfile --output /shared/chaos -- pretrain --config base ...

First the run without faults, then the same run with them. The times from one fault's end, when new steps are made again, to the next fault
are exponential; kinds are drawn evenly.

- kill: SIGKILL to a rank; stop: SIGSTOP to a rank; host: SIGKILL to all processes of a host, or of this machine but the launcher
- flip: a bit of the newest checkpoint, and a rank is killed; full: no large file can be written until a checkpoint has failed
- nan: a loss of one rank at one step; slow: a rank, for some steps

The run without faults has the same nan: an update that is left out is part of what a run computes. Without a training command after "--" a
tiny model is trained on data made here. Run it from the checkout. Exit code 0: the run ended well, with the weights of the undisturbed one.
"""

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from launcher.hostfile import Host, read_hostfile
from launcher.planning.goodput import Reliability, best_interval, goodput
from tests.faulty import VARIABLE
from tests.places import ROOT
from tests.strikes import ROOM, flip_a_bit, largest_log, ranks_here, strike

FATAL = ("kill", "stop", "host", "flip")  # after these the run starts again
STRIKES = (*FATAL, "full")  # from outside
INSIDE = ("nan", "slow")  # by the worker, at steps that are known before
SAME = {True: "EQUAL to the undisturbed run's (SHA-256)", False: "NOT EQUAL to the undisturbed run's (SHA-256)", None: "not compared"}
SAMPLED = 1.0  # seconds between two looks at memory and descriptors


@dataclass
class Fault:
    """One that was struck: when, after which step, and what came of it."""

    kind: str
    rank: int
    time: float  # Unix seconds
    step: int  # the newest logged then
    starts: int  # of the run, by then
    what: str = ""
    resumed: int | None = None  # the step from which the run went on
    again: float | None = None  # Unix seconds of the first record of a step after ``resumed``


@dataclass
class Stretch:
    """Samples of one rank's process while it lived: (step, bytes of memory, open descriptors)."""

    pid: int
    rank: int
    samples: list[tuple[int, int, int]] = field(default_factory=list)


def draw_inside(kinds: Sequence[str], draws: random.Random, steps: int, mean_steps: float, ranks: int) -> str:
    """The faults that the worker makes itself, as its variable has them: exponential in steps, none in the last tenth."""
    words = []
    for kind in (kind for kind in INSIDE if kind in kinds):
        step = 0.0
        while (step := step + draws.expovariate(1 / mean_steps)) < 0.9 * steps - 1:
            words.append(f"{kind}:{draws.randrange(ranks)}:{int(step)}")
    return ",".join(words)


def records_of(run: Path, kind: str = "train") -> list[dict[str, Any]]:
    """The records of a kind so far, without a line that is being written."""
    found = []
    with contextlib.suppress(OSError):
        for line in (run / "metrics.jsonl").read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                found.append(json.loads(line))
    return [record for record in found if record.get("kind") == kind]


def digests_of(run: Path) -> dict[str, str]:
    """SHA-256 of weights and moments of the newest checkpoint, by file name, as its manifest has them."""
    folder = run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip()
    manifest = json.loads((folder / "manifest.json").read_text())
    return {entry["file"]: entry["sha256"] for entry in manifest["files"] if entry["file"].endswith(".safetensors")}


def text_of(run: Path) -> str:
    """The run's log."""
    with contextlib.suppress(OSError):
        return (run / "logs" / "train.log").read_text(errors="replace")
    return ""


class Experiment:
    """One chaos: options, where it is, and what has happened so far."""

    def __init__(self, options: argparse.Namespace, trained: list[str]) -> None:
        self.options, self.output = options, options.output.resolve()
        self.hosts: tuple[Host, ...] = read_hostfile(options.hosts) if options.hosts else ()
        self.ranks = sum(host.slots for host in self.hosts) or options.processes
        self.draws = random.Random(options.seed)
        self.trained = trained or ["pretrain", *self._tiny()]
        self.trained += ["--training.steps", str(options.steps), "--checkpoint.every_steps", str(options.every),
                          "--checkpoint.keep", "4", "--hangs.least", str(options.hang)]  # fmt: skip
        outside = [kind for kind in STRIKES if kind in options.kinds]
        self.outside, self.faults, self.stretches = outside, list[Fault](), dict[int, Stretch]()
        self.flipped: set[str] = set()
        self.first: float | None = None  # when the first record was written

    def _tiny(self) -> list[str]:
        from tests.synthetic import settings, write_data

        self.output.mkdir(parents=True, exist_ok=True)
        data = write_data(self.output)
        wide = {"model__hidden_size": 64, "model__intermediate_size": 512, "data__workers": 1}
        words = settings(
            *data, self.output, training__log_every=max(5, self.options.steps // 400), training__global_batch=4 * self.ranks, **wide
        )
        owned = ("--output", "--training.steps", "--checkpoint.every_steps")
        return [word for pair in zip(words[::2], words[1::2]) if pair[0] not in owned for word in pair]

    def start(self, run: Path, inside: str) -> subprocess.Popen[bytes]:
        """``megainter launch`` of the faulty worker."""
        where = ["--hostfile", str(self.options.hosts.resolve())] if self.hosts else ["--processes", str(self.ranks)]
        command = [sys.executable, "-m", "tests.faulty", "launch", *where, "--restarts", "1000", "--", *self.trained,
                   "--output", str(run)]  # fmt: skip
        variables = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), VARIABLE: inside,
                     "MEGAINTER_WATCH_PID": str(os.getpid())}  # fmt: skip
        with open(run.with_suffix(".log"), "ab") as file:
            return subprocess.Popen(command, env=os.environ | variables, stdout=file, stderr=file, cwd=ROOT, start_new_session=True)

    def undisturbed(self, run: Path, inside: str) -> None:
        """The same run, without what strikes from outside."""
        job = self.start(run, ",".join(word for word in inside.split(",") if word.startswith("nan")))
        code = job.wait()
        if code:
            raise SystemExit(f"chaos: the run without faults ended with {code}; see {run.with_suffix('.log')}")

    def disturbed(self, run: Path, inside: str) -> int:
        """The run with faults; its exit code."""
        job = self.start(run, inside)
        due: float | None = None
        while job.poll() is None:
            self.look(run)
            up = records_of(run) and not any(fault.again is None for fault in self.faults if fault.kind in FATAL)
            if up and self.outside and due is None:
                due = time.time() + self.draws.expovariate(1 / self.options.mtbf)
            if due is not None and time.time() >= due and self.hit(run, job):
                due = None
            time.sleep(SAMPLED)
        self.look(run)
        return job.returncode

    def look(self, run: Path) -> None:
        """Memory and descriptors of the ranks here, and whether the last fault is over."""
        records = records_of(run)
        step = records[-1]["step"] if records else 0
        self.first = records[0]["time"] if records and self.first is None else self.first
        for rank, pid in ranks_here(run).items():
            with contextlib.suppress(OSError, IndexError):
                memory = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
                opened = len(os.listdir(f"/proc/{pid}/fd"))
                self.stretches.setdefault(pid, Stretch(pid, rank)).samples.append((step, memory, opened))
        for fault in self.faults:
            if fault.kind not in FATAL or fault.again is not None:
                continue
            resumed = started_at(text_of(run))[fault.starts :]
            newer = [record["time"] for record in records if resumed and record["time"] > fault.time and record["step"] > resumed[-1]]
            if newer:
                fault.again, fault.resumed = min(newer), resumed[-1]

    def hit(self, run: Path, job: subprocess.Popen[bytes]) -> bool:
        """Draw a fault and strike; False where that one is not possible just now."""
        records = records_of(run)
        kind, rank = self.draws.choice(self.outside), self.draws.randrange(self.ranks)
        fault = Fault(kind, rank, time.time(), records[-1]["step"], len(started_at(text_of(run))))
        if kind == "flip":
            fault.what = self.flip(run)
            if not fault.what:
                return False
        struck = self.full(run, job) if kind == "full" else self.strike(run, "kill" if kind == "flip" else kind, rank)
        if struck:
            self.faults.append(fault)
            print(f"chaos: {kind} rank {rank} after step {fault.step:,} {fault.what}", flush=True)
        return struck

    def strike(self, run: Path, kind: str, rank: int) -> bool:
        """Strike a rank where it runs."""
        if not self.hosts:
            return strike(run, kind, rank, 0)
        places = [number for number, host in enumerate(self.hosts) for _ in range(host.slots)]
        node = places[rank]
        words = ["ssh", "-o", "BatchMode=yes", "--", self.hosts[node].name, "cd", str(ROOT), "&&", f"PYTHONPATH={ROOT}", sys.executable,
                 "-m", "tests.strikes", str(run), kind, str(rank), str(node)]  # fmt: skip
        return subprocess.run(words, capture_output=True, check=False, timeout=60).returncode == 0

    def flip(self, run: Path) -> str:
        """A bit of a file of the newest checkpoint, where an older one is left whole; what was flipped, or nothing."""
        whole = [folder for folder in sorted((run / "checkpoints").glob("step_*")) if folder.name not in self.flipped]
        if len(whole) < 2:
            return ""
        with contextlib.suppress(OSError, ValueError):
            files = sorted(path for path in whole[-1].iterdir() if path.stat().st_size)
            path = self.draws.choice(files)
            place = flip_a_bit(path, self.draws)
            self.flipped.add(whole[-1].name)
            return f"{path.relative_to(run)} bit {place}"
        return ""

    def full(self, run: Path, job: subprocess.Popen[bytes]) -> bool:
        """No large file can be written until a checkpoint has failed, or for as long as three should take."""
        largest = max((path.stat().st_size for path in (run / "checkpoints").glob("step_*/*.safetensors")), default=0)
        if largest <= largest_log(run) + ROOM:
            return False  # a limit on the size of files cannot tell them apart
        failed = text_of(run).count("NOT written")
        nodes = range(len(self.hosts)) if self.hosts else [0]
        firsts = [sum(host.slots for host in self.hosts[:node]) for node in nodes]
        if not all(self.strike(run, "full", rank) for rank in firsts):
            return False
        records = records_of(run)
        patience = 3 * self.options.every * statistics.median(record["step_seconds"] for record in records) + 30
        deadline = time.time() + patience
        while text_of(run).count("NOT written") == failed and time.time() < deadline and job.poll() is None:
            time.sleep(0.2)
        for rank in firsts:
            self.strike(run, "free", rank)
        return text_of(run).count("NOT written") > failed


def started_at(log: str) -> list[int]:
    """The step from which each start went on, as the log has it."""
    return [int(step) for step in re.findall(r"steps (\d+) to \d+ of", log)]


def drift(stretches: Sequence[Stretch], least: int) -> Iterator[tuple[Stretch, float, tuple[float, float]]]:
    """Of each stretch of ``least`` steps or more: growth of memory, and open descriptors before and after.

    Compared are the medians of the first and the last quarter of what follows its first third: buffers and caches find their size before.
    What was seen after its last new step is of a rank that ends. Each batch that a loader's process has ready is a few descriptors, so that
    single counts vary.
    """
    for stretch in stretches:
        last = stretch.samples[-1][0] if stretch.samples else 0
        trained = [sample for sample in stretch.samples if sample[0] < last]
        seen = trained[len(trained) // 3 :]
        if stretch.samples and stretch.samples[-1][0] - stretch.samples[0][0] >= least and len(seen) >= 8:
            quarter = len(seen) // 4
            begin, end = (
                [statistics.median(sample[part] for sample in side) for part in (1, 2)] for side in (seen[:quarter], seen[-quarter:])
            )
            yield stretch, end[0] / begin[0] - 1, (begin[1], end[1])


def report(experiment: Experiment, calm: Path | None, run: Path, inside: str) -> dict[str, Any]:
    """All figures."""
    options, faults = experiment.options, experiment.faults
    records, fatal = records_of(run), [fault for fault in faults if fault.kind in FATAL and fault.again is not None]
    step = statistics.median(record["step_seconds"] for record in records)
    saves = [record["stall_seconds"] for record in records_of(run, "checkpoint")]
    every = statistics.median(later["step"] - earlier["step"] for earlier, later in pairwise(records))
    restarts = [fault.again - fault.time - every * step for fault in fatal if fault.again is not None]
    attempts = [json.loads(line) for line in (run / "launch" / "attempts.jsonl").read_text().splitlines()]
    wall = records[-1]["time"] - (experiment.first or records[0]["time"])  # as the closed form has it: without the first start and the end
    for fault in faults:  # one after the last step has no newer record
        later = started_at(text_of(run))[fault.starts :]
        fault.resumed = later[0] if fault.kind in FATAL and later else None

    figures: dict[str, Any] = {
        "seed": options.seed, "mtbf": options.mtbf, "ranks": experiment.ranks, "steps": options.steps, "every": options.every,
        "hang_seconds": options.hang, "faults": [asdict(fault) for fault in faults], "inside": inside,
        "attempts": [attempt["code"] for attempt in attempts], "step_seconds": step,
        "stall": statistics.mean(saves) if saves else 0.0, "restart": statistics.mean(restarts) if restarts else 0.0,
        "lost_steps": sum(lost(asdict(fault)) for fault in faults), "wall": wall,
        "goodput": (options.steps - records[0]["step"]) * step / wall,
        "same_weights": None if calm is None else digests_of(calm) == digests_of(run),
    }  # fmt: skip
    mean, interval = wall / max(len(attempts) - 1, 1), options.every * step
    known = Reliability(mtbf=mean, stall=figures["stall"], restart=figures["restart"])
    figures["first_order"] = 1 - known.stall / (interval + known.stall) - (known.restart + interval / 2) / mean if fatal else 1.0
    figures["daly"] = goodput(known, 1, interval) if fatal else interval / (interval + known.stall)
    figures["best_interval_steps"] = best_interval(known, 1) / step
    figures["stretches"] = [
        {"rank": stretch.rank, "steps": stretch.samples[-1][0] - stretch.samples[0][0], "drift": grown, "descriptors": opened}
        for stretch, grown, opened in drift(list(experiment.stretches.values()), options.stretch)
    ]
    return figures


def lost(fault: dict[str, Any]) -> int:
    """Steps that were done again after it."""
    return 0 if fault["resumed"] is None else max(fault["step"] - fault["resumed"], 0)


def table(figures: dict[str, Any]) -> str:
    """The figures as text, in Markdown."""
    rows = ["| fault | times | steps lost | seconds to the next new step, mean (most) |", "|---|---|---|---|"]
    for kind in (*STRIKES, *INSIDE):
        struck = [fault for fault in figures["faults"] if fault["kind"] == kind]
        times = len(struck) or figures["inside"].count(f"{kind}:")
        if not times:
            continue
        back = [fault["again"] - fault["time"] for fault in struck if fault["again"] is not None]
        seconds = f"{statistics.mean(back):.1f} ({max(back):.1f})" if back else ""
        rows.append(f"| {kind} | {times} | {sum(map(lost, struck)):,} | {seconds} |")
    text = "\n".join(rows)
    text += (
        f"\n\n{figures['steps']:,} steps of {figures['step_seconds']:.3f} s on {figures['ranks']} ranks, a checkpoint every "
        f"{figures['every']}, {len(figures['attempts'])} attempts (codes {' '.join(map(str, figures['attempts']))}), "
        f"{figures['lost_steps']:,} steps lost, {figures['wall']:.0f} s.\n"
        f"Goodput {figures['goodput']:.1%}; closed form with stall {figures['stall']:.2f} s and restart {figures['restart']:.1f} s: "
        f"{figures['first_order']:.1%} to the first order, {figures['daly']:.1%} by Daly; best interval "
        f"{figures['best_interval_steps']:.0f} steps.\n"
        f"Final weights and moments: {SAME[figures['same_weights']]}."
    )
    if figures["stretches"]:
        worst = max(figures["stretches"], key=lambda each: abs(each["drift"]))
        more = max(figures["stretches"], key=lambda each: abs(each["descriptors"][1] - each["descriptors"][0]))["descriptors"]
        longest = max(each["steps"] for each in figures["stretches"])
        text += (
            f"\n{len(figures['stretches'])} undisturbed stretches of a rank, the longest {longest:,} steps: "
            f"memory drifts by {worst['drift']:+.2%} at most, open descriptors from {more[0]:.0f} to {more[1]:.0f}."
        )
    return text


def parse(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Options, and the training command after "--"."""
    shown, about = argparse.ArgumentDefaultsHelpFormatter, "A run under faults; a training command may follow --."
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=about, formatter_class=shown)
    parser.add_argument(
        "--output", type=Path, required=True, default=argparse.SUPPRESS, help="folder for both runs, on the disk that the hosts share"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of all draws")
    parser.add_argument("--mtbf", type=float, default=60.0, help="mean seconds of training between faults from outside")
    parser.add_argument("--steps", type=int, default=1000, help="steps of the run")
    parser.add_argument("--every", type=int, default=50, help="steps between checkpoints")
    parser.add_argument("--processes", type=int, default=2, help="ranks on this machine")
    parser.add_argument("--hosts", type=Path, help="hostfile, for ranks on other hosts over ssh; None: on this machine")
    parser.add_argument("--kinds", default=",".join((*STRIKES, *INSIDE)), help="faults to draw from, with commas between")
    parser.add_argument("--inside", type=float, default=0.0, help="mean steps between nan, and between slow; 0: a fifth of the steps")
    parser.add_argument("--hang", type=float, default=60.0, help="seconds without progress after which a rank hangs (hangs.least)")
    parser.add_argument("--alone", action="store_true", help="without the undisturbed run, whose weights are then not compared")
    parser.add_argument("--stretch", type=int, default=200, help="steps of a stretch whose memory is looked at")
    own = words[: words.index("--")] if "--" in words else words
    options = parser.parse_args(own)
    options.kinds = tuple(options.kinds.split(","))
    if unknown := set(options.kinds) - {*STRIKES, *INSIDE}:
        parser.error(f"unknown kinds: {', '.join(sorted(unknown))}")
    return options, words[len(own) + 1 :]


def main(words: list[str]) -> int:
    """Both runs and the table; 0 where the disturbed one ended with the weights of the other."""
    options, trained = parse(words)
    experiment = Experiment(options, trained)
    calm, run = experiment.output / "undisturbed", experiment.output / "disturbed"
    inside = draw_inside(options.kinds, experiment.draws, options.steps, options.inside or options.steps / 5, experiment.ranks)
    for old in (calm, run):
        shutil.rmtree(old, ignore_errors=True)

    if not options.alone:
        print(f"chaos: the run without faults, {options.steps:,} steps", flush=True)
        experiment.undisturbed(calm, inside)
    print(f"chaos: the run with faults: {', '.join(experiment.outside)} every {options.mtbf:.0f} s; inside: {inside or 'none'}", flush=True)
    code = experiment.disturbed(run, inside)
    if code:
        print(f"chaos: the run ended with {code}; see {run.with_suffix('.log')}")
        return 1

    figures = report(experiment, None if options.alone else calm, run, inside)
    (experiment.output / "chaos.json").write_text(json.dumps(figures, indent=1))
    print(table(figures))
    return 1 if figures["same_weights"] is False else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
