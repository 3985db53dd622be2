"""/console: what is asked there is asked of the console, a service of its own, and its answers are passed on as they come.

Only reading is passed on (GET and HEAD, without a body), only to paths below /console, only the headers that are named here, and
only so many at a time. A console that is away is a page that says so, and comes back by itself.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Final

import aiohttp
from fastapi import FastAPI, Request, Response
from starlette.types import Receive, Scope, Send
from yarl import URL

from libs.common.errors import ErrorCode, PortcullisError
from services.edge import problems
from services.edge.gate import Gate, call_of
from services.edge.peer import Peer, peer_of

log = logging.getLogger(__name__)

MAX_AT_A_TIME: Final = 64
"""Besides the calls of everybody else: whoever looks at a full gateway must still see something."""
CONNECT_SECONDS: Final = 2.0
SILENT_SECONDS: Final = 15.0
"""The console's streams say something every second."""
STALLED_SECONDS: Final = 30.0
"""How long the reader may take for one piece."""
KEEPALIVE_SECONDS: Final = 30.0

_PATH: Final = re.compile(r"/console(/[A-Za-z0-9._-]*)*", re.ASCII)
_QUERY: Final = re.compile(r"[!-~]*", re.ASCII)
# What the console needs to know of a request, and nothing else: no cookie, no API key.
_PASSED_ON: Final = (
    "accept", "authorization", "forwarded", "host", "if-none-match", "sec-fetch-site", "x-forwarded-for", "x-forwarded-host",
    "x-real-ip", "x-request-id",
)  # fmt: skip
# RFC 9110, 7.6.1; and what this server says for itself.
_OF_ONE_HOP: Final = frozenset(
    {
        "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer",
        "transfer-encoding", "upgrade", "date", "server", "set-cookie",
    }
)  # fmt: skip

_AWAY: Final = b"""<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="refresh" content="3"><meta name="color-scheme" content="light dark"><title>Portcullis console</title></head>
<body><h1>The console is not running</h1>
<p>The gateway itself works without it: see <a href="/health">/health</a>. This page tries again every three seconds.</p>
</body></html>"""
_AWAY_POLICY: Final = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


class Console:
    """Connections to the console at `url` (http://host:port)."""

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self.gate: Gate | None = None
        """Set when the gate stands around the app; tells when the process is about to stop."""
        self._url = url
        self._session = session
        self._asked = 0

    def add_routes(self, app: FastAPI) -> None:
        for path in ("/console", "/console/{path:path}"):
            app.add_api_route(path, self.ask, methods=["GET", "HEAD"], include_in_schema=False)

    async def ask(self, request: Request) -> Response:
        """Raises PAYLOAD_TOO_LARGE for a body, NOT_FOUND for a path that the console has none of, OVERLOADED."""
        headers = call_of(request.scope).headers
        if b"transfer-encoding" in headers or headers.get(b"content-length", b"0") != b"0":
            raise PortcullisError(ErrorCode.PAYLOAD_TOO_LARGE, "The console takes no body.")
        path = request.url.path
        if not _PATH.fullmatch(path) or ".." in path or not _QUERY.fullmatch(request.url.query):
            raise PortcullisError(ErrorCode.NOT_FOUND)
        if self._asked >= MAX_AT_A_TIME:
            raise PortcullisError(ErrorCode.OVERLOADED)
        return _Relay(self, request)

    async def relay(self, request: Request, scope: Scope, receive: Receive, send: Send) -> None:
        """Ask, and pass on what comes; a console that does not answer becomes a 503."""
        query = f"?{request.url.query}" if request.url.query else ""
        url = URL(f"{self._url}{request.url.path}{query}", encoded=True)
        passed_on = {name: value for name in _PASSED_ON if (value := request.headers.get(name)) is not None}
        self._asked += 1
        try:
            async with self._session.request(request.method, url, headers=passed_on, allow_redirects=False) as answer:
                await _pass_on(answer, send, self._ends(scope))
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            log.info("the console does not answer: %r", error)
            await _away(request)(scope, receive, send)
        finally:
            self._asked -= 1

    def _ends(self, scope: Scope) -> _Ends:
        return _Ends(self.gate.stop if self.gate is not None else asyncio.Event(), peer_of(scope))


class _Relay(Response):
    """An answer that is somebody else's."""

    def __init__(self, console: Console, request: Request) -> None:
        super().__init__()
        self._console = console
        self._request = request

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._console.relay(self._request, scope, receive, send)


class _Ends:
    """What ends an answer before its own end: `stop` of this process, or that the reader has gone."""

    def __init__(self, stop: asyncio.Event, peer: Peer | None) -> None:
        self._stop = stop
        self._peer = peer

    async def wait(self) -> None:
        events = [self._stop] if self._peer is None else [self._stop, self._peer.gone]
        waiting = [asyncio.ensure_future(event.wait()) for event in events]
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for each in waiting:
                each.cancel()

    def cut(self) -> None:
        """Cut the connection: the reader must not take what it has for all of it."""
        if self._peer is not None:
            self._peer.abort()


async def _pass_on(answer: aiohttp.ClientResponse, send: Send, ends: _Ends) -> None:
    """Raises what aiohttp raises before anything has been sent; from then on only the connection can say that it failed."""
    headers = list(_kept(answer.headers.items(), answer.headers.get("connection", "")))
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    pumping = asyncio.ensure_future(_pump(answer, send))
    ending = asyncio.ensure_future(ends.wait())
    try:
        await asyncio.wait({pumping, ending}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for each in (pumping, ending):
            each.cancel()
        await asyncio.wait({pumping, ending})
    if not pumping.cancelled() and (error := pumping.exception()) is not None:
        log.info("an answer of the console broke off: %r", error)
        ends.cut()
    elif pumping.cancelled() and "content-length" in answer.headers:
        ends.cut()
    else:
        await send({"type": "http.response.body", "body": b""})


async def _pump(answer: aiohttp.ClientResponse, send: Send) -> None:
    async for piece in answer.content.iter_any():
        async with asyncio.timeout(STALLED_SECONDS):
            await send({"type": "http.response.body", "body": piece, "more_body": True})


def _kept(headers: Iterable[tuple[str, str]], connection: str) -> Iterable[tuple[bytes, bytes]]:
    dropped = _OF_ONE_HOP | {name.strip().lower() for name in connection.split(",")}
    for name, value in headers:
        if name.lower() not in dropped:
            yield name.lower().encode("latin-1"), value.encode("latin-1")


def _away(request: Request) -> Response:
    if "text/html" in request.headers.get("accept", ""):
        headers = {"retry-after": "3", "content-security-policy": _AWAY_POLICY}
        return Response(_AWAY, 503, headers, "text/html")
    error = PortcullisError(ErrorCode.STAGE_UNAVAILABLE, "The console is not running.", retry_after=3)
    return problems.respond(error, call_of(request.scope).request_id)


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[Console]:
    """The way to the console, whether it is there or not."""
    session = aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=MAX_AT_A_TIME, keepalive_timeout=KEEPALIVE_SECONDS),
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=SILENT_SECONDS),
        trust_env=False,
        auto_decompress=False,
        skip_auto_headers=("Accept-Encoding", "User-Agent"),
    )
    async with session:
        yield Console(url, session)
