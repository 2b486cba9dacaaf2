"""The service on a real socket in a thread, and a client that sends exactly what it is told."""

import asyncio
import http.client
import json
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from megainter.tasks.retrieval.search.options import ServeOptions
from megainter.tasks.retrieval.search.searching import Searcher
from megainter.tasks.retrieval.web.app import create_app
from megainter.tasks.retrieval.web.serving import server_settings
from tests.synthetic import environment


@dataclass(frozen=True)
class Answer:
    """What came back."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class Client:
    """Talks to a port of this machine."""

    port: int

    def ask(self, method: str, target: str, body: Any = None, **headers: str) -> Answer:
        """``target`` is sent as it is; a header's name is written with underscores."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        try:
            connection.request(method, target, body, sent)
            response = connection.getresponse()
            return Answer(response.status, {name.lower(): value for name, value in response.getheaders()}, response.read())
        finally:
            connection.close()

    def get(self, target: str, **headers: str) -> Answer:
        return self.ask("GET", target, **headers)


@contextmanager
def running(searcher: Searcher, folder: Path, **serving: Any) -> Iterator[Client]:
    """The service until the block ends."""
    app = create_app(searcher, folder, ServeOptions(**serving))
    server = uvicorn.Server(server_settings(app))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listening])))
        thread.start()
        try:
            yield Client(listening.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()


@contextmanager
def started(index: Path, *words: str) -> Iterator[tuple[subprocess.Popen[str], Client, list[str]]]:
    """``megainter serve`` as a process, a client of it, and the lines that it printed until it listened."""
    command = [sys.executable, "-m", "megainter", "serve", str(index), "--port", "0", *words]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            lines = list[str]()
            for line in process.stdout:
                lines.append(line)
                if found := re.search(r":(\d+)/ \(Ctrl-C stops\)", line):
                    yield process, Client(int(found[1])), lines
                    return
            raise AssertionError(lines)
        finally:
            process.kill()
