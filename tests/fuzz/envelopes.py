"""What is around a message: headers and reply subject. The server passes on nearly anything in both."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from typing import Any, Final

from nats.aio.client import Client
from nats.aio.subscription import Subscription
from nats.protocol.parser import Parser

from libs.common.bus import HEADER_RESERVE_BYTES
from libs.common.clock import ManualClock
from libs.common.context import (
    DEADLINE_HEADER,
    REQUEST_ID_HEADER,
    TIME_LEFT_HEADER,
    TIMINGS_HEADER,
    TRACEPARENT_HEADER,
    RequestContext,
    from_headers,
)
from libs.common.errors import ErrorCode, PortcullisError
from libs.common.guard import guard
from libs.common.stages import origin_of
from libs.common.subjects import INBOX_PREFIX

_CLOCK: Final = ManualClock()
_SUBJECT: Final = b"jobs.v1.a1B2c3D4e5F6.submit"
_NEXT: Final = b"MSG " + _SUBJECT + b" 1 4\r\nnext\r\n"
_NO_REPLY_BYTES: Final = b" \t\r\n"
_MOST_REPLY_BYTES: Final = 1000  # a control line of the server's has at most 4096


async def _receive(reply: bytes, headers: bytes) -> list[Any]:
    """The messages that a guarded connection gives its subscription: of one with such an envelope, and of the one behind it."""
    connection = Client()
    guard(connection)

    async def error(_: Exception) -> None:
        pass

    connection._error_cb = error
    subscription = Subscription(connection, 1, _SUBJECT.decode())
    connection._subs = {1: subscription}
    size = len(headers)
    operation = b"HMSG %b 1 %b%d %d\r\n" if size else b"MSG %b 1 %b%.0d%d\r\n"
    frame = operation % (_SUBJECT, reply + b" " if reply else b"", size, size) + headers + b"\r\n"
    await Parser(connection).parse(frame + _NEXT)
    return [subscription._pending_queue.get_nowait() for _ in range(subscription._pending_queue.qsize())]


_RUNNER: Final = asyncio.Runner(loop_factory=asyncio.new_event_loop)


def run(data: bytes) -> None:
    """The first line is the reply subject, the rest the headers as they are on the wire."""
    first, _, headers = data.partition(b"\n")
    reply = first.translate(None, _NO_REPLY_BYTES)[:_MOST_REPLY_BYTES]
    *before, last = _RUNNER.run(_receive(reply, headers))
    assert last.data == b"next", "what came behind it was not read"
    assert len(before) == 1
    (message,) = before
    origin = origin_of(message.reply)
    if origin is not None:
        assert origin.startswith(f"{INBOX_PREFIX}.")
        assert origin.isascii()
        assert not set(origin) & set(" *>\r\n\0")
    try:
        context = from_headers(message.headers or {}, _CLOCK, origin)
    except PortcullisError as error:
        if error.code != ErrorCode.BAD_REQUEST:
            raise
        return
    _check(context, origin)


def _check(context: RequestContext, origin: str | None) -> None:
    assert math.isfinite(context.remaining_seconds(_CLOCK))
    assert all(map(math.isfinite, context.timings.values())), "no JSON holds such a number"
    sent = context.outgoing(_CLOCK)
    size = sum(len(name) + len(value) + 4 for name, value in sent.items())
    assert size <= HEADER_RESERVE_BYTES, f"{size} bytes of headers: with a large body that ends the connection"
    assert all(value.isascii() and value.isprintable() for value in sent.values())
    again = from_headers(sent, _CLOCK, origin)
    assert again.outgoing(_CLOCK) == sent, "sent on twice, it says something else"


def seeds() -> Iterator[bytes]:
    whole = (
        b"NATS/1.0\r\nPortcullis-Deadline: 1800000000000\r\nPortcullis-Time-Left: 10000\r\nPortcullis-Request-Id: request-1\r\n"
        b"traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\r\n"
        b"Portcullis-Timings: auth=0.410,limiter=0.520,detector_proxy=12.3\r\n\r\n"
    )
    reply = b"_INBOX.auth.0a1b2c3d4e5f._INBOX.edge.5f4e3d2c1b0a.1f"
    yield reply + b"\n" + whole
    yield b"_INBOX.edge.5f4e.1\n" + whole.replace(b"1800000000000", b"-1")
    yield b"\n" + whole.replace(b": ", b":\t")
    yield b"_INBOX.*.>\n" + whole.replace(b"request-1", b"a b\xff")
    yield b"\n"
    yield reply + b"\nNATS/1.0 503\r\n\r\n"
    yield reply + b"\nNATS/1.0 100 Idle Heartbeat\r\nNats-Last-Consumer: 1016\r\n\r\n"
    yield reply + b"\nNATS/1.0\r\nPortcullis-Deadline: 1_0\r\nPortcullis-Timings: auth=1e-3,=,x=inf,auth=2\r\n\r\n"


def words() -> Iterator[str]:
    headers = (DEADLINE_HEADER, TIME_LEFT_HEADER, REQUEST_ID_HEADER, TRACEPARENT_HEADER, TIMINGS_HEADER)
    yield from (f"{name}: " for name in headers)
    yield from (
        "NATS/1.0",
        "\r\n",
        "\r\n\r\n",
        "_INBOX",
        "_INBOX.",
        ".",
        ",",
        "=",
        "auth=1.5",
        "nan",
        "inf",
        "1e308",
        "-0",
        "1_0",
        "00-",
    )
