"""The commands that a page shows, and a way to run them as its reader does."""

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.places import ROOT
from tests.synthetic import environment

FENCE = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)


def blocks(page: str, *languages: str) -> list[str]:
    """The fenced blocks of a page (its path in the repository) in these languages; "" stands for blocks that name none."""
    return [block for language, block in FENCE.findall((ROOT / page).read_text()) if language in languages]


def lines(page: str) -> list[str]:
    """The lines of a page's `sh` blocks, which a reader types one after another; those that a backslash continues are joined."""
    return [line for line in "".join(blocks(page, "sh")).replace("\\\n", " ").splitlines() if line]


def run_line(line: str, folder: Path, timeout: float = 300) -> str:
    """Run a line by the shell in ``folder``, with this Python's `megainter`; returns all that it printed.

    Raises AssertionError where it ends with another code than 0.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        line, shell=True, cwd=folder, capture_output=True, text=True, check=False, timeout=timeout, env=environment() | {"PATH": path}
    )
    assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr
