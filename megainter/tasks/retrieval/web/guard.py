"""What stands before every answer: who may ask, how much may be sent, what browsers are told, and one line of log."""

import ipaddress
import json
import time
from collections.abc import Collection
from urllib.parse import unquote_plus

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from megainter.view.pages import plain

LONGEST_QUERY_STRING = 8192  # bytes
LOGGED = 200  # characters of a path with its query
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}


class Guard:
    """Answers for another application what may not reach it, and logs all."""

    def __init__(self, app: ASGIApp, hosts: Collection[str]) -> None:
        """``hosts``: names that may stand in a Host header, beside localhost and any IP address."""
        self.app, self.hosts = app, {name.lower() for name in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = time.monotonic(), 500

        async def send_guarded(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *((name.encode(), value.encode()) for name, value in HEADERS.items())]
            await send(message)

        try:
            refusal = self._refusal(scope)
            if refusal is None:
                await self.app(scope, receive, send_guarded)
            else:
                await _answer(send_guarded, *refusal)
        finally:
            print(_line(scope, status, time.monotonic() - start), flush=True)

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        """Status and reason where a request is not answered.

        A page of another site may have its name point here (DNS rebinding): its requests carry that name as Host, and none of our own. An
        IP address cannot be pointed elsewhere. A page of another site that sends to our address says so in Origin.
        """
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        hosts = [value for name, value in scope["headers"] if name.lower() == b"host"]
        host = headers.get("host", "")
        if len(hosts) != 1 or not self._known(host):
            return 421, "this server does not answer to that name; start it with --allow-host NAME"
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2].lower() != host.lower():
            return 403, "requests of other sites are not answered"
        if len(scope["query_string"]) > LONGEST_QUERY_STRING:
            return 414, "the address is too long"
        return None

    def _known(self, host: str) -> bool:
        name = host_name(host)
        return name == "localhost" or name in self.hosts or _is_address(name)


def host_name(host: str) -> str:
    """The name or address in a Host header, lower case, without its port and an IPv6 address's brackets."""
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdigit() else host


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


async def _answer(send: Send, status: int, reason: str) -> None:
    body = json.dumps({"error": reason}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _line(scope: Scope, status: int, seconds: float) -> str:
    """One line, whatever was asked for: nothing in it can pass for another line or steer a terminal."""
    query = scope["query_string"].decode("latin-1")
    asked = plain(scope["path"] + (f"?{unquote_plus(query)}" if query else ""))[:LOGGED]
    client = scope["client"][0] if scope.get("client") else "?"
    return f"{time.strftime('%Y-%m-%d %H:%M:%S')} {client} {plain(scope['method'])[:10]} {asked} {status} {1e3 * seconds:.0f} ms"


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine alone."""
    return _is_address(host) and ipaddress.ip_address(host).is_loopback
