"""`megainter serve`: the application on a socket, until it is asked to stop."""

import os
import signal
import socket
from pathlib import Path

import uvicorn

from megainter.errors import UsageError
from megainter.process import StopRequest
from megainter.tasks.retrieval.search.index import open_index
from megainter.tasks.retrieval.search.options import SearchOptions, ServeOptions
from megainter.tasks.retrieval.search.pictures import images_folder
from megainter.tasks.retrieval.search.searching import Searcher, take_threads
from megainter.tasks.retrieval.web.app import create_app
from megainter.tasks.retrieval.web.guard import is_loopback

MOST_CONNECTIONS = 512
GRACE = 10  # seconds for requests under way when it is asked to stop


def serve_index(path: Path, options: SearchOptions, serving: ServeOptions) -> None:
    """Answer until SIGTERM or Ctrl-C; requests under way are answered before the end.

    ``UsageError`` where the index, its images or the address cannot be used.
    """
    index = open_index(path)
    folder = images_folder(index, options)
    with _socket(serving) as listening:
        take_threads(options)
        searcher = Searcher(index, options)
        if options.order != "first":
            _ = searcher.look
        app = create_app(searcher, folder, serving)
        print(searcher.precision_note, flush=True)
        server = uvicorn.Server(server_settings(app))
        _announce(listening, serving, index.facts.image_count)
        with StopRequest((signal.SIGINT, signal.SIGTERM), patient=True):  # uvicorn hands them on when it has stopped
            server.run(sockets=[listening])
    print("stopped", flush=True)


def server_settings(app: object) -> uvicorn.Config:
    """How uvicorn runs an application: no names of its own, no trust in proxies, and bounds."""
    return uvicorn.Config(
        app,  # type: ignore[arg-type]
        http="h11",
        ws="none",
        lifespan="on",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=MOST_CONNECTIONS,
        timeout_graceful_shutdown=GRACE,
    )


def _socket(serving: ServeOptions) -> socket.socket:
    family = socket.AF_INET6 if ":" in serving.host else socket.AF_INET
    try:
        return socket.create_server((serving.host, serving.port), family=family, backlog=MOST_CONNECTIONS)
    except (OSError, OverflowError) as error:
        number = getattr(error, "errno", None)
        reason = os.strerror(number) if number is not None and number > 0 else str(error)
        raise UsageError(f"--host {serving.host} --port {serving.port} cannot be listened on: {reason}; give another --port") from None


def _announce(listening: socket.socket, serving: ServeOptions, images: int) -> None:
    host, port = listening.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    if not is_loopback(host):
        print("warning: whoever reaches this machine can search and see these pictures: there is no password", flush=True)
    print(f"{images:,} images at http://{shown}:{port}/ (Ctrl-C stops)", flush=True)
