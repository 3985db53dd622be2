"""The limiter on a real Redis: the rule in Lua, the memory that it takes, and an adapter that fails fast and comes back."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import redis
from hypothesis import given, settings

from infra.embedded import servers
from infra.embedded.servers import Server
from libs.common.clock import SystemClock
from services.limiter import adapters
from services.limiter.core import MAX_LIMIT, PER_ADDRESS, PER_KEY, REFUSALS_KEPT, Decision, Policy
from services.limiter.failover import Health, Limiter
from services.limiter.lua import READ_CLOCK, SCRIPT, Wire
from services.limiter.ports import StoreUnavailableError
from tests.conftest import free_port, wait_until
from tests.integration.limiter_kit import limiter
from tests.unit.limiter.rule import (
    DAY,
    MINUTE,
    CoreRule,
    Rule,
    RuleBehaviour,
    Step,
    Timed,
    edges,
    histories,
    mixed_overload,
    overload,
    replay,
    replay_stepping_back,
    steps_back,
)

# The production script in every character but the one line that asks for the time: here the last two arguments tell it.
DRIVEN_SCRIPT = SCRIPT.replace(READ_CLOCK, "local clock = {ARGV[#ARGV - 1], ARGV[#ARGV]}")
assert DRIVEN_SCRIPT != SCRIPT

_numbers = itertools.count()


class LuaRule:
    """The script on one key of its own."""

    def __init__(self, client: redis.Redis, policy: Policy) -> None:
        self.client = client
        self.key = f"test:rule:{next(_numbers)}"
        self._wire = Wire(policy)
        self._clock = (0, 0)
        self._script = client.register_script(DRIVEN_SCRIPT)

    def set_clock(self, seconds: float) -> None:
        self._clock = divmod(int(seconds * 1_000_000), 1_000_000)

    def decide(self, limits: Sequence[int], cost: int, known: Sequence[int] | None = None, *, partial: bool = False) -> Decision:
        ask = self._wire.ask(limits, cost, known, partial=partial)
        (answer,) = self._script([self.key], [self._wire.windows, ask, *self._clock])
        return self._wire.decision(answer)


@pytest.fixture(scope="module")
def client(redis_server: Server) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_server.url) as client:
        yield client


class TestLuaRule(RuleBehaviour):
    @pytest.fixture(autouse=True)
    def _connected(self, client: redis.Redis) -> None:
        type(self).client = client

    client: redis.Redis

    def make_rule(self, policy: Policy) -> Rule:
        return LuaRule(self.client, policy)


@given(histories() | edges())
@settings(max_examples=60)
def test_lua_decides_as_the_rule_in_python_does(client: redis.Redis, steps: list[Step]) -> None:
    lua, core = Timed(LuaRule(client, PER_KEY)), Timed(CoreRule(PER_KEY))
    for index, (pause, cost, limits) in enumerate(steps):
        # Not where a call only looks, of which Redis keeps nothing.
        backwards = 1000.0 if index % 40 == 35 else 0.0
        lua.advance(pause - backwards)
        core.advance(pause - backwards)
        known = (cost * 2, cost * 3) if index % 20 == 19 else None
        asked = 0 if index % 10 == 9 else cost
        partial = index % 3 == 2
        assert lua.decide(limits, asked, known, partial=partial) == core.decide(limits, asked, known, partial=partial)


@given(histories() | edges(), steps_back)
@settings(max_examples=30)
def test_lua_agrees_with_an_exact_log(client: redis.Redis, steps: list[Step], back: list[tuple[int, float]]) -> None:
    replay(Timed(LuaRule(client, PER_KEY)), PER_KEY, (MINUTE, DAY), steps)
    replay_stepping_back(LuaRule(client, PER_KEY), steps, back)


@pytest.mark.parametrize("pace", ["flood", "jitter"])
def test_lua_admits_at_least_98_percent_under_steady_overload(client: redis.Redis, pace: str) -> None:
    assert overload(LuaRule(client, Policy.of(MINUTE)), 1_000_000, MINUTE, pace) >= 0.98
    assert mixed_overload(LuaRule(client, PER_KEY), 100_000, 1000) >= 0.98


@pytest.mark.parametrize("limit", [1, 60, 1_000_000, MAX_LIMIT])
def test_a_key_takes_at_most_2_kb_at_any_limit(client: redis.Redis, limit: int) -> None:
    rule = LuaRule(client, PER_KEY)
    timed = Timed(rule)
    largest = 0
    day = min(1_000_000_000, limit * 1440)
    # Slots of a day fill up first, 1 350 s each; then those of a minute, and the refusals.
    for pause in [1350.0] * 70 + [0.9375] * 140:
        timed.advance(pause)
        timed.decide((limit, day), max(1, min(limit // 100, day // 300)))
        for _ in range(1 if pause > 1 else REFUSALS_KEPT):
            timed.decide((limit, day), limit + 1)
        largest = max(largest, client.memory_usage(rule.key) or 0)
    assert 200 < largest <= 2048
    if limit >= 1_000_000:
        assert largest > 1000  # or the slots have not been filled, and nothing was tried


def test_an_idle_key_vanishes(client: redis.Redis) -> None:
    for policy, seconds in ((PER_KEY, 86_400), (PER_ADDRESS, 3600)):
        rule = LuaRule(client, policy)
        timed = Timed(rule)
        timed.decide((5, 5)[: len(policy.windows)])
        assert seconds * 1000 < client.pttl(rule.key) < seconds * 1010


def test_looking_writes_nothing(client: redis.Redis) -> None:
    rule = LuaRule(client, PER_KEY)
    Timed(rule).decide((5, 5), 0)
    assert client.exists(rule.key) == 0


def test_what_is_not_a_state_is_begun_anew(client: redis.Redis) -> None:
    rule = LuaRule(client, PER_KEY)
    client.set(rule.key, b"short")
    assert Timed(rule).decide((5, 5)).used == (1, 1)


# --- the adapter ---------------------------------------------------------------------------------------------------------


class OwnRedis:
    """A Redis of one test's own, to be stopped, killed and started again."""

    def __init__(self, home: Path) -> None:
        self.server = servers.redis(home, free_port(), "password")
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.process = subprocess.Popen(self.server.command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        with redis.Redis.from_url(self.server.url) as client:
            wait_until(lambda: self._answers(client), what="Redis")

    @staticmethod
    def _answers(client: redis.Redis) -> bool:
        try:
            return bool(client.ping())
        except redis.RedisError:
            return False

    def send(self, number: signal.Signals) -> None:
        assert self.process is not None
        os.kill(self.process.pid, number)
        if number == signal.SIGKILL:
            self.process.wait()
            self.process = None

    def end(self) -> None:
        if self.process is not None:
            self.send(signal.SIGKILL)


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[OwnRedis]:
    own = OwnRedis(tmp_path)
    own.start()
    yield own
    own.end()


async def until(health: Health, up: bool) -> None:
    async with asyncio.timeout(10):
        while health.up != up:  # what is waited for happens in another process
            await asyncio.sleep(0.005)


async def test_concurrent_calls_share_a_limit_and_their_answers_are_their_own(redis_server: Server) -> None:
    async with limiter(redis_server.url) as (one, _), limiter(redis_server.url, instance="two") as (two, _):

        async def call(number: int) -> tuple[int, bool, tuple[int, ...]]:
            # Key k has the limit k + 1, by which an answer that went astray would be known.
            key = number % 20
            decision, degraded = await (one, two)[number % 2].decide(f"shared-{key}", (key + 1, 10_000 + key), 1)
            assert not degraded
            return key, decision.admitted, decision.used

        answers = await asyncio.gather(*(call(number) for number in range(2000)))
    for key in range(20):
        mine = [(admitted, used) for asked, admitted, used in answers if asked == key]
        assert len(mine) == 100
        assert sum(admitted for admitted, _ in mine) == key + 1
        assert sorted(used[0] for admitted, used in mine if admitted) == list(range(1, key + 2))


async def test_a_script_flush_goes_unnoticed(redis_server: Server, client: redis.Redis) -> None:
    async with limiter(redis_server.url) as (one, health):
        admitted = 0
        for round_ in range(10):
            client.script_flush()
            decisions = await asyncio.gather(*(one.decide("flushed", (35, 10_000), 1) for _ in range(5)))
            assert not any(degraded for _, degraded in decisions)
            admitted += sum(decision.admitted for decision, _ in decisions)
            assert admitted == min(35, 5 * (round_ + 1))
        assert health.outages == 0


async def test_scripts_flushed_all_the_time_go_unnoticed(own_redis: OwnRedis, monkeypatch: pytest.MonkeyPatch) -> None:
    # Also one that is flushed between the command that fails for want of it and the next.
    monkeypatch.setattr(adapters, "TIMEOUT_SECONDS", 5)  # this is about answers, not about how soon they come
    ends = threading.Event()

    def flush() -> int:
        flushes = 0
        with redis.Redis.from_url(own_redis.server.url) as client:
            while not ends.is_set():
                client.script_flush()
                flushes += 1
        return flushes

    async with limiter(own_redis.server.url) as (one, health):
        flushing = asyncio.create_task(asyncio.to_thread(flush))
        decisions = [await one.decide("flushed", (1000, 10_000), 1) for _ in range(300)]
        ends.set()
        assert await flushing > 0
        assert [decision.used[0] for decision, _ in decisions] == list(range(1, 301))
        assert health.outages == 0


async def test_a_hung_redis_costs_one_timeout_and_its_late_answers_reach_nobody(own_redis: OwnRedis) -> None:
    async with limiter(own_redis.server.url) as (one, health):
        for key in range(8):
            await one.decide(f"k{key}", (100 + key, 10_000), key + 1)
        own_redis.send(signal.SIGSTOP)
        began = time.monotonic()
        first = await asyncio.gather(*(one.decide(f"k{key % 8}", (100 + key % 8, 10_000), 1) for key in range(500)))
        # 500 calls, far more than can be under way at once, share one timeout of 0.1 s.
        assert 0.05 < time.monotonic() - began < 5
        assert all(degraded for _, degraded in first)
        assert not health.up
        own_redis.send(signal.SIGCONT)
        await until(health, True)
        for key in range(8):
            decision, degraded = await one.decide(f"k{key}", (100 + key, 10_000), 0)
            assert not degraded
            # What was admitted before and during the hang; whether Redis counted the calls that it answered too late is its own.
            assert key + 1 <= decision.used[0] <= 100 + key
        fresh = await asyncio.gather(*(one.decide(f"fresh{key}", (100, 10_000), key + 1) for key in range(40)))
        assert [decision.used[0] for decision, _ in fresh] == list(range(1, 41))


async def test_calls_that_wait_behind_a_hung_batch_do_not_hang_in_turn(redis_server: Server) -> None:
    client = adapters.connect(redis_server.url)
    store = adapters.RedisStore(client, PER_KEY, "rl:")
    batches = 0

    async def hang(*_: object) -> None:
        nonlocal batches
        batches += 1
        await asyncio.Event().wait()

    store._script = hang  # type: ignore[assignment]  # a script that never comes back
    calls = [store.decide("k", (1, 1), 1, None) for _ in range(20 * adapters.MAX_BATCH)]
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert all(isinstance(outcome, StoreUnavailableError) for outcome in outcomes)
    assert batches == adapters.MAX_CONNECTIONS
    await client.aclose()


async def test_a_process_that_stands_still_does_not_blame_redis() -> None:
    loop = asyncio.get_running_loop()
    arrived: asyncio.Future[str] = loop.create_future()
    arrival = threading.Timer(0.05, loop.call_soon_threadsafe, (arrived.set_result, "in time"))

    async def call() -> str:
        answer = await arrived
        for _ in range(10):
            await asyncio.sleep(0)  # an answer takes some turns of the loop to be read
        return answer

    async def stand_still() -> None:
        time.sleep(3 * adapters.TIMEOUT_SECONDS)  # noqa: ASYNC251  # which is the point

    arrival.start()
    outcome, _ = await asyncio.gather(adapters.within_the_timeout(call()), stand_still())
    assert outcome == "in time"


async def test_nobody_asks_a_redis_that_is_known_to_be_away(own_redis: OwnRedis) -> None:
    client = adapters.connect(own_redis.server.url)
    asked = 0

    class Counting(adapters.RedisStore):
        async def decide(
            self, key: str, limits: Sequence[int], cost: int, known: Sequence[int] | None, *, partial: bool = False
        ) -> Decision:
            nonlocal asked
            asked += 1
            return await super().decide(key, limits, cost, known, partial=partial)

    health = Health(adapters.RedisHeartbeat(client, "one"), lambda up: None)
    one = Limiter(PER_KEY, Counting(client, PER_KEY, "rl:"), health, SystemClock(), 1000)
    own_redis.send(signal.SIGKILL)
    for _ in range(50):
        assert (await one.decide("k", (1000, 10_000), 1))[1]
    assert asked == 1
    await client.aclose()


async def test_a_redis_that_lost_its_data_unnoticed_hands_out_no_second_window(own_redis: OwnRedis) -> None:
    """It was restarted between two calls, or somebody has emptied it: no call failed, and all counts are gone."""
    async with limiter(own_redis.server.url) as (one, health):
        taken = [(await one.decide("k", (100, 10_000), 1))[0].admitted for _ in range(70)]
        assert all(taken)
        client = adapters.connect(own_redis.server.url)
        await client.flushall()
        await client.aclose()
        async with asyncio.timeout(10):
            while not health.outages:  # the next beats tell
                await asyncio.sleep(0.005)
        await until(health, True)
        again = [(await one.decide("k", (100, 10_000), 1))[0].admitted for _ in range(100)]
        assert sum(again) == 30
        assert health.outages == 1


async def test_a_killed_redis_hands_out_no_second_window_nor_does_its_return(own_redis: OwnRedis) -> None:
    async with limiter(own_redis.server.url) as (one, health):

        async def admitted(calls: int) -> int:
            return sum([(await one.decide("k", (100, 10_000), 1))[0].admitted for _ in range(calls)])

        assert await admitted(70) == 70
        own_redis.send(signal.SIGKILL)
        assert await admitted(20) == 20
        assert await admitted(50) == 10
        assert not health.up
        for file in Path(own_redis.server.command[-1]).parent.glob("**/*.aof"):
            file.unlink()  # the worst case: it comes back with nothing
        own_redis.start()
        await until(health, True)
        decision, degraded = await one.decide("k", (100, 10_000), 1)
        assert (decision.admitted, decision.used[0], degraded) == (False, 100, False)


async def test_two_replicas_without_redis_admit_no_more_than_the_limit_together(own_redis: OwnRedis) -> None:
    url = own_redis.server.url
    async with limiter(url) as (one, health), limiter(url, instance="two") as (two, other):
        async with asyncio.timeout(10):
            while health.replicas != 2 or other.replicas != 2:  # as above
                await asyncio.sleep(0.005)
        own_redis.send(signal.SIGKILL)
        decisions = [(await each.decide("k", (100, 10_000), 1))[0].admitted for _ in range(200) for each in (one, two)]
        assert 98 <= sum(decisions) <= 100


async def test_a_replica_that_leaves_counts_no_more(redis_server: Server, client: redis.Redis) -> None:
    client.delete(adapters.REPLICAS_KEY)
    async with limiter(redis_server.url) as (_, health):
        async with limiter(redis_server.url, instance="two") as (_, other):
            assert other.replicas == 2
        await health.check()
        assert health.replicas == 1
        # One that was killed says nothing; it counts until its last beat is 5 s old.
        seconds, _ = client.time()
        client.zadd(adapters.REPLICAS_KEY, {"killed just now": seconds - 3, "killed before": seconds - 6})
        await health.check()
        assert health.replicas == 2


async def test_redis_away_at_the_start_is_no_reason_to_fail(tmp_path: Path) -> None:
    own = OwnRedis(tmp_path)
    async with limiter(own.server.url) as (one, health):
        assert not health.up
        decision, degraded = await one.decide("k", (2, 10), 1)
        assert (decision.admitted, degraded) == (True, True)
        own.start()
        await until(health, True)
        assert await one.decide("k", (2, 10), 1) == (Decision(True, (2, 2), (decision.reset_ms[0] or 60_151, 0), 0, 1), False)
    own.end()


async def test_a_bug_in_the_client_library_is_answered_like_an_outage(redis_server: Server) -> None:
    client = adapters.connect(redis_server.url)
    store = adapters.RedisStore(client, PER_KEY, "rl:")

    async def fail(*_: object) -> None:
        raise AttributeError

    store._script = fail  # type: ignore[assignment]  # as redis-py has done when a connection went away under it
    with pytest.raises(StoreUnavailableError):
        await asyncio.wait_for(store.decide("k", (1, 1), 1, None), 5)
    await client.aclose()


async def test_a_redis_that_answers_nonsense_counts_as_away(redis_server: Server) -> None:
    client = adapters.connect(redis_server.url)
    for script in ("return {'nonsense'}", "return redis.error_reply('no')", "return {}"):
        store = adapters.RedisStore(client, PER_KEY, "rl:", script)
        with pytest.raises(StoreUnavailableError):
            async with asyncio.timeout(5):
                await store.decide("k", (1, 1), 1, None)
    await client.aclose()
