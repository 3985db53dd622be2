"""Reading a body: counted while it comes, bounded each and in all, and not for ever."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.requests import ClientDisconnect
from starlette.types import Receive

from libs.common.errors import ErrorCode, PortcullisError
from libs.common.timeouts import within
from services.edge import core
from services.edge.metrics import Shed, shed


class Bodies:
    """`held`: bytes of all bodies that are in memory now."""

    def __init__(self, max_bytes: int, max_held: int, timeout_seconds: float) -> None:
        self.held = 0
        self._max_bytes = max_bytes
        self._max_held = max_held
        self._timeout_seconds = timeout_seconds

    @asynccontextmanager
    async def read(
        self, headers: core.Headers, receive: Receive, remaining_seconds: float = math.inf
    ) -> AsyncIterator[bytes | bytearray]:
        """The whole body, held until the block ends.

        Raises PAYLOAD_TOO_LARGE, OVERLOADED (too much held by all), DEADLINE_EXCEEDED after `remaining_seconds`, or BAD_REQUEST
        when the body's own time is over before; `ClientDisconnect` when the caller has gone.
        """
        if int(headers.get(b"content-length", b"0")) > self._max_bytes:
            raise PortcullisError(ErrorCode.PAYLOAD_TOO_LARGE)
        body = bytearray()
        timeout_seconds = min(remaining_seconds, self._timeout_seconds)
        try:
            try:
                with within(timeout_seconds):
                    while await self._append(body, receive):
                        pass
            except TimeoutError:
                if timeout_seconds == remaining_seconds:
                    raise PortcullisError(ErrorCode.DEADLINE_EXCEEDED) from None
                raise PortcullisError(ErrorCode.BAD_REQUEST, "The body did not arrive in time.") from None
            yield body
        finally:
            self.held -= len(body)

    async def _append(self, body: bytearray, receive: Receive) -> bool:
        """Take the next piece; False after the last."""
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        piece: bytes = message.get("body", b"")
        if len(body) + len(piece) > self._max_bytes:
            raise PortcullisError(ErrorCode.PAYLOAD_TOO_LARGE)
        if self.held + len(piece) > self._max_held:
            shed(Shed.BODIES)
            raise PortcullisError(ErrorCode.OVERLOADED, internal="the bodies in hand are too large together")
        self.held += len(piece)
        body += piece
        return bool(message.get("more_body", False))
