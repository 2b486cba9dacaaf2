"""The batch file: what Slurm's own parser makes of it where Slurm can be started, else our reading of it."""

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher.hostfile import Host
from launcher.launch import fit_batch, reduced
from launcher.slurm import SlurmRequest, parse_sbatch, sbatch_file
from megainter.errors import UsageError
from megainter.verbs.launch import launch
from tests.launcher.jobs import asked, last_step
from tests.launcher.slurm_here import slurm
from tests.synthetic import environment as quiet
from tests.synthetic import losses, settings, train, write_data

WORDS = ["launch", "--slurm", "--nodes", "4", "--", "pretrain", "--config", "base", "--data.split", "a b $(x)"]


def text(tmp_path: Path, **changes: object) -> str:
    """A batch file for four nodes."""
    request = SlurmRequest(**{"nodes": 4, "processes": 8, "time": "2-00:00:00", **changes})  # type: ignore[arg-type]
    return sbatch_file(request, WORDS, tmp_path, tmp_path)


def test_directives(tmp_path: Path) -> None:
    found = parse_sbatch(text(tmp_path, partition="gpu", account="team-1"))
    assert found["nodes"] == "4"
    assert found["ntasks-per-node"] == found["gpus-per-node"] == "8"
    assert found["signal"] == "B:USR1@300"
    assert (found["partition"], found["account"]) == ("gpu", "team-1")
    assert "requeue" in found
    assert "no-kill" not in found


def test_what_clusters_ask_for_becomes_directives(tmp_path: Path) -> None:
    asked = {"gres": "gpu:a100:8,lscratch:200", "mem": "200G", "cpus_per_task": 12, "qos": "m1", "constraint": "a100|h100"}
    batch = text(tmp_path, **asked)
    found = parse_sbatch(batch)
    assert {name: found[name.replace("_", "-")] for name in asked} == {name: str(value) for name, value in asked.items()}
    assert "gpus-per-node" not in found, "gres names the GPUs already"
    assert "export SRUN_CPUS_PER_TASK=12" in batch.splitlines()


def test_gres_without_gpus_leaves_them_to_the_processes(tmp_path: Path) -> None:
    assert parse_sbatch(text(tmp_path, gres="lscratch:200", mem="0"))["gpus-per-node"] == "8"
    with pytest.raises(UsageError, match="gives 4 GPUs to the 8 processes"):
        text(tmp_path, gres="gpu:4")
    with pytest.raises(UsageError, match="gives 1 GPUs to the 8 processes"):
        text(tmp_path, gres="gpu:a100")


def test_modules_are_loaded_by_a_login_shell_before_the_launcher(tmp_path: Path) -> None:
    """Run for what it is, with a `module` that writes down what it is given, and the launcher replaced by `true`."""
    batch = text(tmp_path, modules=("cuda/12.8", "nccl/2.27.3-1"))
    *before, last = batch.strip().splitlines()
    assert before[0] == "#!/bin/bash -l"
    assert last.startswith("exec ")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / ".bash_profile").write_text(f'module() {{ echo "$@" >> {tmp_path}/loaded; }}\n')
    (tmp_path / "job.sh").write_text("\n".join([*before, "exec true", ""]))
    subprocess.run(["bash", "-l", str(tmp_path / "job.sh")], check=True, env={"HOME": str(tmp_path / "home"), "PATH": "/usr/bin:/bin"})
    assert (tmp_path / "loaded").read_text() == "load cuda/12.8 nccl/2.27.3-1\n"


@pytest.mark.parametrize(
    "change",
    [
        {"gres": "gpu:8 --wrap=x"}, {"gres": "gpu;8"}, {"mem": "lots"}, {"mem": "1G\n#SBATCH --wrap=x"}, {"cpus_per_task": 0},
        {"qos": "-x"}, {"constraint": "a b"}, {"modules": ("cuda; rm",)}, {"modules": ("$(x)",)}, {"modules": ("-f",)},
    ],
)  # fmt: skip
def test_values_that_are_none_are_refused(change: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        text(tmp_path, **change)


def test_fewer_nodes_may_do(tmp_path: Path) -> None:
    found = parse_sbatch(text(tmp_path, min_nodes=2))
    assert found["nodes"] == "2-4"
    assert "no-kill" in found


def test_the_command_comes_out_of_a_shell_as_it_went_in(tmp_path: Path) -> None:
    last = text(tmp_path).strip().splitlines()[-1]
    assert last.startswith("exec ")
    printed = subprocess.run(["bash", "-c", f"printf '%s\\n' {last[5:]}"], capture_output=True, text=True, check=True).stdout.splitlines()
    assert printed == [sys.executable, "-m", "megainter", *WORDS]


def test_what_is_printed_first_is_what_is_submitted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    options = ["launch", "--slurm", "--processes", "8", "--dry-run"]
    command = ["pretrain", "--config", "base", "--output", str(tmp_path / "run"), "--data.split", "--dry-run"]
    monkeypatch.setattr(sys, "argv", ["megainter", *options, "--", *command])
    launch(*command, **asked(slurm=True, processes=8, dry_run=True))
    words = shlex.split(capsys.readouterr().out.strip().splitlines()[-1])
    assert words == ["exec", sys.executable, "-m", "megainter", *options[:-1], "--", *command]


def test_without_slurm_the_batch_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["megainter", "launch", "--slurm", "--processes", "8", "--", "pretrain"])
    batch = tmp_path / "run" / "launch" / "job.sbatch"
    with pytest.raises(UsageError, match=rf"^sbatch is not installed here; .* the batch file is {batch}, and --dry-run prints it alone$"):
        launch("pretrain", "--config", "base", "--output", str(tmp_path / "run"), **asked(slurm=True, processes=8))
    assert parse_sbatch(batch.read_text())["ntasks-per-node"] == "8"


WRONG = [
    {"time": "soon"},
    {"time": "1:00\n"},
    {"partition": "-x"},
    {"account": "a b"},
    {"account": "a\n#SBATCH"},
    {"nodes": 0},
    {"processes": 0},
    {"min_nodes": 5},
]


@pytest.mark.parametrize("changes", WRONG)
def test_refused(changes: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        text(tmp_path, **changes)


def test_a_folder_with_a_space_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a b").mkdir()
    with pytest.raises(UsageError, match="sbatch"):
        text(tmp_path / "a b")


def test_a_malformed_directive_is_seen() -> None:
    with pytest.raises(UsageError):
        parse_sbatch("#!/bin/bash\n#SBATCH --time = 1\n")


@pytest.mark.parametrize("slots", range(1, 40))
def test_the_global_batch_is_kept_on_any_number_of_devices(slots: int) -> None:
    """By brute force: no larger number of ranks divides the batch, and no larger micro-batch fits."""
    for global_batch, micro_batch in ((512, 64), (96, 10), (7, 7)):
        ranks, micro = fit_batch(global_batch, micro_batch, slots)
        assert global_batch % (ranks * micro) == 0
        assert not any(global_batch % more == 0 for more in range(ranks + 1, slots + 1))
        assert not any(global_batch // ranks % more == 0 for more in range(micro + 1, min(micro_batch, global_batch // ranks) + 1))


def test_the_first_hosts_are_kept() -> None:
    hosts = (Host("a", (0, 1, 2, 3)), Host("b", (0, 1, 2, 3)), Host("c", (0, 1)))
    assert reduced(hosts, 6) == (Host("a", (0, 1, 2, 3)), Host("b", (0, 1)))


@pytest.mark.slow
def test_slurm_takes_it(tmp_path: Path) -> None:
    """sbatch --test-only against a controller started here."""
    with slurm(tmp_path) as environment:
        path = tmp_path / "job.sbatch"
        path.write_text(text(tmp_path, nodes=1, processes=1, gpus=False))
        done = subprocess.run(["sbatch", "--test-only", str(path)], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "to start at" in done.stderr


def submit(run: Path, arguments: list[str], environment: dict[str, str]) -> None:
    """``megainter launch --slurm`` from outside a job: one node, two ranks."""
    options = ["--slurm", "--processes", "2", "--no-gpus", "--time", "30:00"]
    command = [sys.executable, "-m", "megainter", "launch", *options, "--", "pretrain", *arguments]
    done = subprocess.run(command, env=quiet() | environment, capture_output=True, text=True, cwd=run.parent)
    assert done.returncode == 0, done.stderr
    assert "submitted as job 1" in done.stdout


def wait_for_attempt(run: Path, seconds: float = 400) -> int:
    """The exit code of the first attempt, once it has ended."""
    deadline = time.monotonic() + seconds
    while not (run / "launch" / "attempts.jsonl").exists():
        logs = "".join(path.read_text() for path in (run / "launch").glob("slurm-*.log"))
        assert time.monotonic() < deadline, logs
        time.sleep(0.5)
    return json.loads((run / "launch" / "attempts.jsonl").read_text().splitlines()[0])["code"]


@pytest.mark.slow
def test_a_slurm_job_trains_as_one_machine_does(tmp_path: Path) -> None:
    data, run = write_data(tmp_path), tmp_path / "run"
    with slurm(tmp_path) as environment:
        submit(run, settings(*data, run), environment)
        assert wait_for_attempt(run) == 0
    local = train(settings(*data, tmp_path / "local"), processes=2)
    assert local.returncode == 0
    assert losses(run) == losses(tmp_path / "local")


@pytest.mark.slow
def test_a_time_limit_saves_and_queues_again(tmp_path: Path) -> None:
    """The signal that Slurm sends ahead of the limit, sent by hand."""
    data, run = write_data(tmp_path), tmp_path / "run"
    with slurm(tmp_path) as environment:
        submit(run, settings(*data, run, training__steps=100000), environment)
        deadline = time.monotonic() + 400
        while last_step(run) < 5:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        subprocess.run(["scancel", "--batch", "--signal=USR1", "1"], env=environment, check=True)
        assert wait_for_attempt(run) == 75
        time.sleep(3)
        state = subprocess.run(["squeue", "--noheader", "--format=%T", "--jobs=1"], env=environment, capture_output=True, text=True).stdout
        assert state.strip() in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED")
        subprocess.run(["scancel", "1"], env=environment, check=True)
