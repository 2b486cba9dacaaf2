"""Which hosts answer over ssh without a question, what ssh said of those that do not, and what helps."""

import contextlib
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import IO

from launcher.hostfile import Host

OPTIONS = ("-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=yes")
LONGEST = 200  # characters of what ssh said
SHOWN = 3  # silent hosts whose words are shown

# What helps, by what ssh's words hold in lower case; the first that fits.
ADVICE = (
    (("could not resolve", "not known", "no address associated"),
     "correct the name in the hostfile, or make it known: /etc/hosts, or HostName in ~/.ssh/config"),
    (("connection refused",), "start sshd on {host}, or give its port in ~/.ssh/config"),
    (("timed out", "no answer within", "no route to host", "unreachable"),
     "see that {host} is up and that no firewall stands between: `ssh {host} true`"),
    (("permission denied", "too many authentication failures"), "set up a key without a passphrase: ssh-copy-id {host}"),
    (("host key verification failed", "identification has changed"),
     "accept its key once: `ssh {host} true` (a changed one after `ssh-keygen -R {host}`)"),
    (("not installed",), "install an ssh client (Debian: openssh-client)"),
)  # fmt: skip
OTHERWISE = "see what `ssh {host} true` says"


def silent(hosts: Sequence[Host], seconds: int = 10) -> dict[str, str]:
    """The last words of ssh by the name of each host on which it runs no command without asking; {} where all answer.

    All are asked at the same time; ``seconds`` to connect, and as many again to run.
    """
    with contextlib.ExitStack() as stack:
        logs = [stack.enter_context(tempfile.TemporaryFile()) for _ in hosts]  # a pipe that nobody reads would fill up
        try:
            probes = [_ask(host, log, seconds) for host, log in zip(hosts, logs, strict=True)]
        except FileNotFoundError:
            return {host.name: "ssh is not installed here" for host in hosts}
        deadline = time.monotonic() + 2 * seconds
        for probe in probes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                probe.wait(timeout=max(deadline - time.monotonic(), 0.1))
        return {
            host.name: words
            for host, probe, log in zip(hosts, probes, logs, strict=True)
            if (words := _last_words(probe, log, 2 * seconds)) is not None
        }


def _ask(host: Host, log: IO[bytes], seconds: int) -> subprocess.Popen[bytes]:
    words = ["ssh", *OPTIONS, "-o", f"ConnectTimeout={seconds}", "--", host.name, "true"]
    return subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log)


def _last_words(probe: subprocess.Popen[bytes], log: IO[bytes], seconds: int) -> str | None:
    """None where the command ran; else ssh's last line, on one line of printable characters. One that goes on is killed."""
    if probe.returncode == 0:
        return None
    if probe.returncode is None:
        probe.kill()
        probe.wait()
        return f"no answer within {seconds} s"
    log.seek(0)
    lines = [line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    last = lines[-1] if lines else f"ssh said nothing and ended with {probe.returncode}"
    return "".join(character if character.isprintable() else " " for character in last)[:LONGEST]


def told(silent: Mapping[str, str]) -> str:
    """The silent hosts with ssh's words on the first of them: "a (ssh: connect to host a port 22: Connection refused), b (...)"."""
    shown = [f"{host} ({words})" for host, words in [*silent.items()][:SHOWN]]
    return ", ".join([*shown, *([f"and {len(silent) - SHOWN} more"] if len(silent) > SHOWN else [])])


def advice(silent: Mapping[str, str]) -> str:
    """What helps the silent hosts, each thing once, with the host's name in front where several things do."""
    helps: dict[str, str] = {}
    for host, words in silent.items():
        form = next((remedy for signs, remedy in ADVICE if any(sign in words.lower() for sign in signs)), OTHERWISE)
        helps.setdefault(form, host)
    several = len(helps) > 1
    return "; ".join((f"{host}: " if several else "") + form.format(host=host) for form, host in helps.items())
