"""The limiter on a primary that sentinels watch over: its death, and a sentinel that hangs."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import pytest

from services.limiter.failover import Health
from tests.conftest import free_port, wait_until
from tests.integration.limiter_kit import Started, limiter, start

PASSWORD, SENTINELS_OWN = "p@ss/word", "their%own"
LIMITS = (10, 1000)


@dataclass
class Watched:
    """A primary, its replica, and a sentinel that knows both."""

    primary: Started
    replica: Started
    sentinel: Started

    def url(self, *before: int) -> str:
        """With other addresses `before` the sentinel's."""
        addresses = ",".join(f"127.0.0.1:{port}" for port in (*before, self.sentinel.port))
        return f"redis+sentinel://:{quote(PASSWORD, '')}@{addresses}/mymaster/0?sentinel_password={quote(SENTINELS_OWN)}"


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Watched]:
    running: list[Started] = []
    replicates = f'masterauth "{PASSWORD}"\nrepl-diskless-sync yes\nrepl-diskless-sync-delay 0'
    try:
        for name, more in (("primary", ""), ("replica", "replicaof 127.0.0.1 {}")):
            more = more.format(running[0].port) if running else more
            running.append(start(tmp_path / name, free_port(), PASSWORD, f"{replicates}\n{more}"))
        primary, replica = running
        knows = (
            f"sentinel monitor mymaster 127.0.0.1 {primary.port} 1\n"
            f'sentinel auth-pass mymaster "{PASSWORD}"\n'
            "sentinel down-after-milliseconds mymaster 500\nsentinel failover-timeout mymaster 3000"
        )
        sentinel = start(tmp_path / "sentinel", free_port(), SENTINELS_OWN, knows, "--sentinel")
        running.append(sentinel)
        wait_until(lambda: _is_replicated(primary, sentinel), what="a replica that the sentinel knows")
        yield Watched(primary, replica, sentinel)
    finally:
        for each in running:
            each.kill()


def _is_replicated(primary: Started, sentinel: Started) -> bool:
    with primary.client() as client, sentinel.client() as watching:
        link = client.info("replication").get("slave0", {}).get("state")
        known = watching.sentinel_slaves("mymaster")
    return link == "online" and any(not each["is_disconnected"] for each in known)


async def until_up(health: Health) -> None:
    async with asyncio.timeout(30):
        while not health.up:  # what is waited for happens in other processes
            await asyncio.sleep(0.02)


async def test_limits_are_on_the_primary_and_go_on_on_the_next(watched: Watched) -> None:
    async with limiter(watched.url()) as (one, health):
        await until_up(health)
        for _ in range(4):
            decision, local = await one.decide("k", LIMITS, 1)
            assert decision.admitted
            assert not local
        with watched.primary.client() as primary, watched.replica.client() as replica:
            assert primary.exists("rl:k")
            wait_until(lambda: bool(replica.exists("rl:k")), what="the replica's copy")
        watched.primary.kill()
        admitted = 4
        decision, local = await one.decide("k", LIMITS, 1)  # the first that gets no answer, or one after it
        admitted += decision.admitted
        await until_up(health)
        with watched.replica.client() as promoted:
            assert promoted.info("replication")["role"] == "master"
        for _ in range(10):
            decision, local = await one.decide("k", LIMITS, 1)
            assert not local
            admitted += decision.admitted
        assert admitted == LIMITS[0]


async def test_a_failover_by_hand_is_followed(watched: Watched) -> None:
    async with limiter(watched.url()) as (one, health):
        await until_up(health)
        await one.decide("k", LIMITS, 1)
        with watched.sentinel.client() as sentinel:
            sentinel.execute_command("SENTINEL", "FAILOVER", "mymaster")

        def is_primary() -> bool:
            with watched.replica.client() as client:
                return bool(client.info("replication")["role"] == "master")

        await asyncio.to_thread(wait_until, is_primary, what="the failover")
        async with asyncio.timeout(30):
            while True:
                await until_up(health)
                _, local = await one.decide("after", LIMITS, 1)
                with watched.replica.client() as client:
                    if not local and client.exists("rl:after"):
                        break
                await asyncio.sleep(0.05)


async def test_a_sentinel_that_is_gone_or_hangs_is_passed_over(watched: Watched) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        async with limiter(watched.url(free_port(), silent.getsockname()[1])) as (one, health):
            await until_up(health)
            assert not (await one.decide("k", LIMITS, 1))[1]
