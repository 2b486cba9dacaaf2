"""Slurm: the batch file of a job, and the hosts of an allocation. The batch file runs this same launcher inside the allocation."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.hostfile import HOST, Host
from megainter.errors import UsageError

TIME = re.compile(r"(?:[0-9]{1,3}-)?[0-9]{1,3}(?::[0-9]{2}){0,2}")
WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.,:=+-]{0,127}")
GRES = re.compile(r"[A-Za-z][A-Za-z0-9_]*(?::[A-Za-z0-9_.-]+){0,2}(?:,[A-Za-z][A-Za-z0-9_]*(?::[A-Za-z0-9_.-]+){0,2})*")
MEMORY = re.compile(r"[0-9]{1,9}[KMGT]?")
CONSTRAINT = re.compile(r"[A-Za-z0-9\[(][A-Za-z0-9_.|&*()\[\]:-]{0,127}")
MODULE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_./+-]{0,127}")
DIRECTIVE = re.compile(r"#SBATCH --([a-z-]+)(?:=(\S+))?")
FORMS = {"partition": WORD, "account": WORD, "qos": WORD, "gres": GRES, "mem": MEMORY, "constraint": CONSTRAINT}
EXAMPLES = {"gres": "; give gpu:8 or gpu:a100:8", "mem": ", a size of memory; give 200G, or 0 for all of a node"}
ASKED = ("partition", "account", "qos", "gres", "mem", "cpus_per_task", "constraint")
WARNING_SECONDS = 300  # before its time limit, Slurm tells the job to save


@dataclass(frozen=True)
class SlurmRequest:
    """What is asked of Slurm: ``nodes`` with ``processes`` ranks each, for ``time`` (days-hours:minutes:seconds)."""

    nodes: int
    processes: int
    time: str
    min_nodes: int | None = None
    partition: str | None = None
    account: str | None = None
    gpus: bool = True  # one per rank; ``gres`` takes its place where it names them
    gres: str | None = None  # of each node, as "gpu:a100:8"
    mem: str | None = None  # of each node; "0" is all of it
    cpus_per_task: int | None = None
    qos: str | None = None
    constraint: str | None = None
    modules: tuple[str, ...] = ()  # loaded before anything runs


def sbatch_file(request: SlurmRequest, launch: Sequence[str], folder: Path, cwd: Path) -> str:
    """The text of the batch file. ``launch``: the words of the launch command to run inside; ``folder``: where its log goes.

    Slurm sends SIGUSR1 to the launcher ahead of the time limit; the run saves, ends with 75, and the launcher puts the job back in line.
    """
    _check(request)
    least = request.min_nodes or request.nodes
    directives = {
        "job-name": "megainter",
        "nodes": str(request.nodes) if least == request.nodes else f"{least}-{request.nodes}",
        "ntasks-per-node": str(request.processes),
        "time": request.time,
        "signal": f"B:USR1@{WARNING_SECONDS}",
        "open-mode": "append",
        "output": f"{_plain(folder)}/slurm-%j.log",
        "chdir": _plain(cwd),
    }
    directives |= {name.replace("_", "-"): str(value) for name in ASKED if (value := getattr(request, name)) is not None}
    if request.gpus and not _gpus_in(request.gres):
        directives["gpus-per-node"] = str(request.processes)
    lines = [f"#SBATCH --{name}={value}" for name, value in directives.items()]
    flags = ["#SBATCH --requeue", *(["#SBATCH --no-kill"] if least < request.nodes else [])]
    shell = "#!/bin/bash -l" if request.modules else "#!/bin/bash"  # a login shell knows `module`
    start = [f"module load {shlex.join(request.modules)} || exit 2"] if request.modules else []
    if request.cpus_per_task is not None:
        start.append(f"export SRUN_CPUS_PER_TASK={request.cpus_per_task}")  # since Slurm 22.05 srun does not take it over from sbatch
    return "\n".join([shell, *lines, *flags, "", *start, f"exec {shlex.join([sys.executable, '-m', 'megainter', *launch])}", ""])


def _gpus_in(gres: str | None) -> list[int]:
    """How many GPUs each part of a --gres asks for that names them: "gpu:a100:4,lscratch:200" is [4]; one where no number is given."""
    parts = [part.split(":") for part in (gres or "").split(",")]
    return [int(words[-1]) if words[-1].isdecimal() else 1 for words in parts if words[0] == "gpu"]


def _check(request: SlurmRequest) -> None:
    if TIME.fullmatch(request.time) is None:
        raise UsageError(f"--time {request.time!a} is not of the form days-hours:minutes:seconds")
    for name, form in FORMS.items():
        value = getattr(request, name)
        if value is not None and form.fullmatch(value) is None:
            raise UsageError(f"--{name} {value[:200]!a} is not a Slurm name" + EXAMPLES.get(name, ""))
    for name in request.modules:
        if MODULE.fullmatch(name) is None:
            raise UsageError(f"--module {name[:200]!a} is not the name of a module, such as cuda/12.8")
    if request.cpus_per_task is not None and not 1 <= request.cpus_per_task <= 4096:
        raise UsageError(f"--cpus-per-task is {request.cpus_per_task}; give 1 to 4096")
    counts = _gpus_in(request.gres)
    if counts and sum(counts) < request.processes and request.gpus:
        raise UsageError(f"--gres {request.gres} gives {sum(counts)} GPUs to the {request.processes} processes of a node; make them agree")
    if not 1 <= (request.min_nodes or request.nodes) <= request.nodes or request.processes < 1:
        raise UsageError("nodes, processes and min-nodes must be at least 1, and min-nodes no more than nodes")


def _plain(path: Path) -> str:
    """A path that a #SBATCH line takes literally."""
    text = str(path.resolve())
    if re.fullmatch(r"[A-Za-z0-9_./:,=@+~-]+", text) is None:
        raise UsageError(f"path {text!a} cannot stand in an sbatch file; use letters, digits and _./:,=@+~- only")
    return text


def parse_sbatch(text: str) -> dict[str, str]:
    """The directives of a batch file by name, "" for flags; ``UsageError`` for a #SBATCH line that Slurm would not understand."""
    found = {}
    for line in text.splitlines():
        if line.startswith("#SBATCH"):
            directive = DIRECTIVE.fullmatch(line)
            if directive is None:
                raise UsageError(f"line {line!a} is not of the form: #SBATCH --name=value")
            found[directive[1]] = directive[2] or ""
    return found


def submit(path: Path) -> str:
    """Hand the batch file to Slurm; returns the job's number."""
    answer = _ask("sbatch", "--parsable", str(path))
    return answer.strip().partition(";")[0]


def requeue() -> None:
    """Put the job this runs in back in line, to go on after its time limit or its pre-emption."""
    _ask("scontrol", "requeue", os.environ["SLURM_JOB_ID"])


def allocated_hosts(environment: Mapping[str, str], processes: int) -> tuple[Host, ...]:
    """The hosts of the allocation this runs in that Slurm calls usable, ``processes`` ranks on each."""
    nodes = environment.get("SLURM_JOB_NODELIST", "")
    names = _ask("scontrol", "show", "hostnames", nodes).split()
    down = set(_ask("sinfo", "--noheader", "--Node", f"--nodes={nodes}", "--states=down,drain,fail,no_respond", "--format=%N").split())
    for name in names:
        if HOST.fullmatch(name) is None:
            raise UsageError(f"Slurm names a host {name!a}, which is not a host name")
    return tuple(Host(name, tuple(range(processes))) for name in names if name not in down)


def _ask(*words: str) -> str:
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    except FileNotFoundError:
        raise UsageError(f"{words[0]} is not installed here; --slurm needs Slurm's client programs") from None
    except subprocess.TimeoutExpired:
        raise UsageError(f"{words[0]} did not answer within 60 s") from None
    if done.returncode:
        raise UsageError(f"{words[0]} refused: {' '.join(done.stderr.split()) or f'exit code {done.returncode}'}")
    return done.stdout
