"""Two "hosts" on one machine: an sshd of our own on two loopback addresses, DeepSpeed's launcher over pdsh, ranks that meet over both."""

import getpass
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.launcher.jobs import assert_no_orphan, processes_of, start_launch, wait_for_step
from tests.places import ROOT
from tests.synthetic import losses, settings, train, write_data

pytestmark = pytest.mark.slow
HOSTS = ("127.0.0.2", "127.0.0.3")
SSHD = "/usr/sbin/sshd"


@dataclass(frozen=True)
class TwoHosts:
    """A hostfile with both, and the environment in which ssh finds them."""

    hostfile: Path
    environment: dict[str, str]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoHosts]:
    """An sshd on both addresses with keys made for this test."""
    missing = [name for name in ("pdsh", "ssh", "ssh-keygen") if shutil.which(name) is None]
    if missing or not Path(SSHD).exists():
        pytest.skip("needs pdsh and an ssh server (apt: pdsh, openssh-server)")
    if os.getuid() != 0:
        pytest.skip("an sshd that lets its own user in needs root here")
    folder = tmp_path_factory.mktemp("ssh")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for key in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)], check=True)
    public = (folder / "host.pub").read_text().split()
    (folder / "known").write_text("".join(f"[{host}]:{port} {public[0]} {public[1]}\n" for host in HOSTS))
    shutil.copy(folder / "user.pub", folder / "authorized")
    Path("/run/sshd").mkdir(exist_ok=True)
    listen = "".join(f"ListenAddress {host}:{port}\n" for host in HOSTS)
    (folder / "sshd_config").write_text(
        f"{listen}HostKey {folder}/host\nAuthorizedKeysFile {folder}/authorized\nPidFile {folder}/pid\nStrictModes no\nUsePAM no\n"
        "PermitRootLogin yes\nPasswordAuthentication no\n"
    )
    (folder / "config").write_text(
        f"Host *\n  Port {port}\n  User {getpass.getuser()}\n  IdentityFile {folder}/user\n  UserKnownHostsFile {folder}/known\n"
    )
    tools = folder / "bin"
    tools.mkdir()
    (tools / "ssh").write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/config "$@"\n')
    (tools / "ssh").chmod(0o755)
    hostfile = folder / "hosts"
    hostfile.write_text("".join(f"{host} slots=1\n" for host in HOSTS))
    hostfile.chmod(0o600)
    server = subprocess.Popen([SSHD, "-D", "-f", str(folder / "sshd_config")])
    environment = {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "DS_ACCELERATOR": "cpu"}
    deadline = time.monotonic() + 30
    while subprocess.run(["ssh", HOSTS[0], "true"], env=os.environ | environment, capture_output=True).returncode:
        assert time.monotonic() < deadline, "sshd does not answer"
        time.sleep(0.2)
    yield TwoHosts(hostfile, environment)
    server.terminate()
    server.wait()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny data set, shared by the module."""
    return write_data(tmp_path_factory.mktemp("data"))


def test_a_hostfile_trains_as_one_machine_does(hosts: TwoHosts, data: tuple[Path, Path], tmp_path: Path) -> None:
    job = start_launch(["--hostfile", str(hosts.hostfile)], settings(*data, tmp_path / "run"), tmp_path / "log", hosts.environment)
    assert job.wait(400) == 0, (tmp_path / "log").read_text()
    local = train(settings(*data, tmp_path / "local"), processes=2)
    assert local.returncode == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "local")
    assert len(losses(tmp_path / "run")) == 20


def test_a_host_that_dies_is_survived(hosts: TwoHosts, data: tuple[Path, Path], tmp_path: Path) -> None:
    """All processes of one host killed mid-run: the relaunch ends with the losses of a run that nobody disturbed."""
    steps = {"training__steps": 60, "checkpoint__every_steps": 10}
    run = tmp_path / "run"
    job = start_launch(
        ["--hostfile", str(hosts.hostfile), "--restarts", "2"], settings(*data, run, **steps), tmp_path / "log", hosts.environment
    )
    wait_for_step(run, 15, job)
    for pid in on_host(run, 1):
        os.kill(pid, signal.SIGKILL)
    assert job.wait(600) == 0, (tmp_path / "log").read_text()
    assert_no_orphan(run)
    assert (run / "launch" / "attempts.jsonl").read_text().count("\n") == 2
    local = train(settings(*data, tmp_path / "local", **steps), processes=2)
    assert local.returncode == 0
    assert losses(run) == losses(tmp_path / "local")


def test_sigterm_reaches_every_host(hosts: TwoHosts, data: tuple[Path, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = start_launch(
        ["--hostfile", str(hosts.hostfile)], settings(*data, run, training__steps=100000), tmp_path / "log", hosts.environment
    )
    wait_for_step(run, 5, job)
    job.terminate()
    assert job.wait(120) == 75, (tmp_path / "log").read_text()
    assert_no_orphan(run)


def test_a_killed_launcher_leaves_nothing_on_any_host(hosts: TwoHosts, data: tuple[Path, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = start_launch(
        ["--hostfile", str(hosts.hostfile)], settings(*data, run, training__steps=100000), tmp_path / "log", hosts.environment
    )
    wait_for_step(run, 5, job)
    job.kill()
    assert_no_orphan(run, 15)


def test_chaos_strikes_ranks_where_they_are(hosts: TwoHosts, tmp_path: Path) -> None:
    """Over ssh, a rank killed, one stopped and a whole host lost; the end is that of the run in peace."""
    words = ["--hosts", str(hosts.hostfile), "--output", str(tmp_path), "--kinds", "kill,stop,host", "--seed", "2"]
    words += ["--mtbf", "10", "--steps", "200", "--every", "20", "--hang", "5"]
    command, environment = [sys.executable, "-m", "tests.chaos", *words], os.environ | hosts.environment
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "moments: EQUAL" in done.stdout
    assert len(json.loads((tmp_path / "chaos.json").read_text())["faults"]) > 1, done.stdout


def on_host(run: Path, node: int) -> list[int]:
    """DeepSpeed's helper on one host and its rank."""
    helpers = [pid for pid, words in processes_of(run).items() if "deepspeed.launcher.launch" in words and f"--node_rank={node}" in words]
    python = [pid for pid in helpers if "python" in Path(f"/proc/{pid}/exe").resolve().name]
    children = [int(word) for pid in python for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [*python, *children]
