"""Before a long run: numbered checks of settings, hosts, data, memory, disk and network, each with what to do where it fails."""

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from launcher.command import Job, build
from launcher.hostfile import Host
from launcher.launch import LaunchSettings, engine_environment, hosts_of, job_of, write_attempt
from launcher.planning.device_memory import Layout, checkpoint_bytes, memory
from launcher.planning.shape import Shape, largest_load, shape_of
from launcher.reach import advice, silent, told
from megainter.config.settings import RunConfig
from megainter.errors import MegainterError
from megainter.precision import Precision, Units, automatic_in_training, cpu_units
from megainter.progress import shown_time

HOSTS, VERSIONS, ENGINE = "hosts", "versions", "settings and DeepSpeed configuration"  # names of checks that others need
PROBE = "megainter.preflight_probe"
MARK = "megainter-probe: "
SLOW_DISK = 50e6  # bytes/s of a synced write below which checkpoints would hurt
UNKNOWN_SHARE = 0.2  # of tokens that the vocabulary does not know: it is another language's
WRITTEN = 64 * 2**20  # bytes, to time the disk


@dataclass(frozen=True)
class Check:
    """One line of the list: what was looked at, what was found, and for a failure the exit code it ends with, and what to do.

    ``remedy`` is empty where ``found`` says that already. ``skipped``: nothing was looked at, as something failed that it needs; that
    decides the exit code, and not this.
    """

    name: str
    passed: bool
    found: str
    remedy: str = ""
    code: int = 2
    skipped: bool = False


class PreflightFailedError(MegainterError):
    """At least one check failed; the exit code is the first one's."""

    def __init__(self, failed: list[Check]) -> None:
        names = ", ".join(check.name for check in failed)
        super().__init__(f"preflight: {len(failed)} of the checks failed: {names}; the lines above say what to do")
        self.exit_code = failed[0].code


@dataclass(frozen=True)
class Facts:
    """What the checks work on: the run, its ranks, and what the probe said on each host ("" is this machine) that gave an answer.

    ``replies`` are those of all hosts that were asked, errors among them; ``local`` is what the probe said on this machine where no
    host gave an answer.
    """

    config: RunConfig
    settings: LaunchSettings
    hosts: tuple[Host, ...]
    job: Job
    folder: Path
    replies: dict[str, dict[str, Any]]
    local: dict[str, Any] = field(default_factory=dict)

    @property
    def answers(self) -> dict[str, dict[str, Any]]:
        """The replies of hosts on which the probe ran."""
        return {name: reply for name, reply in self.replies.items() if reply and "error" not in reply.get("versions", {"error": ""})}

    @property
    def here(self) -> dict[str, Any]:
        """The first host's answer; this machine's where no host gave one."""
        return next(iter(self.answers.values()), self.local)

    def part(self, name: str) -> dict[str, Any]:
        """One part of that answer; ``{"error": ...}`` where there is none."""
        return self.here.get(name, {"error": "the probe gave no answer", "code": 1})


def preflight(config: RunConfig, settings: LaunchSettings, dry_run_step: bool = True) -> list[Check]:
    """Run all checks, printing each as it is done."""
    hosts = hosts_of(settings)
    done = []
    with _place_of_its_own(settings.output) as folder:
        job = job_of(settings, hosts, folder)
        missing = silent(hosts)
        reachable = tuple(host for host in hosts if host.name not in missing)
        facts = Facts(config=config, settings=settings, hosts=hosts, job=job, folder=folder, replies=_ask_all(reachable, settings, job))
        if not facts.answers:
            facts = replace(facts, local=_ask_here(settings, job))
        for number, check in enumerate(_checks(facts, missing, dry_run_step), start=1):
            _print(number, check)
            done.append(check)
    return done


@contextlib.contextmanager
def _place_of_its_own(output: Path) -> Iterator[Path]:
    """An empty folder in the run's, gone afterwards with all folders that were made for it."""
    folder = (output / "preflight").resolve()
    shutil.rmtree(folder, ignore_errors=True)
    made = [parent for parent in folder.parents if not parent.exists()]
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # something else stands there by now
            for parent in made:
                parent.rmdir()


def require_passed(checks: list[Check]) -> None:
    """``PreflightFailedError`` where some failed."""
    if failed := [check for check in checks if not check.passed]:
        raise PreflightFailedError(failed)


def _print(number: int, check: Check) -> None:
    marks = ("\u2713", "\u2717", "-") if (sys.stdout.encoding or "").lower().startswith("utf") else ("ok", "FAILED", "-")
    mark = marks[2] if check.skipped else marks[0] if check.passed else marks[1]
    print(f"{number:2} {mark} {check.name}: {check.found}", flush=True)
    if not check.passed and check.remedy:
        print(f"     -> {check.remedy}", flush=True)


def _checks(facts: Facts, missing: dict[str, str], dry_run_step: bool) -> Iterator[Check]:
    """The whole list; what needs something that failed is skipped. ``missing``: ssh's words on the hosts that did not answer."""
    done = _Done()
    if facts.hosts:
        yield done(hosts_check(facts.hosts, missing))
    replied = () if facts.replies else (HOSTS,)  # where some answered, these are looked at
    yield done.after(replied, VERSIONS, lambda: versions_check({name: reply.get("versions", {}) for name, reply in facts.replies.items()}))

    # What the probe says: of hosts' devices nothing is known where none answered; settings and data are then looked at here.
    answered = () if facts.answers else (HOSTS, VERSIONS)
    data = {name: answer.get("data", {}) for name, answer in (facts.answers or {"": facts.local}).items()}
    yield done(_where_looked(facts, engine_check(facts.part("engine"), facts.config.training.micro_tokens)))
    yield done.after(answered, "devices", lambda: devices_check(facts))
    yield done(_if_here(facts, data_check(data)))
    yield done.after(("data",), "vocabulary", lambda: _if_here(facts, vocabulary_check(facts.part("vocabulary"))))
    shape = _shape(facts)
    yield done.after((*answered, "devices"), "memory", lambda: memory_check(facts, shape))
    yield from disk_checks(facts.folder, (facts.config.checkpoint.keep + 1) * checkpoint_bytes(shape))

    # What all ranks do together.
    everybody = (HOSTS, *(() if len(facts.answers) == len(facts.replies) else (VERSIONS,)))
    yield done.after(everybody, "all-reduce", lambda: collective_check(facts))
    if not dry_run_step:
        return
    needed = (*everybody, ENGINE, "devices", "data", "vocabulary", "all-reduce")
    if blocked := done.blocked(needed):
        yield blocked("three steps")
    else:
        yield from step_checks(facts)


def _where_looked(facts: Facts, check: Check) -> Check:
    """``check``, which tells where it looked if no host answered."""
    return check if facts.answers else replace(check, found=f"{check.found} (looked at on this machine, as no host answered)")


def _if_here(facts: Facts, check: Check) -> Check:
    """``check`` of what hosts alone may have: where none answered and this machine lacks it, nothing is known."""
    if facts.answers or check.passed:
        return _where_looked(facts, check)
    return Check(check.name, True, f"skipped, as no host answered and this machine cannot tell: {check.found}", skipped=True)


class _Done:
    """Which checks failed, for those that need them."""

    def __init__(self) -> None:
        self.failed: list[str] = []

    def __call__(self, check: Check) -> Check:
        """``check``, remembered."""
        self.failed += [] if check.passed else [check.name]
        return check

    def blocked(self, needs: Sequence[str]) -> Callable[[str], Check] | None:
        """What makes the line of a check that is skipped; None where nothing failed that it needs."""
        causes = [name for name in self.failed if name in needs]
        if not causes:
            return None
        return lambda name: Check(name, True, f"skipped, as it needs {causes[0]}", skipped=True)

    def after(self, needs: Sequence[str], name: str, make: Callable[[], Check]) -> Check:
        """The check that ``make`` does, unless one that it needs failed."""
        blocked = self.blocked(needs)
        return blocked(name) if blocked else self(make())


def engine_check(answer: dict[str, Any], micro_tokens: int | None = None) -> Check:
    """Settings and the DeepSpeed JSON agree, and DeepSpeed knows every key."""
    if "error" in answer:
        return Check(ENGINE, False, answer["error"], code=answer["code"])
    batch, micro, times = (answer[name] for name in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"))
    portion = f"{batch} = {micro} x {times} x ranks" if micro_tokens is None else f"micro-batches of at most {micro_tokens:,} tokens"
    return Check(ENGINE, True, f"ZeRO stage {answer['zero_optimization']['stage']}, {portion}")


def hosts_check(hosts: tuple[Host, ...], missing: dict[str, str]) -> Check:
    """Every host runs a command over ssh without a question; ``missing``: ssh's words by the names of those that did not."""
    found = f"{len(hosts) - len(missing)} of {len(hosts)} answer" + (f"; not {told(missing)}" if missing else "")
    return Check(HOSTS, not missing, found, advice(missing))


def versions_check(versions: dict[str, dict[str, str]]) -> Check:
    """Python, packages and commit are the same everywhere."""
    name = VERSIONS
    broken = [f"{host or 'here'}: {found.get('error', 'no answer')}" for host, found in versions.items() if not found or "error" in found]
    if broken or not versions:
        return Check(name, False, "; ".join(broken) or "no host answered", "install the same environment on every host")
    first_host, first = next(iter(versions.items()))
    unlike = [
        f"{package} {first.get(package)} on {first_host or 'here'}, {found.get(package)} on {host}"
        for host, found in versions.items()
        for package in first
        if found.get(package) != first[package]
    ]
    told = ", ".join(f"{package} {first[package]}" for package in ("python", "torch", "deepspeed") if package in first)
    return Check(name, not unlike, "; ".join(unlike) or told, "install the same versions on every host (constraints.txt)")


def devices_check(facts: Facts) -> Check:
    """Each host has a device for every rank; on the CPU there is nothing to count."""
    name, short, told = "devices", [], []
    for host, answer in facts.answers.items():
        devices = answer.get("devices", {})
        if "names" not in devices:
            return Check(name, False, devices.get("error", "no answer"), "look at nvidia-smi on that host", 1)
        wanted = next((other.slots for other in facts.hosts if other.name == host), facts.job.processes)
        told.append(f"{len(devices['names'])} x {devices['names'][0]}" if devices["names"] else f"CPU, {devices['cores']} cores")
        if devices["names"] and len(devices["names"]) < wanted:
            short.append(f"{host or 'here'} has {len(devices['names'])} devices for {wanted} ranks")
    return Check(name, not short, "; ".join(short) or ", ".join(sorted(set(told))), "lower the slots, or --processes")


def data_check(answers: dict[str, dict[str, Any]]) -> Check:
    """Captions and features are there on every host, and have the same digests."""
    name = "data"
    for host, answer in answers.items():
        if "store" not in answer:
            words, code = answer.get("error", "no answer"), answer.get("code", 2)
            if not host:  # on this machine the words say all
                return Check(name, False, words, code=code)
            return Check(name, False, f"{words} on {host}", "mount the data there under the same path", code)
    if not answers:
        return Check(name, False, "no host answered")
    digests = {(answer["pairs"], answer["store"]) for answer in answers.values()}
    first = next(iter(answers.values()))
    found = f"{first['captions']:,} captions, {first['images']:,} images, store {first['store'][:12]}"
    return Check(
        name, len(digests) == 1, found if len(digests) == 1 else "digests differ between hosts", "copy the same files everywhere", 4
    )


def vocabulary_check(answer: dict[str, Any]) -> Check:
    """Captions survive encoding and decoding, and the vocabulary knows their words."""
    name = "vocabulary"
    if "error" in answer:
        return Check(name, False, answer["error"], "see data.vocabulary", answer["code"])
    good = answer["changed"] == 0 and answer["unknown"] <= UNKNOWN_SHARE
    found = (
        f"{answer['size']:,} entries, {answer['mean_tokens']:.1f} tokens a caption, {answer['unknown']:.1%} unknown, "
        f"{answer['changed']} of {answer['captions']} captions change in a round trip"
    )
    return Check(name, good, found, "give the vocabulary of the captions' language (data.vocabulary), and see data.lowercase")


def _shape(facts: Facts) -> Shape:
    data, vocabulary = facts.part("data"), facts.part("vocabulary")
    return shape_of(facts.config, vocabulary.get("size"), data.get("feature_size"), data.get("num_classes"))


def _precision(facts: Facts) -> Precision:
    """The run's, or what "auto" stands for on the devices of all hosts that answered."""
    engine = facts.config.engine
    if engine.precision != "auto":
        return engine.precision
    told = [each for answer in facts.answers.values() for each in answer.get("devices", {}).get("units", [])]
    units = [Units(each["name"], frozenset(each["computes"])) for each in told] or [cpu_units("")]
    return automatic_in_training(units, engine.zero_stage, engine.deepspeed)[0]


def memory_check(facts: Facts, shape: Shape) -> Check:
    """The plan's estimate fits the smallest device (or this machine's free memory, shared by its ranks)."""
    engine, devices = facts.config.engine, facts.part("devices")
    on_cpu = not devices.get("names")
    precision = _precision(facts)
    layout = Layout(engine.zero_stage, facts.job.world_size, precision, engine.offload_optimizer, facts.config.model.gradient_checkpointing)
    need = memory(shape, largest_load(facts.config, facts.job.world_size), layout, cpu=on_cpu).device
    room = devices.get("host_memory_free", 0) / max(facts.job.processes, 1) if on_cpu else min(devices["memory"])
    found = f"{need / 2**30:.2f} GiB a rank by estimate, in {precision}, {room / 2**30:.1f} GiB there"
    portion = "micro_batch" if facts.config.training.micro_tokens is None else "micro_tokens"
    remedy = f"lower training.{portion}, raise engine.zero_stage, or set model.gradient_checkpointing; `megainter plan` compares them"
    return Check("memory", need <= room, found, remedy)


def disk_checks(folder: Path, need: float) -> Iterator[Check]:
    """Room for the checkpoints that are kept and the one being written; the speed of a synced write."""
    free = shutil.disk_usage(folder).free
    found = f"{free / 1e9:.1f} GB free, checkpoints take {need / 1e9:.1f} GB"
    yield Check("disk space", free > need, found, "free space, lower checkpoint.keep, or choose another output", 5)
    try:
        speed = _write_speed(folder / "speed")
    except OSError as error:
        yield Check("disk speed", False, f"cannot write: {error.strerror}", "choose another output", 5)
        return
    yield Check("disk speed", speed > SLOW_DISK, f"{speed / 1e6:.0f} MB/s", "a checkpoint stalls training: use a faster disk for output", 5)


def _write_speed(path: Path) -> float:
    block = os.urandom(2**20)
    start = time.perf_counter()
    with open(path, "wb") as file:
        for _ in range(WRITTEN // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    path.unlink()
    return WRITTEN / seconds


def collective_check(facts: Facts) -> Check:
    """All ranks meet, add up right, and how fast."""
    answer = facts.folder / "collective.json"
    job = replace(facts.job, arguments=("collective", str(answer)), module=PROBE, port=facts.job.port + 1)
    remedy = "see whether ranks reach --master-addr (firewall, NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME)"
    ended = _run(job, facts.folder / "collective.log", seconds=300)
    if ended or not answer.exists():
        return Check(
            "all-reduce", False, f"{facts.job.world_size} ranks did not meet ({_last_line(facts.folder / 'collective.log')})", remedy, 1
        )
    found = json.loads(answer.read_text())
    told = f"{found['ranks']} ranks over {found['backend']}, {found['gigabytes_per_second']:.2f} GB/s"
    told = f"1 rank, over {found['backend']}" if found["ranks"] == 1 else told
    return Check("all-reduce", found["right"], told if found["right"] else f"{told}, but a WRONG sum", remedy, 1)


def step_checks(facts: Facts) -> Iterator[Check]:
    """Two steps of the run itself in a folder of their own, and the time an epoch takes at their pace."""
    run = facts.folder / "run"
    short = {
        "output": run, "training.steps": 3, "training.log_every": 1, "validation.every_steps": 0, "validation.samples": 1,
        "checkpoint.every_steps": 1000, "tensorboard": "false", "tracking": "none",
    }  # fmt: skip
    words = [word for key, value in short.items() for word in (f"--{key}", str(value))]
    job = replace(facts.job, arguments=(*facts.settings.arguments, *words), port=facts.job.port + 2)
    ended = _run(job, facts.folder / "steps.log", seconds=1800)
    if ended:
        yield Check("three steps", False, _last_line(facts.folder / "steps.log"), code=1)
        return
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seconds = min(record["step_seconds"] for record in records if record["kind"] == "train")
    yield Check("three steps", True, f"loss {records[0]['loss']:.3f}, {seconds:.2f} s a step, checkpoint written")
    samples = facts.part("data").get("captions", 0)
    epoch = samples / facts.config.training.global_batch * seconds
    yield Check("time", True, f"{shown_time(epoch)} an epoch of {samples:,} captions at this pace")


def _run(job: Job, log: Path, seconds: float) -> int:
    """The exit code of a job that is killed, with all of it, after ``seconds``; its output goes to ``log``."""
    write_attempt(job)
    with open(log, "wb") as file:
        child = subprocess.Popen(
            build(job), env=engine_environment(job, os.environ), stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
        )
        try:
            return child.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return 1
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    told = [line for line in lines if line.startswith("megainter:")] or [line for line in lines if "Error" in line] or lines
    return told[-1].strip()[:300] if told else "no output"


def _ask_all(hosts: tuple[Host, ...], settings: LaunchSettings, job: Job) -> dict[str, dict[str, Any]]:
    """The probe's answers by host name, asked at the same time; "" is this machine, asked where there is no hostfile."""
    words = _probe(settings)
    if not hosts:
        return {} if job.hosts else {"": _ask_here(settings, job)}
    told = {**job.environment, **_ranks(job)}
    environment = [f"{name}={value}" for name, value in told.items() if not name.startswith("MEGAINTER_PULSE")]
    inner = f"cd {shlex.quote(os.getcwd())} && {shlex.join(['env', *environment, *words])}"

    def ask(host: Host) -> dict[str, Any]:
        return _answer(["ssh", "-o", "BatchMode=yes", "--", host.name, inner], dict(os.environ))

    with ThreadPoolExecutor(max_workers=min(len(hosts), 64)) as pool:
        return dict(zip((host.name for host in hosts), pool.map(ask, hosts), strict=True))


def _ask_here(settings: LaunchSettings, job: Job) -> dict[str, Any]:
    """The probe's answer on this machine."""
    return _answer(_probe(settings), dict(os.environ) | _ranks(job))


def _probe(settings: LaunchSettings) -> list[str]:
    return [sys.executable, "-m", PROBE, "host", *settings.arguments]


def _ranks(job: Job) -> dict[str, str]:
    """The world size, told to the probe by its environment."""
    return {"MEGAINTER_PREFLIGHT_RANKS": str(job.world_size)}


def _answer(words: list[str], environment: dict[str, str], seconds: float = 300) -> dict[str, Any]:
    try:
        done = subprocess.run(
            words, env=environment, capture_output=True, text=True, check=False, timeout=seconds, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        return {}
    line = next((line for line in done.stdout.splitlines() if line.startswith(MARK)), None)
    if line is None:
        text = (done.stderr.strip().splitlines() or ["no answer"])[-1]
        return {part: {"error": text, "code": 1} for part in ("versions", "devices", "data", "vocabulary", "engine")}
    return json.loads(line[len(MARK) :])
