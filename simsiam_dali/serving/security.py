"""What every request must satisfy before a route sees it: Host, Origin, token and size; and the headers of all answers.

The server has no login, so a page of another site must neither read from it nor write to it. Another site cannot send
this server's Host header unless its name resolves to this machine (DNS rebinding), and cannot leave Origin out or
change it; no answer has CORS headers.
"""

import hmac
import ipaddress
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs

from starlette.exceptions import HTTPException

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

MAX_BODY = 1 << 20
"""Bytes of a request's body: a playlist of 100,000 songs has 600 kB."""

POLICY = "; ".join(
    (
        *("default-src 'none'", "script-src 'self'", "style-src 'self'", "img-src 'self' data:", "media-src 'self'"),
        *("connect-src 'self'", "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"),
    )
)
HEADERS = [
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
]


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens on `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.casefold() == "localhost"


def in_url(host: str) -> str:
    """`host` as a URL has it."""
    return f"[{host}]" if ":" in host else host


@dataclass(frozen=True)
class Address:
    """Where the server listens, and by which names it may be called."""

    host: str
    port: int

    @property
    def url(self) -> str:
        """Of the page, without a token."""
        return f"http://{in_url(self.host)}:{self.port}/"

    def accepts(self, host: str) -> bool:
        """Whether a Host header names this server. A name that is no address of it may be DNS rebinding."""
        host, own = host.casefold(), self.host.casefold()  # browsers send names in lower case, whatever was typed
        name, colon, port = host.rpartition(":")
        if not colon or "]" in port:
            name, port = host, "80"
        if port != str(self.port):
            return False
        if own in ("0.0.0.0", "::"):  # all addresses of this machine, whatever they are
            try:
                ipaddress.ip_address(name.strip("[]"))
            except ValueError:
                return name == "localhost"
            return True
        names = {in_url(own)} | ({"localhost", "127.0.0.1", "[::1]"} if is_loopback(own) else set())
        return name in names


class Guard:
    """ASGI middleware: refuses what must not reach `app`, and adds `HEADERS` to each answer."""

    def __init__(self, app: App, address: Address, token: str | None) -> None:
        self._app, self._address, self._token = app, address, token
        self._cookie = f"simsiam_dali_{address.port}"  # cookies of one host are shared by its ports

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # no route is a WebSocket
            await send({"type": "websocket.close", "code": 1008})
            return
        status, reason = self._refusal(scope)

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *HEADERS, *self._set_cookie(scope)]
            await send(message)

        if status:
            await _answer(send, status, reason)
            return
        await self._app(scope, _limited(receive), guarded)

    def _refusal(self, scope: Scope) -> tuple[int, str]:
        """The status of a request that is refused and why, or 0."""
        headers: dict[bytes, list[bytes]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name.lower(), []).append(value)
        hosts = [value.decode("latin-1") for value in headers.get(b"host", [])]
        if len(hosts) != 1 or not self._address.accepts(hosts[0]):
            return 421, "this server does not have that name"
        origins = [value.decode("latin-1") for value in headers.get(b"origin", [])]
        is_read = scope["method"] in ("GET", "HEAD")
        own = f"http://{hosts[0]}".casefold()
        if any(origin.casefold() != own for origin in origins) or not (is_read or len(origins) == 1):
            return 403, "requests of other sites are refused"
        if self._token is not None and not self._has_token(scope, headers.get(b"cookie", [])):
            return 401, "open the URL that the command printed: it ends with a token"
        lengths = headers.get(b"content-length", [])
        if any(not length.isdigit() or len(length) > 9 or int(length) > MAX_BODY for length in lengths):
            return 413, "the request is too large"
        return 0, ""

    def _has_token(self, scope: Scope, cookies: list[bytes]) -> bool:
        given = self._token_in_query(scope)
        for cookie in cookies:
            try:
                morsel = SimpleCookie(cookie.decode("latin-1")).get(self._cookie)
            except CookieError:
                continue  # no cookie of ours
            given += [morsel.value] if morsel else []
        assert self._token is not None
        return any(hmac.compare_digest(self._token.encode(), text.encode("utf-8", "replace")) for text in given)

    def _token_in_query(self, scope: Scope) -> list[str]:
        """The token of the URL, which counts on the page itself only."""
        query = scope.get("query_string", b"").decode("latin-1")
        return parse_qs(query, max_num_fields=20).get("token", []) if scope["path"] == "/" and len(query) < 1000 else []

    def _set_cookie(self, scope: Scope) -> list[tuple[bytes, bytes]]:
        """The header that keeps the URL's token: without a redirect, on which a Strict cookie may not be sent."""
        if self._token is None or not self._token_in_query(scope):
            return []
        cookie = f"{self._cookie}={self._token}; Path=/; HttpOnly; SameSite=Strict"
        return [(b"set-cookie", cookie.encode())]


def _limited(receive: Receive) -> Receive:
    """`receive` that ends a request without a length beyond `MAX_BODY` bytes."""
    seen = 0

    async def limited() -> Message:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        if seen > MAX_BODY:
            raise HTTPException(413, "the request is too large")
        return message

    return limited


async def _answer(send: Send, status: int, text: str) -> None:
    body = f"{text}\n".encode()
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*headers, *HEADERS]})
    await send({"type": "http.response.body", "body": body})
