"""What callers see while PostgreSQL is away or hangs, and that all recovers by itself."""

from __future__ import annotations

import asyncio
import secrets
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from infra.embedded import servers
from infra.embedded.servers import Server
from libs.common import keys, subjects
from libs.common.errors import ErrorCode
from libs.common.micro import STATUS, STORE_POSTGRES
from tests.conftest import free_port
from tests.integration.auth_kit import Breakable, Fleet, Kit, code, until


@pytest.fixture
async def postgres(server_home: Path) -> AsyncIterator[Breakable]:
    home = server_home / f"pg-{secrets.token_hex(4)}"
    server = await asyncio.to_thread(servers.postgres, home, free_port(), secrets.token_urlsafe(12))
    with Breakable(server) as breakable:
        yield breakable


@pytest.fixture
def kit(nats_server: Server, nats_passwords: dict[str, str], postgres: Breakable) -> Kit:
    return Kit(nats_server, nats_passwords, postgres.server.url)


async def timed(fleet: Fleet, api_key: str) -> tuple[str, float]:
    began = time.monotonic()
    return code(await fleet.detect(api_key)), time.monotonic() - began


@pytest.mark.parametrize("fault", ["stop", "hang"])
async def test_postgres_goes_and_comes_back(kit: Kit, postgres: Breakable, fault: str) -> None:
    # An entry is old after half a second here: what follows does not rest on a fresh one.
    async with kit.fleet(auth_cache_ttl_seconds=0.5) as fleet:
        known = (await fleet.register()).api_key

        async def warm() -> bool:
            return code(await fleet.detect(known)) == "ok"

        # What goes wrong before the fault is not its doing: on a busy machine the first look into the database may be late.
        await until(warm, "the key to be verified", timeout_seconds=10)
        if fault == "stop":
            postgres.stop(signal.SIGQUIT)
        else:
            postgres.hang()
        gone_at = time.monotonic()
        metadata = fleet.replicas[0].status.metadata

        async def told() -> bool:
            assert code(await fleet.detect(known)) == "ok"
            return (metadata[STORE_POSTGRES], metadata[STATUS]) == ("down", "degraded")

        await until(told, "the health check to notice", timeout_seconds=5)
        while time.monotonic() - gone_at < 4:
            outcome, seconds = await timed(fleet, known)
            assert outcome == "ok"
            assert seconds < 1
            outcome, seconds = await timed(fleet, keys.generate())
            assert outcome == ErrorCode.STAGE_UNAVAILABLE
            assert seconds < 1
            await asyncio.sleep(0.05)
        assert code(await fleet.account(subjects.ACCOUNT_PROFILE, known)) == ErrorCode.STAGE_UNAVAILABLE

        if fault == "stop":
            await asyncio.to_thread(postgres.start)
        else:
            postgres.resume()
        back_at = time.monotonic()

        async def recovered() -> bool:
            outcomes = code(await fleet.detect(keys.generate())), code(await fleet.account(subjects.ACCOUNT_PROFILE, known))
            assert code(await fleet.detect(known)) == "ok"
            return outcomes == (ErrorCode.INVALID_CREDENTIALS, "ok") and metadata[STATUS] == "ok"

        await until(recovered, "auth to recover", timeout_seconds=15)
        assert time.monotonic() - back_at < 10


async def test_auth_waits_for_postgres_at_its_start(kit: Kit, postgres: Breakable) -> None:
    postgres.stop(signal.SIGINT)

    async def start() -> None:
        async with kit.fleet() as fleet:
            known = (await fleet.register()).api_key

            async def let_in() -> bool:
                return code(await fleet.detect(known)) == "ok"

            # PostgreSQL has only just started: its first answer to the health check may be late.
            await until(let_in, "the key to be verified", timeout_seconds=10)

    starting = asyncio.create_task(start())
    await asyncio.sleep(0.5)
    assert not starting.done()
    await asyncio.to_thread(postgres.start)
    await asyncio.wait_for(starting, 30)
