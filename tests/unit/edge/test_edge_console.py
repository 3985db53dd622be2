"""What the edge passes on to the console, and what it does not: against a console played on a real socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

import httpx
import pytest
from aiohttp import web
from pydantic import ValidationError
from starlette.types import Message

from services.edge import console as console_module
from services.edge.app import build
from services.edge.console import opened
from services.edge.gate import Gate
from services.edge.health import describe, fleet_of
from services.edge.settings import EdgeSettings
from tests.conftest import free_port
from tests.unit.edge.fakes import FakeStages, client_of, gate_of, healthy_fleet, ping

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass
class Upstream:
    """A console that notes what it is asked."""

    port: int = field(default_factory=free_port)
    asked: list[web.Request] = field(default_factory=list)
    answer: Answer | None = None

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(request)
        if self.answer is not None:
            return await self.answer(request)
        return web.Response(text="here", headers={"ETag": '"1"'})

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self.handle)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", self.port).start()
        try:
            yield
        finally:
            await runner.cleanup()


@asynccontextmanager
async def edge(upstream: Upstream, **settings: object) -> AsyncIterator[Gate]:
    async with opened(f"http://127.0.0.1:{upstream.port}") as console:
        yield build(FakeStages(), EdgeSettings.model_validate(settings), console)


@pytest.fixture
async def upstream() -> AsyncIterator[Upstream]:
    upstream = Upstream()
    async with upstream.running():
        yield upstream


@pytest.fixture
async def gate(upstream: Upstream) -> AsyncIterator[Gate]:
    async with edge(upstream) as gate:
        yield gate


@pytest.fixture
async def client(gate: Gate) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(gate) as client:
        yield client


@pytest.mark.parametrize(
    "path", ["/console", "/console/", "/console/static/app.js", "/console/api/traces?show=failed&search=a%20b%26c"]
)
async def test_what_is_asked_below_console_is_asked_there(client: httpx.AsyncClient, upstream: Upstream, path: str) -> None:
    answer = await client.get(path)
    assert (answer.status_code, answer.text, answer.headers["etag"]) == (200, "here", '"1"')
    assert upstream.asked[0].raw_path == path


async def test_only_what_the_console_needs_is_passed_on(client: httpx.AsyncClient, upstream: Upstream) -> None:
    wanted = {
        "authorization": "Bearer t", "if-none-match": '"1"', "x-forwarded-for": "1.2.3.4", "sec-fetch-site": "none",
        "accept": "a/b", "x-request-id": "mine",
    }  # fmt: skip
    secret = {
        "x-api-key": "k",
        "cookie": "c=1",
        "connection": "x-hop",
        "x-hop": "1",
        "te": "trailers",
        "proxy-authorization": "p",
    }
    await client.get("/console/", headers=wanted | secret | {"host": "localhost:8000"})
    seen = {name.lower(): value for name, value in upstream.asked[0].headers.items()}
    assert seen == wanted | {"host": "localhost:8000"}


async def test_headers_of_one_hop_stay_there(client: httpx.AsyncClient, upstream: Upstream) -> None:
    async def answer(_: web.Request) -> web.Response:
        return web.Response(
            text="x",
            headers={
                "Connection": "close, X-Hop",
                "X-Hop": "1",
                "Keep-Alive": "5",
                "Set-Cookie": "a=b",
                "X-Kept": "1",
                "Upgrade": "h2c",
            },
        )

    upstream.answer = answer
    headers = (await client.get("/console/")).headers
    assert headers["x-kept"] == "1"
    assert not {"connection", "x-hop", "keep-alive", "set-cookie", "upgrade", "server", "transfer-encoding"} & set(headers)


async def test_redirects_are_passed_on_and_not_followed(client: httpx.AsyncClient, upstream: Upstream) -> None:
    async def answer(_: web.Request) -> web.Response:
        return web.Response(status=308, headers={"Location": "/console/"})

    upstream.answer = answer
    assert (await client.get("/console")).status_code == 308
    assert len(upstream.asked) == 1


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
async def test_it_is_for_reading(client: httpx.AsyncClient, upstream: Upstream, method: str) -> None:
    for path in ("/console/", "/console/api/traces"):
        answer = await client.request(method, path)
        assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD")
    assert not upstream.asked


async def test_the_head_alone_can_be_asked_for(client: httpx.AsyncClient, upstream: Upstream) -> None:
    answer = await client.head("/console/")
    assert (answer.status_code, answer.content, upstream.asked[0].method) == (200, b"", "HEAD")


@pytest.mark.parametrize(
    "headers", [{"content-length": "1"}, {"content-length": "99999999999"}, {"transfer-encoding": "chunked"}]
)
async def test_bodies_are_refused_unread(client: httpx.AsyncClient, upstream: Upstream, headers: dict[str, str]) -> None:
    assert (await client.get("/console/", headers=headers)).status_code == 413
    assert not upstream.asked


@pytest.mark.parametrize(
    "path",
    [
        "/console/../v1/traces",
        "/console/..%2fv1/traces",
        "/console/%2e%2e/health/live",
        "/console/a%0d%0ab",
        "/console/a%20b",
        "/consoles",
    ],
)
async def test_no_path_leads_out_of_it(gate: Gate, upstream: Upstream, path: str) -> None:
    assert await raw_status(gate, path) == 404
    assert not upstream.asked


async def test_a_gateway_without_a_console_has_nothing_there() -> None:
    async with client_of(gate_of(FakeStages())) as client:
        assert (await client.get("/console")).status_code == 404
        assert (await client.get("/console/api/traces")).status_code == 404


async def test_a_console_that_is_away_is_a_page_that_says_so() -> None:
    async with edge(Upstream()) as gate, client_of(gate) as client:
        page = await client.get("/console/", headers={"accept": "text/html,*/*"})
        assert (page.status_code, page.headers["content-type"]) == (503, "text/html; charset=utf-8")
        assert page.headers["content-security-policy"].startswith("default-src 'none'")
        assert "The console is not running" in page.text
        problem = await client.get("/console/api/traces")
        assert (problem.status_code, problem.headers["content-type"]) == (503, "application/problem+json")
        assert problem.json()["retry_after"] == 3
        assert (await client.get("/health")).status_code == 200


async def test_a_console_that_talks_no_http_is_away_too() -> None:
    upstream = Upstream()

    async def babble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"\x16\x03\x01 nonsense\r\n\r\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(babble, "127.0.0.1", upstream.port)
    async with server, edge(upstream) as gate, client_of(gate) as client:
        assert (await client.get("/console/")).status_code == 503


async def test_what_streams_is_passed_on_piece_by_piece(gate: Gate, upstream: Upstream) -> None:
    more = asyncio.Event()

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b"first")
        await more.wait()
        await response.write(b"second")
        return response

    upstream.answer = answer
    call = RawCall(gate, "/console/api/live")
    assert await call.body_of(b"first")
    more.set()
    assert await call.body_of(b"firstsecond")
    await call.task
    assert call.messages[-1] == {"type": "http.response.body", "body": b""}


async def test_a_stream_ends_when_the_edge_is_about_to_stop(gate: Gate, upstream: Upstream) -> None:
    upstream.answer = endless
    call = RawCall(gate, "/console/api/live")
    assert await call.body_of(b"first")
    gate.stop.set()
    await asyncio.wait_for(call.task, 5)
    assert call.messages[-1] == {"type": "http.response.body", "body": b""}


async def test_only_so_many_are_asked_at_a_time_and_everybody_elses_calls_have_their_own_room(
    upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console_module, "MAX_AT_A_TIME", 2)
    upstream.answer = endless
    async with edge(upstream, edge_max_in_flight=1) as gate:
        calls = [RawCall(gate, "/console/api/live") for _ in range(2)]
        for call in calls:
            assert await call.body_of(b"first")
        assert await raw_status(gate, "/console/") == 429
        assert gate.in_flight == 0
        assert await raw_status(gate, "/openapi.json") == 200
        gate.stop.set()
        await asyncio.gather(*(call.task for call in calls))


async def endless(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    await response.write(b"first")
    await asyncio.Event().wait()
    return response


@pytest.mark.parametrize(
    "url", ["https://console", "console:4318", "http://user:secret@console", "http://console/path", "http://a b"]
)
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ValidationError) as refused:
        EdgeSettings(console_url=url)
    assert "secret" not in str(refused.value)


def test_the_console_does_not_count_for_health() -> None:
    without = describe(fleet_of(healthy_fleet(), connected=True))
    ill = describe(fleet_of([*healthy_fleet(), ping("console", status="down")], connected=True))
    assert (without.status, "console" in without.services) == ("healthy", False)
    assert (ill.status, ill.services["console"].status) == ("healthy", "down")


def test_calls_are_told_to_whoever_asks_for_statistics() -> None:
    gate = gate_of(FakeStages())
    for route, status, seconds in (
        ("/v1/detect", 200, 0.01), ("/v1/detect", 429, 0.001), ("/v1/detect", 503, 0.02),
        ("/v1/detect/batch", 200, 9.0), ("/docs", 200, 0.1),
    ):  # fmt: skip
        gate.meters.count(route, status, seconds)
    told = {each.info().name: each.stats() for each in gate.meters.all}
    detect = told["http-detect"]
    assert (detect.num_requests, detect.num_errors, detect.processing_time) == (3, 2, 31_000_000)
    assert detect.data is not None
    assert (detect.data["refused"], detect.data["in_flight"], detect.data["queued"]) == (1, 0, 0)
    assert detect.data["p99_ms"] == pytest.approx(20, rel=0.1)
    assert (told["http-batch"].num_requests, told["http-others"].num_requests) == (1, 1)


async def test_looking_at_the_console_is_not_a_call(upstream: Upstream) -> None:
    async with edge(upstream) as gate, client_of(gate) as client:
        await client.get("/console/")
        await client.get("/openapi.json")
        assert [each.stats().num_requests for each in gate.meters.all] == [0, 0, 1]


class RawCall:
    """A call whose answer can be looked at while it comes."""

    def __init__(self, gate: Gate, path: str) -> None:
        self.messages: list[Message] = []
        self.changed = asyncio.Event()
        self.task = asyncio.create_task(gate(_scope(path), self.receive, self.send))

    async def receive(self) -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    async def send(self, message: Message) -> None:
        self.messages.append(message)
        self.changed.set()

    async def body_of(self, expected: bytes) -> bool:
        """Whether the body becomes that."""
        async with asyncio.timeout(5):
            while b"".join(each.get("body", b"") for each in self.messages) != expected:
                self.changed.clear()
                await self.changed.wait()
        return True


async def raw_status(gate: Gate, path: str) -> int:
    call = RawCall(gate, path)
    await call.task
    return int(call.messages[0]["status"])


def _scope(path: str) -> dict[str, Any]:
    plain, _, query = path.partition("?")
    return {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "GET", "path": unquote(plain),
        "raw_path": plain.encode(), "query_string": query.encode(), "root_path": "", "scheme": "http",
        "headers": [(b"host", b"localhost:8000")], "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 8000),
    }  # fmt: skip
