"""The proxy's rules: which engine is asked, for how long, what follows when it fails, and what a judgement becomes.

No engine's failure ever turns into a verdict: when none can answer, that is what the caller is told.
"""

from __future__ import annotations

import asyncio
import math
import time
from contextlib import suppress
from dataclasses import dataclass

from libs.common.clock import Clock
from libs.common.context import RequestContext
from libs.common.contracts import DetectPayload, ThreatType, Verdict
from libs.common.errors import ErrorCode, PortcullisError
from services.detector_proxy.breaker import CircuitBreakerError, EngineBreaker
from services.detector_proxy.metrics import ENGINE_CALLS, ENGINE_DURATION
from services.detector_proxy.ports import Engine, EngineError, EngineResult

PRIMARY = "primary"
FALLBACK = "fallback"
"""The two roles; breakers are called by them, since engines may change their names."""

PRIMARY_SHARE = 0.6
"""The part of what remains until the deadline that the primary engine may use; the rest is the fallback's."""
REPLY_RESERVE_SECONDS = 0.02
"""Kept from the engines, so that the answer (or the error) still reaches the edge in time."""
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
    ) -> None:
        self.role = role
        self.engine = engine
        self.breaker = breaker
        self._max_concurrency = max_concurrency
        self._timeout_seconds = timeout_seconds
        self._running = 0
        self._succeeded = ENGINE_CALLS.labels(role, "ok")
        self._duration = ENGINE_DURATION.labels(role)

    async def detect(self, payload: DetectPayload, context: RequestContext, allotted_seconds: float) -> EngineResult:
        """Ask the engine, for at most `allotted_seconds` and at most its own timeout. Raises `EngineError`."""
        try:
            result = await self._detect(payload, context, allotted_seconds)
        except EngineError as error:
            ENGINE_CALLS.labels(self.role, error.reason).inc()
            raise
        self._succeeded.inc()
        return result

    async def _detect(self, payload: DetectPayload, context: RequestContext, allotted_seconds: float) -> EngineResult:
        # Full means "elsewhere, at once": a queue in front of a slow engine would only use up the callers' time.
        if self._running >= self._max_concurrency:
            raise EngineError("full", counts=False)
        timeout_seconds = min(self._timeout_seconds, allotted_seconds)
        if timeout_seconds <= 0:
            raise EngineError("no_time", counts=False)
        self._running += 1
        started = time.perf_counter()
        try:
            with self.breaker.admit():
                return await self._ask(payload, context, timeout_seconds)
        except CircuitBreakerError:
            raise EngineError("breaker_open", counts=False) from None
        finally:
            self._running -= 1
            self._duration.observe(time.perf_counter() - started)

    async def _ask(self, payload: DetectPayload, context: RequestContext, timeout_seconds: float) -> EngineResult:
        try:
            async with asyncio.timeout(timeout_seconds):
                return await self.engine.detect(payload, context, timeout_seconds)
        except TimeoutError:
            # A caller in a hurry must not be able to open the breaker for everybody: less time than configured proves nothing.
            raise EngineError("timeout", counts=timeout_seconds >= self._timeout_seconds) from None


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
            timings["engine"] = (time.perf_counter() - started) * 1000
        degraded = self.primary is not None and result is None
        if result is None:
            started = time.perf_counter()
            try:
                result = await self.fallback.detect(payload, context, self._remaining(context))
            except EngineError as error:
                raise self._no_verdict(error, context) from error
            timings["fallback"] = (time.perf_counter() - started) * 1000
        return verdict(payload, result, timings, degraded=degraded, default_threshold=self.default_threshold)

    def _remaining(self, context: RequestContext) -> float:
        return context.remaining_seconds(self.clock.now()) - REPLY_RESERVE_SECONDS

    def _no_verdict(self, error: EngineError, context: RequestContext) -> PortcullisError:
        if error.reason in ("busy", "full"):
            return PortcullisError(ErrorCode.OVERLOADED, internal="every worker of the pool is busy")
        if self._remaining(context) <= REPLY_RESERVE_SECONDS:  # it has been used up, but for what the engine left unused
            return PortcullisError(ErrorCode.DEADLINE_EXCEEDED, internal=f"fallback: {error.reason}")
        retry_after = max(1, math.ceil(self.fallback.breaker.open_remaining)) if error.reason == "breaker_open" else 1
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
