"""Composition root: the pages and the receiver of traces, which are there with or without NATS, and the look at the fleet."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from libs.common import tasks
from libs.common.bus import Bus
from libs.common.contracts import BreakerChanged, InstanceLeft
from libs.common.service import Service
from libs.common.subjects import EVENT_BREAKER_CHANGED, EVENT_LEFT
from services.console.core import TraceStore
from services.console.fleet import Fleet
from services.console.guard import Guard
from services.console.hub import Hub
from services.console.server import serving
from services.console.settings import ConsoleSettings
from services.console.watch import Watch
from services.console.web import build


@asynccontextmanager
async def front(bus: Bus, settings: ConsoleSettings) -> AsyncIterator[None]:
    """Serve the pages and receive traces, from before there is a bus to after it has gone; look at the fleet in between."""
    fleet, hub = Fleet(), Hub()
    store = TraceStore(settings.console_max_spans, settings.console_max_bytes, settings.trace_slow_ms)
    token = settings.admin_token.get_secret_value() if settings.admin_token is not None else None
    app = build(store, fleet, hub, Guard(token, is_open=settings.console_open), settings.trace_slow_ms)
    watch = Watch(bus, fleet, store, hub)
    bus.on_event(EVENT_LEFT, InstanceLeft, watch.left)
    bus.on_event(EVENT_BREAKER_CHANGED, BreakerChanged, watch.breaker_changed)
    async with serving(app, settings.console_host, settings.console_port):
        watching = asyncio.create_task(watch.run())
        try:
            yield
        finally:
            await tasks.end(watching)
            hub.close()


SERVICE = Service("console", ConsoleSettings, front=front)
