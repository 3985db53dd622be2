"""Keys and counts: what is true of the fake is true of PostgreSQL; and the schema."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta

import pytest
from alembic.config import Config
from alembic.script import ScriptDirectory

from infra.embedded.servers import Server
from libs.common.contracts import DayUsage, UsageRecorded
from services.auth.adapters import PostgresKeys, PostgresLedgers, engine_url, make_engine
from services.auth.core import KeyChanges, LeftBehind, Match, Position, StoredKey, StoreUnavailableError, Usage, add_up
from services.auth.migrate import HEAD, SCRIPTS, migrate
from services.auth.ports import KeyStore, PositionMovedError, UsageLedgers
from tests.integration.auth_kit import connect, new_database
from tests.unit.auth.fakes import CREATED, MemoryKeys, MemoryLedger, new_key

AT = datetime(2026, 5, 1, 12, tzinfo=UTC)
AT_MS = int(AT.timestamp() * 1000)


@dataclass(frozen=True, slots=True)
class Stores:
    keys: KeyStore
    ledgers: UsageLedgers
    other_ledgers: UsageLedgers
    """Those of another replica."""


@asynccontextmanager
async def in_postgres(server: Server) -> AsyncIterator[Stores]:
    async with new_database(server) as text, AsyncExitStack() as stack:
        url = engine_url(text)
        await migrate(url)
        engines = [make_engine(url, pool_size=2) for _ in range(3)]
        for engine in engines:
            stack.push_async_callback(engine.dispose)
        yield Stores(PostgresKeys(engines[0]), PostgresLedgers(engines[1]), PostgresLedgers(engines[2]))


@pytest.fixture(params=["memory", "postgres"])
async def stores(request: pytest.FixtureRequest) -> AsyncIterator[Stores]:
    if request.param == "memory":
        keys = MemoryKeys()
        ledger = MemoryLedger(keys)
        yield Stores(keys, ledger, ledger)
    else:
        async with in_postgres(request.getfixturevalue("postgres_server")) as stores:
            yield stores


async def test_a_key_is_found_as_it_was_added(stores: Stores) -> None:
    _, plain = new_key()
    _, full = new_key(name="Müller 👩‍💻", scopes=("admin",), limit_day=1_000_000_000, expires_at=AT)
    for key in (plain, full):
        await stores.keys.add(key)
    assert await stores.keys.find([plain.key_id, full.key_id, "A" * 12]) == {plain.key_id: plain, full.key_id: full}
    assert await stores.keys.find([]) == {}


async def test_a_secret_is_replaced_only_if_it_is_still_the_current_one(stores: Stores) -> None:
    _, key = new_key()
    await stores.keys.add(key)

    async def replaced(current: Sequence[bytes], new: bytes) -> StoredKey | None:
        return await stores.keys.replace_secret(
            key.key_id, current=current, new=new, pepper_id="newer id", previous_valid_until=AT
        )

    other = b"under the other pepper".ljust(32)
    once = await replaced([other, key.verifier], b"n" * 32)
    assert once == replace(
        key,
        verifier=b"n" * 32,
        pepper_id="newer id",
        previous_verifier=key.verifier,
        previous_pepper_id=key.pepper_id,
        previous_valid_until=AT,
    )
    assert await replaced([other, key.verifier], b"m" * 32) is None
    assert (await stores.keys.find([key.key_id]))[key.key_id] == once
    await stores.keys.revoke(key.key_id, AT)
    assert await replaced([b"n" * 32], b"m" * 32) is None


async def test_a_secret_is_stored_anew_only_where_it_still_is(stores: Stores) -> None:
    _, key = new_key(pepper_id=None)
    await stores.keys.add(key)
    await stores.keys.store_anew(LeftBehind(key.key_id, Match.CURRENT, b"other".ljust(32), b"n" * 32, "newer id"))
    await stores.keys.store_anew(LeftBehind(key.key_id, Match.PREVIOUS, key.verifier, b"n" * 32, "newer id"))
    assert (await stores.keys.find([key.key_id]))[key.key_id] == key
    both = [LeftBehind(key.key_id, Match.CURRENT, key.verifier, b"n" * 32, "newer id")] * 2
    await asyncio.gather(*(stores.keys.store_anew(each) for each in both))  # as two replicas do
    anew = replace(key, verifier=b"n" * 32, pepper_id="newer id")
    assert (await stores.keys.find([key.key_id]))[key.key_id] == anew
    rotated = await stores.keys.replace_secret(
        key.key_id, current=[b"n" * 32], new=b"m" * 32, pepper_id="newer id", previous_valid_until=AT
    )
    assert rotated is not None
    await stores.keys.store_anew(LeftBehind(key.key_id, Match.CURRENT, b"n" * 32, b"o" * 32, "last one"))
    await stores.keys.store_anew(LeftBehind(key.key_id, Match.PREVIOUS, b"n" * 32, b"o" * 32, "last one"))
    found = (await stores.keys.find([key.key_id]))[key.key_id]
    assert found == replace(rotated, previous_verifier=b"o" * 32, previous_pepper_id="last one")


async def test_the_keys_that_are_left_are_those_that_somebody_may_still_use(stores: Stores) -> None:
    ids = {"here": "the  one", "there": "the next", "unknown": None}
    for pepper_id in ids.values():
        for changes in ({}, {"expires_at": AT}, {"expires_at": AT + timedelta(seconds=1)}):
            await stores.keys.add(new_key(pepper_id=pepper_id, **changes)[1])
        _, revoked = new_key(pepper_id=pepper_id)
        await stores.keys.add(revoked)
        await stores.keys.revoke(revoked.key_id, AT)
    assert await stores.keys.count_left("the  one", AT) == 4
    assert await stores.keys.count_left("the  one", AT - timedelta(seconds=1)) == 6
    assert await stores.keys.count_left("neither!", AT) == 6
    _, rotated = new_key(pepper_id="the next")
    await stores.keys.add(rotated)
    await stores.keys.replace_secret(
        rotated.key_id, current=[rotated.verifier], new=b"n" * 32, pepper_id="the  one", previous_valid_until=AT
    )
    # The secret that was replaced counts as long as it works.
    assert await stores.keys.count_left("the  one", AT) == 4
    assert await stores.keys.count_left("the  one", AT - timedelta(seconds=1)) == 7


async def test_of_many_rotations_at_once_one_wins(stores: Stores) -> None:
    _, key = new_key()
    await stores.keys.add(key)
    outcomes = await asyncio.gather(
        *(
            stores.keys.replace_secret(
                key.key_id, current=[key.verifier], new=bytes([n]) * 32, pepper_id="newer id", previous_valid_until=AT
            )
            for n in range(8)
        )
    )
    assert len([outcome for outcome in outcomes if outcome is not None]) == 1


async def test_revoking_keeps_the_first_time(stores: Stores) -> None:
    _, key = new_key()
    await stores.keys.add(key)
    for at in (AT, AT + timedelta(days=1)):
        revoked = await stores.keys.revoke(key.key_id, at)
        assert revoked is not None
        assert revoked.revoked_at == AT
    assert await stores.keys.revoke("A" * 12, AT) is None


async def test_only_what_is_named_is_changed(stores: Stores) -> None:
    _, key = new_key()
    await stores.keys.add(key)
    assert await stores.keys.change(key.key_id, KeyChanges()) == key
    assert await stores.keys.change(key.key_id, KeyChanges(limit_minute=1)) == replace(key, limit_minute=1)
    changed = await stores.keys.change(key.key_id, KeyChanges(name="other", scopes=("batch",), limit_day=2, expires_at=AT))
    assert changed == replace(key, name="other", scopes=("batch",), limit_minute=1, limit_day=2, expires_at=AT)
    assert await stores.keys.change("A" * 12, KeyChanges(name="x")) is None
    await stores.keys.revoke(key.key_id, AT)
    for changes in (KeyChanges(), KeyChanges(name="x")):
        assert await stores.keys.change(key.key_id, changes) is None


async def test_pages_are_in_the_order_of_creation_even_within_one_instant(stores: Stores) -> None:
    keys = [new_key(created_at=CREATED + timedelta(seconds=n // 3))[1] for n in range(7)]
    for key in reversed(keys):
        await stores.keys.add(key)
    expected = sorted(keys, key=lambda key: (key.created_at, key.key_id))
    seen, after = [], None
    while page := await stores.keys.page(after, 2):
        seen += page
        after = page[-1].key_id
    assert seen == expected
    assert await stores.keys.page("A" * 12, 2) is None


def event(key_id: str, requests: int, malicious: int, at_ms: int = AT_MS) -> UsageRecorded:
    return UsageRecorded(key_id=key_id, at_ms=at_ms, requests=requests, malicious=malicious)


async def test_counts_add_up(stores: Stores) -> None:
    _, key = new_key()
    _, idle = new_key()
    for one in (key, idle):
        await stores.keys.add(one)
    async with stores.ledgers.lead() as ledger:
        assert ledger is not None
        assert await ledger.position() is None
        first = [event(key.key_id, 2, 1), event(key.key_id, 3, 0, AT_MS - 86_400_000), event("A" * 12, 9, 9)]
        await ledger.write(add_up(first), None, Position("then", 3))
        await ledger.write(add_up([event(key.key_id, 1, 1, AT_MS - 1)]), Position("then", 3), Position("then", 4))
        await ledger.write(add_up([]), Position("then", 4), Position("then", 9))
        assert await ledger.position() == Position("then", 9)
    days = (DayUsage(date="2026-04-30", requests=3, malicious=0), DayUsage(date="2026-05-01", requests=3, malicious=2))
    assert await stores.keys.days(key.key_id, date(2026, 4, 30)) == Usage(6, 2, AT, days)
    assert await stores.keys.days(key.key_id, date(2026, 5, 1)) == Usage(6, 2, AT, days[1:])
    assert await stores.keys.days(idle.key_id, date(2026, 5, 1)) == Usage()
    assert await stores.keys.usage([key.key_id, idle.key_id, "A" * 12]) == {key.key_id: Usage(6, 2, AT)}


async def test_counts_and_position_are_written_both_or_neither(stores: Stores) -> None:
    _, key = new_key()
    await stores.keys.add(key)
    batch = add_up([event(key.key_id, 1, 0)])
    async with stores.ledgers.lead() as ledger:
        assert ledger is not None
        await ledger.write(batch, None, Position("then", 1))
        for stale in (None, Position("then", 0), Position("earlier", 1)):
            with pytest.raises(PositionMovedError):
                await ledger.write(batch, stale, Position("then", 2))
        assert await ledger.position() == Position("then", 1)
    assert (await stores.keys.usage([key.key_id]))[key.key_id].requests == 1


async def test_one_replica_leads_and_another_takes_over(stores: Stores) -> None:
    async with stores.ledgers.lead() as first:
        assert first is not None
        async with stores.other_ledgers.lead() as second:
            assert second is None
    async with asyncio.timeout(10):
        while True:
            async with stores.other_ledgers.lead() as second:
                if second is not None:
                    break
            await asyncio.sleep(0.01)


async def test_old_days_are_forgotten(stores: Stores) -> None:
    _, key = new_key()
    await stores.keys.add(key)
    async with stores.ledgers.lead() as ledger:
        assert ledger is not None
        batch = add_up([event(key.key_id, 1, 0, AT_MS - n * 86_400_000) for n in range(3)])
        await ledger.write(batch, None, Position("then", 3))
        await ledger.forget_days_before(date(2026, 4, 30))
    usage = await stores.keys.days(key.key_id, date(2000, 1, 1))
    assert [day.date for day in usage.days] == ["2026-04-30", "2026-05-01"]
    assert usage.requests == 3


async def test_a_leader_whose_connection_was_ended_cannot_write(postgres_server: Server) -> None:
    async with in_postgres(postgres_server) as stores:

        async def lead_and_lose_the_connection() -> None:
            async with stores.ledgers.lead() as ledger:
                assert ledger is not None
                await ledger.write(add_up([]), None, Position("then", 1))
                connection = await connect(postgres_server.url)
                await connection.execute("SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory'")
                await connection.close()
                await ledger.write(add_up([]), Position("then", 1), Position("then", 2))

        with pytest.raises(StoreUnavailableError):
            await lead_and_lose_the_connection()
        async with stores.other_ledgers.lead() as ledger:
            assert ledger is not None
            assert await ledger.position() == Position("then", 1)


async def test_a_full_pool_is_told_as_unavailable_and_heals(postgres_server: Server) -> None:
    async with new_database(postgres_server) as text:
        url = engine_url(text)
        await migrate(url)
        engine = make_engine(url, pool_size=1)
        keys = PostgresKeys(engine)
        async with engine.connect():
            with pytest.raises(StoreUnavailableError):
                await keys.find(["A" * 12])
        assert await keys.find(["A" * 12]) == {}
        await engine.dispose()


async def test_cancelled_work_leaves_the_pool_whole(postgres_server: Server) -> None:
    async with new_database(postgres_server) as text:
        url = engine_url(text)
        await migrate(url)
        engine = make_engine(url, pool_size=2)
        keys = PostgresKeys(engine)
        for delay in range(40):
            task = asyncio.create_task(keys.find(["A" * 12]))
            await asyncio.sleep(delay * 0.0002)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        assert await asyncio.gather(*(keys.find(["A" * 12]) for _ in range(4))) == [{}] * 4
        await engine.dispose()


# --- the schema ----------------------------------------------------------------------------------------------------------


def test_the_newest_revision_is_the_one_we_ask_for() -> None:
    config = Config()
    config.set_main_option("script_location", str(SCRIPTS))
    assert ScriptDirectory.from_config(config).get_heads() == [HEAD]


async def test_a_newer_schema_is_left_to_the_next_release(postgres_server: Server) -> None:
    async with new_database(postgres_server) as text:
        await migrate(engine_url(text))
        connection = await connect(text)
        newer = f"{int(HEAD) + 1:04}"
        await connection.execute("UPDATE alembic_version SET version_num = $1", newer)
        await migrate(engine_url(text))
        assert await connection.fetchval("SELECT version_num FROM alembic_version") == newer
        await connection.close()


async def test_a_migration_does_not_keep_readers_waiting(postgres_server: Server) -> None:
    """Behind a dump, say: it gives up, to be tried again, and what it has kept waiting goes on."""
    async with new_database(postgres_server) as text:
        await _to_revision(text, "0001")
        reader, other = await connect(text), await connect(text)
        transaction = reader.transaction()
        await transaction.start()
        await reader.fetch("SELECT * FROM api_keys")
        migration = asyncio.create_task(migrate(engine_url(text)))
        with pytest.raises(StoreUnavailableError):
            await asyncio.wait_for(migration, 20)
        assert await other.fetch("SELECT * FROM api_keys") == []
        await transaction.rollback()
        await migrate(engine_url(text))
        assert await other.fetchval("SELECT version_num FROM alembic_version") == HEAD
        for connection in (reader, other):
            await connection.close()


async def _to_revision(url: str, revision: str) -> None:
    alembic = [sys.executable, "-m", "alembic", "-c", "services/auth/alembic.ini", "upgrade", revision]
    environment = {**os.environ, "PORTCULLIS_DATABASE_URL": url}
    await asyncio.to_thread(subprocess.run, alembic, env=environment, check=True, capture_output=True)


async def test_replicas_migrate_an_empty_database_at_once(postgres_server: Server) -> None:
    async with new_database(postgres_server) as text:
        await asyncio.gather(*(migrate(engine_url(text)) for _ in range(4)))
        connection = await connect(text)
        assert await connection.fetchval("SELECT version_num FROM alembic_version") == HEAD
        await connection.close()


async def test_models_and_migrations_agree(postgres_server: Server) -> None:
    async with new_database(postgres_server) as text:
        await migrate(engine_url(text))
        alembic = [sys.executable, "-m", "alembic", "-c", "services/auth/alembic.ini"]
        process = await asyncio.to_thread(
            subprocess.run,
            [*alembic, "check"],
            env={**os.environ, "PORTCULLIS_DATABASE_URL": text},
            capture_output=True,
            text=True,
        )
        assert process.returncode == 0, process.stdout + process.stderr


def test_urls() -> None:
    for text in ("postgresql://u:p@h:1/d", "postgres://u:p@h:1/d"):
        assert engine_url(text).render_as_string(hide_password=False) == "postgresql+asyncpg://u:p@h:1/d"
    assert engine_url("postgresql://h/d?sslmode=require").query == {"ssl": "require"}
