"""A run on a disk that fills up, and one that finds what killed builds of compiled code left behind."""

import subprocess
import sys
from pathlib import Path

import pytest

from megainter.training import checkpoint
from tests.disks import mounting
from tests.synthetic import environment, settings, write_data

__all__ = ["mounting"]  # a fixture


@pytest.mark.slow
def test_a_full_disk_ends_the_run_and_keeps_its_checkpoint(mounting: Path, tmp_path: Path) -> None:
    """A disk of 900 KiB, which holds two checkpoints and not the third beside them: the older ones stand, whole."""
    run = mounting / "run"
    words = settings(*write_data(tmp_path), run, training__steps=200, checkpoint__every_steps=10, training__log_every=10)
    train = [sys.executable, "-m", "megainter", "pretrain", *words]
    script = f'mount -t tmpfs -o size=900k tmpfs {mounting} && {{ "$@"; code=$?; cp -r {run} {tmp_path / "kept"}; exit $code; }}'
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script, "sh", *train], capture_output=True, text=True, env=environment())
    assert done.returncode == 5, done.stdout + done.stderr
    assert "those before it stand, training goes on" in done.stdout
    assert "free space and run the same command" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    kept = checkpoint.newest(tmp_path / "kept" / "checkpoints", pytest.fail)
    assert kept is not None
    assert 0 < kept.step < 200
    assert not list((tmp_path / "kept" / "checkpoints").glob(".partial-*"))


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "offload"), [(0, "false"), (2, "true"), (3, "true")])
def test_no_start_compiles_anything(stage: int, offload: str, tmp_path: Path) -> None:
    """So a lock that a killed build left, for which torch would wait without end, keeps no run from starting."""
    extensions = tmp_path / "extensions"
    choices = {"engine__zero_stage": stage, "engine__offload_optimizer": offload, "training__steps": 2}
    words = settings(*write_data(tmp_path), tmp_path / "run", **choices)
    done = subprocess.run(
        [sys.executable, "-m", "megainter", "pretrain", *words],
        capture_output=True,
        text=True,
        timeout=200,
        env=environment() | {"TORCH_EXTENSIONS_DIR": str(extensions)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not list(extensions.rglob("*"))
