"""Ranks that stand after a second or two instead of ten: real processes, forked from one that has imported torch and DeepSpeed.

    with Ranks() as ranks:
        pids = ranks.start(["pretrain", *settings(...)], size=2, log=folder / "log")
        codes = ranks.wait(pids, seconds=60)

``python -m tests.forked PARENT`` is that one process. It has a single thread and no group, so that what it forks is as good as fresh; all
end with it, and it with its parent.
"""

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from megainter.process import end_with_parent, free_port
from tests.places import ROOT
from tests.synthetic import environment

ALWAYS = ("megainter.training.loop", "megainter.tasks.pretraining.training", "megainter.tasks.classification.training")


class Ranks:
    """A server of ranks, and what became of them. As a context manager it ends all that are left."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.forked", str(os.getpid())]
        variables = environment() | {"OPENBLAS_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}
        self.server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=variables, cwd=ROOT, text=True)
        self.codes: dict[int, int] = {}  # of ranks that have ended; -n: by signal n

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.server.kill()
        self.server.wait()

    def start(self, words: Sequence[str], size: int, log: Path, variables: Mapping[str, str] | None = None) -> list[int]:
        """Start ``megainter WORDS`` on ``size`` ranks of this machine, their output appended to ``log``; gives their process ids."""
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(size)}
        order = {"words": list(words), "size": size, "log": str(log), "variables": group | dict(variables or {})}
        return [int(pid) for pid in self._ask(order)]

    def running(self, pids: Sequence[int]) -> list[int]:
        """Those that have not ended."""
        self.codes |= {int(pid): code for pid, code in self._ask({}).items()}
        return [pid for pid in pids if pid not in self.codes]

    def wait(self, pids: Sequence[int], seconds: float) -> list[int]:
        """Their exit codes, once all have ended; ``TimeoutError`` after so many seconds."""
        deadline = time.monotonic() + seconds
        while left := self.running(pids):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{left} of {list(pids)} run after {seconds:.0f} s")
            time.sleep(0.02)
        return [self.codes[pid] for pid in pids]

    def _ask(self, order: dict[str, Any]) -> Any:
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        print(json.dumps(order), file=self.server.stdin, flush=True)
        return json.loads(self.server.stdout.readline())


def serve(parent: int) -> None:
    """Fork what is asked for, and say what has ended."""
    end_with_parent(parent)
    for name in ALWAYS:
        importlib.import_module(name)
    for line in sys.stdin:
        order = json.loads(line)
        print(json.dumps([fork(order, rank) for rank in range(order["size"])] if order else ended()), flush=True)


def fork(order: dict[str, Any], rank: int) -> int:
    """One rank; gives its process id."""
    assert len(os.listdir("/proc/self/task")) == 1, "a process with threads cannot be forked"
    server = os.getpid()
    pid = os.fork()
    if pid == 0:
        run(order, rank, server)
    return pid


def run(order: dict[str, Any], rank: int, server: int) -> None:
    """Be a rank to the end, as ``python -m megainter WORDS`` under a launcher would be."""
    code = 1
    try:
        end_with_parent(server)
        os.setsid()
        log, nothing = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), os.open(os.devnull, os.O_RDONLY)
        for descriptor, target in ((nothing, 0), (log, 1), (log, 2)):
            os.dup2(descriptor, target)
        os.environ.update(order["variables"] | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        sys.argv = ["megainter", *order["words"]]

        from megainter.cli import main

        main(order["words"])
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended() -> dict[int, int]:
    """Exit codes of the ranks that have ended since it was last asked."""
    codes = {}
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return codes
        if pid == 0:
            return codes
        codes[pid] = os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
