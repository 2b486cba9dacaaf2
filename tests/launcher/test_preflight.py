"""Preflight: each check by itself, and the whole list for real on this machine."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launcher.command import Job
from launcher.hostfile import Host
from launcher.launch import LaunchSettings
from launcher.preflight import (
    Check,
    Facts,
    _checks,
    _print,
    data_check,
    disk_checks,
    engine_check,
    hosts_check,
    versions_check,
    vocabulary_check,
)
from megainter.config.reading import load_config
from tests.synthetic import environment, settings, write_data

SAME = {"python": "3.12", "torch": "2.14", "commit": "abc"}


def test_equal_versions_pass_and_unlike_ones_are_named() -> None:
    assert versions_check({"a": SAME, "b": SAME}).passed
    unlike = versions_check({"a": SAME, "b": SAME | {"torch": "2.13"}})
    assert not unlike.passed
    assert unlike.found == "torch 2.14 on a, 2.13 on b"
    assert not versions_check({}).passed
    assert not versions_check({"a": SAME, "b": {"error": "no python"}}).passed


def test_unlike_data_is_damage() -> None:
    here = {"captions": 5, "images": 3, "pairs": "p" * 64, "store": "s" * 64}
    assert data_check({"a": here, "b": dict(here)}).passed
    unlike = data_check({"a": here, "b": here | {"store": "t" * 64}})
    assert (unlike.passed, unlike.code) == (False, 4)
    missing = data_check({"a": here, "b": {"error": "regions.store does not exist", "code": 2}})
    assert "on b" in missing.found


@pytest.mark.parametrize(("changed", "unknown", "passes"), [(0, 0.0, True), (1, 0.0, False), (0, 0.3, False)])
def test_a_vocabulary_of_another_language_fails(changed: int, unknown: float, passes: bool) -> None:
    answer = {"size": 100, "captions": 10, "changed": changed, "mean_tokens": 9.0, "unknown": unknown}
    assert vocabulary_check(answer).passed == passes


def test_a_silent_host_is_named() -> None:
    hosts = (Host("a", (0,)), Host("b", (0,)))
    check = hosts_check(hosts, {"b": "ssh: connect to host b port 22: Connection refused"})
    assert not check.passed
    assert check.found == "1 of 2 answer; not b (ssh: connect to host b port 22: Connection refused)"
    assert check.remedy == "start sshd on b, or give its port in ~/.ssh/config"
    assert hosts_check(hosts, {}).passed


def test_disk_space_counts_the_checkpoints(tmp_path: Path) -> None:
    assert next(disk_checks(tmp_path, 1.0)).passed
    full = next(disk_checks(tmp_path, 1e18))
    assert (full.passed, full.code) == (False, 5)


def test_an_engine_error_keeps_its_code() -> None:
    check = engine_check({"error": "unknown DeepSpeed setting", "code": 2})
    assert (check.passed, check.code, check.found) == (False, 2, "unknown DeepSpeed setting")


def test_a_remedy_stands_only_where_it_adds_something(capsys: pytest.CaptureFixture[str]) -> None:
    """What a check found may say all; data that are missing on a host are to be brought there."""
    gone = {"error": "data.store s does not exist; did you mean t?", "code": 2}
    _print(1, engine_check({"error": "unknown DeepSpeed setting; did you mean x?", "code": 2}))
    _print(2, data_check({"": gone}))
    assert "->" not in capsys.readouterr().out
    _print(3, data_check({"a": gone}))
    assert "-> mount the data there" in capsys.readouterr().out


def run(arguments: list[str], *options: str, extra: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """``megainter preflight`` in a process of its own."""
    command = [sys.executable, "-m", "megainter", "preflight", *options, *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, env=environment() | {"PYTHONIOENCODING": "utf-8"} | (extra or {}), check=False, timeout=900
    )


def test_what_is_missing_is_crossed_and_decides_the_exit_code(tmp_path: Path) -> None:
    """A misspelt DeepSpeed setting and no data: the rest of the list is still checked."""
    (tmp_path / "ds.json").write_text('{"gradient_cliping": 1.0}')
    arguments = settings(tmp_path / "no.parquet", tmp_path / "no.store", tmp_path / "run", engine__deepspeed=tmp_path / "ds.json")
    done = run(arguments, "--processes", "1", "--engine", "torchrun", "--no-steps", "--json")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "\u2717 settings and DeepSpeed configuration" in done.stderr
    assert "did you mean 'gradient_clipping'" in done.stderr or "gradient_cliping" in done.stderr
    assert "\u2717 data: " in done.stderr
    assert "\u2713 all-reduce: 1 rank, over gloo" in done.stderr
    told = json.loads(done.stdout)
    assert not told["passed"]
    marks = {check["name"]: "-" if check["skipped"] else "\u2713" if check["passed"] else "\u2717" for check in told["checks"]}
    assert marks == {name: mark for mark, name in re.findall(r"^ ?\d+ (\S) ([^:]+): ", done.stderr, flags=re.MULTILINE)}
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "preflight").exists()


def silent_ssh(folder: Path) -> dict[str, str]:
    """An environment whose ssh reaches nobody."""
    words = "ssh: Could not resolve hostname away: Name or service not known"
    (folder / "bin").mkdir()
    (folder / "bin" / "ssh").write_text(f"#!/bin/sh\necho '{words}' >&2\nexit 255\n")
    (folder / "bin" / "ssh").chmod(0o755)
    return {"PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"}


def test_one_silent_host_is_one_cross_and_what_needs_it_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("away slots=1\n")
    arguments = settings(tmp_path / "no.parquet", tmp_path / "no.store", tmp_path / "run")
    done = run(arguments, "--hostfile", str(tmp_path / "hosts"), extra=silent_ssh(tmp_path))
    assert done.returncode == 2, done.stdout + done.stderr
    crossed = [line for line in done.stdout.splitlines() if "\u2717" in line]
    assert len(crossed) == 1, done.stdout
    assert crossed[0].endswith("\u2717 hosts: 0 of 1 answer; not away (ssh: Could not resolve hostname away: Name or service not known)")
    assert "     -> correct the name in the hostfile" in done.stdout
    skipped = [line.split(": ")[0].split(" - ")[1] for line in done.stdout.splitlines() if line.endswith("skipped, as it needs hosts")]
    assert skipped == ["versions", "devices", "memory", "all-reduce", "three steps"]
    assert "\u2713 disk space" in done.stdout
    assert "1 of the checks failed: hosts;" in done.stderr
    # What hangs on no host is looked at here; data may lie on the hosts alone.
    assert "\u2713 settings and DeepSpeed configuration: ZeRO stage" in done.stdout
    assert re.search(r"- data: skipped, as no host answered and this machine cannot tell: .*no.parquet does not exist", done.stdout)
    assert not (tmp_path / "run").exists()


def test_settings_and_data_are_looked_at_here_where_hosts_are_silent(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("away slots=1\n")
    (tmp_path / "ds.json").write_text('{"gradient_cliping": 1.0}')
    arguments = settings(*write_data(tmp_path), tmp_path / "deep" / "run", engine__deepspeed=tmp_path / "ds.json")
    done = run(arguments, "--hostfile", str(tmp_path / "hosts"), extra=silent_ssh(tmp_path))
    assert "2 of the checks failed: hosts, settings and DeepSpeed configuration;" in done.stderr
    for name in ("data", "vocabulary"):
        assert re.search(rf"\u2713 {name}: .*\(looked at on this machine, as no host answered\)", done.stdout), done.stdout
    assert not (tmp_path / "deep").exists()


def facts_of(tmp_path: Path, replies: dict[str, dict[str, Any]], *names: str) -> Facts:
    """Facts of a run on hosts of these names, of which some replied."""
    config = load_config(Path("small"), ["--data.pairs", "p", "--data.store", "s", "--output", str(tmp_path / "run")])
    hosts = tuple(Host(name, (0,)) for name in names)
    launched = LaunchSettings(arguments=(), training=config.training, output=tmp_path / "run")
    job = Job("torchrun", (), hosts, 1, {}, tmp_path, "a", 29500)
    return Facts(config=config, settings=launched, hosts=hosts, job=job, folder=tmp_path, replies=replies)


GOOD = {
    "versions": SAME,
    "devices": {"names": [], "memory": [], "cores": 2, "host_memory_free": 2**40, "units": []},
    "data": {"captions": 5, "images": 3, "pairs": "p" * 64, "store": "s" * 64, "feature_size": 16, "num_classes": 8},
    "vocabulary": {"size": 100, "captions": 10, "changed": 0, "mean_tokens": 9.0, "unknown": 0.0},
    "engine": {"zero_optimization": {"stage": 1}, "train_batch_size": 8, "train_micro_batch_size_per_gpu": 8,
               "gradient_accumulation_steps": 1},
}  # fmt: skip
NO_PYTHON = {part: {"error": "no module named megainter", "code": 1} for part in GOOD}


@pytest.mark.parametrize(
    ("replies", "names", "crossed", "cause"),
    [
        ({"a": GOOD}, ("a", "b"), ["hosts"], "hosts"),  # b is not reached: what a says is judged all the same
        ({"a": GOOD, "b": NO_PYTHON}, ("a", "b"), ["versions"], "versions"),
        ({"a": GOOD, "b": {}}, ("a", "b"), ["versions"], "versions"),  # it took too long
        ({"a": GOOD | {"data": {"error": "regions.store does not exist", "code": 2}}}, ("a",), ["data"], "data"),
    ],
)
def test_only_causes_are_crossed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    replies: dict[str, dict[str, Any]],
    names: tuple[str, ...],
    crossed: list[str],
    cause: str,
) -> None:
    monkeypatch.setattr("launcher.preflight.collective_check", lambda facts: Check("all-reduce", True, "met"))
    facts = facts_of(tmp_path, replies, *names)
    missing = {host.name: "no route to host" for host in facts.hosts if host.name not in replies}
    found = list(_checks(facts, missing, dry_run_step=True))
    assert [check.name for check in found if not check.passed] == crossed
    assert {check.name for check in found if check.skipped} == (
        {"vocabulary", "three steps"} if cause == "data" else {"all-reduce", "three steps"}
    )
    assert all(check.found == f"skipped, as it needs {cause}" for check in found if check.skipped)


@pytest.mark.slow
def test_all_is_well(tmp_path: Path) -> None:
    done = run(settings(*write_data(tmp_path), tmp_path / "run"), "--processes", "2", "--engine", "torchrun")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if "\u2713" in line]
    assert len(lines) == 11
    assert "\u2713 all-reduce: 2 ranks over gloo" in done.stdout
