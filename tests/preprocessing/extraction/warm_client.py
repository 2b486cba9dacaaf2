"""Stands for a command that ``warm_start.py`` runs in a fork: passes signals on, and ends as the fork ends. Imports next to nothing."""

import contextlib
import ctypes
import json
import os
import signal
import socket
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main(address: str, place: str, *arguments: str) -> None:
    """Have ``arguments`` run, and exit with their code, or by the signal that ended them."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # with mpirun
    if "PMIX_RANK" in os.environ and os.getppid() == 1:
        os._exit(1)  # it was gone before
    link = socket.socket(socket.AF_UNIX)
    link.connect(address)
    request = json.dumps({"environment": dict(os.environ), "arguments": arguments, "place": place}).encode()
    socket.send_fds(link, [len(request).to_bytes(8, "big")], [1, 2])
    link.sendall(request)
    pid = _number(link, 8)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: _forward(pid, number))
    code = _number(link, 4)
    if code < 0:
        if -code in (signal.SIGTERM, signal.SIGINT):
            signal.signal(-code, signal.SIG_DFL)  # to die of it as the fork did, not to pass it on
        os.kill(os.getpid(), -code)
    os._exit(code)


def _forward(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # the fork has ended, and its code is on the way
        os.kill(pid, number)


def _number(link: socket.socket, size: int) -> int:
    received = link.recv(size, socket.MSG_WAITALL)
    if len(received) < size:
        sys.exit("the process that forks has ended")
    return int.from_bytes(received, "big", signed=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
