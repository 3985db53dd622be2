"""The limiter, put together: Redis and its heartbeat, one limiter for keys and one for addresses, four stages."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

from libs.common import micro, subjects, tasks
from libs.common.bus import Bus
from libs.common.contracts import AnsweredAccount, AuthenticatedAdmission, AuthenticatedDetect, RegisterRequest
from libs.common.service import Service
from services.limiter import handlers
from services.limiter.adapters import OneServer
from services.limiter.address import Nodes, located
from services.limiter.cluster import Cluster
from services.limiter.core import PER_ADDRESS, PER_KEY, Policy
from services.limiter.failover import Limiter
from services.limiter.metrics import WAITING
from services.limiter.settings import Settings

BATCH_IN_FLIGHT = 256


@asynccontextmanager
async def parts(bus: Bus, settings: Settings, *, per_key: Policy = PER_KEY) -> AsyncIterator[None]:
    """Open Redis, which need not be there yet, and register the stages. `per_key`: a minute and a day, unless a test is short."""
    rng = random.Random()  # noqa: S311  # spreads out retries; nothing secret depends on it

    def show(up: bool) -> None:
        bus.status.set(micro.STORE_REDIS, "up" if up else "down")
        bus.status.set(micro.STATUS, "ok" if up else "degraded")

    show(True)
    url = settings.redis_url.get_secret_value()
    known = located(url)
    place = Cluster(known, bus.instance, show) if isinstance(known, Nodes) else OneServer(url, bus.instance, show)
    keys = _limiter("key", per_key, place, bus, settings)
    addresses = _limiter("address", PER_ADDRESS, place, bus, settings)
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
    await place.open()
    watching = asyncio.create_task(place.watch())
    try:
        yield
    finally:
        await tasks.end(watching)
        await place.close()


def _limiter(name: str, policy: Policy, place: OneServer | Cluster, bus: Bus, settings: Settings) -> Limiter:
    store, health = place.limits(policy, f"rl:v1:{name}:")
    WAITING.labels(name).set_function(lambda: store.waiting)
    return Limiter(policy, store, health, bus.clock, settings.limiter_local_keys, name=name)


SERVICE = Service("limiter", Settings, parts)
