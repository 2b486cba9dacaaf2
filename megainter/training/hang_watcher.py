"""The process that watches one rank, started by it: ``python -m megainter.training.hang_watcher``. Standard library only.

Watchers of a run see each other through files in its folder, on all hosts. While all is well each writes a line of its rank's progress now
and then and reads nothing. Where its rank stands still it reads the others', and the first that finds the run hung says so in a file: every
watcher then has its rank write its stacks, prints the line, and ends it.
"""

import contextlib
import json
import math
import mmap
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from megainter.errors import HungError
from megainter.process import OUTCOME_VARIABLE, end_with_parent, record_exit
from megainter.training import hangs
from megainter.training.hangs import BOARD_BYTES, PHASES, READY, Board, Sighting, blamed, is_hung, verdict

BEATS = 10  # lines of progress in the shortest limit
UNMOVED = 0.4  # of the shortest limit, after which a rank's watcher looks at the others
WARY = 15.0  # seconds that it still does after its rank moved: one that was stopped goes on to write its stacks, and the others with it
EVIDENCE_TIME = 3.0  # seconds in which all ranks write their stacks
AFTER_LINE = 0.5  # seconds between the line and the end: the first rank that ends takes the others along
LONGEST_STACK = 200_000  # bytes of one rank in the evidence


class Watcher:
    """Of one rank: ``board`` is what it notes, ``folder`` where the watchers of this start meet, ``logs`` the run's logs."""

    def __init__(self, board: Board, rank: int, size: int, pid: int, folder: Path, logs: Path, least: float) -> None:
        self.board, self.rank, self.size, self.pid, self.folder, self.logs, self.least = board, rank, size, pid, folder, logs, least
        self.tick = min(1.0, least / 40)
        self.host, self.by_hand = socket.gethostname(), OUTCOME_VARIABLE not in os.environ
        self.heard: dict[int, tuple[int, float]] = {}  # last beat of others and when it was first read
        self.beat = 0
        self._restart_clocks()

    def run(self) -> None:
        """Until the rank closes the watch, or is ended for a hang."""
        published = read = 0.0
        wary = -math.inf
        others: list[Sighting] = []
        while self.board[hangs.ORDER] != hangs.CLOSED:
            self._sleep()
            own = self.look()
            if time.monotonic() - published >= self.least / BEATS:
                published = time.monotonic()
                self.publish(own)
            if max(own.stalled, own.halted) >= UNMOVED * self.least:
                wary = time.monotonic()
            elif time.monotonic() - wary > WARY:
                self.heard.clear()
                continue
            if time.monotonic() - read >= self.least / BEATS:
                read, others = time.monotonic(), self.others()
            raised = self.alarm().exists()
            if raised or is_hung(own, others, self.least, self.by_hand):
                self.end_rank([own, *others], raised)
                return
        self.publish(replace(self.look(), state="done"))
        if not self.by_hand:
            self.stay()

    def stay(self) -> None:
        """After the run, until the rank's process ends: a launcher waits for that, and one that is stopped would keep it for ever."""
        while self.look().halted < READY * self.least:
            self._sleep()
        self.tell(f"hang: this rank (process {self.pid}) has left the run and is stopped by a signal (SIGSTOP); it is killed")
        record_exit(HungError.exit_code)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def _sleep(self) -> None:
        """A tick. Where it took much longer, this host was suspended or the job stopped: what passed meanwhile counts for nothing."""
        before = time.monotonic(), time.clock_gettime(time.CLOCK_BOOTTIME)
        time.sleep(self.tick)
        if max(time.monotonic() - before[0], time.clock_gettime(time.CLOCK_BOOTTIME) - before[1]) > 5 + self.tick:
            self._restart_clocks()

    def _restart_clocks(self) -> None:
        self.progress, self.moved = (-1, -1), time.monotonic()
        self.beats, self.beaten = -1, time.monotonic()
        self.ran = time.monotonic()  # when the rank was last seen not stopped
        self.heard.clear()

    def look(self) -> Sighting:
        """The rank as it is now."""
        now, board = time.monotonic(), self.board
        progress = board[hangs.CHANGES], board[hangs.COLLECTIVES]
        if progress != self.progress:
            self.progress, self.moved = progress, now
        if board[hangs.BEATS] != self.beats:
            self.beats, self.beaten = board[hangs.BEATS], now
        state = "debugged" if board[hangs.DEBUGGED] else process_state(self.pid)
        if state in ("stopped", "debugged"):
            self.moved = now  # for a rank that goes on, time begins anew
        if state != "stopped":
            self.ran = now
        return Sighting(
            rank=self.rank,
            host=self.host,
            pid=self.pid,
            beat=self.beat,
            finished=board[hangs.FINISHED],
            phase=PHASES[board[hangs.PHASE]],
            stalled=now - self.moved,
            halted=now - self.ran,
            limit=board.limit,
            collectives=board[hangs.COLLECTIVES],
            state=state,
            silent=state != "stopped" and now - self.beaten > self.least / 3,
        )

    def publish(self, own: Sighting) -> None:
        """Let the other watchers know; a folder that is gone, or a disk that is full, is theirs to notice."""
        self.beat += 1
        with contextlib.suppress(OSError):
            path = self.folder / f"rank-{self.rank:05d}"
            aside = self.folder / f".rank-{self.rank:05d}"
            aside.write_text(json.dumps(asdict(replace(own, beat=self.beat))))
            os.replace(aside, path)

    def others(self) -> list[Sighting]:
        """What the other ranks' watchers said last, "lost" where one has said nothing new for half the shortest limit."""
        found, now = [], time.monotonic()
        for rank in range(self.size):
            if rank == self.rank:
                continue
            seen = self._read(rank)
            beat, since = self.heard.get(rank, (-2, now))
            if seen.beat != beat:
                self.heard[rank] = beat, since = seen.beat, now
            lost = seen.state != "done" and now - since > self.least / 2
            found.append(replace(seen, state="lost") if lost else replace(seen, stalled=seen.stalled + now - since))
        return found

    def _read(self, rank: int) -> Sighting:
        try:
            return Sighting(**json.loads((self.folder / f"rank-{rank:05d}").read_text()))
        except (OSError, ValueError, TypeError):
            return Sighting(rank, "unknown host", 0, -1, 0, hangs.STARTING, 0.0, 0.0, float("inf"), 0, "running", False)

    def alarm(self) -> Path:
        """The file by which the first watcher that finds the run hung tells the others."""
        return self.folder / "alarm"

    def agreed(self, known: list[Sighting], raised: bool) -> dict[str, Any]:
        """What the first watcher that found the run hung has said of it, which this one becomes where none has."""
        mine = {"by": self.rank, "stamp": time.strftime("%Y%m%d-%H%M%S"), "ranks": [asdict(each) for each in known]}
        with contextlib.suppress(OSError):
            if not raised:
                aside = self.folder / f".alarm-{self.rank:05d}"
                aside.write_text(json.dumps(mine))
                os.link(aside, self.alarm())  # there whole, and once
        with contextlib.suppress(OSError, ValueError):
            said: dict[str, Any] = json.loads(self.alarm().read_text())
            return said
        return mine  # the disk is full or gone: each speaks for itself

    def end_rank(self, known: list[Sighting], raised: bool) -> None:
        """Have the rank write its stacks, say who hangs, and end it with the exit code for that."""
        alarm = self.agreed(sorted(known, key=lambda each: each.rank), raised)
        everyone, evidence = [Sighting(**each) for each in alarm["ranks"]], self.logs / f"hang-{alarm['stamp']}.txt"
        others = [each.rank for each in everyone if each.rank != self.rank and each.state == "running"]
        self.write_stacks(process_state(self.pid) == "stopped", others)
        if alarm["by"] == self.rank:
            self.gather(everyone, evidence)
        else:
            wait_for(evidence.exists, EVIDENCE_TIME + 2)

        # The same line on every rank's log, and only then the end of the first.

        self.tell(f"hang: {verdict(everyone)}; stacks of all ranks: {evidence}")
        record_exit(HungError.exit_code)
        time.sleep(AFTER_LINE)
        self.board[hangs.ORDER] = hangs.END
        time.sleep(2.0)  # the rank ends by itself, and this process with it
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def tell(self, line: str) -> None:
        """On this rank's standard error, and from rank 0 in the run's log."""
        print(f"megainter: {line}" if self.rank == 0 else f"megainter: rank {self.rank}: {line}", file=sys.stderr, flush=True)
        if self.rank == 0:
            with contextlib.suppress(OSError), open(self.logs / "train.log", "a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%H:%M:%S')} {line}\n")

    def write_stacks(self, stopped: bool, others: list[int]) -> None:
        """The rank's stacks and those of its loader's workers; a stopped one goes on for the moment that it takes."""
        path = self.folder / f"stacks-{self.rank:05d}.txt"
        if stopped:  # the others first: where this one goes on, so do they
            there = [self.folder / f"written-{rank:05d}" for rank in others]
            wait_for(lambda: all(other.exists() for other in there), EVIDENCE_TIME / 2)
        for pid in [self.pid, *(child for child in children(self.pid) if offers_stacks(child))]:
            grown = partial(longer, path, size_of(path))
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGUSR2)
                if stopped:
                    os.kill(pid, signal.SIGCONT)
                wait_for(grown, 1.0)
                time.sleep(0.1)  # the rest of it
                if stopped:
                    os.kill(pid, signal.SIGSTOP)
        if not stopped:
            self.board[hangs.ORDER] = hangs.DUMP
            wait_for(lambda: self.board[hangs.RECORDED] == 1, 1.0)
        with contextlib.suppress(OSError):
            (self.folder / f"written-{self.rank:05d}").touch()

    def gather(self, everyone: list[Sighting], evidence: Path) -> None:
        """One file with all that the ranks left, and the flight recorders' beside it."""
        there = [each.rank for each in everyone if each.state not in ("lost", "done")]
        wait_for(lambda: all((self.folder / f"written-{rank:05d}").exists() for rank in there), EVIDENCE_TIME)
        parts = [f"{verdict(everyone)}\n"]
        parts += [f"{json.dumps(asdict(each))}\n" for each in everyone]
        named = {each.rank for each in blamed(everyone)}
        for each in sorted(everyone, key=lambda each: each.rank not in named):
            parts.append(f"\n== rank {each.rank} on {each.host}, process {each.pid}{' (named above)' if each.rank in named else ''}\n")
            parts.append(read_end(self.folder / f"stacks-{each.rank:05d}.txt") or "no stacks: the process did not answer\n")
        with contextlib.suppress(OSError):
            aside = evidence.with_name(f".{evidence.name}")
            aside.write_text("".join(parts), encoding="utf-8")
            for each in everyone:
                with contextlib.suppress(FileNotFoundError):
                    os.replace(self.folder / f"flight-{each.rank:05d}", evidence.with_name(f"{evidence.stem}-flight-{each.rank}"))
            os.replace(aside, evidence)


def process_state(pid: int) -> str:
    """ "running", "stopped", "disk" or "debugged", as /proc has it."""
    status = _status(pid)
    if status.get("TracerPid", "0") != "0":
        return "debugged"
    return {"T": "stopped", "D": "disk"}.get(status.get("State", "R")[0], "running")


def offers_stacks(pid: int) -> bool:
    """Whether the process has a handler for the signal that asks for its stacks; others would die of it."""
    return bool(int(_status(pid).get("SigCgt", "0"), 16) >> (signal.SIGUSR2 - 1) & 1)


def _status(pid: int) -> dict[str, str]:
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return {}


def children(pid: int) -> list[int]:
    """Process ids of those that any thread of ``pid`` started."""
    found = []
    for entry in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += [int(word) for word in entry.read_text().split()]
    return found


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    """Until ``condition`` holds, ``seconds`` at most."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)


def longer(path: Path, before: int) -> bool:
    """Whether a file has grown beyond ``before`` bytes."""
    return size_of(path) > before


def size_of(path: Path) -> int:
    """Bytes of a file, 0 where there is none."""
    with contextlib.suppress(OSError):
        return path.stat().st_size
    return 0


def read_end(path: Path) -> str:
    """The end of a file that others wrote, as text; "" where there is none."""
    with contextlib.suppress(OSError):
        return path.read_bytes()[-LONGEST_STACK:].decode(errors="replace")
    return ""


def main(words: list[str]) -> None:
    """The watcher of the rank that started it; its words are those of ``Watcher``, with the shared memory's descriptor first."""
    shared, rank, size, pid = map(int, words[:4])
    end_with_parent(pid)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # for the rank, which saves; its end is this process's
    Watcher(Board(mmap.mmap(shared, BOARD_BYTES)), rank, size, pid, Path(words[4]), Path(words[5]), float(words[6])).run()


if __name__ == "__main__":
    main(sys.argv[1:])
