"""The console over HTTP, without a network: who may look, what the pages may do, what is taken in."""

from __future__ import annotations

import asyncio
import gzip
import hmac
import re
from collections.abc import AsyncIterator
from html.parser import HTMLParser
from typing import Any

import httpx
import pytest
from pydantic import ValidationError
from starlette.types import ASGIApp, Message

from services.console import otlp
from services.console.core import TraceStore
from services.console.fleet import Fleet
from services.console.guard import Guard
from services.console.hub import Hub
from services.console.settings import ConsoleSettings
from services.console.web import STATIC, build
from tests.otlp_kit import encoded, request_trace, span

TOKEN = "an admin token of some length"
PROTOBUF = {"content-type": "application/x-protobuf"}
API = ("/console/api/traces", "/console/api/traces/abc")


def console(token: str | None = TOKEN, *, is_open: bool = False, hub: Hub | None = None) -> ASGIApp:
    store = TraceStore(1000, 10_000_000, slow_ms=1000)
    return build(store, Fleet(), hub or Hub(), Guard(token, is_open=is_open), slow_ms=1000)


def client_of(app: ASGIApp, host: str = "localhost:8000") -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=f"http://{host}")


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(console()) as client:
        yield client


@pytest.fixture
async def open_client() -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(console(None, is_open=True)) as client:
        yield client


# --- who may look --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [*API, "/console/api/live"])
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": f"Basic {TOKEN}"},
        {"authorization": TOKEN},
        {"authorization": f"Bearer {TOKEN} "  # a space at the end is no part of it
         "x"},
        {"x-admin-token": TOKEN},
        {"cookie": f"token={TOKEN}"},
    ],
)  # fmt: skip
async def test_without_the_token_nothing_is_told(client: httpx.AsyncClient, path: str, headers: dict[str, str]) -> None:
    answer = await client.get(path, headers=headers)
    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
    assert "set-cookie" not in answer.headers


async def test_with_the_token_everything_is(client: httpx.AsyncClient) -> None:
    for path in API:
        assert (await client.get(path, headers={"Authorization": f"bearer {TOKEN}"})).status_code == 200


async def test_the_token_in_the_address_counts_for_nothing(client: httpx.AsyncClient) -> None:
    assert (await client.get(f"/console/api/traces?token={TOKEN}&access_token={TOKEN}")).status_code == 401


async def test_tokens_are_compared_in_constant_time_and_as_digests(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    real = hmac.compare_digest

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((len(one), len(other)))
        return real(one, other)

    monkeypatch.setattr(hmac, "compare_digest", compare)
    guard = Guard(TOKEN, is_open=False)
    assert guard.judge({"authorization": "Bearer x"}) == "token"
    assert guard.judge({"authorization": f"Bearer {TOKEN}"}) == "welcome"
    assert guard.judge({"authorization": "Bearer \udcff"}) == "token"
    assert set(compared) == {(32, 32)}


async def test_without_a_token_to_know_a_closed_console_stays_closed() -> None:
    async with client_of(console(None)) as client:
        for headers in ({}, {"authorization": "Bearer "}, {"authorization": "Bearer None"}):
            assert (await client.get(API[0], headers=headers)).status_code == 403


async def test_an_open_console_is_open_to_loopback_names(open_client: httpx.AsyncClient) -> None:
    for host in ("localhost", "localhost:8000", "127.0.0.1:1", "[::1]:8000", "LOCALHOST"):
        assert (await open_client.get(API[0], headers={"host": host})).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example:8000", "", "10.0.0.1", "[::2]"]
)
@pytest.mark.parametrize("path", ["/console/", API[0], "/console/static/app.js", "/v1/traces"])
async def test_and_to_no_other_name_that_may_point_here(open_client: httpx.AsyncClient, host: str, path: str) -> None:
    assert (await open_client.get(path, headers={"host": host})).status_code == 403


@pytest.mark.parametrize("name", ["X-Forwarded-For", "Forwarded", "X-Real-IP", "X-Forwarded-Host"])
async def test_nor_to_what_a_proxy_has_passed_on(name: str) -> None:
    async with client_of(console(is_open=True)) as client:
        assert (await client.get(API[0], headers={name: "203.0.113.7"})).status_code == 401
        assert (await client.get(API[0], headers={name: "x", "authorization": f"Bearer {TOKEN}"})).status_code == 200


@pytest.mark.parametrize(("site", "status"), [("cross-site", 403), ("same-site", 403), ("same-origin", 200), ("none", 200)])
async def test_pages_of_others_get_nothing(open_client: httpx.AsyncClient, site: str, status: int) -> None:
    answer = await open_client.get(API[0], headers={"sec-fetch-site": site, "origin": "http://evil.example"})
    assert answer.status_code == status
    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize(
    ("token", "is_open", "headers", "access"),
    [
        (TOKEN, False, {}, "token"),
        (TOKEN, False, {"authorization": f"Bearer {TOKEN}"}, "welcome"),
        (TOKEN, False, {"authorization": "Bearer wrong"}, "token"),
        (None, False, {}, "never"),
        (None, True, {}, "welcome"),
    ],
)
async def test_a_page_can_ask_whether_it_may_look(token: str | None, is_open: bool, headers: dict[str, str], access: str) -> None:
    async with client_of(console(token, is_open=is_open)) as client:
        answer = await client.get("/console/api/session", headers=headers)
        assert (answer.status_code, answer.json()["access"]) == (200, access)


def test_an_open_console_on_an_address_that_others_reach_is_refused() -> None:
    with pytest.raises(ValidationError, match="PORTCULLIS_CONSOLE_OPEN"):
        ConsoleSettings(console_open=True, console_host="0.0.0.0")


# --- pages ---------------------------------------------------------------------------------------------------------------


async def test_the_page_may_load_from_here_only_and_holds_nothing_inline(client: httpx.AsyncClient) -> None:
    answer = await client.get("/console/")
    policy = dict(part.strip().partition(" ")[::2] for part in answer.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert {policy[name] for name in ("script-src", "style-src", "connect-src", "img-src")} == {"'self'"}
    assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert "unsafe" not in answer.headers["content-security-policy"]

    class Checker(HTMLParser):
        loaded: list[str] = []
        inside = ""

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            given = dict(attrs)
            assert "style" not in given
            assert not any(name.startswith("on") for name in given)
            assert tag != "style"
            self.inside = tag
            for name in ("src", "href"):
                if name in given and tag in ("script", "link", "img"):
                    self.loaded.append(str(given[name]))

        def handle_data(self, data: str) -> None:
            assert self.inside != "script" or not data.strip()

    checker = Checker()
    checker.feed(answer.text)
    assert len(checker.loaded) >= 4
    for path in checker.loaded:
        assert (await client.get(f"/console/{path}")).status_code == 200


def test_scripts_load_each_other_and_nothing_else_and_never_parse_html() -> None:
    for path in STATIC.glob("*.js"):
        source = path.read_text()
        for imported in re.findall(r'from "([^"]+)"', source):
            assert (STATIC / imported).resolve().parent == STATIC.resolve()
            assert (STATIC / imported).exists()
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|https?://(?!www\.w3\.org)", source
        ), path
    assert "http" not in (STATIC / "style.css").read_text()


async def test_files_are_taken_from_the_cache_when_they_are_the_same(client: httpx.AsyncClient) -> None:
    first = await client.get("/console/static/app.js")
    assert first.headers["content-type"].startswith("text/javascript")
    assert first.headers["cache-control"] == "no-cache"
    again = await client.get("/console/static/app.js", headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize(
    "path", ["/console/static/..%2fweb.py", "/console/static/nothing.js", "/console/nothing", "/", "/etc/passwd"]
)
async def test_nothing_else_is_served(client: httpx.AsyncClient, path: str) -> None:
    assert (await client.get(path)).status_code == 404


async def test_the_address_without_a_slash_leads_to_the_page(client: httpx.AsyncClient) -> None:
    answer = await client.get("/console")
    assert (answer.status_code, answer.headers["location"]) == (308, "/console/")


# --- what is taken in, and given out -------------------------------------------------------------------------------------


async def test_traces_come_in_and_are_found(open_client: httpx.AsyncClient) -> None:
    spans = request_trace("failed")
    taken = await open_client.post("/v1/traces", content=encoded(spans), headers=PROTOBUF)
    assert (taken.status_code, taken.headers["content-type"]) == (200, "application/x-protobuf")
    listed = (await open_client.get("/console/api/traces")).json()
    assert (listed["counts"]["all"], listed["counts"]["failed"]) == (1, 1)
    (summary,) = listed["traces"]
    found = (await open_client.get("/console/api/traces", params={"search": summary["request_id"]})).json()
    assert [each["trace_id"] for each in found["traces"]] == [summary["trace_id"]]
    trace = (await open_client.get(f"/console/api/traces/{summary['trace_id'].upper()}")).json()
    assert len(trace["spans"]) == len(spans)


async def test_a_trace_that_is_not_here_is_null(open_client: httpx.AsyncClient) -> None:
    answer = await open_client.get("/console/api/traces/" + "0" * 32)
    assert (answer.status_code, answer.json()) == (200, None)


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b"{}", {"content-type": "application/json"}, 415),
        (encoded([span("x")]), {"content-type": "text/plain"}, 415),
        (b"\xff\xff", PROTOBUF, 400),
        (b"x", PROTOBUF | {"content-encoding": "gzip"}, 400),
        (gzip.compress(b"\0" * 50_000_000), PROTOBUF | {"content-encoding": "gzip"}, 400),
        (b"\0" * (otlp.MAX_BODY_BYTES + 1), PROTOBUF, 413),
        (gzip.compress(encoded([span("x")])), PROTOBUF | {"content-encoding": "gzip"}, 200),
        (b"", PROTOBUF, 200),
    ],
)
async def test_bodies_that_are_none_are_refused(
    open_client: httpx.AsyncClient, body: bytes, headers: dict[str, str], status: int
) -> None:
    assert (await open_client.post("/v1/traces", content=body, headers=headers)).status_code == status


async def test_a_body_without_end_is_refused_while_it_comes() -> None:
    received = 0

    async def receive() -> Message:
        nonlocal received
        received += 1
        return {"type": "http.request", "body": b"\0" * 1_000_000, "more_body": True}

    assert (
        await _status(console(is_open=True), "POST", "/v1/traces", receive, [(b"content-type", b"application/x-protobuf")]) == 413
    )
    assert received <= 6


async def test_only_so_many_messages_with_traces_are_read_at_a_time() -> None:
    app = console(is_open=True)
    held = asyncio.Event()

    async def slowly() -> Message:
        await held.wait()
        return {"type": "http.request", "body": b"", "more_body": False}

    headers = [(b"content-type", b"application/x-protobuf")]
    first = [asyncio.create_task(_status(app, "POST", "/v1/traces", slowly, headers)) for _ in range(4)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert await _status(app, "POST", "/v1/traces", slowly, headers) == 503
    held.set()
    assert await asyncio.gather(*first) == [200] * 4


@pytest.mark.parametrize("query", ["show=everything", "order=best", "show="])
async def test_a_query_that_makes_no_sense_is_refused(open_client: httpx.AsyncClient, query: str) -> None:
    assert (await open_client.get(f"/console/api/traces?{query}")).status_code == 422


@pytest.mark.parametrize(
    ("limit", "given"), [("1", 1), ("0", 1), ("-1", 50), ("99999999999", 50), ("1000", 60), ("x", 50), ("²", 50)]
)
async def test_the_list_is_bounded(open_client: httpx.AsyncClient, limit: str, given: int) -> None:
    spans = [span("x", trace_id=number + 1, span_id=number + 1) for number in range(60)]
    await open_client.post("/v1/traces", content=encoded(spans), headers=PROTOBUF)
    assert len((await open_client.get("/console/api/traces", params={"limit": limit})).json()["traces"]) == given


# --- the stream ----------------------------------------------------------------------------------------------------------


async def test_so_many_may_watch_and_no_more() -> None:
    hub = Hub(most=2)
    app = console(is_open=True, hub=hub)
    gone = asyncio.Event()

    async def until_gone() -> Message:
        await gone.wait()
        return {"type": "http.disconnect"}

    watching = [asyncio.create_task(_status(app, "GET", "/console/api/live", until_gone)) for _ in range(2)]
    while hub.watchers < 2:
        await asyncio.sleep(0)
    assert await _status(app, "GET", "/console/api/live", until_gone) == 503
    gone.set()
    assert await asyncio.gather(*watching) == [200, 200]
    assert hub.watchers == 0


async def test_a_watcher_is_told_the_newest_only() -> None:
    hub = Hub()
    hub.tell("fleet", b"before")
    with hub.watch() as watcher:
        for number in range(1000):
            hub.tell("fleet", str(number).encode())
        hub.tell("traces", b"t")
        hub.close()
        watcher._over = False
        heard = []
        async for pair in watcher.messages():
            heard.append(pair)
            if len(heard) == 2:
                break
    assert dict(heard) == {"fleet": b"999", "traces": b"t"}


async def test_streams_end_when_the_console_stops() -> None:
    hub = Hub()

    async def never() -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    sent: list[Message] = []
    watching = asyncio.create_task(_status(console(is_open=True, hub=hub), "GET", "/console/api/live", never, sent=sent))
    while not sent:
        await asyncio.sleep(0)
    hub.tell("fleet", b"{}")
    while len(sent) < 3:
        await asyncio.sleep(0)
    hub.close()
    assert await asyncio.wait_for(watching, 5) == 200
    assert b"".join(each.get("body", b"") for each in sent).startswith(b"event: history\ndata: {")
    assert not sent[-1].get("more_body")


async def _status(
    app: ASGIApp,
    method: str,
    path: str,
    receive: Any,
    headers: list[tuple[bytes, bytes]] | None = None,
    sent: list[Message] | None = None,
) -> int:
    """The status of one raw ASGI call."""
    messages: list[Message] = sent if sent is not None else []

    async def send(message: Message) -> None:
        messages.append(message)

    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "path": path,
        "raw_path": path.encode(), "query_string": b"", "root_path": "", "scheme": "http",
        "headers": [(b"host", b"localhost"), *(headers or [])], "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2),
    }  # fmt: skip
    await app(scope, receive, send)
    return int(messages[0]["status"])
