"""Where the items of a batch or a job come from: a list that has been read, or lines as they arrive."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Protocol

from starlette.requests import ClientDisconnect
from starlette.types import Receive

from libs.common.errors import ErrorCode, PortcullisError
from services.edge import items
from services.edge.items import Entry, Lines

STOPPING = "The gateway is about to stop; send the rest again."


class Feed(Protocol):
    """Where items come from."""

    next_index: int
    """The place of the item that comes next."""

    async def take(self, most: int, characters: int) -> list[Entry]:
        """Some items, as soon as there are any; none at the end.

        Raises `PortcullisError` or `Refused` when there will be no more for another reason, `ClientDisconnect` when the caller
        has gone.
        """
        ...


class ListFeed:
    def __init__(self, entries: list[Entry]) -> None:
        self.next_index = 0
        self._entries = entries

    async def take(self, most: int, characters: int) -> list[Entry]:
        start, taken = self.next_index, 0
        for entry in self._entries[start : start + most]:
            characters -= len(entry.text)
            if taken and characters < 0:
                break
            taken += 1
        self.next_index += taken
        return self._entries[start : self.next_index]

    @property
    def left(self) -> int:
        return len(self._entries) - self.next_index


class ChargedFeed:
    """Charges the items of `feed` in slices: at first a single one, and twice as many each time, so that a small key gets as far
    as it can, and a long upload is not held up by asking."""

    def __init__(self, feed: NdjsonFeed, charge: Callable[[int], Awaitable[None]]) -> None:
        self.next_index = 0
        self.ended = feed.ended
        self._feed = feed
        self._charge = charge
        self._slice = 1
        self._charged = ListFeed([])

    async def take(self, most: int, characters: int) -> list[Entry]:
        if not self._charged.left:
            entries = await self._feed.take(self._slice, items.MAX_CHARGED_CHARACTERS)
            if units := sum(entry.error is None for entry in entries):
                await self._charge(units)
            self._slice = min(items.MAX_CHARGED, 2 * self._slice)
            self._charged = ListFeed(entries)
        entries = await self._charged.take(most, characters)
        self.next_index += len(entries)
        return entries


class NdjsonFeed:
    """Items as they arrive, nothing charged. `most_items` None: any number; a line of more than `most_bytes` becomes an error,
    and none of it is kept."""

    def __init__(
        self, receive: Receive, stop: asyncio.Event, *, most_bytes: int, most_items: int | None, idle_seconds: float
    ) -> None:
        self.next_index = 0
        self.ended = asyncio.Event()
        self._receive = receive
        self._stop = stop
        self._lines = Lines(most_bytes)
        self._most_bytes = most_bytes
        self._most_items = most_items
        self._idle_seconds = idle_seconds

    async def take(self, most: int, characters: int) -> list[Entry]:
        if self._stop.is_set():
            raise PortcullisError(ErrorCode.STAGE_UNAVAILABLE, STOPPING)
        while not self._lines.whole and not self.ended.is_set():
            await self._read()
        entries: list[Entry] = []
        lines = self._lines.whole
        while lines and len(entries) < most:
            if self._most_items is not None and self.next_index >= self._most_items:
                if entries:
                    break
                raise PortcullisError(
                    ErrorCode.PAYLOAD_TOO_LARGE, f"An answer in one piece holds {self._most_items} items; ask for a stream."
                )
            line = lines[0]
            characters -= len(line or b"")
            if entries and characters < 0:
                break
            lines.popleft()
            entries.append(self._entry(line))
            self.next_index += 1
        return entries

    def _entry(self, line: bytes | None) -> Entry:
        if line is None:
            error = PortcullisError(ErrorCode.PAYLOAD_TOO_LARGE, f"The line is longer than {self._most_bytes} bytes.")
            return Entry(self.next_index, None, error=error)
        return items.read_line(line, self.next_index)

    async def _read(self) -> None:
        receiving = asyncio.ensure_future(self._receive())
        stopping = asyncio.ensure_future(self._stop.wait())
        try:
            await asyncio.wait({receiving, stopping}, timeout=self._idle_seconds, return_when=asyncio.FIRST_COMPLETED)
            if not receiving.done():
                if stopping.done():
                    raise PortcullisError(ErrorCode.STAGE_UNAVAILABLE, STOPPING)
                raise PortcullisError(ErrorCode.BAD_REQUEST, f"Nothing arrived for {self._idle_seconds:.0f} seconds.")
            message = receiving.result()
        finally:
            receiving.cancel()
            stopping.cancel()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        self._lines.add(message.get("body", b""))
        if not message.get("more_body", False):
            self._lines.end()
            self.ended.set()
