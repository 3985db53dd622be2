"""The console over HTTP: its pages, what they read (JSON and server-sent events), and the receiver of traces."""

from __future__ import annotations

import asyncio
import hashlib
import mimetypes
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final, get_args

import msgspec
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from libs.common import VERSION
from services.console import otlp
from services.console.core import Order, Query, TraceStore, Wanted
from services.console.fleet import Fleet
from services.console.guard import Guard
from services.console.hub import FullError, Hub

STATIC: Final = Path(__file__).parent / "static"
PREFIX: Final = "/console"

MAX_LISTED: Final = 200
MAX_SEARCH: Final = 128
MAX_RECEIVED_AT_A_TIME: Final = 4
"""Messages with traces; each is held whole, so this bounds the memory that they take."""
RECEIVE_SECONDS: Final = 10.0
SEND_SECONDS: Final = 20.0
"""A watcher who has not taken the last message by then is not watching."""
STREAM_SECONDS: Final = 600.0
"""Then a stream ends, and the page asks for another: whoever has lost the token in the meantime sees no more."""

POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
_PAGE_HEADERS: Final = {
    "content-security-policy": POLICY,
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "cache-control": "no-cache",
}
_PROTOBUF: Final = "application/x-protobuf"
_encode = msgspec.json.Encoder().encode

Endpoint = Callable[[Request], Awaitable[Response]]


def build(store: TraceStore, fleet: Fleet, hub: Hub, guard: Guard, slow_ms: float) -> ASGIApp:
    """The whole of it as one ASGI application."""
    api = Api(store, fleet, hub, guard, slow_ms)
    receiver = Receiver(store)
    app = Starlette(
        routes=[
            Route(PREFIX, _to_the_page),
            Route(f"{PREFIX}/", _page),
            Route(f"{PREFIX}/static/{{name}}", _static),
            Route(f"{PREFIX}/api/session", api.session),
            Route(f"{PREFIX}/api/traces", api.guarded(api.traces)),
            Route(f"{PREFIX}/api/traces/{{trace_id}}", api.guarded(api.trace)),
            Route(f"{PREFIX}/api/live", api.guarded(api.live)),
            Route("/v1/traces", receiver.take, methods=["POST"]),
            Route("/health/live", _alive),
        ],
        exception_handlers={HTTPException: _refused, ClientDisconnect: _gone},
    )
    app.router.redirect_slashes = False
    return _Doorkeeper(app, guard)


class _Doorkeeper:
    """Around everything: names that are not this machine's are refused, and nothing is guessed from what is sent."""

    def __init__(self, app: ASGIApp, guard: Guard) -> None:
        self._app = app
        self._guard = guard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def stamped(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["x-content-type-options"] = "nosniff"
                headers.setdefault("cache-control", "no-store")
            await send(message)

        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        app: ASGIApp = (
            self._app if self._guard.host_is_fine(headers) else _say(403, "This console answers to loopback names alone.")
        )
        await app(scope, receive, stamped)


class Api:
    """What the pages read."""

    def __init__(self, store: TraceStore, fleet: Fleet, hub: Hub, guard: Guard, slow_ms: float) -> None:
        self._store = store
        self._fleet = fleet
        self._hub = hub
        self._guard = guard
        self._slow_ms = slow_ms

    def guarded(self, endpoint: Endpoint) -> Endpoint:
        async def wrapped(request: Request) -> Response:
            verdict = self._guard.judge(request.headers)
            if verdict == "token":
                return _say(401, "The admin token is needed, in Authorization: Bearer.", {"www-authenticate": "Bearer"})
            if verdict == "never":
                return _say(403, "The console is closed: set PORTCULLIS_ADMIN_TOKEN for it, and call it from its own page.")
            return await endpoint(request)

        return wrapped

    async def session(self, request: Request) -> Response:
        """What a page must know before it asks for anything: whether this browser may look already."""
        return _json({"access": self._guard.judge(request.headers), "version": VERSION, "slow_ms": self._slow_ms})

    async def traces(self, request: Request) -> Response:
        """The last traces, with how many there are of each kind."""
        found = self._store.find(_query(request.query_params))
        return _json({"traces": found, "counts": self._store.counts(), "revision": self._store.revision})

    async def trace(self, request: Request) -> Response:
        """One trace as a tree; null when it is not here: pages ask for traces that are still on their way."""
        return _json(self._store.get(request.path_params["trace_id"].lower()))

    async def live(self, _: Request) -> Response:
        """Server-sent events: `history` once, then `fleet` every second, and `traces` when there are new ones."""
        return _Stream(self._hub, _encode(self._fleet.history()))


def _query(given: Any) -> Query:
    limit = given.get("limit", "")
    show, order = given.get("show", "all"), given.get("order", "notable")
    if show not in get_args(Wanted) or order not in get_args(Order):
        raise HTTPException(422, "show and order are not free to choose; see the page's own calls")
    return Query(
        search=given.get("search", "")[:MAX_SEARCH],
        show=show,
        order=order,
        service=given.get("service", "")[:MAX_SEARCH],
        limit=min(MAX_LISTED, max(1, int(limit))) if limit.isascii() and limit.isdecimal() and len(limit) < 6 else 50,
    )


class _Stream(Response):
    """Server-sent events, to a reader who may stop to read, or leave, whenever it likes."""

    def __init__(self, hub: Hub, history: bytes) -> None:
        super().__init__(media_type="text/event-stream", headers={"x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._hub = hub
        self._history = history

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with self._hub.watch() as watcher:
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                left = asyncio.ensure_future(_until_gone(receive))
                telling = asyncio.ensure_future(self._tell(watcher.messages(), send))
                try:
                    await asyncio.wait({left, telling}, timeout=STREAM_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    left.cancel()
                    telling.cancel()
                    await asyncio.wait({left, telling})
                if not telling.cancelled() and telling.exception() is not None:
                    return  # nobody reads
                if not left.done() or left.cancelled():
                    await send({"type": "http.response.body", "body": b""})
        except FullError:
            await _say(503, "So many are watching that no more may.", {"retry-after": "5"})(scope, receive, send)

    async def _tell(self, messages: Any, send: Send) -> None:
        await _event(send, "history", self._history)
        async for event, data in messages:
            await _event(send, event, data)


async def _event(send: Send, event: str, data: bytes) -> None:
    async with asyncio.timeout(SEND_SECONDS):
        body = b"event: %b\ndata: %b\n\n" % (event.encode(), data)
        await send({"type": "http.response.body", "body": body, "more_body": True})


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Receiver:
    """OTLP over HTTP, as every OpenTelemetry exporter sends it."""

    def __init__(self, store: TraceStore) -> None:
        self._store = store
        self._receiving = 0

    async def take(self, request: Request) -> Response:
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != _PROTOBUF:
            # A page in a browser may send a form's types anywhere, and this one nowhere.
            return _say(415, f"Send {_PROTOBUF}.")
        if self._receiving >= MAX_RECEIVED_AT_A_TIME:
            return _say(503, "Too many traces at a time.", {"retry-after": "1"})
        self._receiving += 1
        try:
            async with asyncio.timeout(RECEIVE_SECONDS):
                body = await _bounded(request)
            plain = otlp.unpack(body, request.headers.get("content-encoding", "").strip().lower())
            spans, refused = otlp.read(plain)
        except otlp.UnreadableError as error:
            return _say(400, f"{str(error).capitalize()}.")
        except TimeoutError:
            return _say(408, "The body did not arrive in time.")
        finally:
            self._receiving -= 1
        self._store.add(spans)
        return Response(otlp.answer(refused), media_type=_PROTOBUF)


async def _bounded(request: Request) -> bytes:
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > otlp.MAX_BODY_BYTES:
            raise HTTPException(413, f"The body is larger than {otlp.MAX_BODY_BYTES} bytes.")
    return bytes(body)


# --- pages ---------------------------------------------------------------------------------------------------------------


class _File(msgspec.Struct, frozen=True):
    content: bytes
    media_type: str
    etag: str


def _read_static() -> dict[str, _File]:
    found = {}
    for path in STATIC.iterdir():
        content = path.read_bytes()
        kind = "text/javascript" if path.suffix == ".js" else mimetypes.guess_type(path.name)[0] or "application/octet-stream"
        found[path.name] = _File(content, kind, f'"{hashlib.sha256(content).hexdigest()[:24]}"')
    return found


_FILES: Final = _read_static()


async def _to_the_page(_: Request) -> Response:
    return RedirectResponse(f"{PREFIX}/", 308)


async def _page(request: Request) -> Response:
    return _answer_file(request, _FILES["index.html"])


async def _static(request: Request) -> Response:
    found = _FILES.get(request.path_params["name"])
    return _answer_file(request, found) if found is not None else _say(404, "There is nothing here by that name.")


def _answer_file(request: Request, file: _File) -> Response:
    headers = {**_PAGE_HEADERS, "etag": file.etag}
    if file.etag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(file.content, headers=headers, media_type=file.media_type)


# --- answers -------------------------------------------------------------------------------------------------------------


async def _alive(_: Request) -> Response:
    return _json({"status": "alive"})


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _say(error.status_code, str(error.detail), dict(error.headers or {}))


async def _gone(_: Request, __: Exception) -> Response:
    return Response(status_code=499)


def _json(value: object) -> Response:
    return Response(_encode(value), media_type="application/json")


def _say(status: int, detail: str, headers: dict[str, str] | None = None) -> Response:
    """As the gateway's own errors are (RFC 9457)."""
    return Response(_encode({"status": status, "detail": detail}), status, headers, "application/problem+json")
