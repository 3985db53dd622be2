"""A Redis Cluster behind the ports: the node that has a key's slot decides about it, and every node has a health of its own.

redis-py's own `RedisCluster` is not used. There (8.1.0, `redis/asyncio/cluster.py`) one connection that fails has the next call
of *any* key wait for a new map, which is asked for under a lock and marks every connection to every node to be closed;
CLUSTERDOWN and each fifth MOVED close all of them at once, with the calls that are under way on them. One node's death would be
felt by the keys of all others, again with each heartbeat until it is back. And ASKING goes out on a connection that the call
after it need not get.

Here a node has a client, batches and heartbeats of its own, as the one server of `adapters.py` has.

* A batch is one pipeline, with one call of the script for each key, since the keys of a call must be of one slot.
* What a node answers with MOVED or ASK is sent on within the same 0.1 s. If that fails, it is that key that goes without.
* The map (CLUSTER SLOTS) is asked for anew when a node says MOVED, and for as long as some part of the cluster is away: somebody
  may have taken over. Nodes that answer are asked first; then those of the configuration, whose names may lead to new ones.
* The heartbeat of a node is a key in one of its slots. So it is answered by a primary that can write, as that of one server is.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

from redis.asyncio import Redis
from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot
from redis.exceptions import AskError, ClusterDownError, MovedError, NoScriptError, TryAgainError

from libs.common import tasks, telemetry
from libs.common.service import ConfigurationError
from services.limiter.adapters import (
    MAX_CONNECTIONS,
    REPLICAS_KEY,
    RedisHeartbeat,
    RedisStore,
    Waiting,
    connect_to_node,
    within_the_timeout,
)
from services.limiter.address import NO_CLUSTER, Address, Nodes
from services.limiter.core import Decision, Policy
from services.limiter.failover import BEAT_SECONDS, RETRY_SECONDS, Health, Whole
from services.limiter.ports import KeyUnavailableError, StoreUnavailableError

log = logging.getLogger(__name__)

HOPS = 3
"""How often a call is sent on: a slot may move while it is on its way."""
TAGS_TRIED = 20 * REDIS_CLUSTER_HASH_SLOTS
"""Among so many names one is of a given slot, but for one time in e^20."""
_OF_THE_KEY = (ClusterDownError, TryAgainError)
"""What a node answers about a slot, while others may be well."""

Range = tuple[int, int, Address]
"""The first and the last of some slots, and where their primary is."""
Call = list[Waiting]
"""Whoever waits for one key, in order: one call of the script."""


class Node:
    """A primary. `stores`: its batches, by prefix."""

    def __init__(self, cluster: Cluster, address: Address, client: Redis) -> None:
        self.address = address
        self.client = client
        self.stores: dict[str, _NodeStore] = {}
        self.heartbeat = _NodeHeartbeat(cluster, self)
        self.health = cluster.new_health(self)
        self.watching: asyncio.Task[None] | None = None

    async def watch(self) -> None:
        await self.health.check()
        await self.health.watch()


class Cluster:
    """Where limits are kept: the nodes of a Redis Cluster, and which of them has which slot."""

    def __init__(
        self,
        known: Nodes,
        instance: str,
        on_change: Callable[[bool], None],
        *,
        beat_seconds: float = BEAT_SECONDS,
        retry_seconds: float = RETRY_SECONDS,
    ) -> None:
        self.whole = Whole(on_change)
        self.instance = instance
        self._known = known
        self._beat_seconds = beat_seconds
        self._retry_seconds = retry_seconds
        self._nodes: dict[Address, Node] = {}
        self._owners: list[Node | None] = [None] * REDIS_CLUSTER_HASH_SLOTS
        self._replicas: tuple[Address, ...] = ()
        self._named: set[Node] = set()
        """Nodes that others have pointed to since the map was made."""
        self._stale = asyncio.Event()
        self.nobody = Health(_Nobody(), self._part_changed, whole=self.whole)
        """Of keys whose slot no node has."""

    def limits(self, policy: Policy, prefix: str) -> tuple[ClusterStore, ClusterStore]:
        store = ClusterStore(self, policy, prefix)
        return store, store

    @property
    def nodes(self) -> Iterable[Node]:
        return self._nodes.values()

    def owner(self, key: str) -> Node | None:
        """The node that has the slot of that key of Redis, as far as is known."""
        return self._owners[key_slot(key.encode())]

    # --- the map ---------------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Ask for the map and for every node's heartbeat. That no node answers is no reason to fail."""
        try:
            await self._make_map(first=True)
        except ConfigurationError:
            await self.close()
            raise
        await asyncio.gather(*(node.health.check() for node in self.nodes))

    async def watch(self) -> None:
        """Follow the cluster, for ever."""
        try:
            while True:
                for node in self.nodes:
                    if node.watching is None:
                        node.watching = asyncio.create_task(node.watch())
                await self._stale.wait()
                await asyncio.sleep(self._retry_seconds)
                self._stale.clear()
                await self._make_map()
                if not self.whole.up:
                    self.stale()
        finally:
            await asyncio.gather(*(tasks.end(node.watching) for node in self.nodes if node.watching is not None))

    async def close(self) -> None:
        await asyncio.gather(*(node.heartbeat.leave() for node in self.nodes if node.health.up))
        for node in self.nodes:
            await node.client.aclose()

    async def _make_map(self, *, first: bool = False) -> None:
        """As the first says that knows a node for every slot, or else who knows most; where nobody answers, it stays as it is."""
        best: list[Range] | None = None
        replicas: tuple[Address, ...] = ()
        failure = "has no node for some keys"
        for address in self._places():
            try:
                ranges, others = _read(await self._ask_for_slots(address), address)
            except StoreUnavailableError as error:
                failure = f"does not answer ({error})"
                if first and "cluster support disabled" in str(error.__cause__):
                    raise ConfigurationError(f"PORTCULLIS_REDIS_URL: {NO_CLUSTER}") from None
                continue
            if best is None or _covered(ranges) > _covered(best):
                best, replicas = ranges, others
            if _covered(best) == REDIS_CLUSTER_HASH_SLOTS:
                break
        if best is not None:
            self._replicas = replicas
            await self._take(best)
        if None in self._owners:
            self.nobody.lost(failure)
            self.nobody.replicas = self._most_replicas()
        else:
            self.nobody.found()

    def _places(self) -> list[Address]:
        up = [node.address for node in self.nodes if node.health.up]
        return list(dict.fromkeys((*up, *self._replicas, *self._known.addresses, *self._nodes)))

    async def _ask_for_slots(self, address: Address) -> list[Any]:
        node = self._nodes.get(address)
        client = connect_to_node(self._known, address) if node is None else node.client
        try:
            return cast(list[Any], await within_the_timeout(client.execute_command("CLUSTER SLOTS")))  # type: ignore[no-untyped-call]
        finally:
            if node is None:
                await client.aclose()

    async def _take(self, ranges: list[Range]) -> None:
        owners: list[Node | None] = [None] * REDIS_CLUSTER_HASH_SLOTS
        for low, high, address in ranges:
            owners[low : high + 1] = [self.node(address)] * (high + 1 - low)
        if owners != self._owners:
            self._owners = owners
            for node in self.nodes:
                node.heartbeat.seek()
        left = set(owners) | self._named
        self._named.clear()
        for node in [node for node in self.nodes if node not in left]:
            await self._drop(node)
        telemetry.CONNECTIONS_LIMIT.labels("redis").set((MAX_CONNECTIONS + 1) * len(self._nodes))

    async def _drop(self, node: Node) -> None:
        del self._nodes[node.address]
        if node.watching is not None:
            await tasks.end(node.watching)
        node.health.retire()
        await node.client.aclose()

    # --- what nodes need -------------------------------------------------------------------------------------------------

    def node(self, address: Address) -> Node:
        """The node at that address, which is taken for a new one if it is not known."""
        known = self._nodes.get(address)
        if known is None:
            known = Node(self, address, connect_to_node(self._known, address))
            self._nodes[address] = known
        return known

    def new_health(self, node: Node) -> Health:
        health = Health(
            node.heartbeat,
            self._part_changed,
            name=f"Redis at {node.address[0]}:{node.address[1]}",
            whole=self.whole,
            beat_seconds=self._beat_seconds,
            retry_seconds=self._retry_seconds,
        )
        health.replicas = self._most_replicas()
        return health

    def pointed_to(self, error: AskError, by: Node) -> Node:
        """The node to which `by` sends on. MOVED (an `AskError` of its own) says that the slot is there from now on."""
        node = self.node((error.host if error.host not in ("", "?") else by.address[0], error.port))
        self._named.add(node)
        if isinstance(error, MovedError):
            self._owners[error.slot_id] = node
            self.stale()
        return node

    def stale(self) -> None:
        """The map is wrong somewhere."""
        self._stale.set()

    def beat_key(self, node: Node, tag: int) -> tuple[str, int] | None:
        """The first key for a heartbeat from number `tag` on that lies on that node, and its number; None: it has no slot."""
        if node in self._owners:
            for number in range(tag, tag + TAGS_TRIED):
                if self.owner(key := f"{REPLICAS_KEY}:{number}") is node:
                    return key, number
        return None

    def _most_replicas(self) -> int:
        return max((node.health.replicas for node in self.nodes), default=1)

    def _part_changed(self, up: bool) -> None:
        if not up:
            self.stale()


def _read(slots: list[Any], told_by: Address) -> tuple[list[Range], tuple[Address, ...]]:
    """An answer to CLUSTER SLOTS: the ranges, and where replicas are. A node may name no host: it is that of who was asked."""

    def address(node: list[Any]) -> Address:
        host = (node[0] or b"").decode()
        return (host if host not in ("", "?") else told_by[0], int(node[1]))

    ranges = [(int(low), int(high), address(primary)) for low, high, primary, *_ in slots]
    return ranges, tuple(address(replica) for _, _, _, *replicas in slots for replica in replicas)


def _covered(ranges: list[Range]) -> int:
    return sum(high + 1 - low for low, high, _ in ranges)


class ClusterStore:
    """Decisions under one policy, each by the node that has its key; and those nodes' healths."""

    def __init__(self, cluster: Cluster, policy: Policy, prefix: str) -> None:
        self._cluster = cluster
        self._policy = policy
        self._prefix = prefix

    @property
    def waiting(self) -> int:
        """Decisions that wait for a connection."""
        return sum(node.stores[self._prefix].waiting for node in self._cluster.nodes if self._prefix in node.stores)

    def of(self, key: str) -> Health:
        node = self._cluster.owner(self._prefix + key)
        return self._cluster.nobody if node is None else node.health

    async def decide(
        self, key: str, limits: Sequence[int], cost: int, known: Sequence[int] | None, *, partial: bool = False
    ) -> Decision:
        node = self._cluster.owner(self._prefix + key)
        if node is None:
            raise KeyUnavailableError("no node has it")
        store = node.stores.get(self._prefix)
        if store is None:
            store = node.stores[self._prefix] = _NodeStore(self._cluster, node, self._policy, self._prefix)
        return await store.decide(key, limits, cost, known, partial=partial)


class _NodeStore(RedisStore):
    """Decisions of one node."""

    def __init__(self, cluster: Cluster, node: Node, policy: Policy, prefix: str) -> None:
        super().__init__(node.client, policy, prefix)
        self._cluster = cluster
        self._node = node

    async def _send(self, batch: list[Waiting]) -> list[bytes]:
        by_key: dict[str, Call] = {}
        for waiting in batch:
            by_key.setdefault(waiting[0], []).append(waiting)
        has_answered = False

        async def decide() -> None:
            nonlocal has_answered
            calls = list(by_key.values())
            sent_on = self._settle(calls, await self._ask(self._node, calls))
            has_answered = True
            at = dict.fromkeys(map(id, calls), self._node)
            for _ in range(HOPS):
                if not sent_on:
                    break
                sent_on = await self._follow(sent_on, at)

        try:
            await within_the_timeout(decide())
        except StoreUnavailableError:
            if not has_answered:
                raise
        _fail(batch, KeyUnavailableError, "it is on its way")
        return [b""] * len(batch)  # everybody has been answered

    async def _follow(self, sent_on: list[tuple[Call, AskError]], at: dict[int, Node]) -> list[tuple[Call, AskError]]:
        """Ask the nodes that calls were sent on to, all at once; what these send on in turn. `at`: where each call was last."""
        groups: dict[tuple[Node, bool], list[Call]] = {}
        for call, error in sent_on:
            at[id(call)] = node = self._cluster.pointed_to(error, at[id(call)])
            groups.setdefault((node, not isinstance(error, MovedError)), []).append(call)
        answers = await asyncio.gather(
            *(self._ask(node, calls, asking=asking) for (node, asking), calls in groups.items()), return_exceptions=True
        )
        again = []
        for calls, replies in zip(groups.values(), answers, strict=True):
            if not isinstance(replies, BaseException):
                again += self._settle(calls, replies, elsewhere=True)
        return again

    async def _ask(self, node: Node, calls: list[Call], *, asking: bool = False) -> list[Any]:
        """A reply to each call: the answers, or an error. `asking`: the node is about to get these keys' slots."""
        replies = await self._pipeline(node, calls, asking=asking)
        unknown = [index for index, reply in enumerate(replies) if isinstance(reply, NoScriptError)]
        if unknown:
            again = await self._pipeline(node, [calls[index] for index in unknown], asking=asking, whole=True)
            for index, reply in zip(unknown, again, strict=True):
                replies[index] = reply
        return replies

    async def _pipeline(self, node: Node, calls: list[Call], *, asking: bool, whole: bool = False) -> list[Any]:
        """`whole`: send the script itself, since the node does not know it."""
        script = ("EVAL", self._script.text) if whole else ("EVALSHA", self._script.sha)
        pipeline = node.client.pipeline(transaction=False)
        for call in calls:
            if asking:
                pipeline.execute_command("ASKING")
            keys = [key for key, _, _ in call]
            pipeline.execute_command(*script, len(keys), *keys, self._wire.windows, *(ask for _, ask, _ in call))
        replies = await pipeline.execute(raise_on_error=False)  # with one for each ASKING
        return replies[asking :: 1 + asking]

    def _settle(self, calls: list[Call], replies: list[Any], *, elsewhere: bool = False) -> list[tuple[Call, AskError]]:
        """Hand out answers and errors; the calls that are to be sent on. `elsewhere`: from a node whose batch it is not."""
        sent_on = []
        for call, reply in zip(calls, replies, strict=True):
            if isinstance(reply, AskError):
                sent_on.append((call, reply))
            elif isinstance(reply, list) and len(reply) == len(call):
                for (_, _, answer), decided in zip(call, reply, strict=True):
                    if not answer.done():
                        answer.set_result(decided)
            elif elsewhere or isinstance(reply, _OF_THE_KEY):
                self._cluster.stale()
                _fail(call, KeyUnavailableError, _name(reply))
            else:
                _fail(call, StoreUnavailableError, _name(reply))
        return sent_on


def _fail(waiting: Iterable[Waiting], kind: type[StoreUnavailableError], why: str) -> None:
    """Nobody of those who still wait gets an answer."""
    for *_, answer in waiting:
        if not answer.done():
            answer.set_exception(kind(why))


def _name(reply: Any) -> str:
    return type(reply).__name__ if isinstance(reply, Exception) else "not the answers of the script"


class _NodeHeartbeat:
    """Of one node, by a key in one of its slots: the first that all replicas of the limiter find by the same map."""

    def __init__(self, cluster: Cluster, node: Node) -> None:
        self._cluster = cluster
        self._node = node
        self._tag = 0
        self._key: str | None = None
        self._heartbeat: RedisHeartbeat | None = None

    async def beat(self) -> int:
        before = self._node.health.replicas
        found = self._cluster.beat_key(self._node, self._tag)
        if found is None:
            return before
        key, self._tag = found
        if is_new := key != self._key or self._heartbeat is None:
            self._key, self._heartbeat = key, RedisHeartbeat(self._node.client, self._cluster.instance, key)
        assert self._heartbeat is not None
        try:
            replicas = await self._heartbeat.beat()
        except StoreUnavailableError as error:
            if not isinstance(error.__cause__, AskError):
                raise
            # The slot is going or gone, and the node is well. After a beat of theirs the other replicas are at the next key, too.
            self._cluster.pointed_to(error.__cause__, self._node)
            self._tag += 1
            return before
        return max(replicas, before) if is_new else replicas

    def seek(self) -> None:
        """There is another map: look for the first key again, as a replica would that has just been started."""
        self._tag = 0

    async def leave(self) -> None:
        if self._heartbeat is not None:
            await self._heartbeat.leave()


class _Nobody:
    """The heartbeat of keys that no node has."""

    async def beat(self) -> int:
        raise StoreUnavailableError("no node")
