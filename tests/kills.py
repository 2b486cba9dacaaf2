"""SIGKILL at random moments of a training of two processes, again and again; in the end it must be the training that nobody disturbed.

    python -m tests.kills --rounds 300 --saving 100 --seed 0

strikes a rank, both, or the process that saves for one of them: while the run starts, while it trains, and at least ``--saving`` times
while a save is in flight (which is seen by what the dead left behind). Each start must go on from the newest whole checkpoint. At the end
the SHA-256 of every file of tensors, and every loss, are compared with those of the undisturbed run. Exit code 1 where anything differs.
"""

import argparse
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from megainter.files import read_json
from megainter.training import checkpoint
from tests.forked import Ranks
from tests.synthetic import losses, settings, write_data

EVERY = 4  # steps between two checkpoints
STRETCH = 8  # steps of a round, at most
VICTIMS = ("rank 0", "rank 1", "both ranks", "writer 0", "writer 1")
PATIENCE = 10.0  # seconds in which a rank is to end by itself when the other has died; a launcher would end it
LIMIT = 180.0  # seconds that anything may take


@dataclass
class Struck:
    """The run that is struck: where it is, its living ranks, and what happened."""

    ranks: Ranks
    arguments: list[str]
    output: Path
    pids: list[int] = field(default_factory=list)
    base: int = 0  # steps at the beginning of the round
    blows: Counter[tuple[str, str]] = field(default_factory=Counter)  # (victim, phase)
    in_flight: int = 0
    lost_steps: int = 0
    ended_by_launcher: int = 0
    start_seconds: float = 2.0
    wrong: list[str] = field(default_factory=list)
    stale: set[str] = field(default_factory=set)

    @property
    def root(self) -> Path:
        """Of the checkpoints."""
        return self.output / "checkpoints"

    def start(self) -> None:
        """Start the ranks; they must go on from the newest whole checkpoint, as it is found without them."""
        self.expected = checkpoint.newest(self.root, lambda line: None)
        self.stale = self.partial()  # of the start before
        self.log = self.output.with_name("log")
        self.log.write_bytes(b"")
        self.began, self.pids = time.monotonic(), self.ranks.start(["pretrain", *self.arguments], 2, self.log)

    def wait_for_first_step(self) -> None:
        """Until it trains; then what it went on from is compared."""
        start = self.expected.step if self.expected is not None else 0
        if self.step() > start or not self.pids:
            return
        self.wait_until(lambda: self.step() > start)
        self.start_seconds = time.monotonic() - self.began
        found = re.search(r"resuming from (\S+)", self.log.read_text())
        right = str(self.expected.folder) if self.expected is not None else None
        if (found.group(1) if found else None) != right:
            self.wrong.append(f"went on from {found.group(1) if found else 'the start'}, the newest whole checkpoint is {right}")

    def step(self) -> int:
        """The last step of this start that is logged."""
        with suppress(OSError), open(self.output / "metrics.jsonl", "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 8000))
            for line in reversed(file.read().splitlines()):
                with suppress(ValueError):
                    record = json.loads(line)
                    if record["kind"] == "train":
                        return int(record["step"])
        return 0

    def wait_until(self, condition, seconds: float = LIMIT) -> None:  # type: ignore[no-untyped-def]
        """Until ``condition`` holds; all ranks must live as long."""
        deadline = time.monotonic() + seconds
        while not condition():
            if len(self.ranks.running(self.pids)) < len(self.pids):
                raise SystemExit(f"a rank ended by itself:\n{self.log.read_text()[-3000:]}")
            if time.monotonic() > deadline:
                raise SystemExit(f"nothing happened for {seconds:.0f} s:\n{self.log.read_text()[-3000:]}")
            time.sleep(0.005)

    def partial(self) -> set[str]:
        """Names of what is being written, or was when its writer died."""
        with suppress(FileNotFoundError):
            return {name for name in os.listdir(self.root) if name.startswith(checkpoint.PARTIAL)}
        return set()

    def strike(self, victim: str, phase: str, moment: float) -> None:
        """One blow, ``moment`` in [0, 1) into its phase; a rank's ends the start, a writer's does not."""
        self.base = max(self.step(), self.expected.step if self.expected is not None else 0) if self.pids else self.base
        if not self.pids:
            self.start()
        if phase == "starting":
            time.sleep(moment * self.start_seconds)
        else:
            self.wait_for_first_step()
        if phase == "training":
            self._train_on(moment)
        if phase == "saving":
            self._await_a_save(moment)
        self.blows[victim, phase] += 1
        self._strike_writer(int(victim[-1])) if victim.startswith("writer") else self._strike_ranks(victim)

    def _train_on(self, moment: float) -> None:
        first, began = self.step(), time.monotonic()
        last = first + int(moment * STRETCH)
        self.wait_until(lambda: self.step() >= last)
        pace = (time.monotonic() - began) / max(self.step() - first, 1)
        time.sleep(min(pace, 1.0) * (moment * STRETCH % 1))

    def _await_a_save(self, moment: float) -> None:
        before = self.partial()
        deadline = time.monotonic() + LIMIT
        while not self.partial() - before:
            if time.monotonic() > deadline or len(self.ranks.running(self.pids)) < 2:
                raise SystemExit(f"no save:\n{self.log.read_text()[-3000:]}")
        time.sleep(moment * 0.03)

    def _strike_ranks(self, victim: str) -> None:
        last = self.step()
        for pid in self.pids if victim == "both ranks" else [self.pids[int(victim[-1])]]:
            os.kill(pid, signal.SIGKILL)
        try:
            self.ranks.wait(self.pids, PATIENCE)
        except TimeoutError:
            self.ended_by_launcher += 1
            for pid in self.ranks.running(self.pids):
                os.kill(pid, signal.SIGKILL)
            self.ranks.wait(self.pids, PATIENCE)
        self.pids = []
        self.in_flight += bool(self.partial() - self.stale)
        found = checkpoint.newest(self.root, lambda line: None)
        self.lost_steps += max(0, last - (found.step if found is not None else 0))

    def _strike_writer(self, rank: int) -> None:
        """Training must go on; what was in flight must be told as a failure."""
        writing, before, failed = bool(self.partial() - self.stale), self.step(), self._failed()
        for pid in writers_of(self.pids[rank]):
            os.kill(pid, signal.SIGKILL)
        self.wait_until(lambda: self.step() >= before + 2)
        if writing and self._failed() > failed:
            self.in_flight += 1

    def _failed(self) -> int:
        text = (self.output / "metrics.jsonl").read_text() if self.pids else ""
        return text.count('"failure"')

    def finish(self) -> None:
        """Let it train to its end."""
        if not self.pids:
            self.start()
            self.wait_for_first_step()
        codes = self.ranks.wait(self.pids, 3600)
        if codes != [0, 0]:
            raise SystemExit(f"it ended with {codes}:\n{self.log.read_text()[-3000:]}")


def writers_of(rank: int) -> list[int]:
    """Processes that save for a rank."""
    found = []
    for entry in Path(f"/proc/{rank}/task").glob("*/children"):
        for pid in entry.read_text().split():
            with suppress(OSError):
                found += [int(pid)] if b"megainter.training.writing" in Path(f"/proc/{pid}/cmdline").read_bytes() else []
    return found


def digests(run: Path) -> dict[str, str]:
    """SHA-256 of every file of tensors of the newest checkpoint, all verified."""
    saved = checkpoint.newest(run / "checkpoints", print)
    assert saved is not None
    entries = read_json(saved.folder / checkpoint.MANIFEST)["files"]
    return {f"{saved.folder.name}/{entry['file']}": entry["sha256"] for entry in entries if entry["file"].endswith(".safetensors")}


def kill_and_compare(folder: Path, rounds: int, saving: int, seed: int, stage: int = 2) -> int:
    """The whole of it; gives the exit code."""
    steps, draws = rounds * STRETCH + 20, random.Random(seed)
    data = write_data(folder, images=40)
    changes = {"training__steps": steps, "checkpoint__every_steps": EVERY, "engine__zero_stage": stage, "training__log_every": 1}
    with Ranks() as ranks:
        whole = Struck(ranks, settings(*data, folder / "whole", **changes), folder / "whole")
        whole.finish()
        run = Struck(ranks, settings(*data, folder / "run", **changes), folder / "run")
        began, done = time.monotonic(), 0
        while done < rounds or (run.in_flight < saving and done < 4 * rounds):
            victim = draws.choice(VICTIMS)
            phase = "saving" if run.in_flight < saving and draws.random() < 0.6 else draws.choice(("starting", "training", "training"))
            if phase == "starting" and (run.pids or victim.startswith("writer")):
                phase = "training"
            if run.step() > steps - 2 * STRETCH:
                break
            run.strike(victim, phase, draws.random())
            done += 1
            if done % 10 == 0:
                print(f"{done} kills, {run.in_flight} in flight, step {run.step()}, {time.monotonic() - began:.0f} s", flush=True)
        seconds = time.monotonic() - began
        run.finish()
    return report(run, whole, done, seconds, rounds, saving)


def report(run: Struck, whole: Struck, done: int, seconds: float, rounds: int, saving: int) -> int:
    """Say what happened, and whether it may be so."""
    for (victim, phase), number in sorted(run.blows.items()):
        print(f"{victim:>12}  {phase:<9} {number:>4}")
    print(f"{done} kills in {seconds:.0f} s, {run.in_flight} with a save in flight; {run.lost_steps} steps were done again")
    print(f"{run.ended_by_launcher} times the other rank had not ended by itself after {PATIENCE:.0f} s")
    run.wrong += ["tensors differ from the undisturbed run's"] * (digests(run.output) != digests(whole.output))
    run.wrong += ["losses differ from the undisturbed run's"] * (losses(run.output) != losses(whole.output))
    run.wrong += [f"{done} kills, {run.in_flight} in flight"] * (done < rounds or run.in_flight < saving)
    print("\n".join(run.wrong) if run.wrong else "all tensors (SHA-256) and losses are those of the undisturbed run")
    return int(bool(run.wrong))


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.kills", description="SIGKILL at random moments of a training of two processes.")
    parser.add_argument("--rounds", type=int, default=300, help="kills")
    parser.add_argument("--saving", type=int, default=100, help="how many of them at least while a save is in flight")
    parser.add_argument("--seed", type=int, default=0, help="of victims and moments")
    parser.add_argument("--stage", type=int, default=2, help="ZeRO stage")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(kill_and_compare(Path(folder), options.rounds, options.saving, options.seed, options.stage))


if __name__ == "__main__":
    main()
