"""What the proxy's rules ask of the world: engines that judge a text, and somebody who keeps count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from libs.common.context import RequestContext
from libs.common.contracts import Coverage, DetectPayload, Span, ThreatType, Transform, UsageRecorded

EngineKind = Literal["detect", "tei", "kserve", "pool"]
Health = Literal["up", "degraded", "down"]
"""`degraded`: it answers, though not as well as it should."""


@dataclass(frozen=True, slots=True)
class EngineResult:
    """An engine's judgement, before any threshold.

    `confidence`: probability in [0, 1] that the text is malicious. `threshold`: the one that the engine was shipped with; None
    when it names none. `threat_types`: those that would be named if the text is malicious, empty when the engine names none.
    `model`: what answered. `coverage` None: the engine does not tell.
    """

    confidence: float
    model: str
    threshold: float | None = None
    threat_types: tuple[ThreatType, ...] = ()
    coverage: Coverage | None = None
    reason: str | None = None
    spans: tuple[Span, ...] = ()
    transforms: tuple[Transform, ...] = ()
    timings: Mapping[str, float] = field(default_factory=dict)


class EngineError(Exception):
    """An engine gave no verdict on this text.

    `reason` is one of a few words (they label a metric and are shown in a breaker's status), never a text, address or secret.
    `counts`: it is the engine's own fault, and the breaker is to count it. A text that the engine refuses, a deadline too short
    to judge it by, and a worker that says it is busy are not.
    """

    def __init__(self, reason: str, *, counts: bool = True) -> None:
        super().__init__(reason)
        self.reason = reason
        self.counts = counts


Outcome = EngineResult | EngineError
"""What became of one text of many."""


class Engine(Protocol):
    """One detection engine, whatever it is and wherever it runs."""

    @property
    def name(self) -> str:
        """What it is called when it does not name itself."""
        ...

    async def detect(self, payload: DetectPayload, context: RequestContext, timeout_seconds: float) -> EngineResult:
        """Judge one text. The caller cancels the call after `timeout_seconds`. Raises `EngineError`."""
        ...

    async def health(self) -> Health:
        """Ask the engine's own health endpoint; never a detection. The caller bounds the time. Raises nothing."""
        ...

    async def close(self) -> None: ...


class BulkEngine(Engine, Protocol):
    """An engine that takes many texts in one call."""

    async def detect_many(
        self, payloads: Sequence[DetectPayload], context: RequestContext, timeout_seconds: float
    ) -> list[Outcome]:
        """Judge each text; outcomes in the same order. `detailed` is the same for all. As `detect`, when nothing came of any."""
        ...


class UsageLog(Protocol):
    """Where the count of calls goes."""

    async def record(self, event: UsageRecorded, message_id: str) -> None:
        """Send an event before returning; never raises, never waits for an acknowledgement. `message_id`: counted once."""
        ...
