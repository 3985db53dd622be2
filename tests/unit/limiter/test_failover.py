"""What happens when the store goes away and comes back, with a store that does so when told."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from libs.common.clock import ManualClock
from services.limiter.core import MAX_LIMIT, PER_KEY, Decision, KeyState
from services.limiter.failover import Health, Limiter
from services.limiter.ports import StoreUnavailableError


class FakeStore:
    """Decides by the rule itself for every replica, unless it is away; also its own heartbeat."""

    def __init__(self, clock: ManualClock) -> None:
        self.away = False
        self.asked = 0
        self.beats = 0
        self.replicas = 1
        self.states: dict[str, KeyState] = {}
        self._clock = clock

    async def decide(
        self, key: str, limits: Sequence[int], cost: int, known: Sequence[int] | None, *, partial: bool = False
    ) -> Decision:
        self.asked += 1
        await asyncio.sleep(0)
        if self.away:
            raise StoreUnavailableError
        state = self.states.setdefault(key, KeyState(PER_KEY))
        return state.decide(PER_KEY, limits, cost, int(self._clock.monotonic() * 1000), known, partial=partial)

    async def beat(self) -> int:
        self.beats += 1
        await asyncio.sleep(0)
        if self.away:
            raise StoreUnavailableError
        return self.replicas


class House:
    """Some replicas over one store."""

    def __init__(self, replicas: int = 1, max_keys: int = 100) -> None:
        self.clock = ManualClock()
        self.store = FakeStore(self.clock)
        self.store.replicas = replicas
        self.changes: list[bool] = []
        self.health = [Health(self.store, self.changes.append, beat_seconds=0.001, retry_seconds=0.001) for _ in range(replicas)]
        self.limiters = [Limiter(PER_KEY, self.store, health, self.clock, max_keys) for health in self.health]

    async def check(self) -> None:
        for health in self.health:
            await health.check()

    async def admitted(self, calls: int, replica: int = 0, key: str = "k", limit: int = 100) -> int:
        """How many of so many calls of one unit get in."""
        decisions = [(await self.limiters[replica].decide(key, (limit, 100_000), 1))[0] for _ in range(calls)]
        return sum(decision.admitted for decision in decisions)


async def test_the_store_decides_while_it_is_there() -> None:
    house = House()
    decision, degraded = await house.limiters[0].decide("k", (2, 10), 1)
    assert (decision.admitted, decision.used, degraded) == (True, (1, 1), False)
    assert house.changes == []


async def test_the_first_call_without_an_answer_is_decided_here_and_no_further_one_is_asked() -> None:
    house = House()
    house.store.away = True
    for _ in range(10):
        assert (await house.limiters[0].decide("k", (100, 1000), 1))[1]
    assert house.store.asked == 1
    assert house.changes == [False]
    assert house.health[0].outages == 1


async def test_a_loss_of_the_store_hands_out_no_fresh_window() -> None:
    house = House()
    assert await house.admitted(60) == 60
    house.store.away = True
    assert await house.admitted(100) == 40


async def test_what_other_replicas_used_counts_too_as_far_as_the_store_has_told() -> None:
    house = House(replicas=2)
    await house.check()
    assert await house.admitted(30, replica=1) == 30
    assert await house.admitted(30, replica=0) == 30
    house.store.away = True
    # 40 are left, and each is taken to be matched by one of the other replica's.
    assert await house.admitted(100, replica=0) == 20


async def test_replicas_without_the_store_stay_within_the_limit_together() -> None:
    house = House(replicas=3)
    await house.check()
    house.store.away = True
    total = 0
    for _ in range(100):
        for replica in range(3):
            total += await house.admitted(1, replica)
    assert 96 <= total <= 102  # to whole units: 33 or 34 each


async def test_the_smallest_limit_is_still_worth_one_call() -> None:
    house = House(replicas=3)
    await house.check()
    house.store.away = True
    assert await house.admitted(5, limit=1) == 1
    assert not (await house.limiters[0].decide("k2", (5, 1000), 6))[0].admitted


async def test_units_are_free_again_in_time_while_the_store_is_away() -> None:
    house = House()
    await house.admitted(100)
    house.store.away = True
    assert await house.admitted(1) == 0
    house.clock.advance(60.2)
    assert await house.admitted(150) == 100


async def test_a_store_that_comes_back_is_told_what_was_used_meanwhile() -> None:
    house = House()
    assert await house.admitted(10) == 10
    house.store.away = True
    assert await house.admitted(80) == 80
    house.store.away = False
    await house.check()
    assert house.changes == [False, True]
    assert await house.admitted(50) == 10
    assert not (await house.limiters[0].decide("k", (100, 100_000), 1))[1]


async def test_a_store_that_comes_back_empty_is_told_of_keys_that_did_not_call_meanwhile() -> None:
    house = House()
    assert await house.admitted(70) == 70
    house.store.away = True
    await house.admitted(1, key="other")
    house.store.states.clear()
    house.store.away = False
    await house.check()
    assert await house.admitted(100) == 30


async def test_concurrent_calls_in_a_loss_are_all_answered_and_it_counts_once() -> None:
    house = House()
    house.store.away = True
    decisions = await asyncio.gather(*(house.limiters[0].decide("k", (20, 1000), 1) for _ in range(64)))
    assert sum(decision.admitted for decision, _ in decisions) == 20
    assert house.health[0].outages == 1


async def test_a_partial_call_counts_for_every_replica_while_the_store_is_away() -> None:
    house = House(replicas=3)
    await house.check()
    house.store.away = True
    granted = []
    for limiter in house.limiters:
        taken = [(await limiter.decide("k", (100, 1000), 20, partial=True))[0].granted for _ in range(4)]
        assert taken == [20, 13, 0, 0]
        granted += taken
    assert sum(granted) <= 100


async def test_a_limit_below_the_number_of_replicas_is_one_unit_for_a_partial_call() -> None:
    house = House(replicas=3)
    await house.check()
    house.store.away = True
    decisions = [(await house.limiters[0].decide("k", (2, 1000), 5, partial=True))[0] for _ in range(2)]
    assert [(each.granted, each.used[0]) for each in decisions] == [(1, 2), (0, 2)]


async def test_what_was_granted_in_part_is_followed_while_the_store_is_there() -> None:
    house = House()
    decision, _ = await house.limiters[0].decide("k", (10, 1000), 25, partial=True)
    assert decision.granted == 10
    house.store.away = True
    assert await house.admitted(5, limit=10) == 0


async def test_only_so_many_keys_are_kept() -> None:
    house = House(max_keys=10)
    house.store.away = True
    for number in range(1000):
        await house.admitted(1, key=str(number))
    assert len(house.limiters[0]._states) == 10


async def test_numbers_beyond_32_bits_are_held_to_them() -> None:
    house = House()
    decision, _ = await house.limiters[0].decide("k", (10**12, 10**12), 10**30)
    assert not decision.admitted
    assert (await house.limiters[0].decide("k", (10**12, 10**12), MAX_LIMIT))[0].admitted


@pytest.fixture
def watched() -> House:
    return House()


async def test_the_watch_notices_both_changes_by_itself(watched: House) -> None:
    changed = asyncio.Event()
    health = Health(watched.store, lambda up: changed.set(), beat_seconds=0.001, retry_seconds=0.001)
    watching = asyncio.create_task(health.watch())
    watched.store.away = True
    await asyncio.wait_for(changed.wait(), 5)
    assert not health.up
    changed.clear()
    watched.store.replicas = 4
    watched.store.away = False
    await asyncio.wait_for(changed.wait(), 5)
    assert health.up
    assert health.replicas == 4
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)


async def test_a_loss_between_two_beats_is_followed_up_at_once(watched: House) -> None:
    back = asyncio.Event()
    health = Health(watched.store, lambda up: back.set() if up else None, beat_seconds=3600, retry_seconds=0.001)
    watching = asyncio.create_task(health.watch())
    await asyncio.sleep(0)  # the watch is at its hour of leisure
    health.lost()
    await asyncio.wait_for(back.wait(), 5)
    assert watched.store.beats == 1
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)
