"""Auth on real NATS and PostgreSQL: databases of a test's own, and a fleet with an edge and a limiter played by the test."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar

import asyncpg  # type: ignore[import-untyped]  # it ships no types
import msgspec
import psutil
from pydantic import SecretStr

from infra.embedded.servers import Server
from libs.common import contracts, keys, subjects
from libs.common.bus import Bus
from libs.common.context import RequestContext, new_request_id, new_traceparent
from libs.common.contracts import (
    AccountRequest,
    AdminCredential,
    AnsweredAccount,
    AuthenticatedAdmission,
    AuthenticatedDetect,
    Credential,
    DetectPayload,
    DetectRequest,
    IssuedKey,
    KeyRecord,
    Message,
    RegisterRequest,
)
from libs.common.neighbours import Response
from libs.common.settings import CommonSettings
from libs.common.stages import Answer
from services.auth.app import parts
from services.auth.settings import AuthSettings
from tests.conftest import OPERATOR, running

PEPPER = "a-pepper-for-the-tests"
ADMIN_TOKEN = "an-admin-token-for-tests"
ADMIN = AdminCredential(admin_digest=keys.digest(ADMIN_TOKEN))

T = TypeVar("T", bound=msgspec.Struct)


async def connect(url: str) -> asyncpg.Connection:
    """A connection, as soon as the server has started up."""
    async with asyncio.timeout(20):
        while True:
            try:
                return await asyncpg.connect(url, timeout=5)
            except (OSError, asyncpg.CannotConnectNowError):
                await asyncio.sleep(0.05)


@asynccontextmanager
async def new_database(server: Server) -> AsyncIterator[str]:
    """The URL of a database of the test's own, empty."""
    name = f"auth_{secrets.token_hex(6)}"
    connection = await connect(server.url)
    await connection.execute(f"CREATE DATABASE {name}")
    yield server.url.rpartition("/")[0] + "/" + name
    await connection.execute(f"DROP DATABASE {name} WITH (FORCE)")
    await connection.close()


async def until(condition: Callable[[], Awaitable[bool]], what: str, timeout_seconds: float = 20.0) -> None:
    """Poll a condition; fail loudly when it does not come."""
    try:
        async with asyncio.timeout(timeout_seconds):
            while not await condition():
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(f"waited {timeout_seconds} s in vain for {what}") from None


def credential(api_key: str) -> Credential:
    parsed = keys.parse(api_key)
    assert parsed is not None
    return Credential(key_id=parsed.key_id, digest=parsed.digest)


def result(response: Response, kind: type[T]) -> T:
    assert response.reply.error is None, response.reply.error
    return msgspec.json.decode(response.reply.result, type=kind)


def code(response: Response) -> str:
    return response.reply.error.code if response.reply.error is not None else "ok"


@dataclass(frozen=True, slots=True)
class Fleet:
    """Auth replicas, an edge, and a limiter that answers with what reached it."""

    edge: Bus
    replicas: list[Bus]

    async def ask(self, subject: str, message: Message, seconds: float = 10.0) -> Response:
        deadline_ms = int((time.time() + seconds) * 1000)
        context = RequestContext(deadline_ms, new_request_id(), new_traceparent())
        return await self.edge.request(subject, message, context)

    async def register(self, name: str = "app") -> IssuedKey:
        message = RegisterRequest(name=name, address="127.0.0.1")
        return result(await self.ask(subjects.REGISTER_ADMITTED, message), IssuedKey)

    async def account(self, subject: str, api_key: str) -> Response:
        return await self.ask(subject, AccountRequest(credential=credential(api_key)))

    async def profile(self, api_key: str) -> KeyRecord:
        return result(await self.account(subjects.ACCOUNT_PROFILE, api_key), KeyRecord)

    async def detect(self, api_key: str, cost: int = 1) -> Response:
        payload = contracts.raw(DetectPayload(text="a text"))
        return await self.ask(subjects.DETECT_REQUEST, DetectRequest(credential=credential(api_key), payload=payload, cost=cost))


@dataclass(frozen=True, slots=True)
class Kit:
    """The servers of one test."""

    nats: Server
    passwords: dict[str, str]
    database_url: str

    def settings(self, **changes: object) -> AuthSettings:
        return AuthSettings.model_validate(
            {
                "nats_url": self.nats.url,
                "nats_user": "auth",
                "nats_password": self.passwords["auth"],
                "database_url": self.database_url,
                "key_pepper": PEPPER,
                "admin_token": ADMIN_TOKEN,
                "registration": "open",
                **changes,
            }
        )

    def bus(self, service: str, user: str | None = None) -> Bus:
        user = user or service
        password = SecretStr(self.passwords[user])
        return Bus(service, CommonSettings(nats_url=self.nats.url, nats_user=user, nats_password=password))

    @asynccontextmanager
    async def players(self) -> AsyncIterator[Bus]:
        """The edge, and behind it a limiter that answers with what reached it."""

        async def echo(message: AuthenticatedDetect, _: RequestContext) -> Answer:
            return Answer(message)

        async def echo_many(message: AuthenticatedAdmission, _: RequestContext) -> Answer:
            return Answer(message)

        async def answer(message: AnsweredAccount, _: RequestContext) -> Answer:
            return Answer(message.result)

        # The edge plays the limiter's part of a registration, too, and the proxy's of counting.
        edge, limiter = self.bus("edge", OPERATOR), self.bus("limiter")
        limiter.stage(subjects.DETECT_AUTHENTICATED, AuthenticatedDetect, echo)
        limiter.stage(subjects.BATCH_AUTHENTICATED, AuthenticatedAdmission, echo_many)
        limiter.stage(subjects.ACCOUNT_ANSWERED, AnsweredAccount, answer)
        async with AsyncExitStack() as stack:
            for bus in (edge, limiter):
                await bus.connect()
                await bus.start()
                stack.push_async_callback(bus.drain)
            yield edge

    @asynccontextmanager
    async def fleet(self, replicas: int = 1, **changes: object) -> AsyncIterator[Fleet]:
        async with AsyncExitStack() as stack:
            edge = await stack.enter_async_context(self.players())
            auths = []
            for _ in range(replicas):
                auth = self.bus("auth")
                await auth.connect()
                await stack.enter_async_context(parts(auth, self.settings(**changes)))
                await auth.start()
                stack.push_async_callback(auth.drain)
                auths.append(auth)
            yield Fleet(edge, auths)


class Breakable:
    """A server of the test's own, to be stopped, hung and started again on the same port with the same data."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self._stack = ExitStack()

    def __enter__(self) -> Breakable:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.resume()
        self._stack.close()

    def start(self) -> None:
        before = {process.pid for process in psutil.Process().children()}
        self._stack.enter_context(running(self.server))
        (self._process,) = (process for process in psutil.Process().children() if process.pid not in before)

    def stop(self, signal_number: int) -> None:
        """End it, and wait until it has ended."""
        self._process.send_signal(signal_number)
        self._stack.close()

    def hang(self) -> None:
        for process in self._family():
            process.suspend()

    def resume(self) -> None:
        for process in self._family():
            process.resume()

    def _family(self) -> list[psutil.Process]:
        if not self._process.is_running():
            return []
        return [self._process, *self._process.children(recursive=True)]
