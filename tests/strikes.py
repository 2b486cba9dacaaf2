"""What strikes a run from outside, on the machine where its processes are: ``python -m tests.strikes RUN KIND RANK`` (chaos calls it over
ssh on other hosts). Nothing here needs torch.
"""

import contextlib
import os
import random
import resource
import signal
import sys
from pathlib import Path

from launcher.supervise import descendants
from tests.launcher.jobs import processes_of

ROOM = 50_000  # bytes that logs may still grow while nothing large can be written
HIDDEN = ("hang_watcher", "deepspeed.launcher", "torch.distributed.run", "mpirun", "srun")  # of a run's processes, what is no rank


def ranks_here(run: Path) -> dict[int, int]:
    """Process ids of the ranks on this machine, by rank; not those of their loaders, writers and watchers."""
    found: dict[int, int] = {}
    ours = {pid: words for pid, words in processes_of(run).items() if not any(name in words for name in HIDDEN)}
    for pid in ours:
        with contextlib.suppress(OSError):
            variables = dict(word.partition(b"=")[::2] for word in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
            parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
            if b"RANK" in variables and parent not in ours:
                found[int(variables[b"RANK"])] = pid
    return found


def host_of(run: Path, node: int) -> list[int]:
    """All processes of one host: below DeepSpeed's helper of that number, or the engine and all below it where there is one machine."""
    ours = processes_of(run)
    helpers = [pid for pid, words in ours.items() if "deepspeed.launcher.launch" in words and f"--node_rank={node}" in words]
    engines = [pid for pid, words in ours.items() if any(name in words for name in HIDDEN[1:])]
    roots = helpers or engines
    return sorted({pid for root in roots for pid in [root, *descendants(root)]})


def strike(run: Path, kind: str, rank: int, node: int) -> bool:
    """Strike ``rank``, or the host ``node``; False where nothing of it is here. ``kind``: kill, stop, host, full, free."""
    if kind == "host":
        return _signal(host_of(run, node), signal.SIGKILL)
    ranks = ranks_here(run)
    if kind in ("full", "free"):  # of all: who writes is the run's affair
        every = [pid for rank_pid in ranks.values() for pid in [rank_pid, *descendants(rank_pid)]]
        return _limit_files(every, largest_log(run) + ROOM if kind == "full" else resource.RLIM_INFINITY)
    number = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[kind]
    return _signal([ranks[rank]] if rank in ranks else [], number)


def _signal(pids: list[int], number: signal.Signals) -> bool:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    return bool(pids)


def _limit_files(pids: list[int], size: int) -> bool:
    """No file of these processes may grow beyond ``size`` bytes: a disk that is full for what is large."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    return bool(pids)


def largest_log(run: Path) -> int:
    """Bytes of the larger of the run's two growing files."""
    return max((path.stat().st_size for path in (run / "metrics.jsonl", run / "logs" / "train.log") if path.exists()), default=0)


def flip_a_bit(path: Path, draws: random.Random) -> int:
    """Flip one bit of a file; returns its place."""
    place = draws.randrange(path.stat().st_size * 8)
    with open(path, "r+b") as file:
        file.seek(place // 8)
        byte = file.read(1)[0]
        file.seek(place // 8)
        file.write(bytes([byte ^ 1 << place % 8]))
    return place


if __name__ == "__main__":
    sys.exit(0 if strike(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])) else 1)
