"""Who is let in: what is told of it, what counts as latency, and that a refusal costs nothing."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field

import httpx
import pytest
from prometheus_client import REGISTRY

from libs.common.clock import ManualClock
from libs.common.context import RequestContext
from libs.common.contracts import Message, Reply, raw
from libs.common.errors import ErrorCode, PortcullisError
from services.edge.admission import RETRY_AFTER_SECONDS, Admission
from services.edge.limit import PATIENCE_SECONDS, WINDOW_ANSWERS, AdaptiveLimit
from services.edge.replies import Refused
from tests.unit.edge.fakes import KEY, RATE, VERDICT, Answered, FakeStages, client_of, gate_of

SECONDS = 10.0
TEXTS = 20


@dataclass
class Held:
    """An answer that comes when the test says so."""

    timings: Mapping[str, float] = field(default_factory=dict)
    failure: Exception | None = None
    now: asyncio.Event = field(default_factory=asyncio.Event)
    reply: Reply = field(default_factory=lambda: Reply(result=raw(VERDICT), rate=RATE))

    async def __call__(self) -> Held:
        await self.now.wait()
        if self.failure is not None:
            raise self.failure
        return self


def shed(reason: str) -> float:
    return REGISTRY.get_sample_value("portcullis_shed_total", {"reason": reason}) or 0.0


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def limit() -> AdaptiveLimit:
    """As after a while of little traffic."""
    limit = AdaptiveLimit(least=4, most=64, tolerated_seconds=0.25)
    limit.base_seconds = 0.01
    return limit


async def asked_together(limit: AdaptiveLimit, clock: ManualClock, seconds: float, held: Held) -> None:
    """`TEXTS` texts are let in, and answered so much later; again and again, for longer than the limit has patience."""
    admission = Admission(limit, clock)
    for _ in range(2 + int(PATIENCE_SECONDS / seconds)):
        held.now.clear()
        tasks = [asyncio.create_task(admission.through(held, SECONDS)) for _ in range(TEXTS)]
        await asyncio.sleep(0)
        assert limit.in_flight == TEXTS
        clock.advance(seconds)
        held.now.set()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert limit.in_flight == 0
        if limit.value < TEXTS:
            return


async def test_answers_that_are_late_lower_the_limit(limit: AdaptiveLimit, clock: ManualClock) -> None:
    await asked_together(limit, clock, 1.0, Held())
    assert limit.value < TEXTS


async def test_what_the_primary_engine_takes_does_not(limit: AdaptiveLimit, clock: ManualClock) -> None:
    await asked_together(limit, clock, 1.0, Held(timings={"auth": 1.0, "engine": 990.0}))
    assert limit.value == 64


@pytest.mark.parametrize("wrapped", [False, True])
async def test_a_deadline_that_passed_counts_as_the_time_that_it_took(
    limit: AdaptiveLimit, clock: ManualClock, wrapped: bool
) -> None:
    error = PortcullisError(ErrorCode.DEADLINE_EXCEEDED)
    await asked_together(limit, clock, 1.0, Held(failure=Refused(error, None) if wrapped else error))
    assert limit.value < TEXTS


async def test_a_stage_that_is_full_lowers_the_limit_however_quickly_it_says_so(limit: AdaptiveLimit, clock: ManualClock) -> None:
    await asked_together(limit, clock, 0.3, Held(failure=Refused(PortcullisError(ErrorCode.OVERLOADED), None)))
    assert limit.value < TEXTS


async def test_other_refusals_say_nothing(limit: AdaptiveLimit, clock: ManualClock) -> None:
    await asked_together(limit, clock, 1.0, Held(failure=PortcullisError(ErrorCode.STAGE_UNAVAILABLE)))
    assert limit.value == 64


async def test_the_one_too_many_is_refused_before_anything_is_asked_and_counted(clock: ManualClock) -> None:
    limit = AdaptiveLimit(least=1, most=1, tolerated_seconds=0.25)
    admission, held = Admission(limit, clock), Held()
    first = asyncio.create_task(admission.through(held, SECONDS))
    await asyncio.sleep(0)
    before = shed("limit")
    with pytest.raises(PortcullisError) as caught:
        await admission.through(held, SECONDS)
    assert caught.value.code is ErrorCode.OVERLOADED
    assert caught.value.retry_after in range(RETRY_AFTER_SECONDS[0], RETRY_AFTER_SECONDS[1] + 1)
    assert shed("limit") == before + 1
    held.now.set()
    await first
    await admission.through(held, SECONDS)


async def test_who_would_wait_past_the_deadline_is_refused_and_who_is_late_already_is_not_called_that(
    limit: AdaptiveLimit, clock: ManualClock
) -> None:
    admission = Admission(limit, clock)
    # Some that wait now, after others that waited for a quarter of a second.
    limit.begin(clock.monotonic())
    for _ in range(TEXTS):
        limit.begin(clock.monotonic())
    for _ in range(TEXTS):
        clock.advance(0.02)
        limit.measure(clock.monotonic(), 0.26, clock.monotonic())
    before = shed("deadline")
    with pytest.raises(PortcullisError) as caught:
        admission.check(0.2)
    assert caught.value.code is ErrorCode.OVERLOADED
    assert shed("deadline") == before + 1
    admission.check(0.5)
    for _ in range(TEXTS):
        limit.end()
    admission.check(0.2)  # hardly anybody is ahead


class Unread(httpx.AsyncByteStream):
    """A body that nobody may ask for."""

    async def __aiter__(self) -> AsyncIterator[bytes]:
        raise AssertionError("the body was read")
        yield b""


class SlowStages(FakeStages):
    """Answers wait until they are released."""

    def __init__(self) -> None:
        super().__init__()
        self.released = asyncio.Event()

    async def request(
        self, subject: str, message: Message, context: RequestContext, *, idempotent: bool = False, token: str | None = None
    ) -> Answered:
        answered = await super().request(subject, message, context, idempotent=idempotent, token=token)
        await self.released.wait()
        return answered


async def test_a_gateway_that_has_become_slow_answers_429_without_reading_the_body_and_lets_other_calls_through() -> None:
    stages = SlowStages()
    headers = {"X-API-Key": KEY}
    async with client_of(gate_of(stages, edge_min_in_flight=1)) as client:

        async def together(texts: int, seconds: float) -> None:
            stages.released.clear()
            asked = len(stages.asked)
            tasks = [
                asyncio.create_task(client.post("/v1/detect", json={"text": "hello"}, headers=headers)) for _ in range(texts)
            ]
            while len(stages.asked) < asked + texts:
                await asyncio.sleep(0)
            stages.clock.advance(seconds)
            stages.released.set()
            assert [response.status_code for response in await asyncio.gather(*tasks)] == [200] * texts

        for _ in range(2 * WINDOW_ANSWERS):
            await together(1, 0.05)
        await together(TEXTS, 1.0)
        await together(TEXTS, 1.0)
        stages.released.clear()
        tasks = [asyncio.create_task(client.post("/v1/detect", json={"text": "hello"}, headers=headers)) for _ in range(TEXTS)]
        refused = [await done for done in itertools.islice(asyncio.as_completed(tasks), 3)]
        for response in (*refused, await client.post("/v1/detect", content=Unread(), headers=headers)):
            assert (response.status_code, response.json()["type"]) == (429, "urn:portcullis:problem:overloaded")
            assert 1 <= int(response.headers["retry-after"]) <= 3
        stages.released.set()
        assert (await client.get("/auth/profile", headers=headers)).status_code == 200
        await asyncio.gather(*tasks)
        assert (await client.post("/v1/detect", json={"text": "hello"}, headers=headers)).status_code == 200
