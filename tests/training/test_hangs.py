"""When a run counts as hung and who is named: by what watchers saw, and by watchers of processes that stand for ranks."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megainter.training.hang_watcher import children, offers_stacks, process_state
from megainter.training.hangs import DATA, FORWARD, SAVING, STARTING, VALIDATION, Sighting, blamed, is_hung, phase_limit, verdict
from megainter.training.stragglers import OwnTime, slowest
from megainter.training.watchdog import Watchdog
from megainter.training.world import World
from tests.synthetic import environment

STILL = Sighting(
    rank=0, host="a", pid=10, beat=5, finished=7, phase=FORWARD, stalled=100.0, halted=0.0, limit=60.0, collectives=40, state="running",
    silent=False,
)  # fmt: skip


def ranks(*changes: dict[str, Any]) -> list[Sighting]:
    """One sighting a rank, each with its changes to one that has stood still for 100 s."""
    return [replace(STILL, rank=rank, pid=10 + rank, **change) for rank, change in enumerate(changes)]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ([{}], [0]),
        ([{}, {"collectives": 39}, {}], [1]),  # the others have entered the collective in which they wait
        ([{"collectives": 38}, {"collectives": 39}, {}], [0, 1]),
        ([{}, {"state": "stopped", "halted": 70.0}], [1]),  # inside the collective, so that none is behind
        ([{"collectives": 30}, {"state": "stopped", "halted": 70.0, "collectives": 29}], [1]),
        ([{}, {"state": "lost"}, {}], [1]),
        ([{"state": "done"}, {}], [0]),
        ([{}, {"silent": True}], [1]),
        ([{}, {"state": "disk"}], [1]),
        ([{}, {}], []),
        ([{"silent": True}, {"silent": True}], []),
    ],
)
def test_who_is_named(changes: list[dict[str, Any]], named: list[int]) -> None:
    assert [each.rank for each in blamed(ranks(*changes))] == named


def test_the_line_is_bounded_and_says_how_a_rank_hangs() -> None:
    line = verdict([*ranks(*[{"collectives": 39}] * 500), *ranks({})])
    assert len(line) < 600
    assert "and 497 more ranks; 1 other rank(s) wait" in line
    assert "has waited for data for 100 s after step 7" in verdict(ranks({}, {"phase": DATA, "collectives": 39}))
    assert "lets no other thread run" in verdict(ranks({}, {"silent": True, "collectives": 39}))
    assert verdict(ranks({"phase": DATA}, {"phase": DATA})).endswith("(waiting for data): no loader gives any")
    assert "none is behind the others" in verdict(ranks({}, {}))


@pytest.mark.parametrize(
    ("own", "others", "by_hand", "hung"),
    [
        ({}, [{}], False, True),
        ({"stalled": 50.0}, [{}], False, False),  # not yet
        ({}, [{"stalled": 1.0}], False, False),  # another one moves, whatever it does
        ({}, [{"limit": 1800.0}], False, False),  # and may take longer for what it does: a validation, say
        ({}, [{"limit": math.inf}], False, False),
        ({}, [{"state": "lost", "stalled": 0.0}], False, True),
        ({}, [{"state": "running", "stalled": 0.0, "beat": -1, "limit": math.inf}], False, False),  # not heard of yet
        ({"limit": 1800.0}, [{"limit": 1800.0, "state": "stopped", "halted": 58.0}], False, True),  # stopped while it saves
        ({"limit": 1800.0}, [{"limit": 1800.0, "state": "stopped", "halted": 20.0}], False, False),
        ({"state": "stopped", "halted": 58.0}, [], False, True),
        ({"state": "stopped", "halted": 58.0}, [{"state": "stopped", "halted": 58.0}], True, False),  # Ctrl-Z
        ({"state": "stopped", "halted": 58.0}, [{}], True, True),
        ({}, [{"state": "debugged"}], False, False),
        ({"state": "debugged"}, [{"state": "stopped", "halted": 99.0}], False, False),
    ],
)
def test_what_counts_as_hung(own: dict[str, Any], others: list[dict[str, Any]], by_hand: bool, hung: bool) -> None:
    first, *rest = ranks(own, *others)
    assert is_hung(first, rest, 60.0, by_hand) == hung


def test_limits_follow_the_median_step_within_bounds() -> None:
    own = {STARTING: 900.0, VALIDATION: 600.0, SAVING: 0.0}

    def limit(phase: str, median: float | None, factor: float = 10.0) -> float:
        return phase_limit(phase, median, factor, 60.0, 1800.0, own)

    assert [limit(FORWARD, median) for median in (0.1, 20.0, 1000.0)] == [60.0, 200.0, 1800.0]
    assert limit(FORWARD, None) == limit(STARTING, None) == 900.0  # the first steps compile
    assert (limit(VALIDATION, 0.1), limit(SAVING, 0.1), limit(FORWARD, 0.1, factor=0.0)) == (600.0, math.inf, math.inf)


def test_the_median_leaves_out_the_first_steps_of_a_start_and_what_is_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megainter.config.settings import HangConfig

    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    watch = Watchdog(HangConfig(), tmp_path, World(0, 1, torch.device("cpu")))
    for step, seconds in enumerate([500.0, 400.0, 3.0, 1.0, 2.0, 0.0]):
        watch.at(DATA, step)
        assert watch.median == [None, None, None, 3.0, 2.0, 2.0][step]
        now[0] += seconds
        watch.at(VALIDATION, step)
        now[0] += 1000.0


def test_a_straggler_is_compared_with_the_median_of_the_others() -> None:
    assert slowest([0.1, 0.1, 0.4, 0.2], 1.0) == (2, 0.3)
    assert slowest([0.5, 0.3], 2.0) == (0, 0.1)
    assert slowest([0.2, 0.2], 1.0)[1] == 0.0


def test_own_time_is_data_and_forward_passes() -> None:
    own = OwnTime(torch.device("cpu"))
    for _ in range(4):
        with own.forward():
            time.sleep(0.02)
        own.step(waited=0.1)
    assert 0.12 <= own.take() < 0.2
    assert own.take() == 0.0


# A program that stands for a rank without torch: it shares a board with its watcher, offers its stacks, and stands still after a second.
RANK = """
import faulthandler, mmap, os, signal, subprocess, sys, threading, time
from megainter.training import hangs
rank, folder, logs = int(os.environ["RANK"]), sys.argv[1], sys.argv[2]
faulthandler.register(signal.SIGUSR2, file=open(f"{folder}/stacks-{rank:05d}.txt", "ab", buffering=0), all_threads=True)
shared = os.memfd_create("board"); os.ftruncate(shared, hangs.BOARD_BYTES)
board = hangs.Board(mmap.mmap(shared, hangs.BOARD_BYTES)); board.limit = 1.0
words = [shared, rank, 2, os.getpid(), folder, logs, 1.0]
subprocess.Popen([sys.executable, "-m", "megainter.training.hang_watcher", *map(str, words)], pass_fds=[shared], start_new_session=True)
def turn():
    while True:
        time.sleep(0.05); board[hangs.BEATS] += 1
        if board[hangs.ORDER] == hangs.END: os._exit(8)
threading.Thread(target=turn, daemon=True).start()
for step in range(10):
    board[hangs.CHANGES] += 1; board[hangs.COLLECTIVES] += 1; time.sleep(0.1)
if "LEAVES" in os.environ:
    board[hangs.ORDER] = hangs.CLOSED; os.kill(os.getpid(), signal.SIGSTOP)
def entered_the_collective(): time.sleep(600)
def in_the_forward(): time.sleep(600)
if rank == 0:
    board[hangs.COLLECTIVES] += 1; board[hangs.PHASE] = 4; entered_the_collective()
board[hangs.PHASE] = 3; in_the_forward()
"""


def start(tmp_path: Path, **variables: str) -> list[subprocess.Popen[str]]:
    """Two such ranks, watched."""
    for name in ("meeting", "logs", "outcome"):
        (tmp_path / name).mkdir()
    command = [sys.executable, "-c", RANK, str(tmp_path / "meeting"), str(tmp_path / "logs")]
    return [
        subprocess.Popen(command, env=environment() | {"RANK": str(rank)} | variables, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]


def test_the_one_that_is_behind_is_named_on_every_log_with_all_stacks(tmp_path: Path) -> None:
    jobs = start(tmp_path, MEGAINTER_OUTCOME_FOLDER=str(tmp_path / "outcome"))
    told = [job.communicate(timeout=60)[1] for job in jobs]
    assert [job.returncode for job in jobs] == [8, 8]
    assert {path.name: path.read_text() for path in (tmp_path / "outcome").iterdir()} == {"rank-00000": "8\n", "rank-00001": "8\n"}

    line = f"rank 1 ({os.uname().nodename}, process {jobs[1].pid}) has made no progress for"
    assert all(line in text and text.count("hang: ") == 1 and f"process {jobs[0].pid}" not in text for text in told)
    (evidence,) = (tmp_path / "logs").glob("hang-*.txt")
    text = evidence.read_text()
    assert text.index("in in_the_forward") < text.index("in entered_the_collective"), "the one that is named comes first"
    assert line in (tmp_path / "logs" / "train.log").read_text()


def test_a_rank_that_is_stopped_on_its_way_out_does_not_keep_the_launcher(tmp_path: Path) -> None:
    jobs = start(tmp_path, MEGAINTER_OUTCOME_FOLDER=str(tmp_path / "outcome"), LEAVES="1")
    told = [job.communicate(timeout=60)[1] for job in jobs]
    assert [job.returncode for job in jobs] == [-signal.SIGKILL] * 2
    assert all(f"(process {job.pid}) has left the run and is stopped" in text for job, text in zip(jobs, told))
    assert len(list((tmp_path / "outcome").iterdir())) == 2


@pytest.mark.slow
def test_a_run_that_somebody_stopped_by_hand_goes_on_when_he_wants(tmp_path: Path) -> None:
    jobs = start(tmp_path)
    for job in jobs:
        job.send_signal(signal.SIGSTOP)
    time.sleep(2)
    assert [process_state(job.pid) for job in jobs] == ["stopped", "stopped"]
    for job in jobs:
        job.send_signal(signal.SIGCONT)
    went_on = time.monotonic()
    assert "no progress" in jobs[0].communicate(timeout=60)[1], "and then it counts again"
    assert time.monotonic() - went_on > 0.9, "from the beginning"
    jobs[1].communicate(timeout=60)


def test_only_processes_with_a_handler_are_asked_for_stacks() -> None:
    code = "import faulthandler, signal, sys, time; {}; print(flush=True); time.sleep(600)"
    ours = [
        subprocess.Popen([sys.executable, "-c", code.format(line)], stdout=subprocess.PIPE)
        for line in ("faulthandler.register(signal.SIGUSR2)", "pass")
    ]
    try:
        assert all(job.stdout is not None and job.stdout.readline() for job in ours)
        assert [offers_stacks(job.pid) for job in ours] == [True, False]
        assert {job.pid for job in ours} <= set(children(os.getpid()))
    finally:
        for job in ours:
            job.kill()
            job.communicate()


def test_sightings_travel_as_json() -> None:
    assert Sighting(**json.loads(json.dumps(vars(replace(STILL, limit=math.inf))))) == replace(STILL, limit=math.inf)
