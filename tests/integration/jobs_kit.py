"""Jobs on a real NATS: replicas of the service, a real edge in front, and auth, limiter and proxy played by the test."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import msgspec
from nats.js import JetStreamContext

from infra.embedded.servers import Server
from libs.common import contracts, subjects
from libs.common.bus import Bus
from libs.common.context import RequestContext
from libs.common.contracts import (
    AnsweredAccount,
    AuthenticatedJobRequest,
    DetectItems,
    ItemResult,
    ItemResults,
    JobRequest,
    Principal,
    TakeRequest,
    Verdict,
)
from libs.common.errors import ErrorCode, PortcullisError
from libs.common.stages import Answer, Forward
from services.jobs.adapters import JetStream
from services.jobs.app import parts
from services.jobs.settings import Settings
from tests.conftest import OPERATOR
from tests.integration.buses import started
from tests.integration.test_edge import KEYED, RATE, Fleet

KEY_ID = "aaaabbbbcccc"
LINES = {**KEYED, "Content-Type": "application/x-ndjson", "Prefer": "respond-async"}
QUICK = {"jobs_ack_wait_seconds": 1.0}
"""What a dead replica had in hand comes back soon."""
VERDICT = Verdict(is_malicious=False, confidence=0.1, threat_types=(), endpoint="test", degraded=False)


def lines(*texts: str) -> bytes:
    return b"".join(json.dumps({"id": f"id-{place}", "text": text}).encode() + b"\n" for place, text in enumerate(texts))


@dataclass
class Around:
    """The stages around jobs. `judged`: how often each text arrived; `poison`: texts that their message dies of."""

    room: float = float("inf")
    key_known: bool = True
    away: bool = False
    poison: frozenset[str] = frozenset()
    broken: frozenset[str] = frozenset()
    judged: Counter[str] = field(default_factory=Counter)
    messages: list[DetectItems] = field(default_factory=list)
    taken: list[tuple[int, int]] = field(default_factory=list)
    """What was asked for, and what was granted."""
    gate: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.gate.set()

    async def forward(self, message: JobRequest, _: RequestContext) -> Forward:
        principal = Principal(key_id=KEY_ID, scopes=("batch",), limit_minute=70, limit_day=10)
        subject = subjects.JOBS_OPERATIONS[message.operation]
        return Forward(subject, AuthenticatedJobRequest(principal=principal, payload=message.payload))

    async def take(self, message: TakeRequest, _: RequestContext) -> Answer:
        if not self.key_known:
            raise PortcullisError(ErrorCode.INVALID_CREDENTIALS)
        granted = int(min(message.cost, self.room))
        self.room -= granted
        self.taken.append((message.cost, granted))
        principal = Principal(key_id=message.key_id, scopes=("batch",), limit_minute=70, limit_day=10)
        rate = msgspec.structs.replace(RATE, reset_minute=0.2)
        return Answer(contracts.Admission(principal=principal, granted=granted, rate=rate))

    async def answered(self, message: AnsweredAccount, _: RequestContext) -> Answer:
        return Answer(message.result, RATE)

    async def judge(self, message: DetectItems, _: RequestContext) -> Answer:
        self.messages.append(message)
        self.judged.update(message.texts)
        await self.gate.wait()
        if self.away or self.poison & set(message.texts):
            raise PortcullisError(ErrorCode.STAGE_UNAVAILABLE)
        return Answer(ItemResults(results=tuple(map(self._result, message.texts))))

    def _result(self, text: str) -> ItemResult:
        if text in self.broken:
            return ItemResult(error=contracts.ErrorBody(code=ErrorCode.INTERNAL, detail="It broke."))
        malicious = text.startswith("ignore")
        return ItemResult(verdict=msgspec.structs.replace(VERDICT, is_malicious=malicious))

    def buses(self, fleet: Fleet) -> list[Bus]:
        auth, limiter, proxy = fleet.bus("auth"), fleet.bus("limiter"), fleet.bus("detector_proxy")
        auth.stage(subjects.JOBS_REQUEST, JobRequest, self.forward)
        auth.stage(subjects.BATCH_TAKE, TakeRequest, self.take)
        limiter.stage(subjects.ACCOUNT_ANSWERED, AnsweredAccount, self.answered)
        proxy.stage(subjects.BATCH_ITEMS, DetectItems, self.judge)
        return [auth, limiter, proxy]


def settings(fleet: Fleet, **values: Any) -> Settings:
    return Settings.model_validate({**fleet.access("jobs"), **QUICK, **values})


@asynccontextmanager
async def replica(fleet: Fleet, **values: Any) -> AsyncIterator[Bus]:
    bus = Bus("jobs", settings(fleet, **values))
    await bus.connect()
    async with parts(bus, settings(fleet, **values)):
        await bus.start()
        try:
            yield bus
        finally:
            await bus.drain()


@dataclass
class System:
    fleet: Fleet
    around: Around
    client: httpx.AsyncClient
    stream: JetStream

    @property
    def js(self) -> JetStreamContext:
        return self.stream.api

    async def submit(self, body: bytes, **headers: str) -> str:
        response = await self.client.post("/v1/detect/batch", content=body, headers={**LINES, **headers})
        assert response.status_code == 202, response.text
        return str(response.json()["id"])

    async def job(self, job_id: str) -> dict[str, Any]:
        response = await self.client.get(f"/v1/jobs/{job_id}", headers=KEYED)
        assert response.status_code == 200, response.text
        found: dict[str, Any] = response.json()
        return found

    async def results(self, job_id: str, **query: str) -> list[dict[str, Any]]:
        response = await self.client.get(f"/v1/jobs/{job_id}/results", params=query, headers=KEYED)
        assert response.status_code == 200, response.text
        return [json.loads(line) for line in response.text.splitlines()]

    async def wait(self, job_id: str, *states: str, seconds: float = 60) -> dict[str, Any]:
        async with asyncio.timeout(seconds):
            while (job := await self.job(job_id))["state"] not in (states or ("done", "failed", "cancelled")):
                await asyncio.sleep(0.05)
        return job


@asynccontextmanager
async def system(server: Server, passwords: dict[str, str], around: Around | None = None) -> AsyncIterator[System]:
    """Everything but jobs itself; the streams are there."""
    fleet = Fleet(server, passwords)
    around = around or Around()
    operator = Bus(OPERATOR, settings(fleet, nats_user=OPERATOR, nats_password=passwords[OPERATOR]))
    async with started(*around.buses(fleet)), fleet.edge() as edge, started(operator):
        stream = JetStream(operator, settings(fleet))
        yield System(fleet, around, edge.client, stream)


async def until(condition: Callable[[], Awaitable[bool]], seconds: float = 30.0) -> None:
    async with asyncio.timeout(seconds):
        while not await condition():
            await asyncio.sleep(0.02)
