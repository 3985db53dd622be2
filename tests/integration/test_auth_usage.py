"""Usage is counted exactly once, whatever is killed on the way: real NATS, real PostgreSQL, real processes."""

from __future__ import annotations

import asyncio
import os
import random
import secrets
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

import pytest
from nats.js import api

from infra.embedded import servers
from infra.embedded.servers import Server
from libs.common import subjects, tasks
from libs.common.bus import Bus
from libs.common.clock import SystemClock
from libs.common.contracts import UsageRecorded
from services.auth.adapters import PostgresKeys, PostgresLedgers, engine_url, make_engine
from services.auth.core import Usage
from services.auth.migrate import migrate
from services.auth.ports import StreamError
from services.auth.stream import GATHER_SECONDS, PAUSE_SECONDS, JetStreamUsage
from services.auth.usage import UsageCounter
from services.detector_proxy.adapters import JetStreamUsageLog
from tests.conftest import OPERATOR, free_port
from tests.integration.auth_kit import ADMIN_TOKEN, PEPPER, Breakable, Kit, connect, new_database, until
from tests.unit.auth.fakes import new_key

STREAM_BYTES = 64 * 1024 * 1024


@pytest.fixture
async def nats_of_its_own(server_home: Path, nats_passwords: dict[str, str]) -> AsyncIterator[Breakable]:
    home = server_home / f"nats-{secrets.token_hex(4)}"
    with Breakable(servers.nats(home, free_port(), nats_passwords)) as breakable:
        yield breakable


@pytest.fixture
async def kit(nats_of_its_own: Breakable, nats_passwords: dict[str, str], postgres_server: Server) -> AsyncIterator[Kit]:
    async with new_database(postgres_server) as url:
        await migrate(engine_url(url))
        yield Kit(nats_of_its_own.server, nats_passwords, url)


class Ledger:
    """A key, and what is known of its use: published by the test, counted by auth."""

    def __init__(self, proxy: Bus, keys: PostgresKeys, key_id: str) -> None:
        self.proxy = proxy
        self.log = JetStreamUsageLog(proxy)
        self.key_id = key_id
        self.published = 0
        self.malicious = 0
        self.enough = asyncio.Event()
        self._keys = keys

    async def publish(self, count: int, pause_seconds: float = 0.0) -> None:
        """Publish `count` events, or enough, through the proxy's own log, each under an id of its own."""
        for n in range(count):
            event = UsageRecorded(key_id=self.key_id, at_ms=int(time.time() * 1000), requests=1, malicious=n % 2)
            await self.log.record(event, secrets.token_hex(8))
            self.published += 1
            self.malicious += n % 2
            await asyncio.sleep(pause_seconds)
            if self.enough.is_set():
                return

    async def counted(self) -> tuple[int, int]:
        usage = (await self._keys.usage([self.key_id])).get(self.key_id, Usage())
        return usage.requests, usage.malicious

    async def settle(self) -> None:
        """Wait until everything is counted, and a little longer: nothing more may come."""

        async def all_there() -> bool:
            return (await self.counted())[0] >= self.published

        await until(all_there, f"{self.published} events to be counted", timeout_seconds=60)
        await asyncio.sleep(2 * (PAUSE_SECONDS + GATHER_SECONDS))
        assert await self.counted() == (self.published, self.malicious)


@asynccontextmanager
async def ledger_of(kit: Kit) -> AsyncIterator[Ledger]:
    async with AsyncExitStack() as stack:
        engine = make_engine(engine_url(kit.database_url), pool_size=2)
        stack.push_async_callback(engine.dispose)
        keys = PostgresKeys(engine)
        _, key = new_key()
        await keys.add(key)
        proxy = kit.bus("detector_proxy", OPERATOR)
        await proxy.connect()
        ledger = Ledger(proxy, keys, key.key_id)
        await proxy.start()
        stack.push_async_callback(proxy.drain)
        sending = asyncio.create_task(ledger.log.run())
        stack.push_async_callback(tasks.end, sending)
        yield ledger


@asynccontextmanager
async def counting(kit: Kit) -> AsyncIterator[None]:
    """A counter in this process, as auth runs it."""
    async with AsyncExitStack() as stack:
        engine = make_engine(engine_url(kit.database_url), pool_size=2)
        stack.push_async_callback(engine.dispose)
        bus = kit.bus("auth")
        await bus.connect()
        stack.push_async_callback(bus.drain)
        counter = UsageCounter(JetStreamUsage(bus, STREAM_BYTES), PostgresLedgers(engine), SystemClock(), retention_days=400)
        task = asyncio.create_task(counter.run())
        try:
            yield
        finally:
            await tasks.end(task)


async def test_counters_cancelled_at_random_points_lose_and_double_nothing(kit: Kit) -> None:
    chance = random.Random(7)
    async with ledger_of(kit) as ledger:
        async with counting(kit):
            await ledger.publish(1)
        publishing = asyncio.create_task(ledger.publish(600, 0.005))
        while not publishing.done():
            async with counting(kit), counting(kit):
                await asyncio.sleep(chance.uniform(0.1, 0.7))
        await publishing
        async with counting(kit):
            await ledger.settle()


async def test_connections_to_postgres_ended_in_the_middle_lose_and_double_nothing(kit: Kit) -> None:
    async with ledger_of(kit) as ledger, counting(kit), counting(kit):
        publishing = asyncio.create_task(ledger.publish(500, 0.005))
        connection = await connect(kit.database_url)
        while not publishing.done():
            await connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND database ="
                " (SELECT oid FROM pg_database WHERE datname = current_database())"
            )
            await asyncio.sleep(0.3)
        await connection.close()
        await publishing
        await ledger.settle()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
async def test_a_restart_of_nats_loses_and_doubles_nothing(kit: Kit, nats_of_its_own: Breakable, how: int) -> None:
    # So many at a time that some have just been acknowledged, and are not on the disk yet.
    async with ledger_of(kit) as ledger, counting(kit), counting(kit):
        publishing = asyncio.create_task(ledger.publish(1500, 0.0005))

        async def has_begun() -> bool:
            return ledger.published > 500

        await until(has_begun, "500 events to be published")
        await asyncio.to_thread(nats_of_its_own.stop, how)
        await asyncio.sleep(0.2)
        await asyncio.to_thread(nats_of_its_own.start)
        await publishing
        await ledger.settle()


async def test_counting_can_be_stopped_when_its_connection_is_closed(kit: Kit) -> None:
    bus = kit.bus("auth")
    await bus.connect()
    stream = JetStreamUsage(bus, STREAM_BYTES)
    await stream.state()
    reading = asyncio.Event()

    async def read_for_ever() -> None:
        while True:
            with suppress(StreamError):
                async with stream.read(0) as reader:
                    reading.set()
                    await reader.batch()
            await asyncio.sleep(0.1)

    task = asyncio.create_task(read_for_ever())
    await asyncio.wait_for(reading.wait(), 10)
    await asyncio.sleep(0.1)
    await bus.connection.close()
    task.cancel()
    await asyncio.wait({task}, timeout=3)
    stopped = task.cancelled()
    task.cancel()
    assert stopped


async def test_a_stream_made_anew_is_counted_from_its_beginning(kit: Kit) -> None:
    async with ledger_of(kit) as ledger, counting(kit):
        await ledger.publish(30)
        await ledger.settle()
        assert await ledger.proxy.connection.jetstream().delete_stream(subjects.USAGE_STREAM)
        await ledger.publish(20)
        await ledger.settle()


async def test_no_event_costs_a_flush_of_the_disk_where_jobs_have_the_server_flush_always(kit: Kit) -> None:
    assert "sync_interval" in str(servers.nats_configuration({}, host="", port=0, store=Path())["jetstream"])
    async with ledger_of(kit) as ledger, counting(kit):
        await ledger.publish(1)
        await ledger.settle()
        stream = await ledger.proxy.connection.jetstream().stream_info(subjects.USAGE_STREAM)
    assert stream.config.persist_mode == api.PersistMode.ASYNC


async def test_a_stream_that_is_there_is_not_altered(kit: Kit) -> None:
    async with ledger_of(kit) as ledger:
        jetstream = ledger.proxy.connection.jetstream()
        made = await jetstream.add_stream(
            name=subjects.USAGE_STREAM, subjects=[subjects.USAGE_RECORDED], max_bytes=5_000_000, description="the operator's"
        )
        async with counting(kit):
            await ledger.publish(5)
            await ledger.settle()
        assert (await jetstream.stream_info(subjects.USAGE_STREAM)).config == made.config


async def test_processes_killed_in_the_middle_lose_and_double_nothing(kit: Kit) -> None:
    environment = {
        **os.environ,
        "PORTCULLIS_NATS_URL": kit.nats.url,
        "PORTCULLIS_NATS_USER": "auth",
        "PORTCULLIS_NATS_PASSWORD": kit.passwords["auth"],
        "PORTCULLIS_DATABASE_URL": kit.database_url,
        "PORTCULLIS_KEY_PEPPER": PEPPER,
        "PORTCULLIS_ADMIN_TOKEN": ADMIN_TOKEN,
    }
    command = (sys.executable, "-m", "services.auth")

    async with ledger_of(kit) as ledger, AsyncExitStack() as stack:

        async def start() -> asyncio.subprocess.Process:
            process = await asyncio.create_subprocess_exec(*command, env=environment, stderr=asyncio.subprocess.PIPE)
            stack.callback(end, process)
            assert process.stderr is not None
            async with asyncio.timeout(60):
                while b'"ready"' not in await process.stderr.readline():
                    assert not process.stderr.at_eof()
            reading = asyncio.create_task(show(process.stderr))
            stack.callback(reading.cancel)
            return process

        first, second = await asyncio.gather(start(), start())
        publishing = asyncio.create_task(ledger.publish(10_000, 0.002))
        await asyncio.sleep(1)
        first.kill()
        await first.wait()
        third = await start()
        second.kill()
        await second.wait()
        await asyncio.sleep(1)
        ledger.enough.set()
        await publishing
        await ledger.settle()
        assert ledger.published > 100
        third.terminate()
        assert await asyncio.wait_for(third.wait(), 20) == 0


async def show(stream: asyncio.StreamReader) -> None:
    """What a process writes: seen when the test fails."""
    async for line in stream:
        print(line.decode().rstrip())


def end(process: asyncio.subprocess.Process) -> None:
    with suppress(ProcessLookupError):
        process.kill()
