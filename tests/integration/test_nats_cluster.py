"""Three NATS servers on loopback: streams with replicas, and services that go on when a server of theirs goes."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from nats.js import JetStreamContext

from infra.embedded import servers
from infra.embedded.servers import Member, Server
from libs.common.bus import Bus
from libs.common.contracts import ItemResult, JobItem, JobResult
from libs.common.errors import PortcullisError
from libs.common.service import ConfigurationError
from libs.common.subjects import JOB_BUCKET, USAGE_STREAM
from services.auth.stream import JetStreamUsage
from services.jobs.adapters import JetStream, JetStreamQueues, JetStreamRecords, JetStreamResults
from services.jobs.core import JobRecord
from services.jobs.settings import Settings
from tests.conftest import OPERATOR, free_port, running
from tests.integration.jobs_kit import VERDICT

KEY_ID = "aaaabbbbcccc"
STREAMS = (*(f"JOB_{kind}" for kind in ("ITEMS", "RESULTS", "DEAD", "HOOKS")), f"KV_{JOB_BUCKET}")
TURNS = 150
SILENT_SECONDS = 9.0
"""Three pings of a route, and some."""


@dataclass
class Cluster:
    servers: list[Server]
    stacks: list[ExitStack]
    """Of each server; closed, it is stopped."""

    @property
    def url(self) -> str:
        return ",".join(server.url for server in self.servers)


@pytest.fixture(scope="module")
def cluster(server_home: Path, nats_passwords: dict[str, str]) -> Iterator[Cluster]:
    ports = [free_port() for _ in range(3)]
    routes = tuple(f"127.0.0.1:{port}" for port in ports)
    secret = secrets.token_urlsafe(12)
    made = [
        servers.nats(
            server_home / f"cluster-{number}",
            free_port(),
            nats_passwords,
            member=Member(f"n{number}", port, routes, secret),
        )
        for number, port in enumerate(ports)
    ]
    stacks = [ExitStack() for _ in made]
    try:
        for stack, server in zip(stacks, made, strict=True):
            stack.enter_context(running(server))
        yield Cluster(made, stacks)
    finally:
        for stack in stacks:
            stack.close()


def settings(url: str, passwords: dict[str, str], user: str, **values: Any) -> Settings:
    return Settings.model_validate({"nats_url": url, "nats_user": user, "nats_password": passwords[user], **values})


@asynccontextmanager
async def connected(url: str, passwords: dict[str, str], user: str) -> AsyncIterator[Bus]:
    bus = Bus(user, settings(url, passwords, user))
    await bus.connect()
    try:
        yield bus
    finally:
        await bus.drain()


async def made(bus: Bus, chosen: Settings) -> JetStream:
    """Jobs' streams, as soon as the servers have found each other."""
    stream = JetStream(bus, chosen)
    async with asyncio.timeout(60):
        while True:
            try:
                await stream.ensure()
            except PortcullisError:
                await asyncio.sleep(0.2)
            else:
                return stream


@asynccontextmanager
async def jobs(cluster: Cluster, passwords: dict[str, str], replicas: int = 3) -> AsyncIterator[JetStream]:
    chosen = settings(cluster.url, passwords, "jobs", stream_replicas=replicas)
    async with connected(cluster.url, passwords, "jobs") as bus:
        yield await made(bus, chosen)


async def replicas_of(jetstream: JetStreamContext, name: str) -> int | None:
    return (await jetstream.stream_info(name)).config.num_replicas


async def test_every_stream_and_bucket_has_the_replicas_that_are_configured(
    cluster: Cluster, nats_passwords: dict[str, str]
) -> None:
    async with jobs(cluster, nats_passwords) as stream, connected(cluster.url, nats_passwords, "auth") as auth:
        assert {name: await replicas_of(stream.api, name) for name in STREAMS} == dict.fromkeys(STREAMS, 3)
        await JetStreamUsage(auth, 1024**2, replicas=3).state()
        assert await replicas_of(auth.connection.jetstream(), USAGE_STREAM) == 3


async def test_what_an_operator_has_altered_stays_so(
    cluster: Cluster, nats_passwords: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    async with jobs(cluster, nats_passwords) as stream, connected(cluster.url, nats_passwords, OPERATOR) as operator:
        jetstream = operator.connection.jetstream()
        altered = (await jetstream.stream_info("JOB_DEAD")).config.evolve(max_bytes=7_000_000, num_replicas=1)
        kept = (await jetstream.update_stream(altered)).config
        with caplog.at_level(logging.WARNING, "libs.common.streams"):
            await JetStream(stream.bus, stream.settings).ensure()
        assert (await jetstream.stream_info("JOB_DEAD")).config == kept
        (line,) = [each.getMessage() for each in caplog.records if each.name == "libs.common.streams"]
        assert "max_bytes is 7000000" in line
        assert "num_replicas is 1, configured 3" in line


async def test_replicas_without_a_cluster_end_the_start(nats_passwords: dict[str, str], tmp_path: Path) -> None:
    with running(servers.nats(tmp_path, free_port(), nats_passwords)) as server:
        async with connected(server.url, nats_passwords, "jobs") as bus:
            with pytest.raises(ConfigurationError, match="PORTCULLIS_STREAM_REPLICAS"):
                await JetStream(bus, settings(server.url, nats_passwords, "jobs", stream_replicas=3)).ensure()
        async with connected(server.url, nats_passwords, "auth") as bus:
            with pytest.raises(ConfigurationError, match="PORTCULLIS_STREAM_REPLICAS"):
                await JetStreamUsage(bus, 1024**2, replicas=3).state()


async def test_what_was_stored_is_read_at_once_wherever_one_asks(cluster: Cluster, nats_passwords: dict[str, str]) -> None:
    """By readers that are on any of the servers."""
    async with jobs(cluster, nats_passwords) as stream:
        records, queues, results = JetStreamRecords(stream), JetStreamQueues(stream), JetStreamResults(stream)
        await queues.open(KEY_ID, "0" * 28)
        missed: list[str] = []
        for number in range(TURNS):
            job_id = f"{number:028x}"
            await records.create(JobRecord(key_id=KEY_ID, job_id=job_id, state="open", created_ms=1, updated_ms=1))
            if await records.get(KEY_ID, job_id) is None:
                missed.append("record")
            await queues.append(KEY_ID, "0" * 28, number, [JobItem(text="Hello")])
            if not await queues.has(KEY_ID, "0" * 28, number):
                missed.append("item")
            await results.store(KEY_ID, "0" * 28, JobResult(index=number, result=ItemResult(verdict=VERDICT)))
            if not await results.has(KEY_ID, "0" * 28, number):
                missed.append("result")
        assert missed == []
        # All results are there when nothing comes any more; a page that would say so too early is refused or goes on.
        found, after, more = 0, 0, True
        while more:
            page, more = await results.page(KEY_ID, "0" * 28, after, 64, 1_000_000)
            found += len(page)
            after = page[-1][0] if page else after
        assert found == TURNS
        await queues.close(KEY_ID, "0" * 28)


async def test_a_server_that_was_away_is_not_asked_what_decides(cluster: Cluster, nats_passwords: dict[str, str]) -> None:
    """Any replica may answer a direct read, and one that was paused said of a third of them for seconds that nothing is there."""
    async with jobs(cluster, nats_passwords) as stream:
        records = JetStreamRecords(stream)
        placed = (await stream.api.stream_info(f"KV_{JOB_BUCKET}")).cluster
        at = stream.bus.connection.connected_url
        assert placed is not None
        assert at is not None
        followers = {peer.name for peer in placed.replicas or []}
        away = next(
            number for number, server in enumerate(cluster.servers) if f"n{number}" in followers and server.port != at.port
        )
        process = process_of(cluster.servers[away])
        process.suspend()
        try:
            await silent(stream, f"n{away}")
            made = [JobRecord(key_id=KEY_ID, job_id=f"{n:027x}f", state="open", created_ms=1, updated_ms=1) for n in range(2000)]
            for first in range(0, len(made), 100):
                await asyncio.gather(*map(records.create, made[first : first + 100]))
        finally:
            process.resume()
        read = missed = 0
        async with asyncio.timeout(60):
            while read < 300:
                try:
                    missed += await records.get(KEY_ID, made[-1].job_id) is None
                    read += 1
                except PortcullisError:  # nobody leads just now, which says nothing wrong
                    await asyncio.sleep(0.05)
        assert missed == 0


async def silent(stream: JetStream, name: str) -> None:
    """Until a server has been silent for so long that the others have given it up."""
    async with asyncio.timeout(60):
        while True:
            placed = (await stream.api.stream_info(f"KV_{JOB_BUCKET}")).cluster
            peers = (placed.replicas or []) if placed is not None else []
            if any(peer.name == name and (peer.active or 0) > SILENT_SECONDS * 1e9 for peer in peers):
                return
            await asyncio.sleep(0.2)


def process_of(server: Server) -> psutil.Process:
    return next(each for each in psutil.process_iter(["cmdline"]) if each.info["cmdline"] == list(server.command))


async def test_a_service_finds_a_server_that_is_there_and_goes_on_when_it_goes(
    cluster: Cluster, nats_passwords: dict[str, str]
) -> None:
    dead = f"nats://127.0.0.1:{free_port()}"
    url = f"{dead}, {cluster.url}"
    async with connected(url, nats_passwords, "jobs") as bus, jobs(cluster, nats_passwords) as stream:
        at = bus.connection.connected_url
        assert at is not None
        number = next(number for number, server in enumerate(cluster.servers) if server.port == at.port)
        reconnected = asyncio.Event()

        async def told() -> None:
            reconnected.set()

        bus.on_reconnect.append(told)
        cluster.stacks[number].close()
        try:
            await asyncio.wait_for(reconnected.wait(), 20)
            assert bus.connection.connected_url is not None
            assert bus.connection.connected_url.port != at.port
            # Two of three are a majority, which goes on storing.
            async with asyncio.timeout(30):
                while True:
                    try:
                        await JetStreamResults(stream).store(
                            KEY_ID, "1" * 28, JobResult(index=0, result=ItemResult(verdict=VERDICT))
                        )
                    except PortcullisError:  # until another leads
                        await asyncio.sleep(0.2)
                    else:
                        break
        finally:
            cluster.stacks[number].enter_context(running(cluster.servers[number]))
