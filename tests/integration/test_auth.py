"""Auth on real NATS and PostgreSQL: two replicas, an edge and a limiter played by the test."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import TypeVar

import asyncpg  # type: ignore[import-untyped]  # it ships no types
import msgspec
import pytest
from pydantic import SecretStr

from infra.embedded.servers import Server
from libs.common import contracts, keys, subjects
from libs.common.bus import Answer, Bus, Response
from libs.common.context import RequestContext, new_request_id, new_traceparent
from libs.common.contracts import (
    AccountRequest,
    AnsweredAccount,
    AuthenticatedDetect,
    Credential,
    DetectPayload,
    DetectRequest,
    IssuedKey,
    KeyRecord,
    Message,
    RegisterRequest,
)
from libs.common.errors import ErrorCode
from libs.common.settings import CommonSettings
from services.auth.app import parts
from services.auth.settings import AuthSettings
from tests.conftest import OPERATOR

ADMIN_TOKEN = "an-admin-token-for-tests"


async def connect(url: str) -> asyncpg.Connection:
    """A connection, as soon as the server has started up."""
    async with asyncio.timeout(20):
        while True:
            try:
                return await asyncpg.connect(url, timeout=5)
            except (OSError, asyncpg.CannotConnectNowError):
                await asyncio.sleep(0.05)


@pytest.fixture
async def database_url(postgres_server: Server) -> AsyncIterator[str]:
    """A database of the test's own, empty."""
    name = f"auth_{secrets.token_hex(6)}"
    connection = await connect(postgres_server.url)
    await connection.execute(f"CREATE DATABASE {name}")
    yield postgres_server.url.rpartition("/")[0] + "/" + name
    await connection.execute(f"DROP DATABASE {name} WITH (FORCE)")
    await connection.close()


class Fleet:
    """Auth replicas and, in the test's hands, an edge and a limiter that answers with what reached it."""

    def __init__(self, edge: Bus, replicas: list[Bus]) -> None:
        self.edge = edge
        self.replicas = replicas

    async def ask(self, subject: str, message: Message, seconds: float = 10.0) -> Response:
        deadline_ms = int((time.time() + seconds) * 1000)
        return await self.edge.request(subject, message, RequestContext(deadline_ms, new_request_id(), new_traceparent()))

    async def register(self, name: str = "app") -> IssuedKey:
        return result(await self.ask(subjects.REGISTER_ADMITTED, RegisterRequest(name=name, address="127.0.0.1")), IssuedKey)

    async def profile(self, api_key: str) -> KeyRecord:
        return result(await self.ask(subjects.ACCOUNT_PROFILE, AccountRequest(credential=credential(api_key))), KeyRecord)

    async def detect(self, api_key: str, cost: int = 1) -> Response:
        payload = contracts.raw(DetectPayload(text="a text"))
        return await self.ask(subjects.DETECT_REQUEST, DetectRequest(credential=credential(api_key), payload=payload, cost=cost))


T = TypeVar("T", bound=msgspec.Struct)


def credential(api_key: str) -> Credential:
    parsed = keys.parse(api_key)
    assert parsed is not None
    return Credential(key_id=parsed.key_id, digest=parsed.digest)


def result(response: Response, kind: type[T]) -> T:
    assert response.reply.error is None, response.reply.error
    return msgspec.json.decode(response.reply.result, type=kind)


def code(response: Response) -> str | None:
    return response.reply.error.code if response.reply.error is not None else None


StartFleet = Callable[..., AbstractAsyncContextManager[Fleet]]


@pytest.fixture
def settings(nats_server: Server, nats_passwords: dict[str, str], database_url: str) -> AuthSettings:
    return AuthSettings(
        nats_url=nats_server.url,
        nats_user="auth",
        nats_password=SecretStr(nats_passwords["auth"]),
        database_url=SecretStr(database_url),
        key_pepper=SecretStr("a-pepper-for-the-tests"),
        admin_token=SecretStr(ADMIN_TOKEN),
        registration="open",
    )


@pytest.fixture
def start_fleet(nats_server: Server, nats_passwords: dict[str, str], settings: AuthSettings) -> StartFleet:
    def make(service: str, user: str) -> Bus:
        password = SecretStr(nats_passwords[user])
        return Bus(service, CommonSettings(nats_url=nats_server.url, nats_user=user, nats_password=password))

    @asynccontextmanager
    async def start(replicas: int = 1) -> AsyncIterator[Fleet]:
        async with AsyncExitStack() as stack:

            async def run(bus: Bus) -> Bus:
                await bus.start()
                stack.push_async_callback(bus.drain)
                return bus

            # The edge plays the limiter's part of a registration, too, so it may publish what it likes.
            edge, limiter = make("edge", OPERATOR), make("limiter", "limiter")

            async def echo(message: AuthenticatedDetect, _: RequestContext) -> Answer:
                return Answer(message)

            async def answer(message: AnsweredAccount, _: RequestContext) -> Answer:
                return Answer(message.result)

            limiter.stage(subjects.DETECT_AUTHENTICATED, AuthenticatedDetect, echo)
            limiter.stage(subjects.ACCOUNT_ANSWERED, AnsweredAccount, answer)
            for bus in (edge, limiter):
                await bus.connect()
                await run(bus)
            auths = []
            for _ in range(replicas):
                auth = make("auth", "auth")
                await auth.connect()
                await stack.enter_async_context(parts(auth, settings))
                auths.append(await run(auth))
            yield Fleet(edge, auths)

    return start


async def test_a_registered_key_detects(start_fleet: StartFleet) -> None:
    async with start_fleet() as fleet:
        issued = await fleet.register("My App")
        forwarded = result(await fleet.detect(issued.api_key), AuthenticatedDetect)
        assert forwarded.principal.key_id == issued.record.key_id
        assert (forwarded.principal.limit_minute, forwarded.principal.limit_day) == (60, 10_000)
        record = result(
            await fleet.ask(subjects.ACCOUNT_PROFILE, AccountRequest(credential=credential(issued.api_key))), KeyRecord
        )
        assert record == issued.record
        assert code(await fleet.detect(keys.generate())) == ErrorCode.INVALID_CREDENTIALS
        assert code(await fleet.detect(keys.generate(issued.record.key_id))) == ErrorCode.INVALID_CREDENTIALS


async def test_usage_is_counted(start_fleet: StartFleet) -> None:
    async with start_fleet(2) as fleet:
        issued = await fleet.register()
        jetstream = fleet.edge.connection.jetstream()
        now_ms = int(time.time() * 1000)
        for _ in range(5):
            event = contracts.UsageRecorded(key_id=issued.record.key_id, at_ms=now_ms, requests=2, malicious=1)
            await jetstream.publish(subjects.USAGE_RECORDED, contracts.encode(event))
        async with asyncio.timeout(10):
            while True:
                record = await fleet.profile(issued.api_key)
                if record.total_requests >= 10:
                    break
                await asyncio.sleep(0.05)
        assert (record.total_requests, record.malicious_detections) == (10, 5)
