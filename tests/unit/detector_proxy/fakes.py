"""Hand-written stand-ins for what the proxy's rules talk to."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

from libs.common.clock import ManualClock
from libs.common.context import RequestContext, new_request_id, new_traceparent
from libs.common.contracts import DetectPayload, UsageRecorded
from services.detector_proxy.breaker import BreakerPolicy, EngineBreaker
from services.detector_proxy.core import GuardedEngine
from services.detector_proxy.ports import EngineError, EngineResult, Health

GOOD = EngineResult(confidence=0.9, model="good-engine", threat_types=("jailbreak",))

Behaviour = EngineResult | Exception | Callable[[], Awaitable[EngineResult]]


class FakeEngine:
    """Answers with what it is given, and remembers how it was asked."""

    name = "fake"

    def __init__(self, behaviour: Behaviour = GOOD, health: Health = "up") -> None:
        self.behaviour = behaviour
        self.answers: Health = health
        self.allotted: list[float] = []
        self.hanging_health = False

    async def detect(self, payload: DetectPayload, context: RequestContext, timeout_seconds: float) -> EngineResult:
        self.allotted.append(timeout_seconds)
        if isinstance(self.behaviour, Exception):
            raise self.behaviour
        if isinstance(self.behaviour, EngineResult):
            return self.behaviour
        return await self.behaviour()

    async def health(self) -> Health:
        if self.hanging_health:
            raise TimeoutError
        return self.answers

    async def close(self) -> None:
        """Nothing to close."""


class HeldEngine(FakeEngine):
    """Holds every call until it is released."""

    def __init__(self) -> None:
        super().__init__(self._wait)
        self.release = asyncio.Event()

    async def _wait(self) -> EngineResult:
        await self.release.wait()
        return GOOD


class FakeUsageLog:
    def __init__(self) -> None:
        self.events: list[tuple[UsageRecorded, str]] = []

    async def record(self, event: UsageRecorded, message_id: str) -> None:
        self.events.append((event, message_id))


def guarded(
    engine: FakeEngine,
    clock: ManualClock,
    *,
    role: str = "primary",
    policy: BreakerPolicy | None = None,
    max_concurrency: int = 8,
    timeout_seconds: float = 2.0,
) -> GuardedEngine:
    breaker = EngineBreaker(role, policy or BreakerPolicy(), clock, rng=random.Random(1))
    return GuardedEngine(role, engine, breaker, max_concurrency=max_concurrency, timeout_seconds=timeout_seconds)


def broken(reason: str = "timeout", *, counts: bool = True) -> FakeEngine:
    return FakeEngine(EngineError(reason, counts=counts))


def context(clock: ManualClock, seconds: float = 10.0) -> RequestContext:
    return RequestContext(int((clock.now() + seconds) * 1000), new_request_id(), new_traceparent())
