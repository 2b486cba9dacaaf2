"""What is known of a rank's progress, when the run counts as hung, and who is named for it. Standard library only.

A run hangs where no rank makes progress: the one that is stuck, and the others, which wait for it in a collective. The waiting ones have
entered that collective and the stuck one has not, so the number of collectives that each has entered tells them apart.
"""

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass

STARTING, DATA, AGREEING, FORWARD, BACKWARD, UPDATE, REPORTING, VALIDATION, SAVING = PHASES = (
    "starting", "waiting for data", "agreeing on the step", "forward", "backward", "update", "reporting", "validation", "saving",
)  # fmt: skip
READY = 0.95  # of its limit, when a rank's own watcher begins to end it, so that the evidence is there when the limit is
NEARLY = 0.8  # of its limit, for what another rank's watcher last said of it
NAMED = 3  # ranks in the line on the terminal; the file has all

FINISHED, PHASE, CHANGES, COLLECTIVES, BEATS, DEBUGGED, RECORDED, ORDER, LIMIT = range(9)
BOARD_BYTES = 128
DUMP, END, CLOSED = 1, 2, 3  # orders


class Board:
    """Nine numbers of eight bytes that a rank and its watcher share: written by one side each, without locks.

    The rank's main thread writes ``FINISHED`` (steps), ``PHASE``, ``CHANGES`` (of phase) and ``LIMIT`` (seconds, the only float); a thread
    of it ``COLLECTIVES`` (entered so far), ``BEATS`` (its own turns), ``DEBUGGED`` and ``RECORDED``; the watcher ``ORDER``.
    """

    def __init__(self, memory: mmap.mmap) -> None:
        self._whole, self._real = memoryview(memory).cast("q"), memoryview(memory).cast("d")

    def __getitem__(self, place: int) -> int:
        return self._whole[place]

    def __setitem__(self, place: int, value: int) -> None:
        self._whole[place] = value

    @property
    def limit(self) -> float:
        """Seconds without progress after which the rank counts as hung in its present phase."""
        return self._real[LIMIT]

    @limit.setter
    def limit(self, seconds: float) -> None:
        self._real[LIMIT] = seconds


@dataclass(frozen=True)
class Sighting:
    """What a rank's watcher saw of it last. Seconds are of the watcher's own clock, so that no two hosts' clocks are compared.

    ``state``: "running", "stopped" (by a signal), "disk" (a wait that no signal ends), "debugged", "done" (left the run in order) or
    "lost" (its watcher is not heard of any more). ``silent``: the rank's other threads do not get the interpreter either.
    """

    rank: int
    host: str
    pid: int
    beat: int
    finished: int
    phase: str
    stalled: float  # without progress
    halted: float  # stopped by a signal
    limit: float
    collectives: int
    state: str
    silent: bool


def phase_limit(phase: str, median: float | None, factor: float, least: float, most: float, own: dict[str, float]) -> float:
    """Seconds without progress that ``phase`` may take: its own limit, or ``factor`` times the ``median`` step within the bounds.

    As long as no median is known, a step has the limit of the start: it compiles and fills caches. 0 stands for no limit.
    """
    key = phase if phase in own else STARTING if median is None else None
    if key is not None:
        return own[key] or math.inf
    assert median is not None  # otherwise the start's limit was taken
    return min(max(factor * median, least), most) if factor else math.inf


def is_hung(own: Sighting, others: Sequence[Sighting], least: float, by_hand: bool) -> bool:
    """Whether the run hangs, as ``own``'s watcher sees it: no rank makes progress, or one is stopped by a signal for ``least`` seconds.

    Where somebody debugs a rank, or has stopped all of a run that he started ``by_hand`` (Ctrl-Z), time does not count.
    """
    everyone = [own, *others]
    if any(each.state == "debugged" for each in everyone) or (by_hand and all(each.state == "stopped" for each in everyone)):
        return False
    if any(each.halted >= READY * least for each in everyone):
        return True
    still = all(each.state in ("lost", "done") or each.stalled >= NEARLY * each.limit for each in others)
    return still and own.stalled >= READY * own.limit


def blamed(everyone: Sequence[Sighting]) -> list[Sighting]:
    """The ranks that the others wait for; empty where there are several and none of them is behind."""
    certain = [each for each in everyone if each.state in ("stopped", "lost", "done")]
    if certain or len(everyone) == 1:
        return certain or list(everyone)
    ahead = max(each.collectives for each in everyone)
    behind = [each for each in everyone if each.collectives < ahead]
    in_disk, silent = [each.state == "disk" for each in everyone], [each.silent for each in everyone]
    return behind or _told_apart(everyone, in_disk) or _told_apart(everyone, silent)


def _told_apart(everyone: Sequence[Sighting], marks: list[bool]) -> list[Sighting]:
    """Those that are marked, where not all are."""
    return [] if all(marks) else [each for each, marked in zip(everyone, marks) if marked]


def reason(stuck: Sighting) -> str:
    """What is wrong with a rank that is named, as the rest of a sentence about it."""
    at = f"{stuck.stalled:.0f} s after step {stuck.finished:,}, {stuck.phase}"
    if stuck.state == "stopped":
        return f"is stopped by a signal (SIGSTOP), for {stuck.halted:.0f} s, {stuck.phase} after step {stuck.finished:,}"
    if stuck.state == "lost":
        return f"gives no sign of life, nor does its host ({stuck.phase} after step {stuck.finished:,})"
    if stuck.state == "done":
        return "has left the run"
    if stuck.state == "disk":
        return f"is in a wait that nothing ends, of a disk or a device ({at})"
    if stuck.phase == DATA:
        return f"has waited for data for {stuck.stalled:.0f} s after step {stuck.finished:,}: its loader gives none"
    holds = ", and lets no other thread run" if stuck.silent else ""
    return f"has made no progress for {stuck.stalled:.0f} s in phase {stuck.phase} after step {stuck.finished:,}{holds}"


def verdict(everyone: Sequence[Sighting]) -> str:
    """One line of bounded length: who hangs and how, or that none is behind the others."""
    stuck = blamed(everyone)
    if not stuck:
        phases = sorted({each.phase for each in everyone})
        seconds = min(each.stalled for each in everyone)
        why = "no loader gives any" if phases == [DATA] else "none is behind the others: a device, or the network"
        return f"all {len(everyone)} ranks have made no progress for {seconds:.0f} s ({', '.join(phases)}): {why}"
    told = "; ".join(f"rank {each.rank} ({each.host}, process {each.pid}) {reason(each)}" for each in stuck[:NAMED])
    more = f"; and {len(stuck) - NAMED} more ranks" if len(stuck) > NAMED else ""
    waiting = len(everyone) - len(stuck)
    return told + more + (f"; {waiting} other rank(s) wait" if waiting else "")
