"""Batches on a real socket and a real NATS: readers that leave, readers that dawdle, stages that go, and a process that stops."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import pytest

from infra.embedded.servers import Server
from libs.common import contracts, subjects
from libs.common.bus import Bus
from libs.common.context import RequestContext
from libs.common.contracts import AdmissionRequest, DetectItems, ItemResult, ItemResults, Principal
from libs.common.errors import ErrorCode, PortcullisError
from libs.common.stages import Answer
from services.edge.metrics import BATCHES
from tests.integration.buses import started
from tests.integration.test_edge import KEYED, RATE, VERDICT, Edge, Fleet

LINES = {**KEYED, "Content-Type": "application/x-ndjson"}
PRINCIPAL = Principal(key_id="key", scopes=("batch",), limit_minute=70, limit_day=10)


@dataclass
class Judge:
    """The stages behind the edge. `seconds`: of each message; `verdict`: of each text."""

    seconds: float = 0.0
    verdict: contracts.Verdict = VERDICT
    texts: int = 0
    charged: int = 0
    under_way: int = 0
    most_under_way: int = 0
    origins: list[str] = field(default_factory=list)

    async def admit(self, message: AdmissionRequest, _: RequestContext) -> Answer:
        self.charged += message.cost
        return Answer(contracts.Admission(principal=PRINCIPAL, granted=message.cost, rate=RATE), RATE)

    async def judge(self, message: DetectItems, context: RequestContext) -> Answer:
        self.texts += len(message.texts)
        self.origins.append(context.attempt_of)
        self.under_way += len(message.texts)
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            await asyncio.sleep(self.seconds)
        finally:
            self.under_way -= len(message.texts)
        return Answer(ItemResults(results=(ItemResult(verdict=self.verdict),) * len(message.texts)))

    def proxy(self, fleet: Fleet) -> Bus:
        bus = fleet.bus("detector_proxy")
        bus.stage(subjects.BATCH_ITEMS, DetectItems, self.judge)
        return bus


@pytest.fixture
def fleet(nats_server: Server, nats_passwords: dict[str, str]) -> Fleet:
    return Fleet(nats_server, nats_passwords)


@asynccontextmanager
async def running(
    fleet: Fleet, judge: Judge, *, proxy: bool = True, **settings: Any
) -> AsyncIterator[tuple[Edge, aiohttp.ClientSession]]:
    auth = fleet.bus("auth")
    auth.stage(subjects.BATCH_REQUEST, AdmissionRequest, judge.admit)
    buses = [auth, *([judge.proxy(fleet)] if proxy else [])]
    timeout = aiohttp.ClientTimeout(total=60)
    async with (
        started(*buses),
        fleet.edge(**settings) as edge,
        aiohttp.ClientSession(str(edge.client.base_url), timeout=timeout) as session,
    ):
        yield edge, session


def lines(count: int) -> bytes:
    return b"".join(b'{"id":"%d","text":"text %d"}\n' % (number, number) for number in range(count))


def listed(count: int) -> dict[str, Any]:
    return {"requests": [{"text": f"text {number}"} for number in range(count)]}


async def until(condition: Callable[[], bool], seconds: float = 15.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


def in_flight() -> float:
    return float(BATCHES._value.get())


async def summary_of(response: aiohttp.ClientResponse) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    assert response.status == 200, await response.text()
    *results, last = [json.loads(line) async for line in response.content]
    return results, last["summary"]


@pytest.mark.parametrize("way", ["list", "lines"])
async def test_a_thousand_texts_through_nats(fleet: Fleet, way: str) -> None:
    judge = Judge()
    async with running(fleet, judge) as (_, session):
        sent: dict[str, Any] = {"json": listed(1000)} if way == "list" else {"data": lines(1000)}
        async with session.post("/v1/detect/batch", headers=KEYED if way == "list" else LINES, **sent) as response:
            results, summary = await summary_of(response)
    assert sorted(line["index"] for line in results) == list(range(1000))
    assert (summary["total"], summary["malicious"], summary["failed"], summary["complete"]) == (1000, 1000, 0, True)
    assert judge.texts == judge.charged == 1000


async def test_results_are_read_while_the_upload_goes_on(fleet: Fleet) -> None:
    read = asyncio.Queue[int]()

    async def upload() -> AsyncIterator[bytes]:
        for number in range(10):
            yield b'{"text":"text"}\n'
            assert await asyncio.wait_for(read.get(), 10) == number

    async with (
        running(fleet, Judge()) as (_, session),
        session.post("/v1/detect/batch", data=upload(), headers=LINES) as response,
    ):
        seen = []
        async for line in response.content:
            document = json.loads(line)
            if "index" in document:
                seen.append(document["index"])
                read.put_nowait(document["index"])
        assert document["summary"]["total"] == 10
    assert seen == list(range(10))


@pytest.mark.parametrize("way", ["list", "lines", "endless"])
async def test_a_reader_that_leaves_stops_the_work_within_a_second(fleet: Fleet, way: str) -> None:
    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield lines(10)
            await asyncio.sleep(0)

    judge = Judge(seconds=0.2)
    ways: dict[str, dict[str, Any]] = {
        "list": {"json": listed(1000)},
        "lines": {"data": lines(20_000)},
        "endless": {"data": endless()},
    }
    async with running(fleet, judge) as (_, session):
        response = await session.post("/v1/detect/batch", headers=KEYED if way == "list" else LINES, **ways[way])
        await response.content.readline()
        await until(lambda: judge.texts > 20)
        assert response.connection is not None
        assert response.connection.transport is not None
        response.connection.transport.abort()  # close() would first send what is left of the upload
        left = time.monotonic()
        await until(lambda: in_flight() == 0, 1.0)
        assert time.monotonic() - left < 1.0
        # Whatever was sent before it left has arrived by now; nothing comes after it.
        await asyncio.sleep(0.1)
        texts = judge.texts
        await until(lambda: judge.under_way == 0)
        await asyncio.sleep(0.5)
        assert judge.texts == texts < 1000


async def test_a_slow_reader_slows_the_work_and_gets_everything(fleet: Fleet) -> None:
    judge = Judge(verdict=contracts.Verdict(
        is_malicious=True, confidence=0.9, threat_types=("jailbreak",), endpoint="x" * 20_000, degraded=False
    ))  # fmt: skip
    async with running(fleet, judge) as (edge, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", edge.port, limit=2**17)
        body = json.dumps({"requests": [{"text": "t"}] * 1000}).encode()
        writer.write(
            b"POST /v1/detect/batch HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\nx-api-key: %b\r\n"
            b"content-type: application/json\r\ncontent-length: %d\r\n\r\n" % (KEYED["X-API-Key"].encode(), len(body)) + body
        )
        await reader.readuntil(b"\r\n\r\n")
        await until(lambda: judge.texts > 10)
        # What nobody reads fills the buffers of both ends; then nothing more is begun.
        texts = -1
        while texts != judge.texts:
            texts = judge.texts
            await asyncio.sleep(0.5)
        assert texts < 900
        async with asyncio.timeout(60):
            rest = await reader.read(-1)
        writer.close()
        assert b'"total":1000' in rest
        assert b'"complete":true' in rest
    assert judge.texts == 1000


async def test_a_reader_that_takes_nothing_is_let_go(fleet: Fleet) -> None:
    judge = Judge(verdict=contracts.Verdict(
        is_malicious=True, confidence=0.9, threat_types=("jailbreak",), endpoint="x" * 20_000, degraded=False
    ))  # fmt: skip
    async with running(fleet, judge, batch_idle_seconds=0.3) as (edge, _):
        # A small buffer, set before connecting: the kernel would grow it until it takes the whole answer.
        taker = socket.socket()
        taker.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**14)
        taker.connect(("127.0.0.1", edge.port))
        reader, writer = await asyncio.open_connection(sock=taker, limit=2**16)
        body = json.dumps(listed(1000)).encode()
        writer.write(
            b"POST /v1/detect/batch HTTP/1.1\r\nhost: localhost\r\nx-api-key: %b\r\n"
            b"content-type: application/json\r\ncontent-length: %d\r\n\r\n" % (KEYED["X-API-Key"].encode(), len(body)) + body
        )
        await until(lambda: in_flight() == 1)
        await until(lambda: in_flight() == 0)
        assert judge.texts < 1000
        # The connection is cut: what was under way to it may still be read, an end of the answer may not.
        with contextlib.suppress(ConnectionError):
            async with asyncio.timeout(10):
                assert b"summary" not in await reader.read(-1)
        writer.close()


async def test_an_upload_is_read_no_faster_than_it_is_judged(fleet: Fleet) -> None:
    sent = 0

    async def upload() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(4000):
            yield b'{"text":"%b"}\n' % (b"x" * 5000)
            sent += 1

    judge = Judge(seconds=0.3)
    async with running(fleet, judge) as (_, session):
        response = await session.post("/v1/detect/batch", data=upload(), headers=LINES)
        await response.content.readline()
        await until(lambda: judge.texts >= 100)
        # What is ahead of the judges is in sockets and one piece of the upload, not in the edge's memory.
        assert sent - judge.texts < 3000
        assert judge.most_under_way <= 512_000 // 5000 + 64
        response.close()
        await until(lambda: in_flight() == 0)


async def test_a_stage_that_comes_back_costs_no_line(fleet: Fleet) -> None:
    judge = Judge(seconds=0.02)
    async with running(fleet, judge, proxy=False) as (_, session):
        first = judge.proxy(fleet)
        await first.connect()
        await first.start()
        response = await session.post("/v1/detect/batch", json=listed(1000), headers=KEYED)
        await response.content.readline()
        await until(lambda: judge.texts > 100)
        await first.drain()
        gone = judge.texts
        await asyncio.sleep(0.5)
        async with started(judge.proxy(fleet)):
            _, summary = await summary_of(response)
    assert gone < 1000
    assert (summary["total"], summary["failed"], summary["complete"]) == (1000, 0, True)


async def test_without_a_proxy_every_item_is_an_error_in_time(fleet: Fleet) -> None:
    async with running(fleet, Judge(), proxy=False) as (_, session):
        headers = {**KEYED, "X-Request-Timeout": "0.3"}
        async with session.post("/v1/detect/batch", json=listed(3), headers=headers) as response:
            results, summary = await summary_of(response)
    # The last attempt may begin in the last millisecond.
    assert {line["error"]["code"] for line in results} <= {ErrorCode.STAGE_UNAVAILABLE, ErrorCode.DEADLINE_EXCEEDED}
    assert (summary["total"], summary["failed"]) == (3, 3)


async def test_a_full_proxy_is_asked_again_under_the_same_origin(fleet: Fleet) -> None:
    judge = Judge()
    refused: list[str] = []

    async def full_at_first(message: DetectItems, context: RequestContext) -> Answer:
        if len(refused) < 2:
            refused.append(context.attempt_of)
            raise PortcullisError(ErrorCode.OVERLOADED)
        return await judge.judge(message, context)

    proxy = fleet.bus("detector_proxy")
    proxy.stage(subjects.BATCH_ITEMS, DetectItems, full_at_first)
    async with (
        running(fleet, judge, proxy=False) as (_, session),
        started(proxy),
        session.post("/v1/detect/batch", json=listed(1), headers=KEYED) as response,
    ):
        _, summary = await summary_of(response)
    assert summary["failed"] == 0
    assert {*refused} == {*judge.origins}


async def test_a_stop_finishes_a_list_and_ends_an_upload_with_where_it_got_to(fleet: Fleet) -> None:
    judge = Judge(seconds=0.05)
    more = asyncio.Event()

    async def upload() -> AsyncIterator[bytes]:
        yield lines(50)
        await more.wait()

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as session:
        async with running(fleet, judge) as (edge, _):
            url = f"http://127.0.0.1:{edge.port}/v1/detect/batch"
            list_response = await session.post(url, json=listed(1000), headers=KEYED)
            upload_response = await session.post(url, data=upload(), headers=LINES)
            answers = [asyncio.create_task(summary_of(each)) for each in (list_response, upload_response)]
            await until(lambda: judge.texts > 60)
        (results, summary), (lines_read, stopped) = await asyncio.gather(*answers)
        more.set()
    assert (len(results), summary["failed"], summary["complete"]) == (1000, 0, True)
    assert stopped["error"]["code"] == ErrorCode.STAGE_UNAVAILABLE
    assert not stopped["complete"]
    assert stopped["next_index"] == stopped["total"] == len(lines_read) - 1 <= 50
