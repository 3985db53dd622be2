"""The limiter, put together: Redis and its heartbeat, one limiter for keys and one for addresses, four stages."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

from redis.asyncio import Redis

from libs.common import micro, subjects, tasks
from libs.common.bus import Bus
from libs.common.contracts import AnsweredAccount, AuthenticatedAdmission, AuthenticatedDetect, RegisterRequest
from libs.common.service import ConfigurationError
from services.limiter import adapters, handlers
from services.limiter.address import NO_CLUSTER
from services.limiter.core import PER_ADDRESS, PER_KEY, Policy
from services.limiter.failover import Health, Limiter
from services.limiter.metrics import WAITING
from services.limiter.settings import Settings

BATCH_IN_FLIGHT = 256


@asynccontextmanager
async def parts(bus: Bus, settings: Settings, *, per_key: Policy = PER_KEY) -> AsyncIterator[None]:
    """Open Redis, which need not be there yet, and register the stages. `per_key`: a minute and a day, unless a test is short."""
    client = adapters.connect(settings.redis_url.get_secret_value())
    heartbeat = adapters.RedisHeartbeat(client, bus.instance)
    rng = random.Random()  # noqa: S311  # spreads out retries; nothing secret depends on it

    def show(up: bool) -> None:
        bus.status.set(micro.STORE_REDIS, "up" if up else "down")
        bus.status.set(micro.STATUS, "ok" if up else "degraded")

    show(True)
    health = Health(heartbeat, show)
    keys = _limiter("key", per_key, client, health, bus, settings)
    addresses = _limiter("address", PER_ADDRESS, client, health, bus, settings)
    bus.stage(subjects.DETECT_AUTHENTICATED, AuthenticatedDetect, partial(handlers.admit, limiter=keys, rng=rng))
    bus.stage(
        subjects.BATCH_AUTHENTICATED,
        AuthenticatedAdmission,
        partial(handlers.admit_many, limiter=keys, rng=rng),
        max_in_flight=BATCH_IN_FLIGHT,
    )
    bus.stage(subjects.ACCOUNT_ANSWERED, AnsweredAccount, partial(handlers.answered, limiter=keys))
    bus.stage(
        subjects.REGISTER_REQUEST,
        RegisterRequest,
        partial(handlers.register, limiter=addresses, rng=rng, per_hour=settings.register_per_hour),
    )
    await health.check()
    if await adapters.is_cluster(client):  # whether or not the heartbeat was answered: it may be another node that has its key
        await client.aclose()
        raise ConfigurationError(f"PORTCULLIS_REDIS_URL: {NO_CLUSTER}")
    watching = asyncio.create_task(health.watch())
    try:
        yield
    finally:
        await tasks.end(watching)
        await heartbeat.leave()
        await client.aclose()


def _limiter(name: str, policy: Policy, client: Redis, health: Health, bus: Bus, settings: Settings) -> Limiter:
    store = adapters.RedisStore(client, policy, f"rl:v1:{name}:")
    WAITING.labels(name).set_function(lambda: store.waiting)
    return Limiter(policy, store, health, bus.clock, settings.limiter_local_keys, name=name)
