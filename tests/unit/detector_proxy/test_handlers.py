from __future__ import annotations

import asyncio
import math

import msgspec
import pytest

from libs.common.clock import ManualClock
from libs.common.contracts import (
    AdmittedDetect,
    BreakerReport,
    BreakersReset,
    DetectPayload,
    Principal,
    RateState,
    Verdict,
    raw,
)
from libs.common.errors import ErrorCode, PortcullisError
from services.detector_proxy import handlers
from services.detector_proxy.core import Judge
from services.detector_proxy.ports import EngineResult
from tests.unit.detector_proxy.fakes import FakeEngine, FakeUsageLog, HeldEngine, broken, context, guarded


def admitted(payload: msgspec.Raw | None = None, *, redis_away: bool = False, cost: int = 1) -> AdmittedDetect:
    return AdmittedDetect(
        principal=Principal(key_id="key1", scopes=("detect",), limit_minute=1, limit_day=1),
        rate=RateState(
            limit_minute=1,
            remaining_minute=0,
            reset_minute=1,
            limit_day=1,
            remaining_day=0,
            reset_day=1,
            degraded=redis_away,
        ),
        payload=payload if payload is not None else raw(DetectPayload(text="text")),
        cost=cost,
    )


class Bench:
    def __init__(self, engine: FakeEngine | None = None) -> None:
        self.clock = ManualClock()
        self.usage = FakeUsageLog()
        self.pool = guarded(engine or FakeEngine(), self.clock, role="fallback", timeout_seconds=math.inf)
        self.judge = Judge(None, self.pool, self.clock, 0.5)
        self.context = context(self.clock)

    async def detect(self, message: AdmittedDetect) -> Verdict:
        answer = await handlers.detect(message, self.context, self.judge, self.usage, self.clock)
        assert isinstance(answer.result, Verdict)
        assert answer.rate == message.rate
        return answer.result

    def counted(self) -> tuple[int, int, int]:
        """(requests, malicious, failed) of the one event there must be."""
        ((event, message_id),) = self.usage.events
        assert message_id == self.context.attempt_of  # a request that is sent again is counted once
        assert (event.key_id, event.at_ms) == ("key1", int(self.clock.now() * 1000))
        return event.requests, event.malicious, event.failed


@pytest.mark.parametrize(("confidence", "malicious"), [(0.9, 1), (0.1, 0)])
async def test_a_verdict_is_counted(confidence: float, malicious: int) -> None:
    bench = Bench(FakeEngine(EngineResult(confidence=confidence, model="m")))
    await bench.detect(admitted(cost=3))
    assert bench.counted() == (3, malicious, 0)


async def test_a_call_without_a_verdict_is_counted_as_failed() -> None:
    bench = Bench(broken("absent"))
    with pytest.raises(PortcullisError):
        await bench.detect(admitted(cost=2))
    assert bench.counted() == (2, 0, 2)


async def test_a_call_cancelled_at_its_deadline_is_counted_as_failed() -> None:
    engine = HeldEngine()
    bench = Bench(engine)
    task = asyncio.create_task(bench.detect(admitted()))
    while not engine.allotted:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert bench.counted() == (1, 0, 1)


async def test_the_limiter_without_redis_shows_as_degraded() -> None:
    bench = Bench()
    assert (await bench.detect(admitted(redis_away=True))).degraded
    assert not (await Bench().detect(admitted())).degraded


@pytest.mark.parametrize(
    ("payload", "code", "field"),
    [
        (b'{"text":""}', ErrorCode.INVALID_FIELD, "text"),
        (b'{"text":"%s"}' % (b"x" * 100_001), ErrorCode.INVALID_FIELD, "text"),
        (b"{}", ErrorCode.INVALID_FIELD, "body"),
        (b'{"text":1}', ErrorCode.INVALID_FIELD, "text"),
        (b'{"text":"t","threshold":1.5}', ErrorCode.INVALID_FIELD, "threshold"),
        (b'{"text":"t","threshold":NaN}', ErrorCode.BAD_REQUEST, None),
        (b'{"text":"t","detailed":"yes"}', ErrorCode.INVALID_FIELD, "detailed"),
        (b"[]", ErrorCode.INVALID_FIELD, "body"),
        (b'{"text":"\xff"}', ErrorCode.BAD_REQUEST, None),
        (b'{"text":"\\ud800"}', ErrorCode.BAD_REQUEST, None),
        (b'{"x":' + b"[" * 100_000, ErrorCode.BAD_REQUEST, None),
        (b"", ErrorCode.BAD_REQUEST, None),
    ],
)
async def test_a_payload_that_cannot_be_read_is_the_callers_error(payload: bytes, code: ErrorCode, field: str | None) -> None:
    bench = Bench()
    with pytest.raises(PortcullisError) as caught:
        await bench.detect(admitted(msgspec.Raw(payload)))
    assert caught.value.code == code
    assert [name for name, _ in caught.value.fields] == ([field] if field else [])
    assert bench.counted() == (1, 0, 1)


async def test_breakers_are_listed_and_reset() -> None:
    bench = Bench(broken("no_answer"))
    breakers = {"fallback": bench.pool.breaker}
    for _ in range(5):
        with pytest.raises(PortcullisError):
            await bench.detect(admitted())
    listed = await handlers.list_breakers(breakers, "replica1")
    assert isinstance(listed.result, BreakerReport)
    (status,) = listed.result.breakers
    assert (status.name, status.state, status.replica, status.failures, status.successes) == (
        "fallback",
        "open",
        "replica1",
        5,
        0,
    )
    assert status.opened_at == "2027-01-15T08:00:00.000+00:00"
    assert status.retry_at is not None
    assert status.opened_at < status.retry_at <= "2027-01-15T08:00:01.000+00:00"
    assert status.reason == "5 consecutive failures, the last: no_answer"

    reset = await handlers.reset_breaker(BreakersReset(name="fallback"), breakers, "replica1")
    assert isinstance(reset.result, BreakerReport)
    (status,) = reset.result.breakers
    assert (status.state, status.failures, status.opened_at, status.retry_at) == ("closed", 0, None, None)


async def test_a_breaker_that_does_not_exist_is_not_found() -> None:
    with pytest.raises(PortcullisError) as caught:
        await handlers.reset_breaker(BreakersReset(name="primary"), {}, "replica1")
    assert caught.value.code == ErrorCode.NOT_FOUND
