"""Saving while training goes on: the rank copies its share of the state into memory, and a process of its own does the rest.

The stall of a step is that copy. Ranks agree in two stages, and ask for it in the sum that every step has anyway: all have written their
part, then rank 0 has published the whole, or removed it where a part is missing. So no collective of a save runs beside those of training,
and all ranks learn how it ended after the same step.
"""

import base64
import json
import logging
import math
import mmap
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

import megainter
from megainter.errors import MegainterError
from megainter.training import zero_state
from megainter.training.arrival import Landing
from megainter.training.checkpoint import PARTIAL, step_name
from megainter.training.collective import first_said, gathered, on_first_rank
from megainter.training.world import World

log = logging.getLogger("megainter")
MADV_POPULATE_WRITE = 23  # asm-generic/mman-common.h
ALIGNED = 64  # bytes, at which files begin in the memory
START = "import sys; sys.path.insert(0, sys.argv[1]); from megainter.training.writing import main; main(*map(int, sys.argv[2:]))"
IDLE, WRITING, PUBLISHING = range(3)


@dataclass(frozen=True)
class Target:
    """Where a state is published: the folder of ``step`` in ``root``, of whose steps the newest ``keep`` and each ``keep_every``-th stay.

    ``files`` are those beside the tensors, by name; rank 0's are written.
    """

    root: Path
    step: int
    files: Mapping[str, bytes]
    keep: int
    keep_every: int = 0


@dataclass(frozen=True)
class Outcome:
    """How a save ended, the same on all ranks: published, or ``failure`` says why not. ``not_finite`` names a tensor with NaN or infinity.

    Seconds: training stood still for ``stall``, of which it ``waited`` for the save before; ``duration`` is from the beginning of the copy
    until it was published. ``size``: bytes of all files. ``left``: what should have been removed and could not be.
    """

    root: Path
    step: int
    failure: str | None
    not_finite: str | None
    stall: float
    waited: float
    duration: float
    size: int
    left: str | None

    @property
    def published(self) -> bool:
        """Whether the checkpoint is there."""
        return self.failure is None and self.not_finite is None

    def record(self) -> dict[str, Any]:
        """For metrics.jsonl: seconds, bytes, the folder, and why it failed where it did."""
        wrong = self.failure or (f"{self.not_finite} is not finite" if self.not_finite else None)
        figures = {"stall_seconds": self.stall, "waited_seconds": self.waited, "duration_seconds": self.duration, "bytes": self.size}
        return {key: round(value, 4) for key, value in figures.items()} | {"folder": self.root.name} | ({"failure": wrong} if wrong else {})


class Saver:
    """The saves of one rank, at most one in flight, of the state of the DeepSpeed engine ``trained``. Collective, as are its methods.

    As a context manager it ends its process, and with it a save that is still in flight.
    """

    def __init__(self, trained: Any, world: World) -> None:
        self.trained, self.world = trained, world
        self.dealt = zero_state.deal(trained, world)
        self.copy = HostCopy(zero_state.owned_shapes(trained, world, self.dealt), world)
        self.writer = Writer(self.copy)
        if (failure := first_said(self.writer.answer().get("failure"))) is not None:
            self.writer.end()
            raise MegainterError(f"no process and memory ({self.copy.size / 1e9:.1f} GB) for saving beside training: {failure}")
        self.copy.touch()
        self.start = on_first_rank(lambda: secrets.token_hex(4))  # a rank of an earlier start may still be writing elsewhere
        self.failed_in_a_row = 0
        self._landing = Landing(world.device)
        self._stage, self._turn = IDLE, 0
        self._copied: int | None = None  # micro-batches behind the state in the memory
        self._queue: list[Target] = []  # for that state; the first is in flight
        self._roots: set[Path] = set()  # for which it was begun
        self._began = self._waited = self._stall = 0.0
        self._entries: list[dict[str, Any]] = []
        self._failure: str | None = None
        self._not_finite: str | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.writer.end()
        os.close(self.copy.descriptor)

    @property
    def in_flight(self) -> bool:
        """Whether a save was begun whose outcome was not given yet."""
        return self._stage != IDLE

    def begin(self, target: Target) -> list[Outcome]:
        """Copy the state and let it be published; gives the outcomes of earlier saves, which are waited for.

        The state that was copied last is not copied again, nor published twice in one place.
        """
        began, outcomes = time.perf_counter(), []
        if self._copied != self.trained.micro_steps:
            outcomes = self.finish()
            self._waited = time.perf_counter() - began
            zero_state.copy_state(self.trained, self.world, self.dealt, self.copy.tensors)
            self._copied, self._roots = self.trained.micro_steps, set()
            self._stall = time.perf_counter() - began

        # What is in flight of the same copy goes first.
        if target.root not in self._roots:
            self._roots.add(target.root)
            self._queue.append(target)
            if not self.in_flight:
                self._began = began
                self._start_writing()
        return outcomes

    def is_published(self, root: Path) -> bool:
        """Whether the state as it is now was published in ``root``; to be asked when nothing is in flight."""
        return self._copied == self.trained.micro_steps and root in self._roots

    def ready(self) -> float:
        """This rank's part of the sum over ranks that ``note`` is to be given."""
        mine = self._stage == WRITING or (self._stage == PUBLISHING and self.world.rank == 0)
        if not mine or not self.writer.answered():
            return 0.0
        return float(self._turn if self._stage == WRITING else self._turn * self.world.size)

    def note(self, total: Tensor) -> list[Outcome]:
        """Go on with the save in flight where the sum of ``ready`` (float32 []) says that no rank will have to wait.

        On a GPU the sum is that of the call before. The turn, another one in each stage, tells what it was about.
        """
        arrived = self._landing.swap(total)
        if not self.in_flight or arrived != float(self._turn * self.world.size):
            return []
        return self._go_on()

    def finish(self) -> list[Outcome]:
        """Wait for what is in flight."""
        outcomes = []
        while self.in_flight:
            outcomes += self._go_on()
        return outcomes

    def _start_writing(self) -> None:
        target = self._queue[0]
        small = target.files if self.world.rank == 0 else {}
        self.writer.ask(
            do="write",
            folder=str(self._partial(target)),
            tensors=[[file.name, file.start, file.size] for file in self.copy.files],
            small={name: base64.b64encode(content).decode() for name, content in small.items()},
        )
        self._enter(WRITING)

    def _partial(self, target: Target) -> Path:
        return target.root / f"{PARTIAL}{step_name(target.step)}-{self.start}"

    def _enter(self, stage: int) -> None:
        self._stage, self._turn = stage, self._turn % 63 + 1

    def _go_on(self) -> list[Outcome]:
        return self._written() if self._stage == WRITING else self._published()

    def _written(self) -> list[Outcome]:
        """All parts are written, or one failed: rank 0's process publishes or removes them."""
        answers = gathered((self.writer.answer(), self._stall))
        said = [{key: f"rank {rank}: {text}" for key, text in answer.items()} for rank, (answer, _) in enumerate(answers)]
        self._failure = next((each["failure"] for each in said if "failure" in each), None)
        self._not_finite = next((each["not_finite"] for each in said if "not_finite" in each), None)
        self._entries = [entry for answer, _ in answers for entry in answer.get("entries", [])]
        self._stall = max(stall for _, stall in answers)
        if self.world.rank == 0:
            self._ask_for_the_end(self._queue[0])
        self._enter(PUBLISHING)
        return []

    def _ask_for_the_end(self, target: Target) -> None:
        if self._failure or self._not_finite:
            self.writer.ask(do="abandon", folder=str(self._partial(target)))
        else:
            self.writer.ask(
                do="publish",
                folder=str(self._partial(target)),
                final=str(target.root / step_name(target.step)),
                entries=self._entries,
                keep=target.keep,
                keep_every=target.keep_every,
            )

    def _published(self) -> list[Outcome]:
        outcome = on_first_rank(self._outcome)
        if outcome.failure is not None:
            self._roots.discard(outcome.root)
        self._queue.pop(0)
        self._enter(IDLE)
        self._began, self._stall, self._waited = time.perf_counter(), 0.0, 0.0  # for the next of the same copy
        if self._queue:
            self._start_writing()
        return [outcome]

    def _outcome(self) -> Outcome:
        answer, target = self.writer.answer(), self._queue[0]
        return Outcome(
            root=target.root,
            step=target.step,
            failure=self._failure or answer.get("failure"),
            not_finite=self._not_finite,
            stall=self._stall,
            waited=self._waited,
            duration=time.perf_counter() - self._began,
            size=sum(entry["bytes"] for entry in self._entries),
            left=answer.get("left"),
        )


@dataclass(frozen=True)
class FilePlace:
    """A file of tensors as it lies in the memory: ``size`` bytes from ``start``."""

    name: str
    start: int
    size: int


class HostCopy:
    """Memory for this rank's share of the state, in the bytes of its files; ``tensors`` [kind][name] are float32 views of it.

    It has no name, so that it goes with the processes that hold it, and no limit but the machine's: containers often have a small /dev/shm.
    """

    def __init__(self, shapes: Mapping[str, Mapping[str, Sequence[int]]], world: World) -> None:
        self.files: list[FilePlace] = []
        self.tensors: dict[str, dict[str, Tensor]] = {}
        headers = {kind: safetensors_header(parameters) for kind, parameters in shapes.items()}
        for kind, parameters in shapes.items():
            start = -(-self.size // ALIGNED) * ALIGNED
            size = len(headers[kind]) + 4 * sum(math.prod(shape) for shape in parameters.values())
            self.files.append(FilePlace(f"{kind}-{world.rank:05d}-of-{world.size:05d}.safetensors", start, size))

        # Pages are found when they are first touched, or when the writer asks for them.
        self.descriptor = _nameless()
        os.ftruncate(self.descriptor, self.size)
        self._memory = mmap.mmap(self.descriptor, self.size)
        for kind, file in zip(shapes, self.files, strict=True):
            self._memory[file.start : file.start + len(headers[kind])] = headers[kind]
            self.tensors[kind] = _views(self._memory, file.start + len(headers[kind]), shapes[kind])

    def touch(self) -> None:
        """Enter the memory in this process's page table now and not during the first copy; Linux before 5.14 cannot."""
        if sys.platform == "linux":
            with suppress(OSError):
                self._memory.madvise(MADV_POPULATE_WRITE)

    @property
    def size(self) -> int:
        """Bytes."""
        return self.files[-1].start + self.files[-1].size if self.files else 0


def _nameless() -> int:
    """A descriptor of memory that processes can share; where the system has no such thing, of a file that is removed already."""
    if sys.platform == "linux":
        return os.memfd_create("checkpoint")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _views(memory: mmap.mmap, start: int, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    views = {}
    for name in sorted(shapes):
        count = math.prod(shapes[name])
        flat = torch.frombuffer(memory, dtype=torch.float32, count=count, offset=start) if count else torch.empty(0)
        views[name] = flat.view(tuple(shapes[name]))
        start += 4 * count
    return views


def safetensors_header(shapes: Mapping[str, Sequence[int]]) -> bytes:
    """What a safetensors file of float32 tensors begins with, to the byte as the library writes it; their data follow by name."""
    places, start = {}, 0
    for name in sorted(shapes):
        end = start + 4 * math.prod(shapes[name])
        places[name] = {"dtype": "F32", "shape": list(shapes[name]), "data_offsets": [start, end]}
        start = end
    text = json.dumps(places, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class Writer:
    """The rank's end of the process that writes: one order, then its answer; the first answer says whether the memory is there.

    One that died is told, and replaced at the next order.
    """

    def __init__(self, copy: HostCopy) -> None:
        self.copy = copy
        self._start()

    def _start(self) -> None:
        orders, self._orders = _pipe()
        self._answers, answers = _pipe()
        root = str(Path(megainter.__file__).parents[1])
        numbers = [orders.fileno(), answers.fileno(), self.copy.descriptor, os.getpid()]
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", START, root, *map(str, numbers)],
            env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            pass_fds=numbers[:3],
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C and a launcher's signals go to the rank's
        )
        orders.close()
        answers.close()
        self._send({"do": "reserve", "bytes": self.copy.size})

    def ask(self, **order: Any) -> None:
        """Give it an order."""
        if self.process.poll() is not None:
            log.error("the process that writes checkpoints had ended (%s) and is started again", self._end())
            self.end()
            self._start()
            self.answer()
        self._send(order)

    def _send(self, order: dict[str, Any]) -> None:
        try:
            self._orders.send_bytes(json.dumps(order).encode())
        except OSError:
            self.process.kill()  # so that the answer is its end

    def answered(self) -> bool:
        """Whether ``answer`` would not wait."""
        return self._answers.poll()

    def answer(self) -> dict[str, Any]:
        """What it answers, waited for; a ``failure`` where it has ended instead."""
        try:
            answer: dict[str, Any] = json.loads(self._answers.recv_bytes())
            return answer
        except (EOFError, OSError):
            return {"failure": f"the process that writes ended ({self._end()})"}

    def _end(self) -> str:
        code = self.process.wait()
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"

    def end(self) -> None:
        """End it, and what it is doing."""
        self.process.kill()
        self.process.wait()
        self._orders.close()
        self._answers.close()


def _pipe() -> tuple[Connection, Connection]:
    read, write = os.pipe()
    return Connection(read, writable=False), Connection(write, readable=False)
