"""A limiter on a real store."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from libs.common.clock import SystemClock
from services.limiter import adapters
from services.limiter.core import PER_KEY, Policy
from services.limiter.failover import Health, Limiter


@asynccontextmanager
async def limiter(url: str, policy: Policy = PER_KEY, instance: str = "one") -> AsyncIterator[tuple[Limiter, Health]]:
    """With its health, which is watched for as long as the block runs."""
    client = adapters.connect(url)
    heartbeat = adapters.RedisHeartbeat(client, instance)
    health = Health(heartbeat, lambda up: None, beat_seconds=0.05, retry_seconds=0.01)
    await health.check()
    watching = asyncio.create_task(health.watch())
    try:
        yield Limiter(policy, adapters.RedisStore(client, policy, "rl:"), health, SystemClock(), 1000), health
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        await heartbeat.leave()
        await client.aclose()
