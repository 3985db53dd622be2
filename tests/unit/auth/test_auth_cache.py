"""What this replica knows of keys, on a driven clock and without PostgreSQL."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from libs.common import keys
from libs.common.clock import ManualClock
from libs.common.errors import ErrorCode
from services.auth import cache as cache_module
from services.auth.cache import Authenticator, KeyCache
from services.auth.core import StoreUnavailableError, verifier_of
from tests.unit.auth.fakes import CREATED, PEPPER, PEPPERS, KeyRing, MemoryKeys, credential_of, new_key


class Bench(KeyRing):
    """A cache of ten seconds over a store in memory."""

    def __init__(self, entries: int = 100) -> None:
        self.clock = ManualClock()
        self.store = MemoryKeys()
        self.up = True
        self.cache = KeyCache(self.store.find, self.clock, ttl_seconds=10.0, entries=entries, is_up=lambda: self.up)
        self.authenticator = Authenticator(self.cache, self.clock, PEPPERS)


async def settle() -> None:
    """Let the background task have its turn; it never waits for anything but the gate."""
    for _ in range(10):
        await asyncio.sleep(0)


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    bench = Bench()
    yield bench
    await bench.cache.close()


async def test_a_key_is_read_once_within_its_time(bench: Bench) -> None:
    api_key, _ = bench.add()
    for _ in range(5):
        assert await bench.outcome(api_key) == "ok"
        bench.clock.advance(0.9)
    assert len(bench.store.finds) == 1


async def test_concurrent_misses_are_one_read(bench: Bench) -> None:
    api_key, stored = bench.add()
    other, other_stored = bench.add()
    bench.store.gate = asyncio.Event()
    asked = [asyncio.create_task(bench.outcome(api_key)) for _ in range(50)]
    await settle()
    asked += [asyncio.create_task(bench.outcome(key)) for key in [api_key, other] * 20]
    await settle()
    bench.store.gate.set()
    assert set(await asyncio.gather(*asked)) == {"ok"}
    assert bench.store.finds == [[stored.key_id], [other_stored.key_id]]


async def test_a_flood_of_unknown_keys_is_a_few_reads_and_bounded(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "UNKNOWN_ENTRIES", 50)
    unknown = [keys.generate() for _ in range(300)]
    bench.store.gate = asyncio.Event()
    asked = [asyncio.create_task(bench.outcome(key)) for key in unknown]
    await settle()
    bench.store.gate.set()
    assert set(await asyncio.gather(*asked)) == {ErrorCode.INVALID_CREDENTIALS}
    assert len(bench.store.finds) <= 1 + -(-300 // cache_module.BATCH_KEYS)
    assert len(bench.cache) == 50


async def test_an_unknown_key_is_remembered_briefly(bench: Bench) -> None:
    api_key = keys.generate()
    for _ in range(5):
        assert await bench.outcome(api_key) == ErrorCode.INVALID_CREDENTIALS
    assert len(bench.store.finds) == 1
    bench.clock.advance(cache_module.UNKNOWN_TTL_SECONDS + 0.1)
    assert await bench.outcome(api_key) == ErrorCode.INVALID_CREDENTIALS
    assert len(bench.store.finds) == 2


async def test_known_keys_are_bounded_least_recently_used_first() -> None:
    bench = Bench(entries=2)
    (first, _), (second, _), (third, _) = (bench.add() for _ in range(3))
    for key in (first, second, first, third):
        assert await bench.outcome(key) == "ok"
    assert len(bench.store.finds) == 3
    assert await bench.outcome(first) == "ok"
    assert len(bench.store.finds) == 3
    assert await bench.outcome(second) == "ok"
    assert len(bench.store.finds) == 4
    assert len(bench.cache) == 2


async def test_a_key_in_use_is_refreshed_before_it_has_to_wait(bench: Bench) -> None:
    api_key, stored = bench.add()
    assert await bench.outcome(api_key) == "ok"
    bench.clock.advance(6)
    assert await bench.outcome(api_key) == "ok"
    await settle()
    assert len(bench.store.finds) == 2
    bench.clock.advance(4.5)
    assert await bench.outcome(api_key) == "ok"
    assert len(bench.store.finds) == 2
    # What was changed behind the bus's back is seen by the end of the time at the latest.
    bench.store.rows[stored.key_id] = new_key(key_id=stored.key_id, verifier=stored.verifier, revoked_at=CREATED)[1]
    bench.clock.advance(10)
    assert await bench.outcome(api_key) == ErrorCode.INVALID_CREDENTIALS


async def test_known_keys_work_for_30_seconds_without_postgres_and_unknown_ones_get_503(bench: Bench) -> None:
    api_key, _ = bench.add()
    idle_key, _ = bench.add()
    unknown = keys.generate()
    assert await bench.outcome(api_key) == "ok"
    assert await bench.outcome(idle_key) == "ok"
    assert await bench.outcome(unknown) == ErrorCode.INVALID_CREDENTIALS
    bench.store.away = True
    for _ in range(29):
        bench.clock.advance(1)
        assert await bench.outcome(api_key) == "ok"
        assert await bench.outcome(unknown) == (ErrorCode.INVALID_CREDENTIALS if bench.up else ErrorCode.STAGE_UNAVAILABLE)
        assert await bench.outcome(keys.generate()) == ErrorCode.STAGE_UNAVAILABLE
        bench.up = False
    assert await bench.outcome(idle_key) == "ok"
    bench.clock.advance(1.5)
    assert await bench.outcome(api_key) == ErrorCode.STAGE_UNAVAILABLE
    assert await bench.outcome(idle_key) == ErrorCode.STAGE_UNAVAILABLE
    bench.store.away, bench.up = False, True
    assert await bench.outcome(api_key) == "ok"


async def test_an_unknown_key_is_503_as_soon_as_the_read_fails(bench: Bench) -> None:
    bench.store.away = True  # and nobody has noticed yet
    assert await bench.outcome(keys.generate()) == ErrorCode.STAGE_UNAVAILABLE


async def test_while_postgres_hangs_known_keys_hardly_wait(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "PATIENCE_SECONDS", 0.01)
    monkeypatch.setattr(cache_module, "LOOKUP_TIMEOUT_SECONDS", 0.02)
    api_key, _ = bench.add()
    assert await bench.outcome(api_key) == "ok"
    bench.clock.advance(15)
    bench.store.gate = asyncio.Event()  # never set
    assert await bench.outcome(api_key) == "ok"
    assert await bench.outcome(keys.generate()) == ErrorCode.STAGE_UNAVAILABLE


async def test_a_dead_secret_is_401_even_while_postgres_is_away(bench: Bench) -> None:
    api_key, _ = bench.add(revoked_at=CREATED)
    assert await bench.outcome(api_key) == ErrorCode.INVALID_CREDENTIALS
    bench.store.away, bench.up = True, False
    bench.clock.advance(5)
    assert await bench.outcome(api_key) == ErrorCode.INVALID_CREDENTIALS


async def test_a_changed_key_is_forgotten_at_once(bench: Bench) -> None:
    api_key, stored = bench.add()
    assert await bench.outcome(api_key) == "ok"
    await bench.store.revoke(stored.key_id, CREATED)
    assert await bench.outcome(api_key) == "ok"
    bench.cache.forget(stored.key_id)
    assert await bench.outcome(api_key) == ErrorCode.INVALID_CREDENTIALS


@pytest.mark.parametrize("how", ["forget", "clear"])
async def test_a_read_begun_before_the_change_is_neither_cached_nor_used(bench: Bench, how: str) -> None:
    api_key, stored = bench.add()
    bench.store.gate = asyncio.Event()
    asked = asyncio.create_task(bench.outcome(api_key))
    await settle()  # the old row has been read, and is on its way
    await bench.store.revoke(stored.key_id, CREATED)
    if how == "forget":
        bench.cache.forget(stored.key_id)
    else:
        bench.cache.clear()
    bench.store.gate.set()
    assert await asked == ErrorCode.INVALID_CREDENTIALS
    assert await bench.outcome(api_key) == ErrorCode.INVALID_CREDENTIALS


async def test_a_refresh_begun_before_the_change_does_not_bring_the_old_key_back(bench: Bench) -> None:
    api_key, stored = bench.add()
    assert await bench.outcome(api_key) == "ok"
    bench.clock.advance(6)
    bench.store.gate = asyncio.Event()
    assert await bench.outcome(api_key) == "ok"  # and a refresh is under way
    await settle()
    await bench.store.revoke(stored.key_id, CREATED)
    bench.cache.forget(stored.key_id)
    bench.store.gate.set()
    await settle()
    assert await bench.outcome(api_key) == ErrorCode.INVALID_CREDENTIALS


async def test_an_old_key_that_is_revoked_while_it_waits_is_not_used(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "PATIENCE_SECONDS", 0.05)
    api_key, stored = bench.add()
    assert await bench.outcome(api_key) == "ok"
    bench.clock.advance(15)
    bench.store.gate = asyncio.Event()  # never set
    asked = asyncio.create_task(bench.outcome(api_key))
    await settle()
    bench.cache.forget(stored.key_id)
    assert await asked == ErrorCode.STAGE_UNAVAILABLE


async def test_a_new_secret_works_although_the_old_one_is_cached(bench: Bench) -> None:
    api_key, stored = bench.add()
    assert await bench.outcome(api_key) == "ok"
    rotated = keys.generate(stored.key_id)
    assert await bench.outcome(rotated) == ErrorCode.INVALID_CREDENTIALS
    bench.store.rows[stored.key_id] = new_key(key_id=stored.key_id, verifier=verifier_of(PEPPER, credential_of(rotated).digest))[
        1
    ]
    bench.clock.advance(1.1)
    assert await bench.outcome(rotated) == "ok"
    assert await bench.outcome(api_key) == ErrorCode.INVALID_CREDENTIALS


async def test_wrong_secrets_for_a_known_key_are_few_reads(bench: Bench) -> None:
    api_key, stored = bench.add()
    assert await bench.outcome(api_key) == "ok"
    for _ in range(100):
        bench.clock.advance(0.05)
        assert await bench.outcome(keys.generate(stored.key_id)) == ErrorCode.INVALID_CREDENTIALS
    assert len(bench.store.finds) <= 6


async def test_an_id_that_cannot_be_one_is_never_looked_up(bench: Bench) -> None:
    for key_id in ("", "x" * 11, "x" * 5000, "A" * 11 + "\x00", "A" * 11 + "é"):
        assert await bench.cache.get(key_id) is None
    assert bench.store.finds == []
    assert len(bench.cache) == 0


async def test_nobody_waits_for_a_read_that_was_broken_off(bench: Bench) -> None:
    api_key, _ = bench.add()
    bench.store.gate = asyncio.Event()
    asked = asyncio.create_task(bench.cache.get(credential_of(api_key).key_id))
    await settle()
    await bench.cache.close()
    with pytest.raises(StoreUnavailableError):
        await asyncio.wait_for(asked, 0.5)
    bench.store.gate = None
    assert await bench.outcome(api_key) == "ok"


async def test_a_caller_that_leaves_does_not_take_the_read_with_it(bench: Bench) -> None:
    api_key, _ = bench.add()
    bench.store.gate = asyncio.Event()
    leaves = asyncio.create_task(bench.outcome(api_key))
    stays = asyncio.create_task(bench.outcome(api_key))
    await settle()
    leaves.cancel()
    await settle()
    bench.store.gate.set()
    assert await stays == "ok"
    assert len(bench.store.finds) == 1
