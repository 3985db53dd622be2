"""The exchange of the pepper in one replica: what it stores anew, and that nothing depends on it."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from libs.common import tasks
from libs.common.clock import ManualClock
from libs.common.errors import ErrorCode
from services.auth import exchange as exchange_module
from services.auth import metrics
from services.auth.cache import Authenticator, KeyCache
from services.auth.core import LeftBehind, Peppers
from services.auth.exchange import Exchange
from tests.unit.auth.fakes import CREATED, PEPPER, KeyRing, MemoryKeys, credential_of

NEW = b"the-pepper-from-now-on"


class Bench(KeyRing):
    """A replica whose current pepper is NEW, over rows that are under PEPPER."""

    store: Keys

    def __init__(self) -> None:
        self.clock = ManualClock(CREATED.timestamp())
        self.store = Keys()
        self.up = True
        self.peppers = Peppers(NEW, PEPPER)
        self.cache = KeyCache(self.store.find, self.clock, ttl_seconds=10.0, entries=100, is_up=lambda: self.up)
        self.exchange = Exchange(self.store, self.clock, self.peppers.current_id, lambda: self.up, self.cache.refresh)
        self.authenticator = Authenticator(self.cache, self.clock, self.peppers, self.exchange.leave)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        running = asyncio.create_task(self.exchange.run())
        try:
            yield
        finally:
            await tasks.end(running)
            await self.cache.close()


class Keys(MemoryKeys):
    """`writes`: what was to be stored anew. `broken`: as if there were a bug in it."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[str] = []
        self.broken = False

    async def store_anew(self, secret: LeftBehind) -> None:
        self.writes.append(secret.key_id)
        if self.broken:
            raise RuntimeError("a bug")
        await super().store_anew(secret)


@pytest.fixture
async def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setattr(exchange_module, "PAUSE_SECONDS", 0)
    monkeypatch.setattr(exchange_module, "RETRY_SECONDS", 0)
    monkeypatch.setattr(exchange_module, "COUNT_EVERY_SECONDS", 0)
    return Bench()


async def settle() -> None:
    """Let the tasks in the background have their turns."""
    for _ in range(20):
        await asyncio.sleep(0)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0)


async def test_a_key_is_stored_anew_when_it_is_used_and_read_anew_then(bench: Bench) -> None:
    api_key, stored = bench.add()
    async with bench.running():
        assert await bench.outcome(api_key) == "ok"
        await until(lambda: bench.store.rows[stored.key_id].pepper_id == bench.peppers.current_id)
        verifier = bench.peppers.verifier(credential_of(api_key).digest)
        assert bench.store.rows[stored.key_id] == replace(stored, verifier=verifier, pepper_id=bench.peppers.current_id)
        await until(lambda: len(bench.store.finds) == 2)
        for _ in range(20):
            assert await bench.outcome(api_key) == "ok"
    assert bench.store.writes == [stored.key_id]


async def test_no_request_waits_for_the_exchange(bench: Bench) -> None:
    """It is not even running here."""
    api_key, stored = bench.add()
    for _ in range(3):
        assert await bench.outcome(api_key) == "ok"
    assert bench.store.rows[stored.key_id] == stored


async def test_what_is_known_stays_good_while_postgres_is_away(bench: Bench) -> None:
    api_key, stored = bench.add()
    async with bench.running():
        bench.store.broken = True
        assert await bench.outcome(api_key) == "ok"
        await until(lambda: bool(bench.store.writes))
        bench.store.broken, bench.store.away = False, True
        # Nobody has noticed yet that it is away.
        assert await bench.outcome(api_key) == "ok"
        await until(lambda: len(bench.store.writes) == 2)
        bench.up = False
        for _ in range(29):
            bench.clock.advance(1)
            assert await bench.outcome(api_key) == "ok"
            await settle()
        assert len(bench.store.writes) == 2
        bench.store.away, bench.up = False, True
        assert await bench.outcome(api_key) == "ok"
        await until(lambda: bench.store.rows[stored.key_id].pepper_id == bench.peppers.current_id)


async def test_a_revoked_key_is_neither_let_in_nor_stored_anew(bench: Bench) -> None:
    api_key, stored = bench.add(revoked_at=CREATED)
    async with bench.running():
        assert await bench.outcome(api_key) == ErrorCode.INVALID_CREDENTIALS
        other, _ = bench.add()
        assert await bench.outcome(other) == "ok"
        await until(lambda: bool(bench.store.writes))
    assert stored.key_id not in bench.store.writes


async def test_what_waits_is_bounded(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange_module, "WAITING_KEYS", 3)
    used = [bench.add()[0] for _ in range(5)]
    for api_key in used:
        assert await bench.outcome(api_key) == "ok"
    async with bench.running():
        await until(lambda: len(bench.store.writes) == 3)
        await settle()
        assert len(bench.store.writes) == 3
        for api_key in used[3:]:  # when they are used the next time
            assert await bench.outcome(api_key) == "ok"
        await until(lambda: all(row.pepper_id == bench.peppers.current_id for row in bench.store.rows.values()))


async def test_the_count_is_unknown_until_it_was_taken_and_ends_at_0(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    used = [bench.add()[0] for _ in range(2)]
    bench.add(revoked_at=CREATED)

    def left() -> float:
        [sample] = [each for metric in metrics.KEYS_UNDER_PREVIOUS_PEPPER.collect() for each in metric.samples]
        return sample.value

    bench.store.away = True
    async with bench.running():
        await until(lambda: "waits" in caplog.text)
        assert math.isnan(left())
        bench.store.away = False
        await until(lambda: left() == 2)
        for number, api_key in enumerate(used, 1):
            assert await bench.outcome(api_key) == "ok"
            await until(lambda: left() == 2 - number)  # noqa: B023  # it is waited for at once
    told = [record.getMessage() for record in caplog.records if "keys not known" in record.getMessage()]
    assert [line.rpartition(": ")[2] for line in told] == ["2", "0"]
    for secret in (*used, PEPPER.decode(), NEW.decode()):
        assert secret not in caplog.text
