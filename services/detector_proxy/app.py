"""The composition root: engines, their guards, the judge, the stages."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from libs.common import tasks
from libs.common.bus import Bus
from libs.common.context import RequestContext
from libs.common.contracts import AdmittedDetect, BreakersListRequest, BreakersReset, DetectItems
from libs.common.service import Service
from libs.common.stages import Answer
from libs.common.subjects import BATCH_ITEMS, BREAKERS_LIST, BREAKERS_RESET, DETECT_ADMITTED
from services.detector_proxy import handlers
from services.detector_proxy.adapters import BreakerNews, JetStreamUsageLog
from services.detector_proxy.breaker import BreakerChange, EngineBreaker
from services.detector_proxy.core import FALLBACK, PRIMARY, AllAtOnce, Bulk, BulkJudge, GuardedEngine, Judge, OneByOne
from services.detector_proxy.engines.factory import http_engine
from services.detector_proxy.engines.pool import PoolEngine
from services.detector_proxy.ports import Engine
from services.detector_proxy.settings import DetectorProxySettings
from services.detector_proxy.watch import EngineWatch

BATCH_IN_FLIGHT = 32
"""Messages with many texts that are worked on at a time, in each replica."""


@asynccontextmanager
async def parts(bus: Bus, settings: DetectorProxySettings) -> AsyncIterator[None]:
    """What the service consists of, for `libs.common.service.run`."""
    async with AsyncExitStack() as stack:
        news = BreakerNews(bus)
        watch: EngineWatch | None = None

        def on_change(change: BreakerChange) -> None:
            news.tell(change)
            if watch is not None:
                watch.refresh()

        def breaker(role: str) -> EngineBreaker:
            news.begin(role)
            return EngineBreaker(role, settings.breaker_policy, bus.clock, on_change)

        primary: GuardedEngine | None = None
        engine = primary_engine(bus, settings)
        if engine is not None:
            stack.push_async_callback(engine.close)
            primary = GuardedEngine(
                PRIMARY,
                engine,
                breaker(PRIMARY),
                max_concurrency=settings.engine_max_concurrency,
                timeout_seconds=settings.engine_timeout_seconds,
            )
        pool = PoolEngine(bus, settings.fallback_pool)
        fallback = GuardedEngine(FALLBACK, pool, breaker(FALLBACK), max_concurrency=settings.fallback_max_concurrency)
        judge = Judge(primary, fallback, bus.clock, settings.engine_threshold)
        bulk_judge = BulkJudge(
            _bulk(bus, primary, settings) if primary is not None else None,
            _bulk(bus, fallback, settings),
            fallback.breaker,
            bus.clock,
            settings.engine_threshold,
        )
        breakers = {guarded.role: guarded.breaker for guarded in (primary, fallback) if guarded is not None}
        usage = JetStreamUsageLog(bus)
        watch = EngineWatch(bus.status, settings.engine_kind or "pool", primary, fallback)

        async def detect(message: AdmittedDetect, context: RequestContext) -> Answer:
            return await handlers.detect(message, context, judge, usage, bus.clock)

        async def detect_many(message: DetectItems, context: RequestContext) -> Answer:
            return await handlers.detect_many(message, context, bulk_judge, usage, bus.clock)

        async def list_breakers(_: BreakersListRequest, __: RequestContext) -> Answer:
            return await handlers.list_breakers(breakers, bus.instance)

        async def reset_breaker(message: BreakersReset, _: RequestContext) -> Answer:
            return await handlers.reset_breaker(message, breakers, bus.instance)

        bus.stage(DETECT_ADMITTED, AdmittedDetect, detect)
        bus.stage(BATCH_ITEMS, DetectItems, detect_many, max_in_flight=BATCH_IN_FLIGHT)
        bus.stage(BREAKERS_LIST, BreakersListRequest, list_breakers, broadcast=True)
        bus.stage(BREAKERS_RESET, BreakersReset, reset_breaker, broadcast=True)
        for loop in (usage.run(), watch.run()):
            stack.push_async_callback(tasks.end, asyncio.create_task(loop))
        yield


def primary_engine(bus: Bus, settings: DetectorProxySettings) -> Engine | None:
    """The configured engine, or None."""
    if settings.engine_url is None:
        return None
    if settings.engine_kind == "pool":
        return PoolEngine(bus, settings.engine_pool)
    return http_engine(settings, settings.engine_url)


def _bulk(bus: Bus, guarded: GuardedEngine, settings: DetectorProxySettings) -> Bulk:
    """The engine of `guarded`, with the same breaker, for many texts: behind a bulkhead that single texts do not share."""
    engine = guarded.engine
    if isinstance(engine, PoolEngine):
        return AllAtOnce(
            GuardedEngine(guarded.role, engine, guarded.breaker, max_concurrency=BATCH_IN_FLIGHT, lane="bulk"), engine
        )
    places = settings.engine_batch_concurrency
    alone = GuardedEngine(
        guarded.role,
        engine,
        guarded.breaker,
        max_concurrency=places,
        timeout_seconds=settings.engine_timeout_seconds,
        lane="bulk",
        one_of_many=True,
    )
    return OneByOne(alone, bus.clock, places)


SERVICE = Service("detector_proxy", DetectorProxySettings, parts)
