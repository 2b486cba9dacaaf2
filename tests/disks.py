"""Python code in a process of its own, also on a disk that is small, full or read-only."""

import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.places import ROOT


def run_python(code: str, before: str = "") -> subprocess.CompletedProcess[str]:
    """Run Python code that finds this repository, after shell commands in a mount namespace of its own if there are any."""
    command = [sys.executable, "-c", f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{textwrap.dedent(code)}"]
    if before:
        command = ["unshare", "-rm", "sh", "-c", f'{before} && exec "$@"', "sh", *command]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=ROOT)


@pytest.fixture
def mounting(tmp_path: Path) -> Path:
    """A folder to mount a file system on, in a namespace that only the child process sees."""
    place = tmp_path / "mounted"
    place.mkdir()
    if (
        shutil.which("unshare") is None
        or subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", str(place)], capture_output=True, check=False).returncode
    ):
        pytest.skip("mounting in a namespace of its own is not permitted here")
    return place
