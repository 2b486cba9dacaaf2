"""A Hugging Face Hub on localhost, for the real client: repositories, revisions, ranges, commits, and what goes wrong on the way."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
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
    token: str | None = None  # that may write; None: nobody may
    created: dict[str, dict[str, Any]] = field(default_factory=dict)  # what was asked of new repositories
    large: dict[str, bytes] = field(default_factory=dict)  # uploaded by LFS, by their SHA-256
    broken: dict[str, int] = field(default_factory=dict)  # the status that uploads with this in their path get
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

        def do_POST(self) -> None:
            self._write()

        def do_PUT(self) -> None:
            self._write()

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

        def _write(self) -> None:
            """A new repository; a commit in its steps: how each file goes, where large ones go, these, and the small ones with the list."""
            path = unquote(self.path.partition("?")[0]).strip("/")
            hub.requests.append((self.command, path, None))
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status = next((status for part, status in hub.broken.items() if part in path), None)
            if status is not None:
                return self._refuse(status, "Broken")
            if path.startswith("lfs/"):  # a signed address: it needs no token
                assert hashlib.sha256(body).hexdigest() == path.removeprefix("lfs/")
                hub.large[path.removeprefix("lfs/")] = body
                return self._send(b"{}")
            if hub.token is None or self.headers.get("Authorization") != f"Bearer {hub.token}":
                return self._refuse(401, "Unauthorized")
            asked = [json.loads(line) for line in body.splitlines()]
            if path == "api/repos/create":
                return self._create(asked[0])
            if path == "api/validate-yaml":
                unknown = [{"message": f"unknown license {word}"} for word in ("ncsa",) if f"license: {word}" in asked[0]["content"]]
                return self._send(json.dumps({"errors": unknown, "warnings": []}).encode(), 400 if unknown else 200)
            repository = "/".join(path.removeprefix("api/models/").split("/")[:2]).removesuffix(".git")
            if "/preupload/" in path:
                modes = [(file["path"], "lfs" if file["size"] > 5000 else "regular") for file in asked[0]["files"]]
                answer = {"files": [{"path": name, "uploadMode": mode, "shouldIgnore": False} for name, mode in modes]}
            elif path.endswith("/info/lfs/objects/batch"):
                answer = {"transfer": "basic", "objects": [self._place(large) for large in asked[0]["objects"]]}
            else:
                answer = self._commit(repository, asked)
            self._send(json.dumps(answer).encode())

        def _create(self, asked: dict[str, Any]) -> None:
            repository = f"{asked['organization']}/{asked['name']}"
            if repository in hub.files:
                return self._send(json.dumps({"url": f"{hub.url}/{repository}"}).encode(), 409)
            hub.created[repository], hub.files[repository] = asked, {".gitattributes": b""}
            self._send(json.dumps({"url": f"{hub.url}/{repository}", "id": "1"}).encode())

        def _place(self, large: dict[str, Any]) -> dict[str, Any]:
            return large | {"actions": {"upload": {"href": f"{hub.url}/lfs/{large['oid']}"}}}

        def _commit(self, repository: str, lines: list[dict[str, Any]]) -> dict[str, Any]:
            for line in lines:
                value = line["value"]
                if line["key"] == "file":
                    hub.files[repository][value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    hub.files[repository][value["path"]] = hub.large[value["oid"]]
            return {"commitUrl": f"{hub.url}/{repository}/commit/{COMMIT}", "commitOid": COMMIT}

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

        def _send(self, body: bytes, status: int = 200) -> None:
            self.send_response(status)
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
