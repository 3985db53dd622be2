"""What the limiter counts: decisions by what decided, how near to their limits callers are, and time without Redis."""

from __future__ import annotations

import pytest
from prometheus_client import REGISTRY

from libs.common.clock import ManualClock
from services.limiter.core import PER_KEY
from services.limiter.failover import Health, Limiter, Whole
from tests.unit.limiter.test_failover import FakeStore


def sample(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(f"portcullis_{name}", labels) or 0.0


def decisions(decision: str, store: str) -> float:
    return sample("limiter_decisions_total", limit="key", decision=decision, store=store)


async def test_decisions_are_counted_by_what_came_of_them_and_who_made_them() -> None:
    clock = ManualClock()
    store = FakeStore(clock)
    limiter = Limiter(PER_KEY, store, Health(store, lambda _: None), clock, 100)
    kinds = [(decision, where) for decision in ("admitted", "refused", "postponed") for where in ("redis", "local")]
    before = {kind: decisions(*kind) for kind in kinds}
    units, full = sample("limiter_units_total", limit="key"), sample("limiter_used_ratio_bucket", window="minute", le="0.99")
    await limiter.decide("k", (2, 100), 2)
    await limiter.decide("k", (2, 100), 1)
    await limiter.decide("k", (2, 100), 5, partial=True)
    await limiter.decide("k", (2, 100), 0)  # only looks
    store.away = True
    await limiter.decide("other", (2, 100), 1)
    after = {kind: decisions(*kind) - before[kind] for kind in kinds}
    assert after == dict.fromkeys(kinds, 0.0) | {
        ("admitted", "redis"): 1.0,
        ("refused", "redis"): 1.0,
        ("postponed", "redis"): 1.0,
        ("admitted", "local"): 1.0,
    }
    assert sample("limiter_units_total", limit="key") - units == 3
    # Of the four, three left nothing of the minute, and one half of it.
    assert sample("limiter_used_ratio_bucket", window="minute", le="0.99") - full == 1


async def test_time_without_redis_adds_up_and_ends_with_its_return() -> None:
    clock = ManualClock()
    store = FakeStore(clock)
    health = Health(store, lambda _: None, monotonic=clock.monotonic)
    before = sample("limiter_degraded_seconds_total")
    assert sample("store_up", store="redis") == 1
    store.away = True
    for _ in range(3):
        await health.check()
        clock.advance(0.5)
    assert sample("store_up", store="redis") == 0
    store.away = False
    await health.check()
    clock.advance(60)
    await health.check()
    assert sample("store_up", store="redis") == 1
    assert sample("limiter_degraded_seconds_total") - before == pytest.approx(1.5)


async def test_a_store_of_parts_is_up_when_all_of_them_are_and_time_counts_once() -> None:
    clock = ManualClock()
    changes: list[bool] = []
    whole = Whole(changes.append, clock.monotonic)
    stores = [FakeStore(clock) for _ in range(2)]
    parts = [Health(store, lambda _: None, whole=whole) for store in stores]
    before = sample("limiter_degraded_seconds_total")
    for away in ((True, False), (True, True), (False, True), (False, False)):
        for store, part, is_away in zip(stores, parts, away, strict=True):
            store.away = is_away
            await part.check()
        assert sample("store_up", store="redis") == (not any(away))
        clock.advance(1)
    assert changes == [False, True]
    assert sample("limiter_degraded_seconds_total") - before == pytest.approx(3)
    parts[0].lost()
    parts[0].retire()  # nobody waits for what is no part any more
    parts[0].lost()
    assert changes == [False, True, False, True]
