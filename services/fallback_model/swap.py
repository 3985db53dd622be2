"""The detector in use, exchangeable while requests are under way."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from services.fallback_model.detector import Detector


class Slot:
    """Holds one detector. A request keeps the one that it began with until its end, whatever is swapped in meanwhile."""

    def __init__(self, detector: Detector) -> None:
        self._detector = detector
        self._users: Counter[Detector] = Counter()
        self._idle: dict[Detector, asyncio.Event] = {}

    @property
    def detector(self) -> Detector:
        """The one that the next request will get."""
        return self._detector

    @asynccontextmanager
    async def use(self) -> AsyncIterator[Detector]:
        """The current detector, kept open for as long as the block runs."""
        detector = self._detector
        self._users[detector] += 1
        try:
            yield detector
        finally:
            self._users[detector] -= 1
            if not self._users[detector]:
                del self._users[detector]
                if detector in self._idle:
                    self._idle[detector].set()

    async def swap(self, detector: Detector) -> None:
        """Puts in a detector that is already warm, and closes the old one after its last request."""
        old, self._detector = self._detector, detector
        await self._retire(old)

    async def close(self) -> None:
        """Closes the detector in use after its last request; none may begin any more."""
        await self._retire(self._detector)

    async def _retire(self, detector: Detector) -> None:
        if self._users[detector]:
            self._idle[detector] = asyncio.Event()
            await self._idle[detector].wait()
            del self._idle[detector]
        del self._users[detector]
        await detector.close()
