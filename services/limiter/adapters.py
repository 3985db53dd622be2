"""One Redis server, or the primary that sentinels name, behind the ports: decisions in batches, and heartbeats.

A cluster of several primaries is in `cluster.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import struct
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, cast

from redis.asyncio import BlockingConnectionPool, Connection, Redis, SSLConnection
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import (
    Sentinel,
    SentinelConnectionPool,
    SentinelManagedConnection,
    SentinelManagedSSLConnection,
)
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError, RedisError

from libs.common import telemetry, tracing
from libs.common.service import ConfigurationError
from services.limiter.address import A_CLUSTER, Address, Nodes, Sentinels, located
from services.limiter.core import Decision, Policy
from services.limiter.failover import Health
from services.limiter.lua import SCRIPT, Wire
from services.limiter.metrics import REDIS_DURATION
from services.limiter.ports import StoreForgotError, StoreUnavailableError

log = logging.getLogger(__name__)

TIMEOUT_SECONDS = 0.1
TIMEOUT_SLICES = 4
SENTINEL_SECONDS = TIMEOUT_SECONDS / 4
"""How long one sentinel may take to say where the primary is: there is time to ask the next ones when it does not answer."""

MAX_CONNECTIONS = 4
MAX_BATCH = 64

_CONNECTIONS = telemetry.CONNECTIONS.labels("redis")

_SCRIPT_CALL: tracing.Attributes = (
    ("db.system.name", "redis"),
    ("db.operation.name", "EVALSHA"),
    ("db.stored_procedure.name", "sliding_window"),
)

REPLICAS_KEY = "rl:v1:replicas"
REPLICA_LIFE_SECONDS = 5
BEAT_SCRIPT = f"""
local clock = redis.call('TIME')
local added = redis.call('ZADD', KEYS[1], clock[1], ARGV[1])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', clock[1] - {REPLICA_LIFE_SECONDS})
redis.call('EXPIRE', KEYS[1], {REPLICA_LIFE_SECONDS})
return {{redis.call('ZCARD', KEYS[1]), added}}
"""

Waiting = tuple[str, bytes, asyncio.Future[bytes]]
"""A key, what is asked about it, and whoever waits for the answer."""


def _ways() -> dict[str, Any]:
    """How our clients are: they fail at once, without retries, and have one connection more than batches, for the heartbeat.

    No timeout of redis-py's own is set: it would count connecting, greeting, writing and reading each anew, and its timeout for
    a write starts a task each time. `within_the_timeout` bounds all of it together.
    """
    return {
        "max_connections": MAX_CONNECTIONS + 1,
        "timeout": TIMEOUT_SECONDS,
        "retry": Retry(NoBackoff(), 0),
        "socket_timeout": None,
        "socket_connect_timeout": None,
        "driver_info": None,
        "protocol": 2,
    }


def connect(url: str) -> Redis:
    """A client of one server, or of the primary that sentinels name."""
    known = located(url)
    if isinstance(known, Nodes):
        raise ValueError("a cluster has no one client")
    pool = BlockingConnectionPool.from_url(url, **_ways()) if known is None else _watched(known, _ways())
    telemetry.CONNECTIONS_LIMIT.labels("redis").set(MAX_CONNECTIONS + 1)
    return Redis.from_pool(pool)


def connect_to_node(known: Nodes, address: Address) -> Redis:
    """A client of one node of that cluster."""
    host, port = address
    kind = SSLConnection if known.tls else Connection
    ways = {**known.connection, **_ways(), "host": host, "port": port}
    return Redis.from_pool(BlockingConnectionPool(connection_class=kind, **ways))


class _WatchedPool(SentinelConnectionPool, BlockingConnectionPool):
    """redis-py's pool of connections to the primary that sentinels name, waiting for one as ours does instead of refusing."""

    async def disconnect(self, inuse_connections: bool = True) -> None:
        await super().disconnect(inuse_connections)
        if inuse_connections:  # not when the primary has changed: the client is being closed
            await self.sentinel_manager.aclose()


def _watched(known: Sentinels, ways: dict[str, Any]) -> BlockingConnectionPool:
    asking = {
        **known.own,
        "ssl": known.tls,
        "socket_timeout": SENTINEL_SECONDS,
        "socket_connect_timeout": SENTINEL_SECONDS,
        "retry": ways["retry"],
    }
    manager = Sentinel(known.addresses, sentinel_kwargs=asking)  # type: ignore[no-untyped-call]
    kind = SentinelManagedSSLConnection if known.tls else SentinelManagedConnection
    return _WatchedPool(known.primary, manager, connection_class=kind, **known.connection, **ways)  # type: ignore[no-untyped-call]


async def is_cluster(client: Redis) -> bool:
    """Whether that Redis is a node of a Redis Cluster. False also when it does not say."""
    with contextlib.suppress(StoreUnavailableError):
        told = await within_the_timeout(client.info("cluster"))
        return bool(told.get("cluster_enabled"))
    return False


async def within_the_timeout(call: Awaitable[Any]) -> Any:
    """Await `call` for 0.1 s at the most. redis-py closes a connection whose call is cancelled, so no answer is left in it.

    The time is counted in slices: if this process stands still (a busy machine, a garbage collection), one slice is over however
    long that took, and the answer that came meanwhile is still read. A plain timeout would blame Redis for it.
    """
    loop = asyncio.get_running_loop()
    timer: asyncio.TimerHandle

    def slice_over(left: int) -> None:
        nonlocal timer
        if left:
            timer = loop.call_later(TIMEOUT_SECONDS / TIMEOUT_SLICES, slice_over, left - 1)
        else:
            deadline.reschedule(loop.time())

    timer = loop.call_later(TIMEOUT_SECONDS / TIMEOUT_SLICES, slice_over, TIMEOUT_SLICES - 1)
    try:
        with _CONNECTIONS.track_inprogress(), REDIS_DURATION.time():
            async with asyncio.timeout(None) as deadline:
                return await call
    except (RedisError, OSError, TimeoutError) as error:
        raise StoreUnavailableError(type(error).__name__) from error
    finally:
        timer.cancel()


class Script:
    """A Lua script that Redis is sent whole where it does not know it, with the very command that runs it.

    redis-py's own (8.1.0, `AsyncScript`) loads it with one command and runs it with the next: SCRIPT FLUSH or a failover between
    the two fails the call.
    """

    def __init__(self, client: Redis, text: str) -> None:
        self.text = text
        self.sha = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
        """By which Redis knows it."""
        self._client = client

    async def __call__(self, keys: Sequence[str], arguments: Sequence[str | bytes]) -> Any:
        try:
            return await self._client.evalsha(self.sha, len(keys), *keys, *arguments)
        except NoScriptError:
            return await self._client.eval(self.text, len(keys), *keys, *arguments)


class RedisStore:
    """Decisions under one policy.

    Calls that come in the same turn of the event loop travel together, and so do those that wait while `MAX_CONNECTIONS`
    batches are under way: one call of the script decides them in order. So the keys of a batch must live on one server.
    """

    def __init__(self, client: Redis, policy: Policy, prefix: str, script: str = SCRIPT) -> None:
        self._wire = Wire(policy)
        self._prefix = prefix
        self._script = Script(client, script)
        self._waiting: deque[Waiting] = deque()
        self._batches: set[asyncio.Task[list[bytes]]] = set()
        self._flushing = False

    @property
    def waiting(self) -> int:
        """Decisions that wait for a connection."""
        return len(self._waiting)

    async def decide(
        self, key: str, limits: Sequence[int], cost: int, known: Sequence[int] | None, *, partial: bool = False
    ) -> Decision:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[bytes] = loop.create_future()
        self._waiting.append((self._prefix + key, self._wire.ask(limits, cost, known, partial=partial), answer))
        if not self._flushing:
            self._flushing = True
            loop.call_soon(self._flush)
        try:
            with tracing.span("EVALSHA sliding_window", tracing.CLIENT, _SCRIPT_CALL):
                decided = await answer
            return self._wire.decision(decided)
        except struct.error as error:
            raise StoreUnavailableError("not an answer of the script") from error

    def _flush(self) -> None:
        self._flushing = False
        while self._waiting and len(self._batches) < MAX_CONNECTIONS:
            batch = [self._waiting.popleft() for _ in range(min(MAX_BATCH, len(self._waiting)))]
            task = asyncio.get_running_loop().create_task(self._send(batch))
            self._batches.add(task)
            task.add_done_callback(partial(self._sent, batch))

    async def _send(self, batch: list[Waiting]) -> list[bytes]:
        keys = [key for key, _, _ in batch]
        asks = [self._wire.windows, *(ask for _, ask, _ in batch)]
        answers: list[bytes] = await within_the_timeout(self._script(keys, asks))
        if len(answers) != len(batch):
            raise StoreUnavailableError("not the answers of the script")
        return answers

    def _sent(self, batch: list[Waiting], task: asyncio.Task[list[bytes]]) -> None:
        self._batches.discard(task)
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        if error is None:
            for (_, _, answer), decided in zip(batch, task.result(), strict=True):
                if not answer.done():
                    answer.set_result(decided)
        else:
            if not isinstance(error, StoreUnavailableError):
                log.error("a batch of decisions failed", exc_info=error)
            # Whoever waits behind this batch must not wait out a timeout of its own.
            for _, _, answer in (*batch, *self._waiting):
                if not answer.done():
                    answer.set_exception(StoreUnavailableError(type(error).__name__))
            self._waiting.clear()
        self._flush()


class RedisHeartbeat:
    """Replicas in a sorted set by the time of their last beat; one that has not beaten for 5 s is taken for gone."""

    def __init__(self, client: Redis, instance: str, key: str = REPLICAS_KEY) -> None:
        self._client = client
        self._script = Script(client, BEAT_SCRIPT)
        self._instance = instance
        self._key = key
        self._is_known = False
        """To Redis, by the last beat."""

    async def beat(self) -> int:
        was_known, self._is_known = self._is_known, False
        replicas, added = cast(list[int], await within_the_timeout(self._script([self._key], [self._instance])))
        self._is_known = True
        if was_known and added:
            raise StoreForgotError
        return replicas

    async def leave(self) -> None:
        """Say that this replica goes; if nobody hears it, its last beat ages."""
        self._is_known = False
        with contextlib.suppress(StoreUnavailableError):
            await within_the_timeout(self._client.zrem(self._key, self._instance))


class OneServer:
    """Where limits are kept: one server. Its only part is itself."""

    def __init__(self, url: str, instance: str, on_change: Callable[[bool], None]) -> None:
        self._client = connect(url)
        self._heartbeat = RedisHeartbeat(self._client, instance)
        self._health = Health(self._heartbeat, on_change)

    def limits(self, policy: Policy, prefix: str) -> tuple[RedisStore, Health]:
        return RedisStore(self._client, policy, prefix), self._health

    async def open(self) -> None:
        await self._health.check()
        if await is_cluster(self._client):  # whether or not the heartbeat was answered: it may be another node that has its key
            await self._client.aclose()
            raise ConfigurationError(f"PORTCULLIS_REDIS_URL: {A_CLUSTER}")

    async def watch(self) -> None:
        await self._health.watch()

    async def close(self) -> None:
        await self._heartbeat.leave()
        await self._client.aclose()
