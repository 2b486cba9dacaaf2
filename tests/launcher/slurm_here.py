"""A Slurm of one node for a test: munge, controller, daemon, all with files in one folder."""

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

CONFIG = """
ClusterName=here
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=1000 State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


@contextlib.contextmanager
def slurm(folder: Path) -> Iterator[dict[str, str]]:
    """The environment in which Slurm's commands find it; skips, with the reason, where it cannot be brought up."""
    if any(shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None for name in ("sbatch", "slurmctld", "slurmd", "munged")):
        pytest.skip("Slurm is not installed (apt: slurm-wlm munge)")
    if os.getuid() != 0:
        pytest.skip("a Slurm of one's own needs root")
    folder.chmod(0o755)
    host = socket.gethostname()
    config = folder / "slurm.conf"
    config.write_text(CONFIG.format(host=host, folder=folder, ports=free_ports(2)))
    for name in ("state", "spool"):
        (folder / name).mkdir()
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    environment = os.environ | {"SLURM_CONF": str(config)}
    files = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "m.pid", "log-file": "m.log", "seed-file": "m.seed"}
    munge = ["munged", "--foreground", "--force", *(f"--{option}={folder}/{name}" for option, name in files.items())]
    processes = []
    try:
        for command in (munge, ["slurmctld", "-D", "-f", str(config)], ["slurmd", "-D", "-f", str(config)]):
            program = shutil.which(command[0]) or f"/usr/sbin/{command[0]}"
            with open(folder / f"{command[0]}.out", "wb") as out:
                processes.append(subprocess.Popen([program, *command[1:]], env=environment, stdout=out, stderr=out))
            time.sleep(1)
        wait_for_node(environment, folder)
        yield environment
    finally:
        for process in reversed(processes):
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
            process.wait()


def wait_for_node(environment: dict[str, str], folder: Path, seconds: float = 60) -> None:
    """Wait until the node is idle."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        answer = subprocess.run(["sinfo", "--noheader", "--format=%t"], env=environment, capture_output=True, text=True)
        if "idle" in answer.stdout:
            return
        time.sleep(1)
    logs = " | ".join(line for name in ("slurmctld", "slurmd", "munged") for line in (folder / f"{name}.out").read_text().splitlines()[-2:])
    pytest.skip(f"Slurm did not come up here: {answer.stdout} {answer.stderr} {logs}")


def free_ports(count: int) -> list[int]:
    """Port numbers that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
