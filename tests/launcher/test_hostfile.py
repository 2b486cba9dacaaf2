"""Hostfiles: what is read, what the filters keep, and that DeepSpeed's own reader agrees."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.hostfile import Host, format_hostfile, parse_hostfile, read_hostfile, select
from megainter.errors import UsageError

TEXT = b"# two machines\nnode-a slots=4\n\n\tnode_b.example.org   slots=2  # the small one\n"


def test_it_reads_hosts_in_their_order() -> None:
    assert parse_hostfile(TEXT, "f") == (Host("node-a", (0, 1, 2, 3)), Host("node_b.example.org", (0, 1)))


def test_deepspeed_reads_what_is_written(tmp_path: Path) -> None:
    from deepspeed.launcher.runner import fetch_hostfile

    path = tmp_path / "hostfile"
    path.write_text(format_hostfile(parse_hostfile(TEXT, "f")))
    assert dict(fetch_hostfile(str(path))) == {"node-a": 4, "node_b.example.org": 2}


def test_a_hostfile_that_is_not_there_is_told_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "hosts").touch()
    with pytest.raises(UsageError, match=r"cannot be read: No such file or directory; did you mean .*/hosts\?$"):
        read_hostfile(tmp_path / "host")


@pytest.mark.parametrize(
    ("include", "exclude"),
    [("", ""), ("node-a", ""), ("node-a@node_b.example.org:1", ""), ("node-a:0,2", ""), ("", "node-a"), ("", "node-a:1,3")],
)
def test_filters_choose_as_deepspeed_does(include: str, exclude: str) -> None:
    from deepspeed.launcher.runner import parse_resource_filter

    hosts = parse_hostfile(TEXT, "f")
    theirs = parse_resource_filter({host.name: list(host.devices) for host in hosts}, include_str=include, exclude_str=exclude)
    assert {host.name: list(host.devices) for host in select(hosts, include, exclude)} == dict(theirs)


@pytest.mark.parametrize("include", ["node-c", "node-a:7", "node-a:", "node-a:0;ls", "@", "node-a:1@@", "-x", "node-a:0,,1"])
def test_filters_refuse(include: str) -> None:
    hosts = parse_hostfile(TEXT, "f")
    with pytest.raises(UsageError):
        select(hosts, include, "")
    with pytest.raises(UsageError):
        select(hosts, "", include)


def test_excluding_everything_is_refused() -> None:
    with pytest.raises(UsageError, match="no host"):
        select(parse_hostfile(TEXT, "f"), "", "node-a@node_b.example.org")


@given(st.binary(max_size=60))
def test_whatever_is_accepted_is_a_host_name(content: bytes) -> None:
    try:
        hosts = parse_hostfile(b"good slots=1\n" + content, "f")
    except UsageError:
        return
    for host in hosts:
        assert host.name[0].isalnum()
        assert all(letter.isascii() and (letter.isalnum() or letter in "._-") for letter in host.name)


@pytest.mark.parametrize("mode", [0o666, 0o620, 0o602])
def test_a_file_that_others_may_write_is_refused(mode: int, tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_bytes(TEXT)
    path.chmod(mode)
    with pytest.raises(UsageError, match="chmod go-w"):
        read_hostfile(path)


def test_a_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(UsageError, match="not a regular file"):
        read_hostfile(tmp_path / "pipe")


def test_somebody_elses_file_is_refused(tmp_path: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can give a file away")
    path = tmp_path / "hosts"
    path.write_bytes(TEXT)
    path.chmod(0o600)
    os.chown(path, 12345, -1)
    with pytest.raises(UsageError, match="12345"):
        read_hostfile(path)
