"""Hostfiles: ``host slots=8`` per line, as DeepSpeed and MPI read them, but strict, because every name ends in an ssh command."""

import os
import re
import stat
from dataclasses import dataclass, replace
from pathlib import Path

from megainter.errors import UsageError
from megainter.paths import did_you_mean

# No leading dash: ssh would take such a "host" for an option and run what it says.
HOST = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,252}[A-Za-z0-9])?")
LINE = re.compile(rf"(?P<host>{HOST.pattern})[ \t]+slots=(?P<slots>[1-9][0-9]{{0,3}})")
DEVICES = re.compile(r"[0-9]{1,4}(?:,[0-9]{1,4})*")
LARGEST = 1 << 20  # bytes
MOST_SLOTS = 1024


@dataclass(frozen=True)
class Host:
    """A machine and the numbers of those of its devices that the job uses; one process runs on each."""

    name: str
    devices: tuple[int, ...]

    @property
    def slots(self) -> int:
        """Processes on this host."""
        return len(self.devices)


def read_hostfile(path: Path) -> tuple[Host, ...]:
    """The hosts of a file that nobody else could have changed.

    ``UsageError`` with file and line for anything but comments, blank lines and ``host slots=N``; for a file that group or others may
    write, or that belongs to another user: its names are handed to ssh.
    """
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            _refuse_foreign(path, os.fstat(file.fileno()))
            content = file.read(LARGEST + 1)
    except OSError as error:
        raise UsageError(f"hostfile {path} cannot be read: {error.strerror}{did_you_mean(path)}") from None
    except ValueError:
        raise UsageError(f"hostfile {str(path)!r} is not a file name") from None
    if len(content) > LARGEST:
        raise UsageError(f"hostfile {path} is larger than {LARGEST} bytes")
    return parse_hostfile(content, str(path))


def _refuse_foreign(path: Path, facts: os.stat_result) -> None:
    if not stat.S_ISREG(facts.st_mode):
        raise UsageError(f"hostfile {path} is not a regular file")
    if facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise UsageError(f"hostfile {path} can be written by others; take it back with: chmod go-w {path}")
    if facts.st_uid not in (os.getuid(), 0):
        raise UsageError(f"hostfile {path} belongs to user number {facts.st_uid}; use a copy of your own")


def parse_hostfile(content: bytes, where: str) -> tuple[Host, ...]:
    """Hosts in the order of their lines; ``where`` names the file in errors."""
    hosts: dict[str, Host] = {}
    for number, raw in enumerate(content.split(b"\n"), start=1):
        line = raw.partition(b"#")[0].strip(b" \t")
        if not line:
            continue
        if raw.endswith(b"\r"):
            raise UsageError(f"{where}, line {number} ends as on Windows; take the carriage returns out: sed -i 's/\\r$//' {where}")
        found = LINE.fullmatch(line.decode("latin-1"))
        if found is None or not 0 < int(found["slots"]) <= MOST_SLOTS:
            form = "host slots=8 (a user or port: ~/.ssh/config)"
            raise UsageError(f"{where}, line {number}: {raw[:80].decode('latin-1')!r} is not of the form: {form}")
        if found["host"] in hosts:
            raise UsageError(f"{where}, line {number}: host {found['host']} stands there twice")
        hosts[found["host"]] = Host(found["host"], tuple(range(int(found["slots"]))))
    if not hosts:
        raise UsageError(f"hostfile {where} names no host")
    return tuple(hosts.values())


def select(hosts: tuple[Host, ...], include: str, exclude: str) -> tuple[Host, ...]:
    """DeepSpeed's filters: ``include`` "a@b:0,2" keeps host a and two devices of b; ``exclude`` drops hosts or devices."""
    if include and exclude:
        raise UsageError("give --include or --exclude, not both")
    if include:
        wanted = _filter("--include", include, hosts)
        kept = tuple(replace(host, devices=wanted[host.name] or host.devices) for host in hosts if host.name in wanted)
    else:
        unwanted = _filter("--exclude", exclude, hosts) if exclude else {}
        kept = tuple(_without(host, unwanted) for host in hosts)
    kept = tuple(host for host in kept if host.devices)
    if not kept:
        raise UsageError("the filters leave no host")
    return kept


def _without(host: Host, unwanted: dict[str, tuple[int, ...]]) -> Host:
    if host.name not in unwanted:
        return host
    dropped = unwanted[host.name] or host.devices
    return replace(host, devices=tuple(device for device in host.devices if device not in dropped))


def _filter(option: str, text: str, hosts: tuple[Host, ...]) -> dict[str, tuple[int, ...]]:
    """Device numbers by host; none given means all of that host."""
    known = {host.name: host for host in hosts}
    chosen: dict[str, tuple[int, ...]] = {}
    for part in text.split("@"):
        name, colon, devices = part.partition(":")
        if HOST.fullmatch(name) is None or (colon and DEVICES.fullmatch(devices) is None):
            raise UsageError(f"{option} {text!r} is not of the form: host or host:0,2, joined by @")
        if name not in known:
            raise UsageError(f"{option}: host {name} is not in the hostfile")
        numbers = tuple(sorted({int(device) for device in devices.split(",")})) if colon else ()
        missing = set(numbers) - set(known[name].devices)
        if missing:
            raise UsageError(f"{option}: host {name} has no device {min(missing)}, it has {known[name].slots} slots")
        chosen[name] = numbers
    return chosen


def format_hostfile(hosts: tuple[Host, ...]) -> str:
    """The hosts as a hostfile that every engine reads; the largest device number decides the slots."""
    return "".join(f"{host.name} slots={max(host.devices) + 1}\n" for host in hosts)
