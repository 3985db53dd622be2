"""Auth's composition root."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta
from functools import partial

from sqlalchemy import URL

from libs.common import keys, subjects, tasks
from libs.common.bus import Bus
from libs.common.contracts import (
    AccountRequest,
    AdminCreateKey,
    AdminKey,
    AdminListKeys,
    AdminUpdateKey,
    AdmissionRequest,
    BreakersResetRequest,
    DetectRequest,
    JobRequest,
    KeyChanged,
    RegisterRequest,
    TakeRequest,
)
from libs.common.service import ConfigurationError, Service
from services.auth import handlers, metrics
from services.auth.adapters import BusAnnouncer, PostgresCheck, PostgresKeys, PostgresLedgers, engine_url, make_engine, watch_pool
from services.auth.cache import Authenticator, KeyCache
from services.auth.connections import BusConnections
from services.auth.core import Caps, Peppers, StoreRefusesError, StoreUnavailableError
from services.auth.door import Door
from services.auth.exchange import Exchange
from services.auth.handlers import Finisher, Keys, Policy, finished
from services.auth.health import StoreHealth
from services.auth.migrate import migrate
from services.auth.ports import StreamError
from services.auth.settings import AuthSettings
from services.auth.stream import JetStreamUsage
from services.auth.tokens import Issuer
from services.auth.usage import UsageCounter

log = logging.getLogger(__name__)

START_RETRY_SECONDS = 0.2
CALLS_IN_FLIGHT = 128
"""Of each call on keys: they wait for one of a few connections to PostgreSQL."""

OWN_POOL_SIZE = 2
"""Connections for the health check and the count of usage, which must not wait behind calls."""

JOB_CALLS_IN_FLIGHT = 64
"""Some hold up to 2 MB of texts."""


@asynccontextmanager
async def parts(bus: Bus, settings: AuthSettings) -> AsyncIterator[None]:
    """Takes no message before the database is there and migrated: the replicas that are ready get them."""
    url = engine_url(settings.database_url.get_secret_value())
    await _migrate_when_there(url)
    async with AsyncExitStack() as stack:
        engine = make_engine(url, pool_size=settings.database_pool_size)
        stack.push_async_callback(engine.dispose)
        watch_pool(engine, "postgres", settings.database_pool_size)
        own_engine = make_engine(url, pool_size=OWN_POOL_SIZE)
        stack.push_async_callback(own_engine.dispose)
        watch_pool(own_engine, "postgres_background", OWN_POOL_SIZE)

        clock = bus.clock
        health = StoreHealth(bus.status, clock)
        store = PostgresKeys(engine)
        cache = KeyCache(
            store.find,
            clock,
            ttl_seconds=settings.auth_cache_ttl_seconds,
            entries=settings.auth_cache_entries,
            is_up=health.is_up,
        )
        stack.push_async_callback(cache.close)
        metrics.CACHE_ENTRIES.set_function(cache.__len__)
        peppers = peppers_of(settings)
        exchange = Exchange(store, clock, peppers.current_id, health.is_up, cache.refresh) if peppers.is_exchanging else None
        authenticator = Authenticator(cache, clock, peppers, exchange.leave if exchange is not None else None)
        announcer = BusAnnouncer(bus, cache, clock)
        bus.on_reconnect.append(announcer.reconnected)
        use = Keys(store, authenticator, announcer, clock, peppers, _policy(settings))
        finisher = Finisher()
        stack.push_async_callback(finisher.close)

        door = _door(bus, settings, authenticator)
        if door is not None:
            bus.asked(subjects.AUTH_CALLOUT, door.answer, max_in_flight=CALLS_IN_FLIGHT)
            ending = asyncio.create_task(door.run())
            stack.push_async_callback(tasks.end, ending)
        bus.on_event(subjects.EVENT_KEY_CHANGED, KeyChanged, partial(handlers.forget, cache=cache, door=door))
        bus.stage(subjects.DETECT_REQUEST, DetectRequest, partial(handlers.detect, authenticator=authenticator))
        bus.stage(subjects.BATCH_REQUEST, AdmissionRequest, partial(handlers.admit, authenticator=authenticator))
        bus.stage(subjects.BATCH_TAKE, TakeRequest, partial(handlers.take, authenticator=authenticator))
        bus.stage(
            subjects.JOBS_REQUEST,
            JobRequest,
            partial(handlers.job, authenticator=authenticator),
            max_in_flight=JOB_CALLS_IN_FLIGHT,
        )
        _register_calls(bus, use, finisher)
        if exchange is not None:
            exchanging = asyncio.create_task(exchange.run())
            stack.push_async_callback(tasks.end, exchanging)

        watching = asyncio.create_task(health.watch(PostgresCheck(own_engine).check))
        stack.push_async_callback(tasks.end, watching)
        usage = JetStreamUsage(bus, settings.usage_stream_bytes, settings.stream_replicas)
        try:
            # Before the first request, so that its event finds a stream.
            await usage.state()
        except StreamError as error:
            log.warning("usage is not counted yet: %s", error)
        counter = UsageCounter(usage, PostgresLedgers(own_engine), clock, retention_days=settings.usage_retention_days)
        counting = asyncio.create_task(counter.run())
        stack.push_async_callback(tasks.end, counting)
        # Before the connection is drained, too: nats-py waits half a minute for a reader that has no time to read any more.
        bus.on_drained.append(partial(tasks.end, counting))
        yield


async def migrate_only(settings: AuthSettings) -> None:
    await _migrate_when_there(engine_url(settings.database_url.get_secret_value()))


async def _migrate_when_there(url: URL) -> None:
    waiting = False
    while True:
        try:
            await migrate(url)
        except StoreRefusesError:
            raise ConfigurationError(
                "PostgreSQL refuses the user or has no such database; check PORTCULLIS_DATABASE_URL"
            ) from None
        except StoreUnavailableError as error:
            if not waiting:
                log.warning("waiting for PostgreSQL (%s)", error.internal)
            waiting = True
            await asyncio.sleep(START_RETRY_SECONDS)
        else:
            return


def peppers_of(settings: AuthSettings) -> Peppers:
    previous = settings.key_pepper_previous
    return Peppers(
        settings.key_pepper.get_secret_value().encode(),
        previous.get_secret_value().encode() if previous is not None else None,
    )


def _door(bus: Bus, settings: AuthSettings, authenticator: Authenticator) -> Door | None:
    if settings.nats_issuer_seed is None:
        return None
    try:
        issuer = Issuer(settings.nats_issuer_seed.get_secret_value())
    except ValueError as error:
        raise ConfigurationError(f"PORTCULLIS_NATS_ISSUER_SEED: {error}") from None
    most = settings.door_connections_per_key
    return Door(issuer, authenticator, BusConnections(bus), bus.clock, most_connections=most)


def _policy(settings: AuthSettings) -> Policy:
    return Policy(
        registration_open=settings.registration == "open",
        caps=Caps(settings.register_max_per_minute, settings.register_max_per_day),
        rotate_grace=timedelta(seconds=settings.rotate_grace_seconds),
        admin_digest=keys.digest(settings.admin_token.get_secret_value()) if settings.admin_token is not None else None,
    )


def _register_calls(bus: Bus, use: Keys, finisher: Finisher) -> None:
    stage = partial(bus.stage, max_in_flight=CALLS_IN_FLIGHT)
    stage(subjects.REGISTER_ADMITTED, RegisterRequest, finished(handlers.register, use, finisher))
    stage(subjects.ACCOUNT_PROFILE, AccountRequest, finished(handlers.profile, use, finisher))
    stage(subjects.ACCOUNT_ROTATE, AccountRequest, finished(handlers.rotate, use, finisher))
    stage(subjects.ACCOUNT_REVOKE, AccountRequest, finished(handlers.revoke, use, finisher))
    stage(subjects.ADMIN_KEYS_LIST, AdminListKeys, finished(handlers.list_keys, use, finisher))
    stage(subjects.ADMIN_KEYS_CREATE, AdminCreateKey, finished(handlers.create_key, use, finisher))
    stage(subjects.ADMIN_KEYS_GET, AdminKey, finished(handlers.get_key, use, finisher))
    stage(subjects.ADMIN_KEYS_UPDATE, AdminUpdateKey, finished(handlers.update_key, use, finisher))
    stage(subjects.ADMIN_KEYS_DELETE, AdminKey, finished(handlers.delete_key, use, finisher))
    stage(subjects.BREAKERS_RESET_REQUEST, BreakersResetRequest, finished(handlers.reset_breakers, use, finisher))


SERVICE = Service("auth", AuthSettings, parts)
