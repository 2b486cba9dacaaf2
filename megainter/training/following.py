"""What metrics.jsonl says is sent to a tracker, by a process of its own beside a run, or of a finished run.

    python -m megainter.training.following RUN TRACKER

follows the file until its standard input ends, which the kernel sees to when the run does. How far it came is kept in the run folder,
so that a resumed run and `megainter track` send what is new and nothing twice.
"""

import json
import os
import select
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megainter.files import read_json, write_json
from megainter.process import folder_lock
from megainter.tracking import Tracker
from megainter.training.trackers import open_tracker

INTERVAL = 2.0  # seconds between two looks at the file


class Records:
    """The records of metrics.jsonl that were not sent yet. ``time`` is the last sent one's, ``same`` how many of that time were sent.

    A resumed run, and one that goes back to a checkpoint, writes the file anew without the steps that are to be done again.
    """

    def __init__(self, path: Path, time: float = 0.0, same: int = 0) -> None:
        self.path, self.time, self.same = path, time, same
        self.inode = self.offset = -1

    def new(self) -> list[dict[str, Any]]:
        """Whole records that came since the last call, in the order of the file."""
        if not self.path.exists():
            return []
        with open(self.path, "rb") as file:
            inode = os.fstat(file.fileno()).st_ino
            anew = inode != self.inode
            self.inode, self.offset = inode, 0 if anew else self.offset
            file.seek(self.offset)
            block = file.read()
        whole = block[: block.rfind(b"\n") + 1]
        self.offset += len(whole)

        # What a file written anew repeats was sent; a clock that was set back hides nothing of one that only grew.
        found, before, skipped = [json.loads(line) for line in whole.splitlines()], self.time, 0
        fresh = []
        for record in found:
            known = anew and (record["time"] < before or (record["time"] == before and skipped < self.same))
            skipped += known and record["time"] == before
            fresh += [] if known else [record]
        for record in fresh:
            self.same = self.same + 1 if record["time"] == self.time else 1 if record["time"] > self.time else self.same
            self.time = max(self.time, record["time"])
        return fresh


def follow(run: Path, name: Tracker, ended: Callable[[], bool]) -> int:
    """Send what is new until ``ended`` and nothing is left; how many records were sent. ``LockedError`` where another process does."""
    folder = run / "logs" / "tracking" / name
    folder.mkdir(parents=True, exist_ok=True)
    with folder_lock(folder):
        state = read_json(folder / "sent.json") if (folder / "sent.json").exists() else {}
        records = Records(run / "metrics.jsonl", state.get("time", 0.0), state.get("same", 0))
        sink, sent, last = open_tracker(name, run, state.get("id")), 0, False
        while True:
            fresh = records.new()
            for record in fresh:
                sink.send(record)
            sent += len(fresh)
            if fresh:
                write_json(folder / "sent.json", {"id": sink.id, "time": records.time, "same": records.same})
            if last:
                sink.close()
                return sent
            last = ended()


def _input_ended() -> bool:
    return bool(select.select([sys.stdin], [], [], INTERVAL)[0])


if __name__ == "__main__":
    os.nice(10)  # training comes first where cores are few
    print(f"{follow(Path(sys.argv[1]), sys.argv[2], _input_ended)} records sent", flush=True)  # type: ignore[arg-type]
