"""``python -m benchmarks.serve INDEX``: `megainter serve` under load, on loopback.

Clients each send the index's own captions one after the other, without a pause, on a connection that is kept; for every fourth search a
client also fetches two of the pictures found. Prints requests, failures, and the milliseconds of searches and pictures.
"""

import argparse
import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from datetime import date
from pathlib import Path
from urllib.parse import quote

import numpy as np

from benchmarks.timing import machine
from megainter.tasks.retrieval.search.index import open_index

PICTURES_EVERY, PICTURES = 4, 2
CAPTIONS = 2000


def main() -> None:
    """Start the server, load it, stop it, and print one JSON object."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("index", type=Path)
    options.add_argument("--clients", type=int, default=50)
    options.add_argument("--seconds", type=float, default=60)
    options.add_argument("--order", choices=("both", "second", "first"), default="both")
    options.add_argument("--candidates", type=int, default=100)
    given = options.parse_args()
    words = ["serve", str(given.index), "--port", "0", "--order", given.order, "--candidates", str(given.candidates)]
    with subprocess.Popen([sys.executable, "-m", "megainter", *words], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        port = next(int(found[1]) for line in server.stdout if (found := re.search(r"http://127\.0\.0\.1:(\d+)/", line)))
        log = subprocess.Popen([sys.executable, "-c", "import sys; [0 for _ in sys.stdin]"], stdin=server.stdout)  # reads what is logged
        load = Load(port, given.order, captions_of(given.index))
        start = time.monotonic()
        asyncio.run(load.run(given.clients, given.seconds))
        seconds = time.monotonic() - start
        server.send_signal(signal.SIGTERM)
        ended = server.wait(30)
        log.wait()
    print(json.dumps({
        "date": date.today().isoformat(), "machine": machine(), "cores": len(os.sched_getaffinity(0)), "clients": given.clients,
        "order": given.order, "candidates": given.candidates, "seconds": seconds, "exit code": ended, "statuses": dict(load.statuses),
        "failed": load.failed, "searches per second": len(load.milliseconds["search"]) / seconds,
        "milliseconds": {kind: percentiles(values) for kind, values in load.milliseconds.items()},
    }, indent=2))  # fmt: skip


def captions_of(path: Path) -> list[str]:
    """Captions spread over the index."""
    index = open_index(path)
    return [index.caption(int(place)) for place in np.linspace(0, index.facts.caption_count - 1, CAPTIONS).astype(int)]


def percentiles(values: list[float]) -> dict[str, float]:
    """p50, p99 and the most."""
    return {name: round(float(np.percentile(values, share)), 1) for name, share in (("p50", 50), ("p99", 99), ("most", 100))}


class Load:
    """Clients, and what came back to them."""

    def __init__(self, port: int, order: str, captions: list[str]) -> None:
        self.port, self.order, self.captions = port, order, captions
        self.statuses, self.failed = Counter[int](), 0
        self.milliseconds: dict[str, list[float]] = defaultdict(list)

    async def run(self, clients: int, seconds: float) -> None:
        """All clients until the time is over."""
        end = time.monotonic() + seconds
        await asyncio.gather(*(self._client(number, end) for number in range(clients)))

    async def _client(self, number: int, end: float) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        rng, searches = np.random.default_rng(number), 0
        while time.monotonic() < end:
            text = quote(self.captions[int(rng.integers(len(self.captions)))])
            body = await self._get(reader, writer, "search", f"/api/search?q={text}&top=10&order={self.order}")
            searches += 1
            if body and searches % PICTURES_EVERY == 0:
                for item in json.loads(body)["images"][:PICTURES]:
                    await self._get(reader, writer, "picture", f"/images/{item['row']}?size=small")
        writer.close()

    async def _get(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, kind: str, target: str) -> bytes:
        start = time.monotonic()
        try:
            writer.write(f"GET {target} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            length = re.search(r"content-length: (\d+)", head, re.IGNORECASE)
            body = await reader.readexactly(int(length[1]) if length else 0)
        except (OSError, EOFError):
            self.failed += 1
            return b""
        status = int(head.split()[1])
        self.statuses[status] += 1
        self.failed += status != 200
        self.milliseconds[kind].append(1e3 * (time.monotonic() - start))
        return body if status == 200 else b""


if __name__ == "__main__":
    main()
