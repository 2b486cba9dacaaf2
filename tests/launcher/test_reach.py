"""Hosts that stay silent over ssh: its own words, and advice that follows them."""

import os
from pathlib import Path

import pytest

from launcher.hostfile import Host
from launcher.reach import LONGEST, advice, silent, told

WORDS = {
    "ssh: Could not resolve hostname a: Name or service not known": "correct the name in the hostfile",
    "ssh: Could not resolve hostname a: Temporary failure in name resolution": "correct the name in the hostfile",
    "ssh: connect to host a port 22: Connection refused": "start sshd on a",
    "ssh: connect to host a port 22: Connection timed out": "see that a is up",
    "ssh: connect to host a port 22: No route to host": "see that a is up",
    "me@a: Permission denied (publickey,password).": "ssh-copy-id a",
    "Host key verification failed.": "accept its key once: `ssh a true`",
    "kex_exchange_identification: read: Connection reset by peer": "see what `ssh a true` says",
}


@pytest.mark.parametrize(("words", "remedy"), list(WORDS.items()))
def test_advice_follows_what_ssh_said(words: str, remedy: str) -> None:
    assert remedy in advice({"a": words})
    assert told({"a": words}) == f"a ({words})"


def test_three_hosts_are_shown_and_each_thing_is_advised_once() -> None:
    refused = {f"n{number}": f"ssh: connect to host n{number} port 22: Connection refused" for number in range(5)}
    assert told(refused).endswith("n2 (ssh: connect to host n2 port 22: Connection refused), and 2 more")
    assert advice(refused).count("sshd") == 1
    both = advice(refused | {"b": "me@b: Permission denied (publickey)."})
    assert both == "n0: start sshd on n0, or give its port in ~/.ssh/config; b: set up a key without a passphrase: ssh-copy-id b"


def ssh(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An ssh of one's own, whose last words but one are the host's name."""
    (folder / "ssh").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_the_last_line_is_kept_short_and_printable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one host of two, behind a banner longer than a pipe holds."""
    banner = "head -c 200000 /dev/zero | tr '\\0' x >&2; printf '\\n\\033[1mno %0300d\\r\\n' 7 >&2"
    ssh(tmp_path, f'case "$*" in *good*) exit 0;; esac; {banner}; exit 255', monkeypatch)
    found = silent((Host("good", (0,)), Host("bad", (0,))))
    assert list(found) == ["bad"]
    assert found["bad"].startswith(" [1mno 000")
    assert len(found["bad"]) == LONGEST
    assert silent(()) == {}


def test_one_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ssh(tmp_path, "exec sleep 60", monkeypatch)
    assert silent((Host("a", (0,)),), seconds=0) == {"a": "no answer within 0 s"}
    assert "see that a is up" in advice({"a": "no answer within 20 s"})


def test_without_an_ssh_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert advice(silent((Host("a", (0,)),))) == "install an ssh client (Debian: openssh-client)"
