"""The exact command that hands a job to an existing engine: DeepSpeed's launcher, torchrun, mpirun or srun. Lists of words, no shell."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.hostfile import Host
from launcher.options import Engine, RemoteShell
from megainter.errors import UsageError
from megainter.process import RANKS_VARIABLE

MODULE = "megainter.pretrain"  # what ranks run where nothing else is said

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
# What no shell reads as anything but text, and pdsh (which expands %) neither. DeepSpeed's pdsh runner quotes nothing.
PLAIN = re.compile(r"[A-Za-z0-9_./:,=@+~-]*")
# Of what the networks' variables may begin with, to leave interfaces and devices out; no shell of today reads it but as text.
EXCEPT, NETWORK = "^", re.compile(r"(NCCL|GLOO|UCX)_.*")
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
# Variables that run or load code of their own, or that the engines set themselves.
FORBIDDEN = re.compile(
    r"LD_(?!LIBRARY_PATH$).*|BASH_.*|ENV|IFS|PS4|PROMPT_COMMAND|SHELLOPTS|PYTHON(STARTUP|INSPECT|HOME|BREAKPOINT|WARNINGS)|PERL5.*|"
    r"DS_ENV_FILE|PDSH_.*|SBATCH_.*|SLURM_.*|OMPI_.*|PMIX_.*|PMI_.*|(LOCAL_|CROSS_)?(RANK|SIZE)|WORLD_SIZE|MASTER_(ADDR|PORT)|MEGAINTER_.*|GIT_.*"
)
# What ranks on other hosts get from here without being asked, where it is set.
PASSED_ON = re.compile(
    r"PATH|PYTHONPATH|LD_LIBRARY_PATH|DS_ACCELERATOR|OMP_NUM_THREADS|CUDA_HOME|TORCH_EXTENSIONS_DIR|HF_HOME|"
    r"(NCCL|GLOO|UCX)_.*"
)


@dataclass(frozen=True)
class Job:
    """What is started: ``module`` with ``arguments`` on every device of ``hosts`` (empty: ``processes`` on this machine)."""

    engine: Engine
    arguments: tuple[str, ...]
    hosts: tuple[Host, ...]
    processes: int
    environment: Mapping[str, str]  # given to every rank, on every host
    folder: Path  # of the attempt: hostfile, environment file
    master: str
    port: int
    remote_shell: RemoteShell = "pdsh"
    module: str = MODULE

    @property
    def world_size(self) -> int:
        """Ranks of the job."""
        return sum(host.slots for host in self.hosts) if self.hosts else self.processes


def check_arguments(arguments: Sequence[str], remote: bool) -> None:
    """``UsageError`` for an argument with control characters, or (``remote``) one that a shell on the way would not take literally."""
    for argument in arguments:
        if CONTROL.search(argument):
            raise UsageError(f"argument {argument!a} contains control characters")
        if remote and PLAIN.fullmatch(argument) is None:
            raise UsageError(f"argument {argument!a} would pass through shells on other hosts; use letters, digits and _./:,=@+~- only")


def check_environment(given: Sequence[str], remote: bool) -> dict[str, str]:
    """``NAME=VALUE`` words as a dictionary; ``UsageError`` where one loads code, is set by the engines, or does not survive a shell."""
    environment = {}
    for word in given:
        name, equals, value = word.partition("=")
        if not equals or NAME.fullmatch(name) is None:
            raise UsageError(f"--env {word!a} is not of the form NAME=VALUE")
        if FORBIDDEN.fullmatch(name):
            raise UsageError(f"--env {name} is not passed on: it is the launcher's own, or makes programs load code")
        _check_value("--env", name, value, remote)
        environment[name] = value
    return environment


def inherited_environment(source: Mapping[str, str]) -> dict[str, str]:
    """What ranks on other hosts take over from this environment (``PASSED_ON``), checked likewise."""
    found = {name: value for name, value in source.items() if PASSED_ON.fullmatch(name)}
    for name, value in found.items():
        _check_value("environment variable", name, value, remote=True)
    return found


def _check_value(kind: str, name: str, value: str, remote: bool) -> None:
    if CONTROL.search(value):
        raise UsageError(f"{kind} {name} contains control characters")
    plain = value.removeprefix(EXCEPT) if NETWORK.fullmatch(name) else value
    if remote and PLAIN.fullmatch(plain) is None:
        raise UsageError(f"{kind} {name} is {value!a}; for other hosts use letters, digits and _./:,=@+~- only")


def build(job: Job) -> list[str]:
    """The command line that starts ``job``; ``UsageError`` where the engine cannot do it, with the one that can."""
    makers = {"deepspeed": _deepspeed, "torchrun": _torchrun, "mpirun": _mpirun, "srun": _srun}
    return makers[job.engine](job)


def _deepspeed(job: Job) -> list[str]:
    runner = [sys.executable, "-m", "deepspeed.launcher.runner", "--master_port", str(job.port)]
    if not job.hosts:
        # A hostfile that is not there: otherwise the runner would take /job/hostfile.
        return [*runner, "--hostfile", str(job.folder / "none"), "--num_gpus", str(job.processes), "--module", job.module, *job.arguments]
    for path in (Path.cwd(), Path(sys.executable)):
        if PLAIN.fullmatch(str(path)) is None:
            raise UsageError(f"{str(path)!a} would pass through shells on other hosts; move to a path without special characters")
    return [
        *runner, "--hostfile", str(job.folder / "hostfile"), *_chosen_devices(job), "--master_addr", job.master, "--launcher",
        job.remote_shell, "--force_multi", "--module", job.module, *job.arguments,
    ]  # fmt: skip


def _chosen_devices(job: Job) -> list[str]:
    """DeepSpeed's filter. Its MPI runners refuse one: they get whole hosts, out of the job's own hostfile."""
    if job.remote_shell == "pdsh":
        return ["--include", "@".join(f"{host.name}:{','.join(map(str, host.devices))}" for host in job.hosts)]
    _require_whole_hosts(job)
    return []


def _torchrun(job: Job) -> list[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node"]
    if not job.hosts:
        return [*torchrun, str(job.processes), "--standalone", "--module", job.module, *job.arguments]
    raise UsageError("torchrun starts the processes of one machine only; for a hostfile use --engine deepspeed or --engine mpirun")


def _mpirun(job: Job) -> list[str]:
    _require_whole_hosts(job)
    program = shutil.which("mpirun") or "mpirun"
    words = [program, "-n", str(job.world_size)]
    words += ["--host", ",".join(f"{host.name}:{host.slots}" for host in job.hosts)] if job.hosts else ["--oversubscribe"]
    if os.getuid() == 0:
        words.append("--allow-run-as-root")
    environment = {**job.environment, **rendezvous(job)}
    exported = [word for name in sorted(environment) for word in ("-x", f"{name}={environment[name]}")]
    return [*words, *exported, sys.executable, "-m", job.module, *job.arguments]


def rendezvous(job: Job) -> dict[str, str]:
    """Where ranks meet, for engines that do not tell them: mpirun and srun."""
    meeting = {"MASTER_ADDR": job.master, "MASTER_PORT": str(job.port)}
    return meeting | ({RANKS_VARIABLE: "slurm"} if job.engine == "srun" else {})


def _srun(job: Job) -> list[str]:
    _require_whole_hosts(job)
    slots = {host.slots for host in job.hosts}
    if not job.hosts or len(slots) > 1:
        raise UsageError("srun needs hosts with the same number of slots each")
    return [
        "srun", "--nodes", str(len(job.hosts)), "--ntasks", str(job.world_size), "--ntasks-per-node", str(slots.pop()), "--nodelist",
        ",".join(host.name for host in job.hosts), "--kill-on-bad-exit=1", "--export=ALL", sys.executable, "-m", job.module,
        *job.arguments,
    ]  # fmt: skip


def _require_whole_hosts(job: Job) -> None:
    for host in job.hosts:
        if host.devices != tuple(range(host.slots)):
            how = job.engine if job.engine != "deepspeed" else f"--remote-shell {job.remote_shell}"
            raise UsageError(f"{how} numbers the devices of {host.name} from 0; choosing others needs --engine deepspeed over pdsh")


def require_programs(job: Job) -> None:
    """``UsageError`` naming the package where a program of the engine is not installed, or is not the one this speaks to."""
    needed = {"mpirun": "mpirun", "srun": "srun"}.get(job.engine)
    if job.engine == "deepspeed" and job.hosts:
        needed = {"pdsh": "pdsh", "openmpi": "mpirun", "mpich": "mpirun"}[job.remote_shell]
    if needed is not None and shutil.which(needed) is None:
        raise UsageError(f"{needed} is not installed here; {job.engine} needs it (Debian: pdsh, openmpi-bin, slurm-client)")
    if job.engine == "mpirun":
        answer = subprocess.run(["mpirun", "--version"], capture_output=True, text=True, check=False)
        if "Open MPI" not in answer.stdout and "open-mpi" not in answer.stdout:
            raise UsageError("this mpirun is not Open MPI; for MPICH use --engine deepspeed --remote-shell mpich")
