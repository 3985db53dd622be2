"""What the engines behind HTTP have in common: one bounded client that trusts nothing it is told.

It is somebody else's service. No redirect is followed, no cookie kept, no proxy taken from the environment, nothing decompressed,
no more than `MAX_BODY_BYTES` read. Time is bounded by whoever calls: a cancelled call closes its connection.
"""

from __future__ import annotations

import asyncio
import ssl
from typing import Final, TypeVar
from urllib.parse import quote, urlsplit

import msgspec

from libs.common import telemetry
from libs.common.context import RequestContext
from services.detector_proxy.engines.connection import Connection, Headers, HttpReply
from services.detector_proxy.ports import EngineError, Health

T = TypeVar("T")

KEEPALIVE_SECONDS: Final = 4.0
"""Less than the 5 s after which uvicorn closes an idle connection: so that we do not write into one that is being closed."""
_IN_A_PATH: Final = "/%:@!$&'()*+,;=~"
"""What may stand in the path of a URL beside letters, digits and `-._` (RFC 3986, 3.3)."""


class HttpClient:
    """Connections to one engine. Make it inside a running event loop."""

    def __init__(self, base_url: str, *, token: str | None, max_connections: int) -> None:
        """`base_url` as the settings have checked it. `max_connections`: what the bulkheads in front of it allow; it is shown."""
        parts = urlsplit(base_url)
        assert parts.hostname is not None
        is_tls = parts.scheme == "https"
        self._host = parts.hostname
        self._port = parts.port or (443 if is_tls else 80)
        self._tls = ssl.create_default_context() if is_tls else None
        self._base_path = quote(parts.path.rstrip("/"), safe=_IN_A_PATH)
        host = f"[{self._host}]" if ":" in self._host else self._host.encode("idna").decode("ascii")
        headers = {
            "Host": host if parts.port is None else f"{host}:{parts.port}",
            "Accept": "application/json",
            "Accept-Encoding": "identity",
            "User-Agent": "portcullis",
        }
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        self._headers = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        self._idle: list[Connection] = []
        self._in_use = 0
        self._sweep_timer: asyncio.TimerHandle | None = None
        self._closed = False
        telemetry.CONNECTIONS.labels("engine").set_function(lambda: self._in_use)
        telemetry.CONNECTIONS_LIMIT.labels("engine").set(max_connections)

    async def post(self, path: str, body: bytes, context: RequestContext) -> HttpReply:
        """The answer, JSON by its content type (or with none).

        Raises `EngineError`: unreachable, bad_http, redirect, content_type, content_encoding, too_large, cut_off, status_…
        """
        head = (
            f"POST {self._base_path}{path} HTTP/1.1\r\n{self._headers}Content-Type: application/json\r\n"
            f"X-Request-ID: {context.request_id}\r\ntraceparent: {context.traceparent}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        return await self._ask(head.encode("ascii") + body)

    async def get_status(self, path: str) -> int | None:
        """The status of a GET whose body nobody reads; None when there is no answer."""
        request = f"GET {self._base_path}{path} HTTP/1.1\r\n{self._headers}\r\n"
        try:
            return (await self._ask(request.encode("ascii"), head_only=True)).status
        except EngineError:
            return None

    async def close(self) -> None:
        self._closed = True
        if self._sweep_timer is not None:
            self._sweep_timer.cancel()
        while self._idle:
            self._idle.pop().close()

    async def _ask(self, request: bytes, *, head_only: bool = False) -> HttpReply:
        self._in_use += 1
        try:
            connection = self._kept() or await self._connected()
            reply = await connection.ask(request, _any if head_only else _check_head, head_only=head_only)
            self._keep(connection)
            return reply
        finally:
            self._in_use -= 1

    def _kept(self) -> Connection | None:
        """The connection that was used last, if it is still good: those that are not needed grow old together."""
        oldest = asyncio.get_running_loop().time() - KEEPALIVE_SECONDS
        while self._idle:
            connection = self._idle.pop()
            if connection.reusable and connection.idle_since > oldest:
                return connection
            connection.close()
        return None

    async def _connected(self) -> Connection:
        loop = asyncio.get_running_loop()
        try:
            _, connection = await loop.create_connection(Connection, self._host, self._port, ssl=self._tls)
        except OSError:  # of name resolution and TLS, too
            raise EngineError("unreachable") from None
        return connection

    def _keep(self, connection: Connection) -> None:
        if not connection.reusable:
            return
        if self._closed:
            connection.close()
            return
        loop = asyncio.get_running_loop()
        connection.idle_since = loop.time()
        self._idle.append(connection)
        if self._sweep_timer is None:
            self._sweep_timer = loop.call_later(KEEPALIVE_SECONDS, self._sweep)

    def _sweep(self) -> None:
        """Close what has not been needed for long."""
        loop = asyncio.get_running_loop()
        oldest = loop.time() - KEEPALIVE_SECONDS
        kept = [connection for connection in self._idle if connection.reusable and connection.idle_since > oldest]
        for connection in self._idle:
            if connection not in kept:
                connection.close()
        self._idle = kept
        self._sweep_timer = loop.call_later(KEEPALIVE_SECONDS, self._sweep) if kept else None


def _any(_: int, __: Headers) -> None:
    pass


def _check_head(status: int, headers: Headers) -> None:
    if 300 <= status < 400:
        raise EngineError("redirect")
    kind = headers.get(b"content-type", b"application/json").partition(b";")[0].strip().lower()
    if kind != b"application/json" and not kind.endswith(b"+json"):
        raise bad_status(status) if status != 200 else EngineError("content_type")
    if headers.get(b"content-encoding", b"identity").lower() != b"identity":
        raise EngineError("content_encoding")


def bad_status(status: int) -> EngineError:
    """The error for a status that is not the text's fault."""
    return EngineError(f"status_{status // 100}xx")


def decoded(decoder: msgspec.json.Decoder[T], reply: HttpReply) -> T:
    """The body as what it should be, else `EngineError` "malformed". Bounds are those of the type."""
    try:
        return decoder.decode(reply.body)
    except (ValueError, RecursionError):  # malformed, mistyped, out of bounds; not UTF-8; nested too deep to be read
        raise EngineError("malformed") from None


def up_if_ok(status: int | None) -> Health:
    """The health of an engine whose endpoint knows only yes (200) and no."""
    return "up" if status == 200 else "down"
