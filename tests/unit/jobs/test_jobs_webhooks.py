from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime

import aiohttp
import pytest
from aiohttp import web
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.test_utils import TestServer
from standardwebhooks.webhooks import Webhook, WebhookVerificationError

from libs.common.clock import ManualClock, SystemClock
from libs.common.errors import ErrorCode, PortcullisError
from services.jobs import core, webhooks
from services.jobs.core import JobRecord
from services.jobs.settings import Settings
from services.jobs.webhooks import Deliverer, PublicResolver, Sender
from tests.unit.jobs.fakes import JOB, KEY, FakeRecords, record

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
NOW = datetime(2027, 1, 15, 8, tzinfo=UTC)


@dataclass
class Receiver:
    """Somebody's server. `status`: of its answers."""

    status: int = 200
    silent: bool = False
    requests: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)

    async def receive(self, request: web.Request) -> web.Response:
        headers = {name.lower(): value for name, value in request.headers.items()}
        self.requests.append((request.path, headers, await request.read()))
        if self.silent:
            await asyncio.Event().wait()
        return web.Response(status=self.status, headers={"Location": "/elsewhere", "Set-Cookie": "a=b"}, text="x" * 100)


@asynccontextmanager
async def listening(receiver: Receiver) -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", receiver.receive)
    async with TestServer(app, host="127.0.0.1") as server:
        yield str(server.make_url("/hook?a=b"))


@asynccontextmanager
async def sender(**values: object) -> AsyncIterator[Sender]:
    settings = Settings.model_validate({"webhook_allow_private": True, "webhook_timeout_seconds": 0.3, **values})
    async with webhooks.sending(settings) as each:
        yield each


async def send(each: Sender, url: str, body: str = '{"a":1}') -> str | None:
    return await each.send(url, SECRET, "msg_1", datetime.now(UTC), body)


# --- which addresses -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "http://localhost/",
        "http://a.localhost/",
        "http://LOCALHOST/",
        "http://127.0.0.1/",
        "http://127.1/",
        "http://0x7f000001/",
        "http://2130706433/",
        "http://017700000001/",
        "http://0/",
        "http://10.1.2.3/",
        "http://172.16.0.1/",
        "http://192.168.1.1:8080/x",
        "http://169.254.169.254/latest/meta-data/",
        "http://100.64.0.1/",
        "http://224.0.0.1/",
        "http://255.255.255.255/",
        "http://[::1]/",
        "http://[::]/",
        "http://[fc00::1]/",
        "http://[fe80::1]/",
        "http://[fe80::1%25eth0]/",
        "http://[ff02::1]/",
        "http://[::ffff:127.0.0.1]/",
        "http://[::ffff:a01:203]/",
        "http://[::127.0.0.1]/",
        "http://[64:ff9b::7f00:1]/",
        "http://[2002:7f00:1::]/",
        "http://[2001:0:7f00:1::]/",
    ],
)
def test_private_addresses_are_refused_however_they_are_written(url: str) -> None:
    assert webhooks.refusal(url, allow_private=False) == "Expected a public address"
    assert webhooks.refusal(url, allow_private=True) is None


@pytest.mark.parametrize(
    "url",
    [
        "https://example.com/hook?a=b#c",
        "http://example.com:8080",
        "https://8.8.8.8/",
        "https://[2606:4700::1111]/",
        "https://xn--bcher-kva.example/",
    ],
)
def test_public_addresses_are_welcome(url: str) -> None:
    assert webhooks.refusal(url, allow_private=False) is None


@pytest.mark.parametrize(
    "url",
    [
        "",
        "example.com",
        "ftp://example.com/",
        "file:///etc/passwd",
        "http:///x",
        "http://",
        "https://example.com:99999/",
        "https://example.com:x/",
        "https://[::1/",
        "https://exa mple.com/",
        "https://example.com/\r\nX: y",
        "https://bücher.example/",
        "https://user:password@example.com/",
        "https://user@example.com/",
        "http://example.com\\@127.0.0.1/",
        "https://example.com/" + "x" * 2000,
    ],
)
def test_what_is_no_url_of_a_webhook_is_refused_wherever_it_may_go(url: str) -> None:
    assert webhooks.refusal(url, allow_private=True) is not None
    assert webhooks.refusal(url, allow_private=False) is not None


class Names(AbstractResolver):
    """A name server that changes its mind: each question has the next answer."""

    def __init__(self, *answers: list[str]) -> None:
        self.answers = list(answers)

    async def resolve(self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET) -> list[ResolveResult]:
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                proto=0,
                flags=socket.AI_NUMERICHOST,
            )
            for address in self.answers.pop(0)
        ]

    async def close(self) -> None:
        pass


async def test_of_the_addresses_of_a_name_only_public_ones_are_used() -> None:
    resolver = PublicResolver(Names(["127.0.0.1", "8.8.8.8", "::1", "fe80::1%eth0", "10.0.0.1"]))
    assert [result["host"] for result in await resolver.resolve("example.com")] == ["8.8.8.8"]


async def test_a_name_that_points_inside_is_not_connected_to_also_when_it_was_public_a_moment_before() -> None:
    receiver = Receiver()
    async with listening(receiver) as url:
        port = url.split(":")[2].split("/")[0]
        names = Names(["8.8.8.8"], ["127.0.0.1"], ["::ffff:127.0.0.1", "169.254.169.254"])
        resolver = PublicResolver(names)
        assert await resolver.resolve("rebinding.example")  # as somebody who checks the name beforehand sees it
        connector = aiohttp.TCPConnector(resolver=resolver, use_dns_cache=False)
        async with aiohttp.ClientSession(connector=connector) as session:
            each = Sender(session, allow_private=False)
            for _ in range(2):
                failure = await send(each, f"http://rebinding.example:{port}/hook")
                assert failure is not None
                assert "Connector" in failure
    assert names.answers == []
    assert receiver.requests == []


async def test_an_address_that_was_accepted_under_other_settings_is_not_connected_to() -> None:
    receiver = Receiver()
    async with listening(receiver) as url, sender(webhook_allow_private=False) as each:
        assert await send(each, url) == "refused"
        assert await send(each, url.replace("127.0.0.1", "localhost")) == "refused"
    assert receiver.requests == []


# --- what is sent --------------------------------------------------------------------------------------------------------


async def test_what_arrives_is_verified_as_the_standard_has_it() -> None:
    receiver = Receiver()
    body = webhooks.document(
        core.status_of(record(state="done", done=4, finished_ms=1_800_000_000_000, webhook_secret=SECRET), 0)
    )
    async with listening(receiver) as url, sender() as each:
        assert await send(each, url, body) is None
    ((path, headers, received),) = receiver.requests
    assert path == "/hook"
    assert headers["content-type"] == "application/json"
    assert headers["webhook-id"] == "msg_1"
    assert headers["user-agent"].startswith("Portcullis/")
    assert Webhook(SECRET).verify(received, headers) == json.loads(body)
    with pytest.raises(WebhookVerificationError):
        Webhook(SECRET).verify(received + b" ", headers)
    with pytest.raises(WebhookVerificationError):
        Webhook("whsec_" + "A" * 32).verify(received, headers)
    with pytest.raises(WebhookVerificationError):
        Webhook(SECRET).verify(received, {**headers, "webhook-id": "msg_2"})


def test_a_document_holds_counts_and_times_and_no_secret() -> None:
    job = record(
        state="failed", reason="why", done=3, webhook_url="https://example.com/", webhook_secret=SECRET, finished_ms=1000
    )
    document = webhooks.document(core.status_of(job, 0))
    event = json.loads(document)
    assert (event["type"], event["timestamp"]) == ("job.failed", "1970-01-01T00:00:01.000Z")
    assert (event["data"]["job_id"], event["data"]["done"], event["data"]["reason"]) == (JOB, 3, "why")
    assert SECRET not in document


@pytest.mark.parametrize("status", [301, 302, 307, 308, 400, 404, 410, 429, 500, 503])
async def test_anything_but_success_is_a_failure_and_a_redirect_is_not_followed(status: int) -> None:
    receiver = Receiver(status)
    async with listening(receiver) as url, sender() as each:
        assert await send(each, url) == str(status)
    assert [path for path, _, _ in receiver.requests] == ["/hook"]


async def test_no_cookie_is_kept() -> None:
    receiver = Receiver()
    async with listening(receiver) as url, sender() as each:
        for _ in range(2):
            assert await send(each, url) is None
    assert all("cookie" not in headers for _, headers, _ in receiver.requests)


async def test_a_receiver_that_does_not_answer_or_is_not_there_is_a_failure() -> None:
    async with listening(Receiver(silent=True)) as url, sender() as each:
        assert await send(each, url) == "timeout"
    async with sender() as each:
        failure = await send(each, url)
        assert failure is not None
        assert "Connector" in failure


# --- attempts ------------------------------------------------------------------------------------------------------------


@dataclass
class FakeDue:
    attempt: int = 1
    key_id: str = KEY
    job_id: str = JOB
    over: bool = False
    pauses: list[float] = field(default_factory=list)

    async def done(self) -> None:
        self.over = True

    async def again(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.attempt += 1


class FakeSender(Sender):
    def __init__(self, *outcomes: str | None) -> None:
        self.outcomes = list(outcomes)
        self.sent: list[tuple[str, str, str, datetime, str]] = []

    async def send(self, url: str, secret: str, message_id: str, at: datetime, body: str) -> str | None:
        self.sent.append((url, secret, message_id, at, body))
        return self.outcomes.pop(0)


def hooked() -> JobRecord:
    return record(state="done", webhook_url="https://example.com/", webhook_secret=SECRET)


async def deliver(each: FakeSender, due: FakeDue, kept: JobRecord | None, attempts: int = 8) -> None:
    records = FakeRecords()
    if kept is not None:
        records.put(kept)
    deliverer = Deliverer(NoHooks(), records, each, ManualClock(NOW.timestamp()), attempts)
    while not due.over:
        await deliverer.deliver(due)


class NoHooks:
    async def take(self, most: int) -> list[FakeDue]:
        raise AssertionError


async def test_a_webhook_is_tried_again_with_growing_pauses_under_the_same_name() -> None:
    each, due = FakeSender("500", "timeout", None), FakeDue()
    await deliver(each, due, hooked())
    assert due.pauses == [1, 5]
    assert {message_id for _, _, message_id, _, _ in each.sent} == {f"msg_{JOB}"}
    assert {(url, secret, at) for url, secret, _, at, _ in each.sent} == {("https://example.com/", SECRET, NOW)}


async def test_a_webhook_is_given_up_in_the_end() -> None:
    each, due = FakeSender(*["500"] * 3), FakeDue()
    await deliver(each, due, hooked(), attempts=3)
    assert (len(each.sent), due.pauses) == (3, [1, 5])


@pytest.mark.parametrize("kept", [None, record(state="done")])
async def test_a_job_that_is_gone_or_wants_none_has_none(kept: JobRecord | None) -> None:
    each, due = FakeSender(), FakeDue()
    await deliver(each, due, kept)
    assert each.sent == []


async def test_one_webhook_that_cannot_be_handled_does_not_end_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhooks, "RETRY_SECONDS", 0.0)
    due = FakeDue()
    delivered = asyncio.Event()

    class Hooks:
        def __init__(self) -> None:
            self.failures: list[Exception] = [PortcullisError(ErrorCode.STAGE_UNAVAILABLE), RuntimeError("a bug")]

        async def take(self, most: int) -> list[FakeDue]:
            if self.failures:
                raise self.failures.pop()
            if due.over:
                delivered.set()
                await asyncio.Event().wait()
            return [due]

    records = FakeRecords()
    records.put(hooked())
    each = FakeSender(None)
    task = asyncio.create_task(Deliverer(Hooks(), records, each, SystemClock(), 8).run())
    async with asyncio.timeout(10):
        await delivered.wait()
    task.cancel()
    assert len(each.sent) == 1
