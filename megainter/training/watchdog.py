"""The rank's side of the watch against hangs: it notes where it is, and a process of its own looks whether that changes.

Noting costs microseconds and touches neither the device nor a file: the numbers lie in memory that the watcher shares
(``hang_watcher``). A thread only of this process would be as stuck as its rank where that is stopped or holds the interpreter.
"""

import faulthandler
import mmap
import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megainter.config.settings import HangConfig
from megainter.errors import HungError
from megainter.process import OUTCOME_VARIABLE
from megainter.training import hangs
from megainter.training.collective import collectives_entered, on_first_rank
from megainter.training.hangs import BOARD_BYTES, DATA, PHASES, SAVING, STARTING, VALIDATION, Board, phase_limit
from megainter.training.world import World

WARM_UP = 2  # steps of a start that compile, build and fill caches: no measure of the others
REMEMBERED = 100  # steps of which the median is taken
PULSE = 0.2  # seconds between two turns of the thread
DUMP_SIGNAL = signal.SIGUSR2  # writes the stacks, whatever holds the interpreter
NUMBER = {phase: number for number, phase in enumerate(PHASES)}


class Watchdog:
    """Notes this rank's progress for its watcher; a context manager, entered by all ranks together (collective).

    Where there is no /proc nothing is watched, and noting does nothing.
    """

    def __init__(self, settings: HangConfig, output: Path, world: World) -> None:
        self._settings, self._output, self._world = settings, output, world
        self._own = {STARTING: settings.start, VALIDATION: settings.validation, SAVING: settings.saving}
        self._steps: deque[float] = deque(maxlen=REMEMBERED)
        self._begun, self._spent, self._phase, self._finished = 0, 0.0, STARTING, 0
        self._since = time.monotonic()
        self._board: Board | None = None
        self._closed = threading.Event()

    def at(self, phase: str, finished: int) -> None:
        """This rank enters ``phase`` after ``finished`` steps."""
        now = time.monotonic()
        if self._phase not in self._own:
            self._spent += now - self._since
        if phase == DATA:
            self._next_step()
        self._phase, self._since, self._finished = phase, now, finished
        self._note()

    @property
    def median(self) -> float | None:
        """Seconds of the median step, without validation and saving; None during the first steps of a start."""
        return statistics.median(self._steps) if self._steps else None

    def _next_step(self) -> None:
        self._begun += 1
        if self._begun > WARM_UP + 1:  # with the first call of all nothing was finished
            self._steps.append(self._spent)
        self._spent = 0.0

    def _note(self) -> None:
        if self._board is None:
            return
        known = self._settings
        self._board.limit = phase_limit(self._phase, self.median, known.factor, known.least, known.most, self._own)
        self._board[hangs.FINISHED], self._board[hangs.PHASE] = self._finished, NUMBER[self._phase]
        self._board[hangs.CHANGES] += 1

    def __enter__(self) -> "Watchdog":
        if not Path("/proc/self/stat").exists():
            return self
        self._folder = Path(on_first_rank(lambda: str(_fresh(self._output / "watch"))))
        self._stacks = open(self._folder / f"stacks-{self._world.rank:05d}.txt", "ab", buffering=0)
        faulthandler.register(DUMP_SIGNAL, file=self._stacks, all_threads=True)
        shared = os.memfd_create("megainter-watch")
        os.ftruncate(shared, BOARD_BYTES)
        self._board = Board(mmap.mmap(shared, BOARD_BYTES))
        self._note()

        words = [shared, self._world.rank, self._world.size, os.getpid(), self._folder, self._output / "logs", self._settings.least]
        self._watcher = subprocess.Popen(
            [sys.executable, "-m", "megainter.training.hang_watcher", *map(str, words)],
            pass_fds=[shared], stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        os.close(shared)
        self._thread = threading.Thread(target=self._pulse, args=(self._board,), daemon=True, name="hang-watch")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._board is None:
            return
        self._closed.set()
        self._thread.join()
        self._board[hangs.ORDER] = hangs.CLOSED
        if OUTCOME_VARIABLE not in os.environ:  # otherwise it stays to the end of this process, for which a launcher waits
            self._end_watcher()
        faulthandler.unregister(DUMP_SIGNAL)
        self._stacks.close()
        if self._world.rank == 0:
            shutil.rmtree(self._folder.parent, ignore_errors=True)

    def _end_watcher(self) -> None:
        try:
            self._watcher.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._watcher.kill()
            self._watcher.wait()

    def _pulse(self, board: Board) -> None:
        """The thread: what only this process can know, and the two things that only it can do itself."""
        main = threading.main_thread().ident
        assert main is not None
        while not self._closed.wait(PULSE):
            if board[hangs.ORDER] == hangs.END:
                os._exit(HungError.exit_code)
            board[hangs.COLLECTIVES] = collectives_entered()
            board[hangs.DEBUGGED] = is_debugged(sys._current_frames().get(main))
            board[hangs.BEATS] += 1
            if board[hangs.ORDER] == hangs.DUMP and not board[hangs.RECORDED]:
                with suppress(Exception):  # evidence that cannot be had must not keep the run from ending
                    (self._folder / f"flight-{self._world.rank:05d}").write_bytes(flight_record())
                board[hangs.RECORDED] = 1


def _fresh(root: Path) -> Path:
    """An empty folder for the watchers of this start; those of earlier ones may still be ending, and write to theirs."""
    shutil.rmtree(root, ignore_errors=True)
    folder = root / f"{os.getpid()}-{time.time_ns()}"
    folder.mkdir(parents=True)
    return folder


def is_debugged(frame: Any) -> bool:
    """Whether a Python debugger holds the thread at ``frame``, or is loaded to take it at a breakpoint."""
    if "pydevd" in sys.modules:
        return True
    while frame is not None:
        if frame.f_globals.get("__name__") in ("bdb", "pdb"):
            return True
        frame = frame.f_back
    return False


def flight_record() -> bytes:
    """The last collectives of this rank as torch's flight recorder has them (pickled, for ``torchfrtrace``)."""
    from torch._C import _distributed_c10d as c10d

    name = "_dump_nccl_trace" if dist.get_backend() == "nccl" else "_dump_fr_trace"
    record: bytes = getattr(c10d, name)()
    return record
