"""One connection to an engine: HTTP/1.1 as httptools reads it, one request at a time, and nothing believed that it says.

A library's client would do, and did: aiohttp's took several times the processor time of this, and was the largest part of what
a detection costs (docs/adr/0019-the-engine-is-asked-over-connections-of-our-own.md).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import httptools

from services.detector_proxy.ports import EngineError

MAX_BODY_BYTES: Final = 1024 * 1024
MAX_HEADERS: Final = 128
MAX_HEADER_BYTES: Final = 8190
"""Of one header, name and value."""
MAX_HEAD_BYTES: Final = 64 * 1024
MAX_FRAMED_BYTES: Final = 8 * MAX_BODY_BYTES
"""Of everything that is received for one answer: chunks of a byte each are mostly frame."""

Headers = dict[bytes, bytes]
"""By lower-case name, the last of equal names."""
Check = Callable[[int, Headers], None]
"""Looks at the status and the headers of an answer before its body; raises `EngineError` where that need not be read."""


@dataclass(frozen=True, slots=True)
class HttpReply:
    """`body`: at most `MAX_BODY_BYTES`; empty when only the head was asked for."""

    status: int
    body: bytes


class Connection(asyncio.Protocol):
    """What `loop.create_connection` makes. It can be used again while `reusable`."""

    def __init__(self) -> None:
        self.idle_since = 0.0
        self._is_clean = False
        self._answer: asyncio.Future[HttpReply] | None = None
        self._begin_head()

    @property
    def reusable(self) -> bool:
        """Whether its last answer has been read to the end, nothing came after that, and it is still there."""
        return self._is_clean and not self._transport.is_closing()

    async def ask(self, request: bytes, check: Check, *, head_only: bool = False) -> HttpReply:
        """Send a whole request, and read its answer, or only the head of it.

        Raises what `check` raises, or `EngineError`: unreachable (no answer), cut_off (not all of it), bad_http, too_large.
        Whoever is cancelled in the middle has closed it.
        """
        if self._transport.is_closing():  # no sooner made than lost
            raise EngineError("unreachable")
        self._is_clean = self._is_complete = False
        self._check, self._head_only = check, head_only
        self._received = 0
        self._body = bytearray()
        self._parser = httptools.HttpResponseParser(self)
        self._begin_head()
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            return await self._answer
        finally:
            self._answer = None
            if not self.reusable:
                self.close()

    def close(self) -> None:
        self._is_clean = False
        self._transport.abort()

    # --- asyncio.Protocol ------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as for every TCP connection
        self._transport = transport

    def connection_lost(self, _: Exception | None) -> None:
        self._is_clean = False
        if not self._has_head:
            self._fail(EngineError("unreachable"))
        elif self._is_sized:
            self._fail(EngineError("cut_off"))
        else:  # without a length it ends with the connection
            self._succeed()

    def data_received(self, data: bytes) -> None:
        if not self._is_awaited:
            self.close()  # nobody has asked for it
            return
        self._received += len(data)
        self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._fail(EngineError("bad_http"))
        if not self._has_head and self._head_bytes > MAX_HEAD_BYTES:
            self._fail(EngineError("bad_http"))
        elif self._received > MAX_FRAMED_BYTES:
            self._fail(EngineError("too_large"))

    # --- httptools -------------------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        if self._has_head:
            self._is_clean = False  # another answer, that nobody has asked for

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._has_head:
            return  # after the body: nothing that is wanted
        self._headers[name.lower()] = value
        self._header_count += 1
        if self._header_count > MAX_HEADERS or len(name) + len(value) > MAX_HEADER_BYTES:
            self._fail(EngineError("bad_http"))

    def on_headers_complete(self) -> None:
        self._status = self._parser.get_status_code()
        if 100 <= self._status < 200 or not self._is_awaited:
            return
        self._has_head = True
        self._is_sized = b"content-length" in self._headers or b"transfer-encoding" in self._headers
        try:
            self._check(self._status, self._headers)
        except EngineError as error:
            self._fail(error)
            return
        if self._head_only:
            self._succeed()

    def on_body(self, body: bytes) -> None:
        if self._is_awaited:
            self._body += body
            if len(self._body) > MAX_BODY_BYTES:
                self._fail(EngineError("too_large"))

    def on_message_complete(self) -> None:
        if not self._has_head:
            self._begin_head()  # an interim answer; the real one follows
        elif self._is_complete:
            self._is_clean = False
        else:
            self._is_complete = True
            self._is_clean = self._parser.should_keep_alive()
            self._succeed()

    # --- what they share -------------------------------------------------------------------------------------------------

    @property
    def _is_awaited(self) -> bool:
        return self._answer is not None and not self._answer.done()

    def _begin_head(self) -> None:
        self._headers: Headers = {}
        self._header_count = self._head_bytes = self._status = 0
        self._has_head = self._is_sized = False

    def _succeed(self) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(HttpReply(self._status, bytes(self._body)))

    def _fail(self, error: EngineError) -> None:
        self._is_clean = False
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error)
