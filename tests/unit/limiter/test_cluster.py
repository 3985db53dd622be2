"""Which node of a cluster is asked about which key, in how many calls, and what a node costs that is away."""

from __future__ import annotations

import asyncio
import itertools
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from redis.crc import key_slot
from redis.exceptions import AskError, ClusterDownError, MovedError, NoScriptError, ResponseError

from libs.common.clock import ManualClock
from services.limiter import cluster as under_test
from services.limiter.address import Address, Nodes
from services.limiter.cluster import Cluster
from services.limiter.core import PER_KEY
from services.limiter.failover import Limiter
from services.limiter.ports import KeyUnavailableError, StoreUnavailableError

PREFIX = "rl:v1:key:"
ONE, TWO, THREE = ("one", 6379), ("two", 6379), ("three", 6379)
HALF = 8192
LIMITS = (100, 1000)


def slot(key: str) -> int:
    return key_slot((PREFIX + key).encode())


def keys(low: int, high: int, count: int = 3) -> list[str]:
    """Names of keys in slots from `low` up to, but without, `high`."""
    return list(itertools.islice((key for key in map(str, itertools.count()) if low <= slot(key) < high), count))


def _named(address: Address) -> list[Any]:
    return [address[0].encode(), address[1], b"id"]


@dataclass
class Server:
    """A node that counts units and refuses nothing. `replies`: what it says in place of a decision, by slot."""

    address: Address
    ranges: list[tuple[int, int, Address]]
    replicas: tuple[Address, ...] = ()
    away: bool = False
    knows_script: bool = True
    replies: dict[int, Exception] = field(default_factory=dict)
    pipelines: list[list[tuple[Any, ...]]] = field(default_factory=list)
    units: dict[str, int] = field(default_factory=dict)
    beats: int = 0

    def slots(self) -> list[Any]:
        return [[low, high, _named(address), *map(_named, self.replicas)] for low, high, address in self.ranges]

    def reply(self, command: tuple[Any, ...], asked: bool) -> Any:
        if command[0] == "ASKING":
            return "OK"
        count = command[2]
        names, asks = command[3 : 3 + count], command[4 + count :]
        assert len({key_slot(name.encode()) for name in names}) == 1, "CROSSSLOT"
        error = self.replies.get(key_slot(names[0].encode()))
        if error is not None and not asked:
            return error
        self.knows_script |= command[0] == "EVAL"
        if not self.knows_script:
            return NoScriptError()
        return [self._decide(name, ask) for name, ask in zip(names, asks, strict=True)]

    def _decide(self, name: str, ask: bytes) -> bytes:
        cost, _, _, minute, _, _ = struct.unpack("<dBdddd", ask)
        self.units[name] = max(self.units.get(name, 0), int(minute)) + int(cost)
        return struct.pack("<BBddddd", 1, 0, cost, self.units[name], 0, self.units[name], 0)


class Client:
    """In the place of redis-py's."""

    def __init__(self, server: Server) -> None:
        self.server = server

    async def answers(self) -> None:
        await asyncio.sleep(0)
        if self.server.away:
            raise ConnectionError

    async def evalsha(self, sha: str, count: int, key: str, instance: str) -> list[int]:
        """Heartbeats; decisions come in pipelines."""
        await self.answers()
        error = self.server.replies.get(key_slot(key.encode()))
        if error is not None:
            raise error
        self.server.beats += 1
        return [1, int(self.server.beats == 1)]

    async def execute_command(self, *_: object) -> Any:
        await self.answers()
        return self.server.slots()

    def pipeline(self, *, transaction: bool) -> Pipeline:
        assert not transaction
        return Pipeline(self)

    async def zrem(self, *_: object) -> None:
        await self.answers()

    async def aclose(self) -> None: ...


class Pipeline:
    def __init__(self, client: Client) -> None:
        self._client = client
        self._commands: list[tuple[Any, ...]] = []

    def execute_command(self, *command: Any) -> None:
        self._commands.append(command)

    async def execute(self, *, raise_on_error: bool) -> list[Any]:
        assert not raise_on_error
        await self._client.answers()
        server = self._client.server
        server.pipelines.append(self._commands)
        before = [("",), *self._commands]
        return [server.reply(command, previous[0] == "ASKING") for previous, command in zip(before, self._commands, strict=False)]


class House:
    """Nodes: two with half of the slots each, and one that has none."""

    def __init__(self) -> None:
        ranges = [(0, HALF - 1, ONE), (HALF, 16383, TWO)]
        self.one, self.two, self.three = (Server(address, ranges) for address in (ONE, TWO, THREE))
        self.servers = {server.address: server for server in (self.one, self.two, self.three)}
        self.changes: list[bool] = []
        self.cluster = Cluster(Nodes((ONE,), {}, False), "me", self.changes.append, retry_seconds=0.001)
        self.store, healths = self.cluster.limits(PER_KEY, PREFIX)
        self.limiter = Limiter(PER_KEY, self.store, healths, ManualClock(), 100)

    async def decide(self, names: Iterable[str]) -> list[Any]:
        """What comes of one unit of each, asked for at the same time."""
        calls: list[Awaitable[Any]] = [self.store.decide(name, LIMITS, 1, None) for name in names]
        return await asyncio.gather(*calls, return_exceptions=True)

    async def is_local(self, name: str) -> bool:
        return (await self.limiter.decide(name, LIMITS, 1))[1]

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        watching = asyncio.create_task(self.cluster.watch())
        try:
            yield
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)


@pytest.fixture
async def house(monkeypatch: pytest.MonkeyPatch) -> House:
    house = House()
    monkeypatch.setattr(under_test, "connect_to_node", lambda _, address: Client(house.servers[address]))
    await house.cluster.open()
    return house


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


async def test_a_batch_is_one_pipeline_for_each_node_with_one_call_for_each_key(house: House) -> None:
    a, b = keys(0, HALF, 2)
    (c,) = keys(HALF, 16384, 1)
    outcomes = await house.decide([a, c, b, a, c, a])
    assert [outcome.used[0] for outcome in outcomes] == [1, 1, 1, 2, 2, 3]
    (first,), (second,) = house.one.pipelines, house.two.pipelines
    assert [(command[0], command[2], command[3]) for command in first] == [("EVALSHA", 3, PREFIX + a), ("EVALSHA", 1, PREFIX + b)]
    assert [(command[0], command[2], command[3]) for command in second] == [("EVALSHA", 2, PREFIX + c)]


async def test_a_node_that_does_not_know_the_script_gets_it_and_decides_once(house: House) -> None:
    house.one.knows_script = False
    a, b = keys(0, HALF, 2)
    outcomes = await house.decide([a, b, a])
    assert [outcome.used[0] for outcome in outcomes] == [1, 1, 2]
    assert [command[0] for command in house.one.pipelines[1]] == ["EVAL", "EVAL"]


async def test_moved_is_followed_at_once_and_remembered(house: House) -> None:
    a, b = keys(0, HALF, 2)
    house.one.replies[slot(a)] = MovedError(f"{slot(a)} three:6379")
    outcomes = await house.decide([a, b])
    assert [outcome.used[0] for outcome in outcomes] == [1, 1]
    assert (house.three.units, house.one.units) == ({PREFIX + a: 1}, {PREFIX + b: 1})
    asked = len(house.one.pipelines)
    await house.decide([a])
    assert house.three.units == {PREFIX + a: 2}
    assert len(house.one.pipelines) == asked


async def test_a_slot_under_way_is_asked_for_where_it_goes_and_stays_where_it_is(house: House) -> None:
    a, b = keys(0, HALF, 2)
    house.one.replies[slot(a)] = AskError(f"{slot(a)} two:6379")
    house.two.replies[slot(a)] = MovedError(f"{slot(a)} one:6379")  # but not to who is asking
    house.two.knows_script = False
    for units in (1, 2):
        outcomes = await house.decide([a, b])
        assert [outcome.used[0] for outcome in outcomes] == [units, units]
    assert house.two.units == {PREFIX + a: 2}
    assert house.store.of(a) is house.store.of(b)


async def test_nodes_that_send_a_call_round_and_round_are_asked_so_often_and_no_more(house: House) -> None:
    (a,) = keys(0, HALF, 1)
    house.one.replies[slot(a)] = MovedError(f"{slot(a)} two:6379")
    house.two.replies[slot(a)] = MovedError(f"{slot(a)} one:6379")
    (outcome,) = await house.decide([a])
    assert isinstance(outcome, KeyUnavailableError)
    assert len(house.one.pipelines) + len(house.two.pipelines) == 1 + under_test.HOPS


async def test_a_node_that_is_away_costs_its_own_keys(house: House) -> None:
    house.two.away = True
    assert not any([await house.is_local(key) for key in keys(0, HALF)])
    assert house.changes == []
    assert all([await house.is_local(key) for key in keys(HALF, 16384)])
    assert house.changes == [False]
    assert not any([await house.is_local(key) for key in keys(0, HALF)])
    async with house.watched():
        house.two.away = False
        await until(lambda: house.changes == [False, True])
    assert not any([await house.is_local(key) for key in keys(HALF, 16384)])


async def test_where_a_call_is_sent_on_to_in_vain_one_key_goes_without_and_is_told_of_later(house: House) -> None:
    a, b = keys(0, HALF, 2)
    assert not await house.is_local(a)
    house.one.replies[slot(a)] = AskError(f"{slot(a)} three:6379")
    house.three.away = True
    assert await house.is_local(a)
    assert not await house.is_local(b)
    assert house.changes == []
    del house.one.replies[slot(a)]
    decision, is_local = await house.limiter.decide(a, LIMITS, 1)
    assert (decision.used[0], is_local) == (3, False)


@pytest.mark.parametrize(("error", "of_the_key"), [(ClusterDownError("x"), True), (ResponseError("MISCONF"), False)])
async def test_an_error_is_the_nodes_unless_it_is_about_a_slot(house: House, error: Exception, of_the_key: bool) -> None:
    a, b = keys(0, HALF, 2)
    house.one.replies[slot(a)] = error
    outcome, other = await house.decide([a, b])
    assert type(outcome) is (KeyUnavailableError if of_the_key else StoreUnavailableError)
    assert other.used[0] == 1


async def test_a_promoted_replica_takes_over_and_is_told_what_it_may_not_have_heard(house: House) -> None:
    a, b = keys(HALF, 16384, 2)
    async with house.watched():
        for key in (a, b) * 5:
            assert not await house.is_local(key)
        house.two.away = True
        assert await house.is_local(a)
        house.one.ranges = [(0, HALF - 1, ONE), (HALF, 16383, THREE)]
        await until(lambda: house.changes == [False, True])
        for key, units in ((a, 7), (b, 6)):
            decision, is_local = await house.limiter.decide(key, LIMITS, 1)
            assert (decision.used[0], is_local) == (units, False)
    assert house.three.units == {PREFIX + a: 7, PREFIX + b: 6}
    assert [node.address for node in house.cluster.nodes] == [ONE, THREE]


async def test_keys_that_no_node_has_are_decided_here_until_one_has(house: House) -> None:
    (a,), (b,) = keys(0, HALF, 1), keys(HALF, 16384, 1)
    async with house.watched():
        house.one.ranges = house.two.ranges = [(HALF, 16383, TWO)]
        house.cluster.stale()
        await until(lambda: house.changes == [False])
        assert await house.is_local(a)
        assert not await house.is_local(b)
        house.two.ranges = [(0, 16383, TWO)]
        await until(lambda: house.changes == [False, True])
        decision, is_local = await house.limiter.decide(a, LIMITS, 1)
        assert (decision.used[0], is_local) == (2, False)


async def test_a_cluster_that_is_not_there_yet_is_found_when_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    house = House()
    monkeypatch.setattr(under_test, "connect_to_node", lambda _, address: Client(house.servers[address]))
    house.one.away = True
    await house.cluster.open()
    (a,) = keys(HALF, 16384, 1)
    assert await house.is_local(a)
    assert house.changes == [False]
    async with house.watched():
        house.one.away = False
        await until(lambda: house.changes == [False, True])
    decision, is_local = await house.limiter.decide(a, LIMITS, 1)
    assert (decision.used[0], is_local) == (2, False)


async def test_a_heartbeat_goes_to_another_slot_when_its_own_moves(house: House) -> None:
    (node, *_) = house.cluster.nodes
    key, tag = house.cluster.beat_key(node, 0) or ("", 0)
    beats = house.one.beats
    house.one.replies[key_slot(key.encode())] = AskError(f"{key_slot(key.encode())} two:6379")
    await node.health.check()
    assert (node.health.up, house.one.beats) == (True, beats)
    await node.health.check()
    assert (node.health.up, house.one.beats) == (True, beats + 1)
    moved_on = node.heartbeat._key
    assert moved_on == (house.cluster.beat_key(node, tag + 1) or ("", 0))[0]
    # By the next map all replicas of the limiter look from the first on, or they would not see one another.
    house.one.replies.clear()
    house.one.ranges = [(0, HALF, ONE), (HALF + 1, 16383, TWO)]
    async with house.watched():
        house.cluster.stale()
        await until(lambda: house.store.of(keys(HALF, HALF + 1, 1)[0]) is node.health)
        await node.health.check()
        assert node.heartbeat._key == key


async def test_a_replica_tells_who_has_taken_over_when_no_primary_is_left_to_ask(house: House) -> None:
    (a,) = keys(0, HALF, 1)
    house.one.ranges, house.one.replicas = [(0, 16383, ONE)], (THREE,)
    house.three.ranges = [(0, 16383, THREE)]
    async with house.watched():
        house.cluster.stale()
        await until(lambda: [node.address for node in house.cluster.nodes] == [ONE])
        assert not await house.is_local(a)
        house.one.away = True
        assert await house.is_local(a)
        await until(lambda: house.changes == [False, True])
        assert not await house.is_local(a)
    assert house.three.units == {PREFIX + a: 3}


async def test_a_node_that_names_no_host_means_its_own(house: House) -> None:
    (a,) = keys(0, HALF, 1)
    house.one.replies[slot(a)] = MovedError(f"{slot(a)} :6379")
    (outcome,) = await house.decide([a])
    assert isinstance(outcome, KeyUnavailableError)  # it was asked, and asked again
    assert {node.address for node in house.cluster.nodes} == {ONE, TWO}
    house.one.ranges = [(0, 16383, ("", 6379))]
    async with house.watched():
        house.cluster.stale()
        await until(lambda: [node.address for node in house.cluster.nodes] == [ONE])
