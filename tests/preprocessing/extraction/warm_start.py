"""Command lines run by forks of one process that has everything imported, so that a start, also of a rank, costs milliseconds.

``warm_client.py`` stands where the command would stand, under mpirun too: it hands its environment and outputs over and lives and
dies with the fork.
"""

import json
import os
import signal
import socket
import sys
import threading
import traceback
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

CLIENT = Path(__file__).with_name("warm_client.py")


class WarmStart:
    """Serves forks until it is left; ``command`` is what to start."""

    def __init__(self, folder: Path) -> None:
        self.address = folder / "warm.socket"
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(self.address))
        self.listener.listen(64)
        self.pid = os.fork()
        if self.pid == 0:
            try:
                _serve(self.listener)
            except BaseException:
                traceback.print_exc()
            os._exit(70)

    def command(self, place: Path, *arguments: str) -> list[str]:
        """A `megainter` command; the fork that runs it writes its process id into a file of the folder ``place``."""
        return [sys.executable, "-S", str(CLIENT), str(self.address), str(place), *arguments]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.listener.close()
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def _serve(listener: socket.socket) -> None:
    """Fork for each caller and tell it how its fork ended, until killed or left alone."""
    from preprocessing.extraction import crew as extract_crew

    extract_crew.START_METHOD = "fork"  # workers need no new interpreter either
    callers: dict[int, socket.socket] = {}
    parent = os.getppid()
    listener.settimeout(0.01)
    while os.getppid() == parent:
        with suppress(TimeoutError):
            link, _ = listener.accept()
            pid = os.fork()
            if pid == 0:
                _run(link)
            callers[pid] = link
        for pid in list(callers):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                link = callers.pop(pid)
                with suppress(BrokenPipeError), link:
                    link.sendall(os.waitstatus_to_exitcode(status).to_bytes(4, "big", signed=True))


def _run(link: socket.socket) -> None:
    """Become the caller's command: its environment, outputs and end."""
    from megainter.cli import main

    try:
        request, outputs = _request(link)
        Path(request["place"], str(os.getpid())).touch()
        link.sendall(os.getpid().to_bytes(8, "big"))
    except (ValueError, OSError):
        os._exit(1)  # the caller was killed meanwhile
    for target, output in enumerate(outputs, 1):
        os.dup2(output, target)
        os.close(output)
    os.environ.clear()
    os.environ.update(request["environment"])
    threading.Thread(target=_end_with, args=(link,), daemon=True).start()
    try:
        main(request["arguments"])
        code = 0
    except SystemExit as error:
        code = int(error.code or 0)
    except BaseException:
        traceback.print_exc()
        code = 70
    _leave(code)


def _request(link: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """What the caller asks for, and its outputs; ``ValueError`` where it is gone."""
    start, outputs, _, _ = socket.recv_fds(link, 8, 2)
    return json.loads(link.recv(int.from_bytes(start, "big"), socket.MSG_WAITALL)), outputs


def _leave(code: int) -> None:
    """What an interpreter's end does."""
    if code == 0 and "mpi4py.MPI" in sys.modules:
        from mpi4py import MPI

        if not MPI.Is_finalized():
            MPI.Finalize()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _end_with(link: socket.socket) -> None:
    """Die as the client does."""
    with suppress(ConnectionResetError):
        link.recv(1)
    os.kill(os.getpid(), signal.SIGKILL)
