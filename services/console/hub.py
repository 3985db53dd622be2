"""Whoever watches: each is told the newest of everything, and nothing is kept for those who read slowly."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Final

MAX_WATCHERS: Final = 32


class FullError(Exception):
    """So many are watching that no more may."""


class Watcher:
    """`wait` gives what is new, by name of event: of each only the last."""

    def __init__(self) -> None:
        self._new: dict[str, bytes] = {}
        self._something = asyncio.Event()
        self._over = False

    def tell(self, event: str, data: bytes) -> None:
        self._new[event] = data
        self._something.set()

    def end(self) -> None:
        self._over = True
        self._something.set()

    async def messages(self) -> AsyncIterator[tuple[str, bytes]]:
        """Until the console stops."""
        while True:
            await self._something.wait()
            if self._over:
                return
            self._something.clear()
            new, self._new = self._new, {}
            for pair in new.items():
                yield pair


class Hub:
    """All watchers. One that comes is first told the last of every event."""

    def __init__(self, most: int = MAX_WATCHERS) -> None:
        self._most = most
        self._watchers: set[Watcher] = set()
        self._last: dict[str, bytes] = {}
        self._closed = False
        self.has_watchers = asyncio.Event()

    @property
    def watchers(self) -> int:
        return len(self._watchers)

    def tell(self, event: str, data: bytes) -> None:
        self._last[event] = data
        for watcher in self._watchers:
            watcher.tell(event, data)

    @contextmanager
    def watch(self) -> Iterator[Watcher]:
        """Raises `FullError`."""
        if self._closed or len(self._watchers) >= self._most:
            raise FullError
        watcher = Watcher()
        for event, data in self._last.items():
            watcher.tell(event, data)
        self._watchers.add(watcher)
        self.has_watchers.set()
        try:
            yield watcher
        finally:
            self._watchers.discard(watcher)
            if not self._watchers:
                self.has_watchers.clear()

    def close(self) -> None:
        """The console stops: every watcher's messages end."""
        self._closed = True
        for watcher in self._watchers:
            watcher.end()
