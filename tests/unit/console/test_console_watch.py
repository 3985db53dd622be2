"""How often the fleet is looked at."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import cast

import pytest

from libs.common import tasks
from libs.common.bus import Bus
from libs.common.clock import SystemClock
from services.console import watch
from services.console.core import TraceStore
from services.console.fleet import Fleet
from services.console.hub import Hub
from services.console.watch import Watch


class CountingHub(Hub):
    def __init__(self) -> None:
        super().__init__()
        self.told = 0
        self.twice = asyncio.Event()

    def tell(self, event: str, data: bytes) -> None:
        super().tell(event, data)
        self.told += event == "fleet"
        if self.told == 2:
            self.twice.set()


async def test_who_begins_to_watch_is_told_anew_however_long_nobody_did(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "PERIOD_SECONDS", 0.0)
    monkeypatch.setattr(watch, "UNWATCHED_PERIOD_SECONDS", 3600.0)
    hub = CountingHub()
    bus = cast(Bus, SimpleNamespace(connected=False, clock=SystemClock()))
    running = asyncio.create_task(Watch(bus, Fleet(), TraceStore(10, 10_000, 100.0), hub).run())
    try:
        while not hub.told:
            await asyncio.sleep(0)
        with hub.watch():
            async with asyncio.timeout(30):
                await hub.twice.wait()
        assert not hub.has_watchers.is_set()
    finally:
        await tasks.end(running)
