"""A part of a GPU run that hangs, as do a child and a grandchild, which has left its session."""

import subprocess
import sys
import time

from benchmarks.gpu.part import Report, Setting, run_part

CHILD = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {grandchild!r}], start_new_session=True); time.sleep(600)"
GRANDCHILD = "import os, time; open({path!r}, 'w').write(str(os.getpid())); time.sleep(600)"


def check(setting: Setting, report: Report) -> None:
    """Start them and wait in vain."""
    report.row("found before", "1")
    grandchild = GRANDCHILD.format(path=str(setting.output / "pid"))
    subprocess.Popen([sys.executable, "-c", CHILD.format(grandchild=grandchild)])
    time.sleep(600)


if __name__ == "__main__":
    run_part("hanging", check)
