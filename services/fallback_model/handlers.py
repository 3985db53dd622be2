"""A text, or many, comes in on the bus; a judgement of each goes out."""

from __future__ import annotations

import logging

from libs.common import tracing
from libs.common.clock import Clock
from libs.common.context import RequestContext
from libs.common.contracts import (
    Coverage,
    ErrorBody,
    ModelItemResult,
    ModelItemResults,
    ModelItems,
    ModelRequest,
    ModelResult,
    Span,
    ThreatType,
    Transform,
)
from libs.common.errors import CATALOGUE, ErrorCode, PortcullisError
from libs.common.stages import Answer, Outcome
from services.fallback_model.batcher import Busy
from services.fallback_model.detector import Judged
from services.fallback_model.model import Detection
from services.fallback_model.swap import Slot

log = logging.getLogger(__name__)


async def detect(request: ModelRequest, context: RequestContext, slot: Slot, clock: Clock) -> Outcome:
    """Judges one text. Refuses with OVERLOADED when the queue is full, or too long for the deadline: another may have room."""
    seconds = context.remaining_seconds(clock)
    try:
        async with slot.use() as detector:
            detection = await detector.detect(request.text, detailed=request.detailed, seconds=seconds)
    except Busy:
        raise PortcullisError(ErrorCode.OVERLOADED, internal="the model's queue is too long") from None
    tracing.annotate("portcullis.tokens", detection.coverage.tokens)
    return Answer(to_message(detection, detailed=request.detailed))


async def detect_many(request: ModelItems, context: RequestContext, slot: Slot, clock: Clock) -> Outcome:
    """Judges many texts side by side, as bulk work. What becomes of one text is no matter of the others."""
    async with slot.use() as detector:
        judged = await detector.detect_many(request.texts, detailed=request.detailed, seconds=context.remaining_seconds(clock))
    results = tuple(_item(index, each, detailed=request.detailed) for index, each in enumerate(judged))
    tracing.annotate("portcullis.items", len(results))
    scored = [each.result.coverage.tokens for each in results if each.result is not None]
    tracing.annotate("portcullis.tokens", sum(scored))
    return Answer(ModelItemResults(results=results))


def _item(index: int, judged: Judged, *, detailed: bool) -> ModelItemResult:
    """One of many; it has a span only when it failed or was slow."""
    result = _result(judged.outcome, detailed=detailed)
    if result.error is not None or tracing.is_slow(judged.seconds):
        error = result.error.code if result.error is not None else ""
        tracing.record("item", judged.seconds, own=(("portcullis.item.index", index),), error=error)
    return result


def _result(outcome: Detection | Exception, *, detailed: bool) -> ModelItemResult:
    if isinstance(outcome, Busy):
        return ModelItemResult(error=_error(ErrorCode.OVERLOADED))
    if isinstance(outcome, Exception):
        # As in a stage: a bug is answered like any other failure, and told to the log. The other texts go on.
        log.error("a text of many failed", exc_info=outcome)
        return ModelItemResult(error=_error(ErrorCode.INTERNAL))
    return ModelItemResult(result=to_message(outcome, detailed=detailed))


def _error(code: ErrorCode) -> ErrorBody:
    return ErrorBody(code=code, detail=CATALOGUE[code].detail)


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
