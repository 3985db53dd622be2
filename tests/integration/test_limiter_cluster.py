"""The limiter on a real Redis Cluster: exact over all nodes; a node that dies or hangs; a slot that moves; a failover."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
from pydantic import SecretStr
from redis.crc import key_slot

from libs.common.bus import Bus
from libs.common.clock import SystemClock
from libs.common.service import ConfigurationError
from services.limiter.address import Nodes, located
from services.limiter.app import parts
from services.limiter.cluster import Cluster
from services.limiter.core import PER_KEY
from services.limiter.failover import Limiter
from services.limiter.settings import Settings
from tests.conftest import free_port, wait_until
from tests.integration.limiter_kit import Started, start

PASSWORD, USERS_OWN = "password", "own"
PREFIX = "rl:v1:key:"
SLOTS = 16384
# What docs/operations/kubernetes.md has an operator allow; all of these tests get along with it.
RIGHTS = "~rl:v1:* +eval +evalsha +get +set +time +zadd +zremrangebyscore +expire +zcard +zrem +info +cluster|slots +asking"
_names = itertools.count()


class Running:
    """Three primaries, and a replica of the last."""

    def __init__(self, servers: list[Started]) -> None:
        self.servers = servers

    def url(self, *, password: str = USERS_OWN) -> str:
        hosts = ",".join(f"127.0.0.1:{server.port}" for server in self.servers)
        return f"redis+cluster://limiter:{password}@{hosts}"

    def form(self) -> None:
        first, *others = self.servers
        third = SLOTS // 3 + 1
        for index, server in enumerate(self.servers[:3]):
            _tell(server, "CLUSTER ADDSLOTS", *range(index * third, min(SLOTS, (index + 1) * third)))
        for server in others:
            _tell(server, "CLUSTER MEET", "127.0.0.1", first.port)
        wait_until(lambda: all(len(_nodes(server)) == 4 for server in self.servers), what="nodes that know each other")
        _tell(self.servers[3], "CLUSTER REPLICATE", _id(self.servers[2]))
        self.until_well()

    def until_well(self) -> None:
        wait_until(self.is_well, what="a cluster that is well")

    def is_well(self) -> bool:
        """Every node serves, all agree on who has which slots, and the replica has its copy."""
        seen = []
        for server in self.servers:
            try:
                if b"cluster_state:ok" not in _tell(server, "CLUSTER INFO"):
                    return False
                nodes = _nodes(server)
                with server.client() as client:
                    replication = client.info("replication")
            except redis.RedisError:
                return False
            if replication["role"] == "slave" and replication["master_link_status"] != "up":
                return False
            if any("fail" in flags for flags, _ in nodes.values()):
                return False
            seen.append({address: slots for address, (_, slots) in nodes.items()})
        return all(each == seen[0] for each in seen)

    def replica_and_primary(self) -> tuple[Started, Started]:
        replica = next(server for server in self.servers if _is_replica(server))
        with replica.client() as client:
            port = client.info("replication")["master_port"]
        return replica, next(server for server in self.servers if server.port == port)

    def owner(self, key: str) -> Started:
        """The server that has that key of the limiter."""
        slot = key_slot((PREFIX + key).encode())
        alive = next(server for server in self.servers if server.process.poll() is None and server.answers())
        for low, high, primary, *_ in _tell(alive, "CLUSTER SLOTS"):
            if low <= slot <= high:
                return next(server for server in self.servers if server.port == primary[1])
        raise AssertionError(f"nobody has slot {slot}")

    def keys(self, count: int) -> dict[int, list[str]]:
        """New names of keys, so many on each primary, by its port."""
        found: dict[int, list[str]] = {}
        ranges = _tell(self.servers[0], "CLUSTER SLOTS")
        while len(found) < 3 or any(len(each) < count for each in found.values()):
            key = f"k{next(_names)}"
            slot = key_slot((PREFIX + key).encode())
            port = next(primary[1] for low, high, primary, *_ in ranges if low <= slot <= high)
            if len(found.setdefault(port, [])) < count:
                found[port].append(key)
        return found


def _tell(server: Started, *command: Any) -> Any:
    with server.client() as client:
        client.response_callbacks.clear()
        return client.execute_command(*command)


def _id(server: Started) -> str:
    return str(_tell(server, "CLUSTER MYID"), "ascii")


def _is_replica(server: Started) -> bool:
    with server.client() as client:
        return bool(client.info("replication")["role"] == "slave")


def _nodes(server: Started) -> dict[str, tuple[str, str]]:
    """What a node knows: flags and slots by address."""
    lines = [line.split() for line in str(_tell(server, "CLUSTER NODES"), "ascii").splitlines()]
    return {words[1]: (words[2], " ".join(words[8:])) for words in lines}


def _port() -> int:
    """A free port whose counterpart for the other nodes, 10 000 above, is free as well."""
    while True:
        port = free_port()
        with socket.socket() as probe:
            if port + 10_000 < 65_536 and probe.connect_ex(("127.0.0.1", port + 10_000)):
                return port


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    home = tmp_path_factory.mktemp("cluster")
    more = (
        "cluster-enabled yes\ncluster-node-timeout 1000\ncluster-require-full-coverage no\ncluster-replica-validity-factor 0\n"
        f"masterauth {PASSWORD}\nrepl-diskless-sync yes\nrepl-diskless-sync-delay 0\n"
        f"user limiter on >{USERS_OWN} {RIGHTS}"
    )
    servers: list[Started] = []
    try:
        for number in range(4):
            servers.append(start(home / str(number), _port(), PASSWORD, more))  # noqa: PERF401  # if the next fails, this is killed
        running = Running(servers)
        running.form()
        yield running
    finally:
        for server in servers:
            server.kill()


@pytest.fixture
def cluster(running: Running) -> Iterator[Running]:
    """The cluster, as it is again after the test."""
    yield running
    for server in running.servers:
        if server.process.poll() is not None:
            server.again()
    running.until_well()


@asynccontextmanager
async def limiter(url: str, instance: str = "one") -> AsyncIterator[tuple[Limiter, Cluster]]:
    known = located(url)
    assert isinstance(known, Nodes)
    place = Cluster(known, instance, lambda up: None, beat_seconds=0.05, retry_seconds=0.02)
    store, healths = place.limits(PER_KEY, PREFIX)
    await place.open()
    watching = asyncio.create_task(place.watch())
    try:
        yield Limiter(PER_KEY, store, healths, SystemClock(), 1000), place
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        await place.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # what is waited for happens in other processes
            await asyncio.sleep(0.01)


async def ask(one: Limiter, key: str, limit: int, times: int) -> tuple[int, int]:
    """How many of so many calls at the same time are admitted, and how many are decided without Redis."""
    decisions = await asyncio.gather(*(one.decide(key, (limit, 10_000), 1) for _ in range(times)))
    return sum(decision.admitted for decision, _ in decisions), sum(local for _, local in decisions)


async def test_limits_are_exact_over_all_nodes_and_two_replicas(cluster: Running) -> None:
    keys = list(itertools.chain(*cluster.keys(10).values()))
    async with limiter(cluster.url()) as (one, _), limiter(cluster.url(), "two") as (two, _):

        async def call(number: int) -> tuple[str, bool, tuple[int, ...]]:
            # Each key has a limit of its own, by which an answer that went astray would be known.
            index = number % len(keys)
            decision, local = await (one, two)[number % 2].decide(keys[index], (index + 1, 10_000 + index), 1)
            assert not local
            return keys[index], decision.admitted, decision.used

        # An even number of keys goes to one replica each; shifted by one half way through, each is asked about of both.
        answers = await asyncio.gather(*(call(number + number // 1500) for number in range(3000)))
    for index, key in enumerate(keys):
        mine = [(admitted, used) for asked, admitted, used in answers if asked == key]
        assert sorted(used[0] for admitted, used in mine if admitted) == list(range(1, index + 2))
    for server in cluster.servers[:3]:
        with server.client() as client:
            assert [key for key in client.keys(f"{PREFIX}*") if key.decode().removeprefix(PREFIX) in keys]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_node_that_is_away_costs_its_own_keys_and_these_stay_bounded(cluster: Running, how: signal.Signals) -> None:
    server = cluster.servers[0]
    by_port = cluster.keys(3)
    its, others = by_port.pop(server.port), list(itertools.chain(*by_port.values()))
    async with limiter(cluster.url()) as (one, place):
        for key in (*its, *others):
            assert await ask(one, key, 100, 40) == (40, 0)
        os.kill(server.process.pid, how)
        try:
            results = await asyncio.gather(*(ask(one, key, 100, 30) for key in (*its, *others)))
            assert results == [(30, 30)] * 3 + [(30, 0)] * 6
            assert not place.whole.up
            assert await asyncio.gather(*(ask(one, key, 100, 10) for key in others)) == [(10, 0)] * 6
        finally:
            if how == signal.SIGKILL:
                server.kill()
                for file in server.home.glob("**/*.aof"):
                    file.unlink()  # the worst case: it comes back with nothing
                server.again()
            else:
                os.kill(server.process.pid, signal.SIGCONT)
        await until(lambda: place.whole.up)
        for key in others:
            assert await ask(one, key, 100, 50) == (20, 0)
        for key in its:
            admitted, local = await ask(one, key, 100, 50)
            assert local == 0
            # Of the 30, a node that hung may have counted some when it woke up; nobody has waited for that.
            assert admitted == 30 if how == signal.SIGKILL else admitted <= 30
        assert {node.health.outages for node in place.nodes if node.address[1] != server.port} == {0}


async def test_two_replicas_of_the_limiter_share_what_a_node_that_is_away_had(cluster: Running) -> None:
    server = cluster.servers[1]
    (key,) = cluster.keys(1)[server.port]
    async with limiter(cluster.url()) as (one, place), limiter(cluster.url(), "two") as (two, other):
        await until(lambda: {node.health.replicas for node in (*place.nodes, *other.nodes)} == {2})
        server.kill()
        decisions = [(await each.decide(key, (100, 10_000), 1))[0].admitted for _ in range(100) for each in (one, two)]
        assert 98 <= sum(decisions) <= 100


async def test_a_slot_that_moves_while_it_is_in_use_is_followed(cluster: Running) -> None:
    (key, *_), (target, *_) = (cluster.keys(1)[server.port] for server in cluster.servers[:2])
    source, destination = cluster.servers[:2]
    slot = key_slot((PREFIX + key).encode())
    fresh = next(name for name in map(str, itertools.count()) if key_slot((PREFIX + name).encode()) == slot)
    admitted = locally = 0
    over = asyncio.Event()
    async with limiter(cluster.url()) as (one, place):

        async def use() -> None:
            nonlocal admitted, locally
            while not over.is_set():
                more, local = await ask(one, key, 300, 5)
                admitted, locally = admitted + more, locally + local
                await asyncio.sleep(0.005)

        async def tell(server: Started, *command: Any) -> None:
            await asyncio.to_thread(_tell, server, *command)

        using = asyncio.create_task(use())
        await until(lambda: admitted >= 20)
        await tell(destination, "CLUSTER SETSLOT", slot, "IMPORTING", _id(source))
        await tell(source, "CLUSTER SETSLOT", slot, "MIGRATING", _id(destination))
        # A key that is not there yet is made where the slot goes.
        assert await ask(one, fresh, 100, 7) == (7, 0)
        before = admitted
        await until(lambda: admitted > before)  # the other is still where it was
        await tell(source, "MIGRATE", "127.0.0.1", destination.port, "", 0, 1000, "AUTH", PASSWORD, "KEYS", PREFIX + key)
        before = admitted
        await until(lambda: admitted > before)
        for server in (destination, source):  # the others hear of it from these
            await tell(server, "CLUSTER SETSLOT", slot, "NODE", _id(destination))
        before = admitted
        await until(lambda: admitted > before)
        over.set()
        await using
        assert locally == 0
        more, _ = await ask(one, key, 300, 400)
        assert admitted + more == 300
        assert (await one.decide(fresh, (100, 10_000), 0))[0].used[0] == 7
        assert place.whole.turn == 0  # nothing was ever away
        assert one._health.of(key) is one._health.of(target)
    cluster.until_well()


async def test_a_primary_that_dies_is_succeeded_by_its_replica(cluster: Running) -> None:
    replica, first = cluster.replica_and_primary()
    (key,) = cluster.keys(1)[first.port]
    async with limiter(cluster.url()) as (one, place):
        assert await ask(one, key, 100, 40) == (40, 0)
        first.kill()
        assert await ask(one, key, 100, 10) == (10, 10)
        await until(lambda: place.whole.up)
        assert cluster.owner(key) is replica
        assert await ask(one, key, 100, 100) == (50, 0)


async def test_a_failover_by_hand_is_followed(cluster: Running) -> None:
    replica, first = cluster.replica_and_primary()
    (key,) = cluster.keys(1)[first.port]
    async with limiter(cluster.url()) as (one, place):
        assert await ask(one, key, 100, 40) == (40, 0)
        async with asyncio.timeout(30):
            while _is_replica(replica):  # the others do not vote twice within two seconds, and then it is over
                await asyncio.to_thread(_tell, replica, "CLUSTER FAILOVER")
                await asyncio.sleep(1)
        await until(lambda: place.whole.up and one._health.of(key).up)
        admitted, local = await ask(one, key, 100, 100)
        assert (admitted, local) == (60, 0)
    assert cluster.owner(key) is replica


def _start(url: str) -> Any:
    settings = Settings(redis_url=SecretStr(url))
    return parts(Bus("limiter", settings), settings)


@pytest.mark.parametrize("what", ["password", "address"])
async def test_what_is_wrong_with_the_url_is_one_line(cluster: Running, caplog: pytest.LogCaptureFixture, what: str) -> None:
    url = cluster.url(password="secret") if what == "password" else f"redis+cluster://limiter:secret@127.0.0.1:{free_port()}"
    with caplog.at_level(logging.WARNING, "services.limiter"):
        async with _start(url):
            pass
    (line,) = caplog.messages
    assert ("AuthenticationError" if what == "password" else "ConnectionError") in line
    assert "secret" not in caplog.text


async def test_a_node_by_the_url_of_one_server_is_refused_with_the_right_scheme(cluster: Running) -> None:
    with pytest.raises(ConfigurationError, match=r"redis\+cluster://:password@host"):
        async with _start(f"redis://limiter:{USERS_OWN}@127.0.0.1:{cluster.servers[0].port}/0"):
            pass


async def test_one_server_by_the_url_of_a_cluster_is_refused_with_the_right_scheme(tmp_path: Path) -> None:
    server = start(tmp_path / "one", free_port(), PASSWORD)
    try:
        with pytest.raises(ConfigurationError, match="no node of a Redis Cluster; name a single server as in redis://"):
            async with _start(f"redis+cluster://:{PASSWORD}@127.0.0.1:{server.port}"):
                pass
    finally:
        server.kill()
