"""From the words of ``megainter launch`` to a supervised job: which hosts, how many ranks, which batch, which command."""

import contextlib
import os
import secrets
import shlex
import shutil
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from launcher import slurm
from launcher.command import (
    MODULE,
    PASSED_ON,
    Job,
    build,
    check_arguments,
    check_environment,
    inherited_environment,
    rendezvous,
    require_programs,
)
from launcher.hostfile import HOST, Host, format_hostfile, read_hostfile, select
from launcher.options import NO_RESTARTS, THIS_MACHINE, Placement, Supervision
from launcher.reach import advice, silent, told
from launcher.supervise import SIGNALS, adopt_orphans, control_variables, run_attempt, supervise
from megainter.config.portions import check_portions
from megainter.config.settings import TrainingConfig
from megainter.errors import STOPPED_EARLY, MegainterError, UsageError
from megainter.files import write_atomically
from megainter.process import StopRequest, free_port

WAIT_FOR_HOSTS = 600.0  # seconds, after a failure
ENGINE_EXPORTS = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL")  # prefixes that DeepSpeed's runner passes on unquoted


class JobFailedError(MegainterError):
    """The job ended otherwise than done; ``exit_code`` is the job's."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.exit_code = code


@dataclass(frozen=True)
class LaunchSettings:
    """What the command line says about the job: ``arguments`` are those of ``module``, the training command, ``training`` its batch."""

    arguments: tuple[str, ...]
    training: TrainingConfig
    output: Path
    placement: Placement = THIS_MACHINE
    supervision: Supervision = NO_RESTARTS
    request: slurm.SlurmRequest | None = None  # for Slurm
    module: str = MODULE


def launch(settings: LaunchSettings, own_words: tuple[str, ...], dry_run: bool) -> None:
    """Write the job into ``output``/launch and run it to its end, or (``dry_run``) print it.

    ``own_words``: the launch command as it was typed, for the batch file. Raises ``UsageError`` before anything runs, and
    ``JobFailedError`` with the job's exit code where it did not end with 0.
    """
    folder = (settings.output / "launch").resolve()
    if settings.request is not None and "SLURM_JOB_ID" not in os.environ:
        _submit(settings, settings.request, own_words, folder, dry_run)
        return
    hosts = hosts_of(settings)
    job = job_of(settings, hosts, folder / "attempt-1")
    check_portions(settings.training, job.world_size)
    if dry_run:
        print(describe(job, settings))
        return
    require_programs(job)
    if job.engine == "deepspeed" and job.remote_shell == "pdsh":
        _require_answers(hosts, settings.supervision.min_nodes or len(hosts))
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "command.txt", describe(job, settings) + "\n")
    code = _supervised(settings, hosts, folder)
    if code == STOPPED_EARLY and settings.request is not None:
        slurm.requeue()
    if code:
        raise JobFailedError(f"the job ended with {code}; see {folder / 'attempts.jsonl'} and docs/failures.md", code)


def hosts_of(settings: LaunchSettings) -> tuple[Host, ...]:
    """The hosts of the job, () for this machine alone; ``UsageError`` for settings that contradict each other."""
    if settings.request is not None:
        return slurm.allocated_hosts(os.environ, settings.request.processes)
    at, least = settings.placement, settings.supervision.min_nodes
    if at.hostfile is None:
        if at.include or at.exclude:
            raise UsageError("--include and --exclude choose among the hosts of a --hostfile")
        return ()
    hosts = select(read_hostfile(at.hostfile), at.include, at.exclude)
    if at.processes is not None:
        raise UsageError("--processes is for one machine; a hostfile gives slots, --include chooses among them")
    if not 1 <= (least or 1) <= len(hosts):
        raise UsageError(f"--min-nodes {least} does not fit the {len(hosts)} hosts that are chosen")
    return hosts


def fit_batch(global_batch: int, micro_batch: int, slots: int) -> tuple[int, int]:
    """Most ranks, at most ``slots``, that share a global batch out evenly, and the largest micro-batch up to ``micro_batch`` for them.

    >>> fit_batch(512, 64, 24)
    (16, 32)
    """
    ranks = max(number for number in range(1, slots + 1) if global_batch % number == 0)
    share = global_batch // ranks
    return ranks, max(size for size in range(1, min(micro_batch, share) + 1) if share % size == 0)


def reduced(hosts: tuple[Host, ...], ranks: int) -> tuple[Host, ...]:
    """The first hosts with ``ranks`` devices between them."""
    kept: list[Host] = []
    for host in hosts:
        room = ranks - sum(other.slots for other in kept)
        if room > 0:
            kept.append(replace(host, devices=host.devices[:room]))
    return tuple(kept)


def visible_devices(environment: Mapping[str, str]) -> int:
    """GPUs of this machine: those of CUDA_VISIBLE_DEVICES, else those nvidia-smi lists; 0 without any."""
    if "CUDA_VISIBLE_DEVICES" in environment:
        return len([name for name in environment["CUDA_VISIBLE_DEVICES"].split(",") if name])
    if shutil.which("nvidia-smi") is None:
        return 0
    answer = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False, timeout=60)
    return sum(line.startswith("GPU ") for line in answer.stdout.splitlines())


def job_of(settings: LaunchSettings, hosts: tuple[Host, ...], folder: Path) -> Job:
    """The job on these hosts; ``UsageError`` for arguments or variables that do not travel safely."""
    at, remote = settings.placement, bool(hosts)
    check_arguments(settings.arguments, remote)
    given = check_environment(at.env, remote)
    if at.master_addr is not None and HOST.fullmatch(at.master_addr) is None:
        raise UsageError(f"--master-addr {at.master_addr!a} is not a host name")
    processes = at.processes or visible_devices(os.environ) or 1
    environment = (inherited_environment(os.environ) if remote else {}) | given | control_variables(folder, remote)
    if not remote and os.environ.get("CUDA_VISIBLE_DEVICES"):
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(os.environ["CUDA_VISIBLE_DEVICES"].split(",")[:processes])
    master = at.master_addr or (hosts[0].name if hosts else "127.0.0.1")
    engine = at.engine or ("srun" if settings.request is not None else "deepspeed")
    port = at.port or (20000 + secrets.randbelow(10000) if remote else free_port())
    return Job(
        engine=engine,
        arguments=settings.arguments,
        hosts=hosts,
        processes=processes,
        environment=environment,
        folder=folder,
        master=master,
        port=port,
        remote_shell=at.remote_shell,
        module=settings.module,
    )


def describe(job: Job, settings: LaunchSettings) -> str:
    """What would run, as text: the command and what is set for every rank."""
    names = [f"{name}={shlex.quote(value)}" for name, value in sorted(job.environment.items())]
    where = ", ".join(f"{host.name} x {host.slots}" for host in job.hosts) or f"this machine x {job.processes}"
    return "\n".join(
        [
            f"# {job.world_size} processes: {where}; global batch {settings.training.global_batch}",
            shlex.join(build(job)),
            "# for every rank:",
            *names,
        ]
    )


def write_attempt(job: Job) -> None:
    """What the engine reads: our own copy of the hosts, and the environment of ranks on other hosts (DeepSpeed's file)."""
    job.folder.mkdir(parents=True, exist_ok=True)
    if job.hosts:
        write_atomically(job.folder / "hostfile", format_hostfile(job.hosts))
        write_atomically(job.folder / "environment", "".join(f"{name}={value}\n" for name, value in sorted(job.environment.items())))


def engine_environment(job: Job, source: Mapping[str, str]) -> dict[str, str]:
    """The engine's own environment: this one, without what it would pass on unchecked, and with what ranks get."""
    kept = dict(source)
    if job.hosts:
        kept = {name: value for name, value in source.items() if not name.startswith(ENGINE_EXPORTS) or PASSED_ON.fullmatch(name)}
        kept["DS_ENV_FILE"] = str(job.folder / "environment")
    return kept | dict(job.environment) | (rendezvous(job) if job.engine == "srun" else {})


def _supervised(settings: LaunchSettings, hosts: tuple[Host, ...], folder: Path) -> int:
    requests = StopRequest(SIGNALS, patient=True)
    adopt_orphans()

    def attempt(number: int) -> int:
        job = _job_of_attempt(settings, hosts, folder / f"attempt-{number}", first=number == 1, requests=requests)
        if requests.count:
            return STOPPED_EARLY
        write_attempt(job)
        environment, grace = engine_environment(job, os.environ), settings.supervision.grace
        return run_attempt(build(job), environment, job.folder, requests, grace, remote=bool(job.hosts))

    def newest_checkpoint() -> str | None:
        with contextlib.suppress(OSError):
            return (settings.output / "checkpoints" / "latest").read_text()
        return None

    return supervise(attempt, settings.supervision.restarts, requests, folder / "attempts.jsonl", newest_checkpoint)


def _job_of_attempt(settings: LaunchSettings, hosts: tuple[Host, ...], folder: Path, first: bool, requests: StopRequest) -> Job:
    """The job on the hosts that answer now; with fewer ranks the global batch stays and the micro-batch follows."""
    if first or not hosts:
        return job_of(settings, hosts, folder)
    alive = _wait_for(settings, hosts, requests)
    if len(alive) == len(hosts):
        return job_of(settings, hosts, folder)
    slots = sum(host.slots for host in alive)
    if settings.training.micro_tokens is not None:  # tokens divide over any number of ranks
        print(f"launch: going on with {len(alive)} of {len(hosts)} hosts, {slots} ranks", flush=True)
        return job_of(settings, reduced(alive, slots), folder)
    ranks, micro = fit_batch(settings.training.global_batch, settings.training.micro_batch, slots)
    print(f"launch: going on with {len(alive)} of {len(hosts)} hosts, {ranks} ranks, micro-batch {micro}", flush=True)
    arguments = (*settings.arguments, "--training.micro_batch", str(micro))
    return job_of(replace(settings, arguments=arguments), reduced(alive, ranks), folder)


def _wait_for(settings: LaunchSettings, hosts: tuple[Host, ...], requests: StopRequest) -> tuple[Host, ...]:
    """The hosts that answer, at least ``min_nodes`` (default: all); ``UsageError`` where they stay away for ten minutes."""
    least = settings.supervision.min_nodes or len(hosts)
    deadline = time.monotonic() + WAIT_FOR_HOSTS
    while True:
        alive, missing = _answers(settings, hosts)
        if len(alive) >= least or requests.count:
            return alive
        if time.monotonic() > deadline:
            raise UsageError(f"{told(missing)} did not answer for {WAIT_FOR_HOSTS / 60:.0f} minutes, and --min-nodes is {least}")
        print(f"launch: waiting for {told(missing)}", flush=True)
        time.sleep(10)


def _answers(settings: LaunchSettings, hosts: tuple[Host, ...]) -> tuple[tuple[Host, ...], dict[str, str]]:
    """The hosts that answer over ssh, in Slurm those that it calls usable now; and what is said of the others, by their names."""
    if settings.request is None:
        missing = silent(hosts)
        return tuple(host for host in hosts if host.name not in missing), missing
    usable = hosts_of(settings)
    names = {host.name for host in usable}
    return usable, {host.name: "Slurm calls it down" for host in hosts if host.name not in names}


def _require_answers(hosts: tuple[Host, ...], least: int) -> None:
    """``UsageError`` naming the hosts that ssh does not reach where fewer than ``least`` answer, instead of the engine's traceback."""
    missing = silent(hosts)
    if len(hosts) - len(missing) < least:
        raise UsageError(f"no answer over ssh from {told(missing)}: {advice(missing)}, or --exclude {'@'.join(missing)}")


def _submit(settings: LaunchSettings, request: slurm.SlurmRequest, own_words: tuple[str, ...], folder: Path, dry_run: bool) -> None:
    check_arguments(own_words, remote=False)
    check_environment(settings.placement.env, remote=True)
    text = slurm.sbatch_file(request, _without_dry_run(own_words), folder, Path.cwd())
    check_portions(settings.training, request.nodes * request.processes)
    slurm.parse_sbatch(text)
    if dry_run:
        print(text)
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "job.sbatch"
    write_atomically(path, text)
    try:
        number = slurm.submit(path)
    except UsageError as error:
        raise UsageError(f"{error}; nothing was submitted: the batch file is {path}, and --dry-run prints it alone") from None
    print(f"launch: submitted as job {number}; its log: {folder}/slurm-JOB.log")


def _without_dry_run(own_words: tuple[str, ...]) -> tuple[str, ...]:
    """The launch command of the job itself: what was typed to have it printed first would have it print once more."""
    end = own_words.index("--") if "--" in own_words else len(own_words)
    return (*(word for word in own_words[:end] if word != "--dry-run"), *own_words[end:])
