"""How a pool is asked: which answers are tried again, how long each attempt lasts, what a breaker may count."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import msgspec
import pytest

from libs.common import contracts, micro, telemetry
from libs.common.bus import NoRespondersError
from libs.common.clock import ManualClock
from libs.common.context import RequestContext, from_headers
from libs.common.contracts import (
    Coverage,
    DetectPayload,
    ErrorBody,
    Message,
    ModelItemResult,
    ModelItemResults,
    ModelItems,
    ModelRequest,
    ModelResult,
    Reply,
    raw,
)
from libs.common.errors import ErrorCode, PortcullisError
from libs.common.neighbours import Response
from libs.common.retries import RetryBudget
from services.detector_proxy.engines.pool import ATTEMPT_SECONDS, BULK_ATTEMPT_SECONDS, MARGIN_SECONDS, MAX_ATTEMPTS, PoolEngine
from services.detector_proxy.ports import EngineError
from tests.unit.detector_proxy.fakes import context

RESULT = ModelResult(
    confidence=0.7,
    threshold=0.4,
    threat_types=("jailbreak",),
    model="worker-model",
    coverage=Coverage(tokens=3, windows=1, truncated=False),
)
TEXT = DetectPayload(text="text", detailed=True)


class Silence:
    """No answer: the whole attempt passes."""


Word = ModelResult | ErrorCode | Exception | Silence | bytes


class FakeBus:
    def __init__(self, *words: Word) -> None:
        self.clock = ManualClock()
        self.retry_budget = RetryBudget(self.clock)
        self.words = list(words)
        self.allotted: list[float] = []
        self.sent: list[dict[str, str]] = []
        self.meanwhile: Callable[[float], Awaitable[None]] | None = None
        self.pings: list[bytes] = []
        self.text = "text"

    async def request(
        self, subject: str, message: Message, context: RequestContext, *, idempotent: bool = False, again: bool = False
    ) -> Response:
        self.sent.append(context.outgoing(self.clock))
        assert subject == "model.v1.gpu"
        assert message == ModelRequest(text=self.text, detailed=True)
        assert idempotent
        assert again is bool(self.allotted) or self.meanwhile is not None
        seconds = context.remaining_seconds(self.clock)
        self.allotted.append(seconds)
        word = self.words.pop(0)
        if isinstance(word, Silence):
            if self.meanwhile is not None:
                await self.meanwhile(seconds)
            self.clock.advance(seconds)
            raise PortcullisError(ErrorCode.DEADLINE_EXCEEDED)
        if isinstance(word, Exception):
            raise word
        if isinstance(word, ErrorCode):
            return Response(Reply(error=ErrorBody(code=word, detail="")), {})
        return Response(Reply(result=msgspec.Raw(word) if isinstance(word, bytes) else raw(word)), {})

    async def gather(
        self, subject: str, message: Message | None, context: RequestContext, *, window_seconds: float
    ) -> list[bytes]:
        assert subject == "$SRV.PING.portcullis-fallback-model"
        return self.pings


async def ask(bus: FakeBus, seconds: float = 10.0) -> ModelResult:
    result = await PoolEngine(bus, "gpu").detect(TEXT, context(bus.clock, 60), seconds)
    assert (result.model, result.threshold, result.confidence) == ("worker-model", 0.4, 0.7)
    return RESULT


async def failure(bus: FakeBus, seconds: float = 10.0) -> tuple[str, bool]:
    with pytest.raises(EngineError) as caught:
        await ask(bus, seconds)
    return caught.value.reason, caught.value.counts


async def test_the_first_worker_answers() -> None:
    bus = FakeBus(RESULT)
    await ask(bus)
    assert bus.allotted == [pytest.approx(ATTEMPT_SECONDS, abs=0.01)]


async def test_workers_are_told_the_time_of_whoever_asked_and_not_ours() -> None:
    """A clock of ours that is an hour slow made every text late for them, and a hung worker was waited for for an hour."""
    bus, right = FakeBus(Silence(), Silence(), Silence()), ManualClock()
    bus.clock._now -= 3600
    request = from_headers(RequestContext.lasting(10, right).outgoing(right), bus.clock)
    with pytest.raises(EngineError):
        await PoolEngine(bus, "gpu").detect(TEXT, request, request.remaining_seconds(bus.clock))
    assert sum(bus.allotted) <= 10
    began = 0.0
    for headers, seconds in zip(bus.sent, bus.allotted, strict=True):
        then = ManualClock()
        then.advance(began)
        assert from_headers(headers, then).remaining_seconds(then) == pytest.approx(seconds, abs=0.01)
        began += seconds


@pytest.mark.parametrize("word", [ErrorCode.OVERLOADED, ErrorCode.INTERNAL, Silence(), b"garbage"])
async def test_another_worker_is_tried(word: Word) -> None:
    bus = FakeBus(word, word, RESULT)
    await ask(bus)
    assert bus.words == []


@pytest.mark.parametrize(
    ("word", "reason", "counts"),
    [
        (ErrorCode.OVERLOADED, "busy", False),
        (ErrorCode.INTERNAL, "failed", False),
        (Silence(), "no_answer", True),
        (b"garbage", "malformed", True),
        (b'{"confidence":2}', "malformed", True),
        (b"\xff", "malformed", True),
    ],
)
async def test_tries_are_bounded(word: Word, reason: str, counts: bool) -> None:
    bus = FakeBus(*[word] * 10)
    assert await failure(bus) == (reason, counts)
    assert len(bus.allotted) == MAX_ATTEMPTS


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        (NoRespondersError("model.v1.gpu"), "absent"),
        (PortcullisError(ErrorCode.STAGE_UNAVAILABLE), "absent"),
        (PortcullisError(ErrorCode.PAYLOAD_TOO_LARGE), "rejected"),
        (ErrorCode.BAD_REQUEST, "rejected"),
        (ErrorCode.INVALID_FIELD, "rejected"),
    ],
)
async def test_what_no_other_worker_would_say_differently_is_not_asked_again(word: Word, reason: str) -> None:
    bus = FakeBus(word, RESULT)
    assert await failure(bus) == (reason, False)
    assert len(bus.allotted) == 1


async def test_a_pool_that_answers_others_meanwhile_does_not_hang() -> None:
    bus = FakeBus(Silence(), Silence(), Silence())
    engine = PoolEngine(bus, "gpu")

    async def another_is_answered(seconds: float) -> None:
        bus.words.insert(0, RESULT)
        await engine.detect(TEXT, context(bus.clock, 60), seconds)

    bus.meanwhile = another_is_answered
    with pytest.raises(EngineError) as caught:
        await engine.detect(TEXT, context(bus.clock, 60), 10.0)
    assert (caught.value.reason, caught.value.counts) == ("no_answer", False)


async def test_a_hanging_worker_is_given_up_early_enough_for_two_others() -> None:
    bus = FakeBus(Silence(), Silence(), Silence())
    await failure(bus)
    rest = 10 - MARGIN_SECONDS - 2 * ATTEMPT_SECONDS
    assert bus.allotted == [pytest.approx(ATTEMPT_SECONDS, abs=0.01)] * 2 + [pytest.approx(rest, abs=0.02)]


async def test_after_a_busy_worker_the_next_one_is_asked_for_all_the_time_there_is() -> None:
    bus = FakeBus(ErrorCode.OVERLOADED, RESULT)
    await ask(bus)
    assert bus.allotted == [pytest.approx(ATTEMPT_SECONDS, abs=0.01), pytest.approx(10 - MARGIN_SECONDS, abs=0.01)]


@pytest.mark.parametrize(
    ("word", "reason"), [(ErrorCode.OVERLOADED, "busy"), (Silence(), "no_answer"), (b"garbage", "malformed")]
)
async def test_without_a_budget_nothing_is_tried_again_and_nothing_held_against_the_pool(word: Word, reason: str) -> None:
    bus = FakeBus(word, RESULT)
    while bus.retry_budget.take():
        pass
    withheld = telemetry.POOL_WITHHELD._value.get()
    assert await failure(bus) == (reason, False)
    assert len(bus.allotted) == 1
    assert telemetry.POOL_WITHHELD._value.get() == withheld + 1


async def test_a_deadline_too_short_for_one_attempt_proves_nothing_about_the_workers() -> None:
    bus = FakeBus(Silence())
    assert await failure(bus, seconds=0.5) == ("no_answer", False)
    assert bus.allotted == [pytest.approx(0.5 - MARGIN_SECONDS, abs=0.01)]


async def test_one_full_silence_counts_whatever_came_after_it() -> None:
    bus = FakeBus(Silence(), ErrorCode.OVERLOADED, ErrorCode.OVERLOADED)
    assert await failure(bus) == ("busy", True)


async def test_longer_texts_are_waited_for_longer() -> None:
    bus = FakeBus(NoRespondersError("model.v1.gpu"))
    bus.text = "x" * 100_000
    with pytest.raises(EngineError):
        await PoolEngine(bus, "gpu").detect(DetectPayload(text=bus.text, detailed=True), context(bus.clock, 60), 30)
    assert bus.allotted == [pytest.approx(ATTEMPT_SECONDS + 5, abs=0.01)]


def ping(**metadata: str) -> bytes:
    return msgspec.json.encode({"name": "portcullis-fallback-model", "metadata": metadata})


@pytest.mark.parametrize(
    ("pings", "health"),
    [
        ([], "down"),
        ([ping(**{micro.POOL: "gpu", micro.STATUS: "ok"})], "up"),
        ([ping(**{micro.POOL: "gpu"})], "up"),
        ([ping(**{micro.POOL: "gpu", micro.STATUS: "degraded"})], "degraded"),
        ([ping(**{micro.POOL: "gpu", micro.STATUS: "down"})], "down"),
        ([ping(**{micro.POOL: "other", micro.STATUS: "ok"})], "down"),
        ([ping(**{micro.STATUS: "ok"})], "down"),  # a worker of the default pool
        ([ping(**{micro.POOL: "gpu", micro.STATUS: "ok", micro.LANES: micro.BULK_ONLY})], "down"),
        ([b"garbage", b"\xff", ping(**{micro.POOL: "gpu", micro.STATUS: "ok"})], "up"),
    ],
)
async def test_health_is_that_of_the_pool_s_own_workers(pings: list[bytes], health: str) -> None:
    bus = FakeBus()
    bus.pings = pings
    assert await PoolEngine(bus, "gpu").health() == health


async def test_workers_that_name_no_pool_are_of_the_default_one() -> None:
    bus = FakeBus()
    bus.pings = [ping(**{micro.STATUS: "ok"})]
    assert await PoolEngine(bus, "fallback").health() == "up"


# --- many texts ----------------------------------------------------------------------------------------------------------


class BulkBus(FakeBus):
    async def request(
        self, subject: str, message: Message, context: RequestContext, *, idempotent: bool = False, again: bool = False
    ) -> Response:
        assert subject == "model.v1.gpu.batch"
        assert message == ModelItems(texts=("one", "two"), detailed=False)
        assert idempotent
        seconds = context.remaining_seconds(self.clock)
        self.allotted.append(seconds)
        word = self.words.pop(0)
        if isinstance(word, Silence):
            self.clock.advance(seconds)
            raise PortcullisError(ErrorCode.DEADLINE_EXCEEDED)
        if isinstance(word, ErrorCode):
            return Response(Reply(error=ErrorBody(code=word, detail="")), {})
        assert isinstance(word, bytes)
        return Response(Reply(result=msgspec.Raw(word)), {})


def items(*results: ModelItemResult) -> bytes:
    return contracts.encode(ModelItemResults(results=results))


async def ask_many(bus: BulkBus, seconds: float = 20.0) -> list[str]:
    payloads = [DetectPayload(text="one"), DetectPayload(text="two")]
    outcomes = await PoolEngine(bus, "gpu").detect_many(payloads, context(bus.clock, 60), seconds)
    return [outcome.reason if isinstance(outcome, EngineError) else outcome.model for outcome in outcomes]


async def test_many_texts_have_an_outcome_each() -> None:
    busy = ModelItemResult(error=ErrorBody(code=ErrorCode.OVERLOADED, detail=""))
    bus = BulkBus(items(ModelItemResult(result=RESULT), busy))
    assert await ask_many(bus) == ["worker-model", "busy"]
    assert bus.allotted == [pytest.approx(BULK_ATTEMPT_SECONDS, abs=0.01)]


@pytest.mark.parametrize("word", [items(ModelItemResult(result=RESULT)), b"garbage", ErrorCode.OVERLOADED, Silence()])
async def test_many_texts_are_put_to_another_worker_too(word: Word) -> None:
    good = items(*[ModelItemResult(result=RESULT)] * 2)
    bus = BulkBus(word, good)
    assert await ask_many(bus) == ["worker-model"] * 2


async def test_an_item_that_says_nothing_is_malformed() -> None:
    assert await ask_many(BulkBus(items(ModelItemResult(result=RESULT), ModelItemResult()))) == ["worker-model", "malformed"]


@pytest.mark.parametrize(("word", "reason", "counts"), [(Silence(), "no_answer", False), (b"garbage", "malformed", True)])
async def test_bulk_work_that_waits_too_long_opens_no_breaker(word: Word, reason: str, counts: bool) -> None:
    with pytest.raises(EngineError) as caught:
        await ask_many(BulkBus(*[word] * MAX_ATTEMPTS))
    assert (caught.value.reason, caught.value.counts) == (reason, counts)
