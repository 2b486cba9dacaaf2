"""A Hugging Face Hub on localhost, for the real client: repositories, revisions, ranges, and what goes wrong on the way."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

COMMIT = "a" * 40


@dataclass
class Hub:
    """``files`` by repository and revision; what a test breaks; and the requests that came."""

    files: dict[str, dict[str, bytes]] = field(default_factory=dict)  # of "OWNER/NAME"
    revisions: dict[str, str] = field(default_factory=lambda: {"main": COMMIT})
    private: set[str] = field(default_factory=set)
    cut_once: set[str] = field(default_factory=set)  # files whose first download ends after its first half
    stated: dict[str, str] = field(default_factory=dict)  # another digest than a file's own
    longer: dict[str, int] = field(default_factory=dict)  # bytes that are stated and never sent
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)  # method, path, range
    url: str = ""


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Answer on a free port of 127.0.0.1 while the block runs."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def log_message(self, *_: object) -> None:
            """Tests look at ``hub.requests``."""

        def _answer(self) -> None:
            path = unquote(self.path.partition("?")[0]).strip("/")
            hub.requests.append((self.command, path, self.headers.get("Range")))
            parts = path.removeprefix("api/models/").split("/")
            repository = "/".join(parts[:2])
            if repository in hub.private and "Authorization" not in self.headers:
                return self._refuse(401, "RepoNotFound")
            if repository not in hub.files:
                return self._refuse(404, "RepoNotFound")
            revision = parts[3] if len(parts) > 3 else "main"
            commit = hub.revisions.get(revision, revision if revision in hub.revisions.values() else None)
            if commit is None:
                return self._refuse(404, "RevisionNotFound")
            if path.startswith("api/models/"):
                names = [{"rfilename": name} for name in hub.files[repository]]
                return self._send(json.dumps({"id": repository, "sha": commit, "siblings": names}).encode())
            name = "/".join(parts[4:])
            if name not in hub.files[repository]:
                return self._refuse(404, "EntryNotFound")
            self._file(name, hub.files[repository][name], commit)

        def _file(self, name: str, content: bytes, commit: str) -> None:
            etag = hub.stated.get(name, hashlib.sha256(content).hexdigest())
            start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.send_header("X-Repo-Commit", commit)
            self.send_header("ETag", f'"{etag}"')
            extra = hub.longer.get(name, 0) if self.command == "HEAD" else 0
            self.send_header("Content-Length", str(len(content) - start + extra))
            self.end_headers()
            if self.command == "HEAD":
                return
            if name in hub.cut_once:
                hub.cut_once.discard(name)
                self.wfile.write(content[start : len(content) // 2])
                self.wfile.flush()
                self.connection.close()
                return
            self.wfile.write(content[start:])

        def _send(self, body: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def _refuse(self, status: int, code: str) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
