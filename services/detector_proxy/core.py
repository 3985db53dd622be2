"""The proxy's rules: which engine is asked, for how long, what follows when it fails, and what a judgement becomes.

No engine's failure ever turns into a verdict: when none can answer, that is what the caller is told.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol, TypeVar

from libs.common import telemetry, tracing
from libs.common.clock import Clock
from libs.common.context import RequestContext
from libs.common.contracts import DetectPayload, ThreatType, Verdict
from libs.common.errors import ErrorCode, PortcullisError
from libs.common.timeouts import within
from services.detector_proxy.breaker import CircuitBreakerError, EngineBreaker
from services.detector_proxy.metrics import ENGINE_CALLS, ENGINE_DURATION, ENGINE_IN_FLIGHT, ENGINE_LIMIT
from services.detector_proxy.ports import BulkEngine, Engine, EngineError, EngineResult, Outcome

T = TypeVar("T")

_SPAN = "engine detect"

PRIMARY = "primary"
FALLBACK = "fallback"
"""The two roles; breakers are called by them, since engines may change their names."""

PRIMARY_SHARE = 0.6
"""The part of what remains until the deadline that the primary engine may use; the rest is the fallback's."""
REPLY_RESERVE_SECONDS = 0.03
"""Kept from the engines, so that the answer (or the error) still reaches the edge in time."""
PAUSE_SECONDS = (0.02, 0.5)
"""The first and the longest pause before texts of a batch are put again to a fallback that had no room for them."""
_COMES_BACK = frozenset({"busy", "full", "absent", "breaker_open"})
"""Failures of the fallback that are over in a moment: a batch waits for that, where a single text is answered at once."""
UNNAMED_THREAT: tuple[ThreatType, ...] = ("injection",)
"""What a malicious text is called when the engine names no threat: every attack of this kind injects instructions."""


class GuardedEngine:
    """An engine with its breaker, its bulkhead and its timeout. Whatever goes wrong comes out as an `EngineError`."""

    def __init__(
        self,
        role: str,
        engine: Engine,
        breaker: EngineBreaker,
        *,
        max_concurrency: int,
        timeout_seconds: float = math.inf,
        lane: str = "single",
        one_of_many: bool = False,
    ) -> None:
        """`lane`, for the metrics: `single` texts or `bulk`.

        `one_of_many`: it is called once for each text of many; only calls that fail or are slow have a span then.
        """
        self.role = role
        self.engine = engine
        self.breaker = breaker
        self._max_concurrency = max_concurrency
        self._timeout_seconds = timeout_seconds
        self._one_of_many = one_of_many
        self._span_attributes: tracing.Attributes = (("portcullis.engine.role", role), ("portcullis.engine.name", engine.name))
        self._running = 0
        self._succeeded = ENGINE_CALLS.labels(role, "ok")
        self._durations = {result: ENGINE_DURATION.labels(role, result) for result in ("ok", "failed")}
        ENGINE_IN_FLIGHT.labels(role, lane).set_function(lambda: self._running)
        ENGINE_LIMIT.labels(role, lane).set(max_concurrency)

    async def detect(self, payload: DetectPayload, context: RequestContext, allotted_seconds: float) -> EngineResult:
        """Ask the engine, for at most `allotted_seconds` and at most its own timeout. Raises `EngineError`."""
        return await self.call(lambda inside, seconds: self.engine.detect(payload, inside, seconds), context, allotted_seconds)

    async def call(
        self, ask: Callable[[RequestContext, float], Awaitable[T]], context: RequestContext, allotted_seconds: float
    ) -> T:
        """As `detect`, for any way to ask; it is given the context, within this call's span, and told how many seconds it has."""
        span = tracing.begin(_SPAN, tracing.CLIENT, context.traceparent, self._span_attributes)
        # A call that may have no span must not be named as anybody's parent.
        inside = context.within(span.traceparent) if span and not self._one_of_many else context
        try:
            result = await self._call(lambda seconds: ask(inside, seconds), allotted_seconds)
        except EngineError as error:
            ENGINE_CALLS.labels(self.role, error.reason).inc()
            span.fail(error.reason)
            raise
        except BaseException as error:
            span.fail(tracing.word_for(error))
            raise
        else:
            self._succeeded.inc()
            return result
        finally:
            if span.error or not self._one_of_many or span.is_slow:
                span.end()

    async def _call(self, ask: Callable[[float], Awaitable[T]], allotted_seconds: float) -> T:
        # Full means "elsewhere, at once": a queue in front of a slow engine would only use up the callers' time.
        if self._running >= self._max_concurrency:
            raise EngineError("full", counts=False)
        timeout_seconds = min(self._timeout_seconds, allotted_seconds)
        if timeout_seconds <= 0:
            raise EngineError("no_time", counts=False)
        self._running += 1
        try:
            with self.breaker.admit():
                return await self._ask(ask, timeout_seconds)
        except CircuitBreakerError:
            raise EngineError("breaker_open", counts=False) from None
        finally:
            self._running -= 1

    async def _ask(self, ask: Callable[[float], Awaitable[T]], timeout_seconds: float) -> T:
        started, result = time.perf_counter(), "failed"
        try:
            with within(timeout_seconds):
                answer = await ask(timeout_seconds)
            result = "ok"
            return answer
        except TimeoutError:
            # A caller in a hurry must not be able to open the breaker for everybody: less time than configured proves nothing.
            raise EngineError("timeout", counts=timeout_seconds >= self._timeout_seconds) from None
        finally:
            self._durations[result].observe(time.perf_counter() - started, telemetry.exemplar())


class Bulk(Protocol):
    """An engine as batches use it. It raises nothing: each text has an outcome of its own."""

    async def detect_many(
        self, payloads: Sequence[DetectPayload], context: RequestContext, allotted_seconds: float
    ) -> list[Outcome]: ...


class OneByOne:
    """An engine that takes one text a call; its texts of all batches wait for one of `max_concurrency` places.

    `guarded`: the engine and its breaker, behind a bulkhead other than that of single texts.
    """

    def __init__(self, guarded: GuardedEngine, clock: Clock, max_concurrency: int) -> None:
        self._guarded = guarded
        self._clock = clock
        self._places = asyncio.Semaphore(max_concurrency)

    async def detect_many(
        self, payloads: Sequence[DetectPayload], context: RequestContext, allotted_seconds: float
    ) -> list[Outcome]:
        ends = self._clock.monotonic() + allotted_seconds
        return await asyncio.gather(*(self._detect(payload, context, ends) for payload in payloads))

    async def _detect(self, payload: DetectPayload, context: RequestContext, ends: float) -> Outcome:
        try:
            async with asyncio.timeout(max(0.0, ends - self._clock.monotonic())):
                await self._places.acquire()
        except TimeoutError:
            return EngineError("no_time", counts=False)
        try:
            return await self._guarded.detect(payload, context, ends - self._clock.monotonic())
        except EngineError as error:
            return error
        finally:
            self._places.release()


class AllAtOnce:
    """An engine that takes many texts in a call. `guarded`: as for `OneByOne`, around the same engine."""

    def __init__(self, guarded: GuardedEngine, engine: BulkEngine) -> None:
        self._guarded = guarded
        self._engine = engine

    async def detect_many(
        self, payloads: Sequence[DetectPayload], context: RequestContext, allotted_seconds: float
    ) -> list[Outcome]:
        try:
            return await self._guarded.call(
                lambda inside, seconds: self._engine.detect_many(payloads, inside, seconds), context, allotted_seconds
            )
        except EngineError as error:
            return [error] * len(payloads)


@dataclass(frozen=True, slots=True)
class Judge:
    """Asks the primary engine, if there is one, then the fallback. `default_threshold`: for engines shipped with none."""

    primary: GuardedEngine | None
    fallback: GuardedEngine
    clock: Clock
    default_threshold: float

    async def judge(self, payload: DetectPayload, context: RequestContext) -> Verdict:
        """Raises `PortcullisError`: OVERLOADED when every worker is busy, DEADLINE_EXCEEDED, NO_ENGINE."""
        timings: dict[str, float] = {}
        result: EngineResult | None = None
        if self.primary is not None:
            started = time.perf_counter()
            with suppress(EngineError):  # counted by the guard; `degraded` tells the caller
                result = await self.primary.detect(payload, context, self._remaining(context) * PRIMARY_SHARE)
            # In the answer's headers too: what is slow is somebody else's engine, and no reason for the edge to take in less.
            context.timings["engine"] = timings["engine"] = _milliseconds_since(started)
        degraded = self.primary is not None and result is None
        if result is None:
            started = time.perf_counter()
            try:
                result = await self.fallback.detect(payload, context, self._remaining(context))
            except EngineError as error:
                raise self._no_verdict(error, context) from error
            timings["fallback"] = _milliseconds_since(started)
        return verdict(payload, result, timings, degraded=degraded, default_threshold=self.default_threshold)

    def _remaining(self, context: RequestContext) -> float:
        return _remaining(context, self.clock)

    def _no_verdict(self, error: EngineError, context: RequestContext) -> PortcullisError:
        return no_verdict(error, self._remaining(context), self.fallback.breaker)


def _milliseconds_since(started: float) -> float:
    return round((time.perf_counter() - started) * 1000, 3)


@dataclass(frozen=True, slots=True)
class BulkJudge:
    """As `Judge`, for many texts: what the primary leaves open is put to the fallback, again and again while that is full."""

    primary: Bulk | None
    fallback: Bulk
    fallback_breaker: EngineBreaker
    clock: Clock
    default_threshold: float
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep

    async def judge(self, payloads: Sequence[DetectPayload], context: RequestContext) -> list[Verdict | PortcullisError]:
        """A verdict for each text, or why there is none: OVERLOADED, DEADLINE_EXCEEDED, NO_ENGINE."""
        outcomes: list[Outcome] = []
        if self.primary is not None:
            outcomes = await self.primary.detect_many(payloads, context, _remaining(context, self.clock) * PRIMARY_SHARE)
        by_primary = [isinstance(outcome, EngineResult) for outcome in outcomes] or [False] * len(payloads)
        outcomes = outcomes or [EngineError("unasked", counts=False)] * len(payloads)
        await self._fall_back(payloads, outcomes, context)
        remaining = _remaining(context, self.clock)
        return [
            verdict(
                payload,
                outcome,
                {},
                degraded=self.primary is not None and not primary,
                default_threshold=self.default_threshold,
            )
            if isinstance(outcome, EngineResult)
            else no_verdict(outcome, remaining, self.fallback_breaker)
            for payload, outcome, primary in zip(payloads, outcomes, by_primary, strict=True)
        ]

    async def _fall_back(self, payloads: Sequence[DetectPayload], outcomes: list[Outcome], context: RequestContext) -> None:
        """Fill in what has no result yet."""
        pause, longest = PAUSE_SECONDS
        left = [index for index, outcome in enumerate(outcomes) if isinstance(outcome, EngineError)]
        while left:
            part = await self.fallback.detect_many([payloads[index] for index in left], context, _remaining(context, self.clock))
            for index, outcome in zip(left, part, strict=True):
                outcomes[index] = outcome
            left = [
                index
                for index, outcome in zip(left, part, strict=True)
                if isinstance(outcome, EngineError) and outcome.reason in _COMES_BACK
            ]
            # Spread out: whoever was refused together must not come back together.
            seconds = pause * random.uniform(0.5, 1.5)  # noqa: S311  # nothing secret depends on it
            if not left or _remaining(context, self.clock) <= seconds:
                return
            await self.sleep(seconds)
            pause = min(pause * 2, longest)


def _remaining(context: RequestContext, clock: Clock) -> float:
    return context.remaining_seconds(clock) - REPLY_RESERVE_SECONDS


def no_verdict(error: EngineError, remaining_seconds: float, fallback_breaker: EngineBreaker) -> PortcullisError:
    """What the caller is told when the fallback, too, had no result."""
    if error.reason in ("busy", "full"):
        return PortcullisError(ErrorCode.OVERLOADED, internal="every worker of the pool is busy")
    if remaining_seconds <= REPLY_RESERVE_SECONDS:  # it has been used up, but for what the engine left unused
        return PortcullisError(ErrorCode.DEADLINE_EXCEEDED, internal=f"fallback: {error.reason}")
    retry_after = max(1, math.ceil(fallback_breaker.open_remaining)) if error.reason == "breaker_open" else 1
    return PortcullisError(ErrorCode.NO_ENGINE, internal=f"fallback: {error.reason}", retry_after=retry_after)


def verdict(
    payload: DetectPayload,
    result: EngineResult,
    timings: dict[str, float],
    *,
    degraded: bool,
    default_threshold: float,
) -> Verdict:
    """A judgement under the caller's threshold, else the engine's own, else `default_threshold`.

    `is_malicious` follows from `confidence` alone, whatever an engine says beside it. A malicious verdict always names a threat
    (`UNNAMED_THREAT` if the engine named none), a benign one none.
    """
    threshold = payload.threshold
    if threshold is None:
        threshold = result.threshold if result.threshold is not None else default_threshold
    malicious = result.confidence >= threshold
    threat_types = (result.threat_types or UNNAMED_THREAT) if malicious else ()
    if not payload.detailed:
        return Verdict(
            is_malicious=malicious,
            confidence=result.confidence,
            threat_types=threat_types,
            endpoint=result.model,
            degraded=degraded,
            coverage=result.coverage,
        )
    return Verdict(
        is_malicious=malicious,
        confidence=result.confidence,
        threat_types=threat_types,
        endpoint=result.model,
        degraded=degraded,
        coverage=result.coverage,
        reason=result.reason,
        spans=result.spans,
        transforms=result.transforms,
        timings={**result.timings, **timings},
    )
