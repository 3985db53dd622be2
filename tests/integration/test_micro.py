"""`$SRV.PING/INFO/STATS` as `nats micro ls`, `info` and `stats` ask for them, on a real server: the fleet in ADR-32's form."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import nats
import pytest
from nats.aio.client import Client
from nats.micro.service import ServiceInfo, ServicePing, ServiceStats
from pydantic import SecretStr

from infra.embedded.servers import Server
from libs.common import subjects
from libs.common.bus import Bus
from libs.common.context import RequestContext
from libs.common.contracts import Message
from libs.common.errors import ErrorCode, PortcullisError
from libs.common.settings import CommonSettings
from libs.common.stages import Answer
from tests.conftest import OPERATOR
from tests.integration.buses import Ping
from tests.integration.test_bus import context

SERVICE = "portcullis-auth"
STAGE = "detect-v1-request"


@asynccontextmanager
async def operator(server: Server, passwords: dict[str, str]) -> AsyncIterator[Client]:
    client = await nats.connect(server.url, user=OPERATOR, password=passwords[OPERATOR])
    try:
        yield client
    finally:
        await client.close()


async def ask(client: Client, subject: str, replicas: int) -> list[dict[str, Any]]:
    """What `nats micro` does: an empty message, and an inbox for the answers of all."""
    inbox = client.new_inbox()
    answers = await client.subscribe(inbox)
    await client.publish(subject, b"", reply=inbox)
    found = [msgspec.json.decode((await answers.next_msg(5)).data) for _ in range(replicas)]
    await answers.unsubscribe()
    return found


class Two:
    """Two replicas of auth, whose stage judges by the value: 0 is held until `release`, 13 is refused."""

    def __init__(self, server: Server, passwords: dict[str, str]) -> None:
        settings = CommonSettings(nats_url=server.url, nats_user="auth", nats_password=SecretStr(passwords["auth"]))
        self.release = asyncio.Event()
        self.held = 0
        self.waiting = 0
        self.buses = [Bus("auth", settings) for _ in range(2)]
        for bus in self.buses:
            bus.stage(subjects.DETECT_REQUEST, Ping, self.handle, max_in_flight=4, waiting=lambda: self.waiting)

    async def handle(self, message: Ping, _: RequestContext) -> Answer:
        if message.value == 0:
            self.held += 1
            await self.release.wait()
        if message.value == 13:
            raise PortcullisError(ErrorCode.RATE_LIMITED)
        return Answer(Message())


@pytest.fixture
async def two(nats_server: Server, nats_passwords: dict[str, str]) -> AsyncIterator[Two]:
    replicas = Two(nats_server, nats_passwords)
    for bus in replicas.buses:
        await bus.connect()
        await bus.start()
    yield replicas
    replicas.release.set()
    for bus in replicas.buses:
        await bus.drain()


@pytest.fixture
async def edge(nats_server: Server, nats_passwords: dict[str, str]) -> AsyncIterator[Bus]:
    bus = Bus("edge", CommonSettings(nats_url=nats_server.url, nats_user="edge", nats_password=SecretStr(nats_passwords["edge"])))
    await bus.connect()
    yield bus
    await bus.drain()


async def test_ping_lists_every_replica_once(nats_server: Server, nats_passwords: dict[str, str], two: Two) -> None:
    async with operator(nats_server, nats_passwords) as client:
        found = await ask(client, f"$SRV.PING.{SERVICE}", 2)
        pings = [ServicePing.from_dict(ping) for ping in found]
        assert {ping["type"] for ping in found} == {"io.nats.micro.v1.ping_response"}
        assert {ping.name for ping in pings} == {SERVICE}
        assert len({ping.id for ping in pings}) == 2
        assert {ping.metadata["instance"] for ping in pings} == {bus.instance for bus in two.buses}
        (one,) = await ask(client, f"$SRV.PING.{SERVICE}.{pings[0].id}", 1)
        assert one["id"] == pings[0].id


async def test_info_names_what_each_listens_to(nats_server: Server, nats_passwords: dict[str, str], two: Two) -> None:
    async with operator(nats_server, nats_passwords) as client:
        found = await ask(client, f"$SRV.INFO.{SERVICE}", 2)
    for one in found:
        assert one["type"] == "io.nats.micro.v1.info_response"
        (endpoint,) = ServiceInfo.from_dict(one).endpoints
        assert (endpoint.name, endpoint.subject, endpoint.queue_group) == (STAGE, subjects.DETECT_REQUEST, "auth")


async def stats_of(client: Client) -> list[dict[str, Any]]:
    found = await ask(client, f"$SRV.STATS.{SERVICE}", 2)
    assert {one["type"] for one in found} == {"io.nats.micro.v1.stats_response"}
    endpoints = []
    for one in found:
        (endpoint,) = ServiceStats.from_dict(one).endpoints
        assert (endpoint.name, endpoint.subject) == (STAGE, subjects.DETECT_REQUEST)
        endpoints.append(endpoint.to_dict())
    return endpoints


async def test_stats_tell_what_was_done(nats_server: Server, nats_passwords: dict[str, str], two: Two, edge: Bus) -> None:
    async with operator(nats_server, nats_passwords) as client:
        for endpoint in await stats_of(client):
            assert endpoint["num_requests"] == 0
            assert endpoint["data"] == {"in_flight": 0, "queued": 0, "refused": 0, "p50_ms": None, "p99_ms": None}
        for value in (*range(1, 10), 13):
            await edge.request(subjects.DETECT_REQUEST, Ping(value=value), context())
        told = await stats_of(client)
    assert sum(endpoint["num_requests"] for endpoint in told) == 10
    assert sum(endpoint["num_errors"] for endpoint in told) == 1
    assert "rate_limited" in {endpoint["last_error"] for endpoint in told}
    for endpoint in told:
        if endpoint["num_requests"]:
            assert endpoint["average_processing_time"] == endpoint["processing_time"] // endpoint["num_requests"]
            assert 0 < endpoint["data"]["p50_ms"] <= endpoint["data"]["p99_ms"] < 5000


async def test_stats_tell_what_is_under_way_and_what_waits(
    nats_server: Server, nats_passwords: dict[str, str], two: Two, edge: Bus
) -> None:
    async with operator(nats_server, nats_passwords) as client:
        asked = [asyncio.create_task(edge.request(subjects.DETECT_REQUEST, Ping(), context())) for _ in range(3)]
        while two.held < 3:
            await asyncio.sleep(0.01)
        two.waiting = 5
        told = [endpoint["data"] for endpoint in await stats_of(client)]
        assert sum(data["in_flight"] for data in told) == 3
        assert [data["queued"] for data in told] == [5, 5]
        two.release.set()
        await asyncio.gather(*asked)
        assert sum(endpoint["data"]["in_flight"] for endpoint in await stats_of(client)) == 0
