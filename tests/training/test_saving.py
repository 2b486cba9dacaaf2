"""Saves beside training, one rank in this process: what is published is the state at its step, one save at a time, whatever is killed."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save
from torch import nn

from megainter.training import checkpoint, zero_state
from megainter.training.saving import START, Outcome, Saver, Target, safetensors_header
from megainter.training.world import World
from tests.places import ROOT


@dataclass
class Plain:
    """What a saver needs of an engine, as DeepSpeed has it at stage 0."""

    module: nn.Module
    optimizer: torch.optim.Optimizer
    micro_steps: int = 0
    global_rank: int = 0

    def step(self) -> None:
        """Another state."""
        for parameter in self.module.parameters():
            parameter.grad = torch.randn_like(parameter)
        self.optimizer.step()
        self.micro_steps += 1


@pytest.fixture
def trained() -> Iterator[Plain]:
    """A few parameters after one update, in a group of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    module = nn.Sequential(nn.Linear(300, 500), nn.LayerNorm(500))
    plain = Plain(module, torch.optim.AdamW(module.parameters()))
    plain.step()
    yield plain
    dist.destroy_process_group()


@pytest.fixture
def saver(trained: Plain) -> Iterator[Saver]:
    """Of ``trained``."""
    with Saver(trained, World(0, 1, torch.device("cpu"))) as saver:
        yield saver


def target(root: Path, step: int) -> Target:
    """With the one file that reading asks for."""
    return Target(root, step, {"trainer.json": b'{"step": %d}' % step}, keep=2)


def steps(root: Path) -> list[str]:
    """What lies there, hidden things too."""
    return sorted(path.name for path in root.iterdir()) if root.exists() else []


@pytest.mark.parametrize("shapes", [{"a": (2, 3), "ä.b": (0, 4), "Z": (), "a.a": (5,)}, {"weight": (7,)}, {}])
def test_a_header_is_that_of_the_library(shapes: dict[str, tuple[int, ...]]) -> None:
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    whole = safetensors_header(shapes) + b"".join(tensors[name].numpy().tobytes() for name in sorted(tensors))
    assert whole == save(tensors)


def test_what_is_published_is_the_state_when_it_was_begun(trained: Plain, saver: Saver, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with Saver(trained, World(0, 1, torch.device("cpu"))) as other:
            state = {kind: {name: part.clone() for name, part in parts.items()} for kind, parts in owned(trained).items()}
            assert other.begin(target(tmp_path, 1)) == []
            for _ in range(3):
                trained.step()
            (outcome,) = other.finish()
    finally:
        os.umask(before)
    assert outcome.published
    saved = checkpoint.open_checkpoint(tmp_path / "step_0000001")
    assert outcome.size == sum(path.stat().st_size for path in saved.folder.iterdir() if path.name != checkpoint.MANIFEST)
    assert {oct(path.stat().st_mode & 0o777) for path in saved.folder.iterdir()} == {"0o640"}
    for kind, parts in state.items():
        loaded = load_file(saved.folder / f"{kind}-00000-of-00001.safetensors")
        assert set(loaded) == set(parts)
        assert all(torch.equal(loaded[name], parts[name]) for name in parts), kind


def owned(trained: Plain) -> dict[str, dict[str, torch.Tensor]]:
    """The whole state."""
    return zero_state.owned_state(trained, World(0, 1, torch.device("cpu")))


def test_one_save_is_in_flight_at_a_time_and_the_next_waits(trained: Plain, saver: Saver, tmp_path: Path) -> None:
    saver.begin(target(tmp_path, 1))
    os.kill(saver.writer.process.pid, signal.SIGSTOP)
    subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -CONT {saver.writer.process.pid}"])
    trained.step()
    (first,) = saver.begin(target(tmp_path, 2))
    assert (first.step, first.published) == (1, True)
    (second,) = saver.finish()
    assert second.published
    assert second.stall >= second.waited > 0.2, "what was stopped went on half a second later"
    assert steps(tmp_path) == ["latest", "step_0000001", "step_0000002"]


def test_one_state_goes_to_two_places_but_not_twice_to_one(trained: Plain, saver: Saver, tmp_path: Path) -> None:
    for root in ("best", "checkpoints", "best"):
        assert saver.begin(target(tmp_path / root, 1)) == []
    outcomes = saver.finish()
    assert [(outcome.root.name, outcome.published) for outcome in outcomes] == [("best", True), ("checkpoints", True)]
    assert saver.is_published(tmp_path / "best")
    assert saver.begin(target(tmp_path / "best", 1)) + saver.finish() == []
    trained.step()
    assert not saver.is_published(tmp_path / "best")
    assert checkpoint.damage(tmp_path / "checkpoints" / "step_0000001") is None


def test_steps_learn_of_a_save_without_waiting(trained: Plain, saver: Saver, tmp_path: Path) -> None:
    assert saver.ready() == 0
    saver.begin(target(tmp_path, 1))
    told: list[Outcome] = []
    deadline = time.monotonic() + 20
    while not told and time.monotonic() < deadline:
        told = saver.note(torch.tensor(saver.ready()))
        time.sleep(0.01)
    assert [outcome.published for outcome in told] == [True]
    assert not saver.in_flight


def test_a_killed_writer_is_told_and_the_next_save_has_another(trained: Plain, saver: Saver, tmp_path: Path) -> None:
    saver.begin(target(tmp_path, 1))
    saver.finish()
    trained.step()
    os.kill(saver.writer.process.pid, signal.SIGSTOP)
    saver.begin(target(tmp_path, 2))
    os.kill(saver.writer.process.pid, signal.SIGKILL)
    (outcome,) = saver.finish()
    assert outcome.failure == "rank 0: the process that writes ended (SIGKILL)"
    assert steps(tmp_path) == ["latest", "step_0000001"]
    assert saver.begin(target(tmp_path, 2)) == [], "the state is still in the memory"
    os.kill(saver.writer.process.pid, signal.SIGTERM)  # which it does not hear
    (outcome,) = saver.finish()
    assert outcome.published
    assert checkpoint.damage(tmp_path / "step_0000002") is None


def test_a_state_that_is_not_finite_is_named_and_leaves_nothing(trained: Plain, saver: Saver, tmp_path: Path) -> None:
    saver.begin(target(tmp_path, 1))
    saver.finish()
    trained.step()
    with torch.no_grad():
        next(trained.module.parameters())[3, 4] = float("nan")
    saver.begin(target(tmp_path, 2))
    (outcome,) = saver.finish()
    assert outcome.not_finite == "rank 0: weights of 0.weight"
    assert steps(tmp_path) == ["latest", "step_0000001"]


def test_a_place_that_cannot_be_written_is_a_failure(trained: Plain, saver: Saver, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").touch()
    saver.begin(target(tmp_path / "checkpoints", 1))
    (outcome,) = saver.finish()
    assert outcome.failure is not None
    assert "rank 0: NotADirectoryError" in outcome.failure


def test_the_process_hears_no_signal_of_the_run(trained: Plain, saver: Saver, tmp_path: Path) -> None:
    pid = saver.writer.process.pid
    assert os.getsid(pid) != os.getsid(0)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        os.kill(pid, number)
    saver.begin(target(tmp_path, 1))
    assert [outcome.published for outcome in saver.finish()] == [True]
    assert saver.writer.process.pid == pid


def test_the_process_dies_with_its_rank() -> None:
    code = """
        import os, subprocess, sys, time
        numbers = [os.pipe()[0], os.pipe()[1], os.memfd_create("test")]
        words = [sys.executable, "-P", "-c", sys.argv[1], sys.argv[2], *map(str, numbers), str(os.getpid())]
        child = subprocess.Popen(words, pass_fds=numbers, start_new_session=True)
        print(child.pid, flush=True)
        time.sleep(60)
    """
    rank = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), START, str(ROOT)], stdout=subprocess.PIPE, text=True)
    assert rank.stdout is not None
    pid = int(rank.stdout.readline())
    time.sleep(1)
    assert alive(pid)
    rank.kill()
    rank.wait()
    deadline = time.monotonic() + 5
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not alive(pid)


def alive(pid: int) -> bool:
    """Whether it runs."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
