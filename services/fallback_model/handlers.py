"""A text comes in on the bus, a judgement goes out."""

from __future__ import annotations

from libs.common.bus import Answer, Outcome
from libs.common.context import RequestContext
from libs.common.contracts import Coverage, ModelRequest, ModelResult, Span, ThreatType, Transform
from libs.common.errors import ErrorCode, PortcullisError
from services.fallback_model.batcher import Busy
from services.fallback_model.detector import Detection
from services.fallback_model.swap import Slot


async def detect(request: ModelRequest, _: RequestContext, slot: Slot) -> Outcome:
    """Judges one text. Refuses with OVERLOADED when the queue is full, so that the caller can try another worker."""
    try:
        async with slot.use() as detector:
            detection = await detector.detect(request.text, detailed=request.detailed)
    except Busy:
        raise PortcullisError(ErrorCode.OVERLOADED, internal="the model's queue is full") from None
    return Answer(to_message(detection, detailed=request.detailed))


def to_message(detection: Detection, *, detailed: bool) -> ModelResult:
    """The detection as it crosses the bus; what was not asked for is left out."""
    threats: tuple[ThreatType, ...] = detection.threats
    return ModelResult(
        confidence=detection.probability,
        threshold=detection.threshold,
        threat_types=threats,
        model=detection.model,
        coverage=Coverage(
            tokens=detection.coverage.tokens, windows=detection.coverage.windows, truncated=detection.coverage.truncated
        ),
        reason=detection.reason,
        spans=tuple(Span(start=s.start, end=s.end, score=s.score, transform=s.transform) for s in detection.spans),
        transforms=tuple(Transform(name=n, count=c) for n, c in sorted(detection.transforms.items())) if detailed else (),
        timings=detection.timings,
    )
