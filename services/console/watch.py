"""Looks at the fleet about once a second while anybody watches, and tells them; less often otherwise."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from typing import Final

import msgspec

from libs.common.bus import Bus
from libs.common.context import RequestContext
from libs.common.contracts import BreakerChanged, BreakersListRequest, InstanceLeft
from libs.common.subjects import BREAKERS_LIST, EVERYBODYS_STATS
from services.console.core import TraceStore
from services.console.fleet import Fleet
from services.console.hub import Hub

log = logging.getLogger(__name__)

PERIOD_SECONDS: Final = 1.0
UNWATCHED_PERIOD_SECONDS: Final = 5.0
"""Every process of the fleet answers every look: much of what an idle gateway does, if nobody sees it."""
WINDOW_SECONDS: Final = 0.7
"""How long answers are waited for."""

_encode = msgspec.json.Encoder().encode


class Watch:
    """`run` looks; `changed` is to be called when traces have come."""

    def __init__(self, bus: Bus, fleet: Fleet, store: TraceStore, hub: Hub) -> None:
        self._bus = bus
        self._fleet = fleet
        self._store = store
        self._hub = hub
        self._told_revision = -1

    async def run(self) -> None:
        """For ever. Says at once that the bus is away when it is."""
        while True:
            began = self._bus.clock.monotonic()
            if self._bus.connected:
                await self._look()
            self.tell()
            await asyncio.sleep(max(0.05, PERIOD_SECONDS - (self._bus.clock.monotonic() - began)))
            with suppress(TimeoutError):
                async with asyncio.timeout(UNWATCHED_PERIOD_SECONDS - PERIOD_SECONDS):
                    await self._hub.has_watchers.wait()

    def tell(self) -> None:
        picture = self._fleet.picture(self._now_ms(), connected=self._bus.connected)
        self._hub.tell("fleet", _encode(picture))
        if self._store.revision != self._told_revision:
            self._told_revision = self._store.revision
            self._hub.tell("traces", _encode({"revision": self._store.revision, "counts": self._store.counts()}))

    async def left(self, event: InstanceLeft) -> None:
        self._fleet.leaves(event.instance)

    async def breaker_changed(self, event: BreakerChanged) -> None:
        self._fleet.breaker_changed(event, self._now_ms())

    async def _look(self) -> None:
        context = RequestContext.lasting(2 * WINDOW_SECONDS, self._bus.clock)
        stats, breakers = await asyncio.gather(
            self._bus.gather(EVERYBODYS_STATS, None, context, window_seconds=WINDOW_SECONDS),
            self._bus.gather(
                BREAKERS_LIST, BreakersListRequest(), context, window_seconds=WINDOW_SECONDS, expected=self._fleet.proxies
            ),
        )
        if not self._bus.connected:
            return  # silence says nothing of the others then
        self._fleet.look(stats, self._bus.clock.monotonic(), self._now_ms())
        self._fleet.look_at_breakers(breakers)

    def _now_ms(self) -> float:
        return round(self._bus.clock.now() * 1000)
