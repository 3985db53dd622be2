"""Many texts: who is asked for which, what becomes of each, and how they are counted. Everything is driven; nothing waits."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence

import pytest

from libs.common.clock import ManualClock
from libs.common.context import RequestContext
from libs.common.contracts import DetectItems, DetectPayload, ItemResults, Verdict
from libs.common.errors import ErrorCode, PortcullisError
from libs.common.tracing import Recorder
from services.detector_proxy import handlers
from services.detector_proxy.breaker import BreakerPolicy
from services.detector_proxy.core import (
    PAUSE_SECONDS,
    PRIMARY_SHARE,
    REPLY_RESERVE_SECONDS,
    AllAtOnce,
    BulkJudge,
    GuardedEngine,
    OneByOne,
)
from services.detector_proxy.ports import EngineError, EngineResult, Outcome
from tests.unit.detector_proxy.fakes import GOOD, FakeEngine, FakeUsageLog, HeldEngine, broken, context, guarded

POOL = EngineResult(confidence=0.8, model="pool-model", threshold=0.5, threat_types=("jailbreak",))
TEXTS = [DetectPayload(text=f"text {number}") for number in range(4)]
BUSY = EngineError("busy", counts=False)


class FakePool(FakeEngine):
    """Takes many texts in a call; `words`: what it says to each call, the last of them for ever."""

    def __init__(self, *words: Outcome | list[Outcome]) -> None:
        super().__init__(POOL)
        self.words = list(words) or [POOL]
        self.asked: list[list[str]] = []

    async def detect_many(
        self, payloads: Sequence[DetectPayload], context: RequestContext, timeout_seconds: float
    ) -> list[Outcome]:
        self.asked.append([payload.text for payload in payloads])
        self.allotted.append(timeout_seconds)
        word = self.words.pop(0) if len(self.words) > 1 else self.words[0]
        if isinstance(word, list):
            return word
        if isinstance(word, EngineError):
            raise word
        return [word] * len(payloads)


class Bench:
    def __init__(self, pool: FakePool, primary: FakeEngine | None = None, places: int = 2) -> None:
        self.clock = ManualClock()
        self.pool = pool
        self.usage = FakeUsageLog()
        self.slept: list[float] = []
        self.fallback = guarded(pool, self.clock, role="fallback", timeout_seconds=math.inf)
        self.primary = guarded(primary, self.clock, max_concurrency=places) if primary is not None else None
        one_by_one = OneByOne(self.primary, self.clock, places) if self.primary is not None else None
        self.judge = BulkJudge(
            one_by_one, AllAtOnce(self.fallback, pool), self.fallback.breaker, self.clock, 0.5, sleep=self.sleep
        )

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.clock.advance(seconds)

    async def ask(self, seconds: float = 10.0) -> list[Verdict | PortcullisError]:
        return await self.judge.judge(TEXTS, context(self.clock, seconds))


def told(outcomes: list[Verdict | PortcullisError]) -> list[str]:
    """What answered each text, or the code of why nothing did; ! where it is degraded."""
    return [
        outcome.code if isinstance(outcome, PortcullisError) else outcome.endpoint + "!" * outcome.degraded
        for outcome in outcomes
    ]


async def test_the_pool_gets_them_all_at_once() -> None:
    bench = Bench(FakePool())
    assert told(await bench.ask()) == ["pool-model"] * 4
    assert bench.pool.asked == [[payload.text for payload in TEXTS]]
    assert bench.fallback.breaker.counts() == (1, 0)


async def test_an_engine_that_takes_one_is_asked_one_by_one_but_no_more_than_its_places_at_a_time() -> None:
    engine = HeldEngine()
    bench = Bench(FakePool(), engine, places=2)
    asked = asyncio.create_task(bench.ask())
    for _ in range(10):
        await asyncio.sleep(0)
    assert len(engine.allotted) == 2
    engine.release.set()
    assert told(await asked) == ["good-engine"] * 4
    assert len(engine.allotted) == 4
    assert bench.pool.asked == []


async def test_what_the_primary_leaves_open_goes_to_the_fallback_and_is_degraded_text_by_text() -> None:
    answers: list[EngineResult | None] = [GOOD, None, GOOD, None]

    async def by_turns() -> EngineResult:
        answer = answers.pop(0)
        if answer is None:
            raise EngineError("malformed")
        return answer

    bench = Bench(FakePool(), FakeEngine(by_turns), places=1)
    assert told(await bench.ask()) == ["good-engine", "pool-model!", "good-engine", "pool-model!"]
    assert bench.pool.asked == [["text 1", "text 3"]]


async def test_a_primary_whose_breaker_is_open_is_not_asked() -> None:
    engine = broken("timeout")
    bench = Bench(FakePool(), engine, places=1)
    assert bench.primary is not None
    bench.primary.breaker.policy = BreakerPolicy()
    assert told(await bench.ask()) == ["pool-model!"] * 4
    assert told(await bench.ask()) == ["pool-model!"] * 4
    assert len(engine.allotted) == BreakerPolicy().failure_threshold


async def test_the_primary_has_its_share_of_the_time_for_all_of_them_together() -> None:
    class Slow(FakeEngine):
        async def detect(self, payload: DetectPayload, context: RequestContext, timeout_seconds: float) -> EngineResult:
            self.allotted.append(timeout_seconds)
            bench.clock.advance(1.5)
            return GOOD

    engine = Slow()
    bench = Bench(FakePool(), engine, places=1)
    assert told(await bench.ask(5)) == ["good-engine", "good-engine", "pool-model!", "pool-model!"]
    assert engine.allotted == pytest.approx([2.0, PRIMARY_SHARE * (5 - REPLY_RESERVE_SECONDS) - 1.5])


async def test_a_pool_without_room_is_asked_again_with_growing_pauses_until_it_has() -> None:
    bench = Bench(FakePool(BUSY, EngineError("absent", counts=False), BUSY, POOL))
    assert told(await bench.ask()) == ["pool-model"] * 4
    first, longest = PAUSE_SECONDS
    assert [first * 0.5 <= pause <= longest * 1.5 for pause in bench.slept] == [True] * 3
    assert sum(bench.slept) < 0.3


async def test_only_the_texts_that_found_no_room_are_put_again() -> None:
    bench = Bench(FakePool([POOL, BUSY, EngineError("failed", counts=False), BUSY], POOL))
    assert told(await bench.ask()) == ["pool-model", "pool-model", ErrorCode.NO_ENGINE, "pool-model"]
    assert bench.pool.asked[1:] == [["text 1", "text 3"]]


async def test_a_pool_that_stays_full_is_given_up_at_the_deadline() -> None:
    bench = Bench(FakePool(BUSY))
    assert told(await bench.ask(3)) == [ErrorCode.OVERLOADED] * 4
    assert 1 < sum(bench.slept) < 3
    assert len(bench.pool.asked) < 30


@pytest.mark.parametrize(
    ("reason", "code"),
    [("malformed", ErrorCode.NO_ENGINE), ("rejected", ErrorCode.NO_ENGINE), ("no_answer", ErrorCode.NO_ENGINE)],
)
async def test_a_failure_is_told_and_never_a_verdict(reason: str, code: ErrorCode) -> None:
    bench = Bench(FakePool(EngineError(reason)))
    assert told(await bench.ask()) == [code] * 4
    assert len(bench.pool.asked) == 1


async def test_bulk_work_leaves_the_bulkhead_of_single_texts_alone() -> None:
    clock = ManualClock()
    engine = HeldEngine()
    single = guarded(engine, clock, max_concurrency=1)
    apart = GuardedEngine("primary", engine, single.breaker, max_concurrency=2, timeout_seconds=2.0)
    bulk = asyncio.create_task(OneByOne(apart, clock, 2).detect_many(TEXTS, context(clock), 5.0))
    for _ in range(10):
        await asyncio.sleep(0)
    alone = asyncio.create_task(single.detect(TEXTS[0], context(clock), 5.0))
    await asyncio.sleep(0)
    assert len(engine.allotted) == 3
    engine.release.set()
    assert await alone == GOOD
    assert await bulk == [GOOD] * 4


# --- counting ------------------------------------------------------------------------------------------------------------


def message(*, redis_away: bool = False) -> DetectItems:
    return DetectItems(key_id="key1", texts=("a", "b", "c", "d"), rate_degraded=redis_away)


async def test_one_event_counts_a_whole_message() -> None:
    benign = EngineResult(confidence=0.1, model="pool-model")
    bench = Bench(FakePool([POOL, benign, EngineError("failed", counts=False), POOL]))
    where = context(bench.clock)
    answer = await handlers.detect_many(message(), where, bench.judge, bench.usage, bench.clock)
    ((event, message_id),) = bench.usage.events
    assert message_id == where.attempt_of  # a message that is sent again is counted once
    assert (event.key_id, event.requests, event.malicious, event.failed) == ("key1", 4, 2, 1)
    assert isinstance(answer.result, ItemResults)
    results = answer.result.results
    assert [item.verdict.is_malicious if item.verdict else None for item in results] == [True, False, None, True]
    assert [item.error.code if item.error else None for item in results] == [None, None, ErrorCode.NO_ENGINE, None]


async def test_texts_admitted_without_redis_are_degraded() -> None:
    bench = Bench(FakePool())
    answer = await handlers.detect_many(message(redis_away=True), context(bench.clock), bench.judge, bench.usage, bench.clock)
    assert isinstance(answer.result, ItemResults)
    assert all(item.verdict is not None and item.verdict.degraded for item in answer.result.results)


async def test_a_message_cancelled_at_its_deadline_is_counted_as_failed() -> None:
    engine = HeldEngine()
    bench = Bench(FakePool(), engine)
    call = handlers.detect_many(message(), context(bench.clock), bench.judge, bench.usage, bench.clock)
    task = asyncio.create_task(call)
    for _ in range(10):
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    ((event, _),) = bench.usage.events
    assert (event.requests, event.malicious, event.failed) == (4, 0, 4)


class NotingEngine(FakeEngine):
    """Fails its second call, and remembers below which span it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.inside: list[str] = []

    async def detect(self, payload: DetectPayload, context: RequestContext, timeout_seconds: float) -> EngineResult:
        self.inside.append(context.traceparent)
        if len(self.inside) == 2:
            raise EngineError("status_5xx")
        return GOOD


async def test_of_many_texts_only_calls_that_fail_have_a_span(recorder: Recorder) -> None:
    clock, engine = ManualClock(), NotingEngine()
    asked = context(clock).within("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01")
    alone = guarded(engine, clock)
    many = GuardedEngine("primary", engine, alone.breaker, max_concurrency=8, one_of_many=True)
    await OneByOne(many, clock, 1).detect_many(TEXTS, asked, 1.0)
    assert [(span[3], span[11]) for span in recorder.take(10)] == [("engine detect", "status_5xx")]
    assert set(engine.inside) == {asked.traceparent}, "nobody is told a parent that is not there"
    await alone.detect(TEXTS[0], asked, 1.0)
    (span,) = recorder.take(10)
    assert engine.inside[-1] == f"00-{span[0]}-{span[1]}-01"
