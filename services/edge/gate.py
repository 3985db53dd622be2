"""The first and the last that a request meets: an ASGI wrapper around everything else.

It refuses what is not fit to be looked at (headers, host, too many at once), gives each request its id and its deadline's
beginning, stamps every answer, counts it, and is the one place where an unexpected exception ends.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import re
from collections import Counter as Count
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

from prometheus_client import Counter, Histogram
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from libs.common import telemetry, tracing
from libs.common.clock import Clock
from libs.common.context import REQUEST_ID_PATTERN, TRACEPARENT_PATTERN, new_request_id, new_traceparent
from libs.common.errors import ErrorCode, PortcullisError
from services.edge import core, problems
from services.edge.metrics import DURATION, IN_FLIGHT, IN_FLIGHT_LIMIT, REQUESTS, CallMeters, Shed, shed, status_class
from services.edge.settings import EdgeSettings

log = logging.getLogger(__name__)

MAX_HEADERS = 100
_UNMATCHED = "unmatched"
_METHODS = frozenset({"GET", "POST", "PATCH", "DELETE", "PUT", "HEAD", "OPTIONS"})
# Whoever sends one of these twice wants it to be read in two ways: one by what stands in front of us, the other by us.
_ONCE = (
    b"authorization",
    b"content-encoding",
    b"content-type",
    b"idempotency-key",
    b"x-admin-token",
    b"x-api-key",
    b"x-request-timeout",
)
# Operators look at a full gateway most of all, so these are answered whatever is in flight.
# They have no traces either: asked every few seconds by machines, or watched for hours, nobody would look for them.
_ALWAYS = ("/health", "/metrics", "/console")

CALL = "portcullis.call"
"""Where the `Call` is in the ASGI scope."""


@dataclass(slots=True)
class Call:
    """One request. `headers`: by lower-case name, the last of equal names; `arrived`: monotonic seconds.

    `traceparent`: of the edge's own span, under which everything else happens.
    """

    request_id: str
    traceparent: str
    headers: dict[bytes, bytes]
    arrived: float


def call_of(scope: MutableMapping[str, Any]) -> Call:
    call: Call = scope[CALL]
    return call


class Gate:
    """ASGI in, ASGI out. `stop` is set when the process is about to: every answer from then on closes its connection."""

    def __init__(self, app: ASGIApp, settings: EdgeSettings, clock: Clock) -> None:
        self.stop = asyncio.Event()
        self.in_flight = 0
        self._app = app
        self._clock = clock
        self._allowed_hosts = settings.allowed_host_names
        self._max_header_bytes = settings.max_header_bytes
        self._max_in_flight = settings.edge_max_in_flight
        IN_FLIGHT.set_function(lambda: self.in_flight)
        IN_FLIGHT_LIMIT.set(self._max_in_flight)
        self.meters = CallMeters(lambda: self.in_flight)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        arrived = self._clock.monotonic()
        headers = dict(scope["headers"])
        traceparent = _sane(headers.get(b"traceparent"), TRACEPARENT_PATTERN) or ""
        span = tracing.NO_SPAN
        if not scope["path"].startswith(_ALWAYS):
            span = tracing.root("", tracing.SERVER, traceparent)
            span.set("portcullis.outcome", "ok")  # until something else is said
        call = scope[CALL] = Call(
            _sane(headers.get(b"x-request-id"), REQUEST_ID_PATTERN) or new_request_id(),
            span.traceparent or traceparent or new_traceparent(),
            headers,
            arrived,
        )
        telemetry.request_id_var.set(call.request_id)
        tracing.enter(call.traceparent, span or None)
        status = 0

        async def stamped(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own: list[tuple[bytes, bytes]] = message["headers"]
                own.append((b"x-request-id", call.request_id.encode("ascii")))
                own.append((b"x-content-type-options", b"nosniff"))
                if not any(name == b"cache-control" for name, _ in own):
                    own.append((b"cache-control", b"no-store"))
                if self.stop.is_set():
                    own.append((b"connection", b"close"))
            await send(message)

        counted = not scope["path"].startswith(_ALWAYS)
        refusal = self._refusal(scope, headers, counted)
        if counted:
            self.in_flight += 1
        try:
            if refusal is not None:
                await problems.respond(refusal, call.request_id)(scope, receive, stamped)
            else:
                await self._app(scope, receive, stamped)
        except Exception:
            # The one catch-all of the edge: a bug is answered like a failed stage, and told to the log.
            log.exception("%s failed", _route(scope))
            if not status:
                await _internal(call)(scope, receive, stamped)
        finally:
            if counted:
                self.in_flight -= 1
            route = _route(scope)
            method = scope["method"] if scope["method"] in _METHODS else "other"
            if span:
                _end(span, call, method, route, status)
            requests, durations = _series(method, route, status)
            requests.inc()
            spent_seconds = self._clock.monotonic() - arrived
            durations.observe(spent_seconds, telemetry.exemplar())
            if counted:
                self.meters.count(route, status, spent_seconds)

    def _refusal(self, scope: Scope, headers: dict[bytes, bytes], counted: bool) -> PortcullisError | None:
        raw: list[tuple[bytes, bytes]] = scope["headers"]
        size = len(scope.get("raw_path", b"")) + len(scope["query_string"])
        hosts = 0
        for name, value in raw:
            size += len(name) + len(value) + 4  # ": " and the end of the line
            hosts += name == b"host"
        if size > self._max_header_bytes or len(raw) > MAX_HEADERS:
            return PortcullisError(ErrorCode.HEADERS_TOO_LARGE)
        if len(headers) < len(raw) and (repeated := _repeated(raw)) is not None:
            return PortcullisError(ErrorCode.BAD_REQUEST, f"The header {repeated} is there more than once.")
        # HTTP/1.0 had no Host header.
        if hosts != 1 and not (hosts == 0 and scope["http_version"] == "1.0"):
            return PortcullisError(ErrorCode.BAD_REQUEST, "Exactly one Host header is needed.")
        if hosts and not core.host_allowed(headers[b"host"].decode("latin-1"), self._allowed_hosts):
            return PortcullisError(ErrorCode.BAD_REQUEST, "This gateway does not answer to the name in the Host header.")
        if counted and self.in_flight >= self._max_in_flight:
            shed(Shed.FULL)
            return PortcullisError(ErrorCode.OVERLOADED)
        return None


def _repeated(raw: list[tuple[bytes, bytes]]) -> str | None:
    counts = Count(name for name, _ in raw)
    return next((name.decode("ascii") for name in _ONCE if counts[name] > 1), None)


def _sane(value: bytes | None, pattern: re.Pattern[str]) -> str | None:
    if value is None:
        return None
    text = value.decode("latin-1")
    return text if pattern.fullmatch(text) else None


@functools.cache
def _series(method: str, route: str, status: int) -> tuple[Counter, Histogram]:
    """`labels()` costs more than the counting, and there are few of these."""
    return REQUESTS.labels(method, route, status), DURATION.labels(route, status_class(status))


def _route(scope: Scope) -> str:
    """The template of the path, never the path itself: labels stay few, whatever is asked for."""
    route = scope.get("route")
    return getattr(route, "path", _UNMATCHED)


def _end(span: tracing.Span, call: Call, method: str, route: str, status: int) -> None:
    """https://opentelemetry.io/docs/specs/semconv/http/http-spans/: a refusal is not the server's error."""
    span.name = f"{method} {route}" if route != _UNMATCHED else method
    span.set("http.request.method", method)
    span.set("http.route", route)
    span.set("portcullis.request_id", call.request_id)
    if status:
        span.set("http.response.status_code", status)
    else:
        span.set("portcullis.outcome", "caller_gone")
    if status >= 500:
        span.fail(str(status))
    span.refused = span.refused or 400 <= status < 500
    span.end()


def _internal(call: Call) -> Response:
    return problems.respond(PortcullisError(ErrorCode.INTERNAL), call.request_id)
