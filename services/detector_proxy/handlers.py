"""What arrives on the bus: detections that have been admitted, one or many at a time, and questions about the breakers."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

import msgspec

from libs.common import tracing
from libs.common.clock import Clock
from libs.common.context import RequestContext
from libs.common.contracts import (
    AdmittedDetect,
    BreakerReport,
    BreakersReset,
    BreakerStatus,
    DetectItems,
    DetectPayload,
    ErrorBody,
    ItemResult,
    ItemResults,
    UsageRecorded,
    Verdict,
)
from libs.common.errors import ErrorCode, PortcullisError
from libs.common.stages import Answer
from services.detector_proxy.breaker import EngineBreaker
from services.detector_proxy.core import BulkJudge, Judge
from services.detector_proxy.metrics import count_verdict
from services.detector_proxy.ports import UsageLog

Breakers = Mapping[str, EngineBreaker]

_decode_payload = msgspec.json.Decoder(DetectPayload).decode


async def detect(message: AdmittedDetect, context: RequestContext, judge: Judge, usage: UsageLog, clock: Clock) -> Answer:
    """Judge an admitted text. The call is counted before it is answered, whatever becomes of it: its units are spent."""
    verdict: Verdict | None = None
    try:
        verdict = await judge.judge(_payload(message.payload), context)
    finally:
        malicious = 1 if verdict is not None and verdict.is_malicious else 0
        await usage.record(
            UsageRecorded(
                key_id=message.principal.key_id,
                at_ms=int(clock.now() * 1000),
                requests=message.cost,
                malicious=malicious,
                failed=0 if verdict is not None else message.cost,
            ),
            context.attempt_of,
        )
    if message.rate.degraded and not verdict.degraded:
        verdict = msgspec.structs.replace(verdict, degraded=True)
    count_verdict(verdict)
    tracing.annotate("portcullis.is_malicious", verdict.is_malicious)
    tracing.annotate("portcullis.degraded", verdict.degraded)
    return Answer(verdict, rate=message.rate)


async def detect_many(message: DetectItems, context: RequestContext, judge: BulkJudge, usage: UsageLog, clock: Clock) -> Answer:
    """Judge many texts. They are counted, all in one event, before they are answered, whatever becomes of them."""
    payloads = [DetectPayload(text=text, threshold=message.threshold, detailed=message.detailed) for text in message.texts]
    outcomes: list[Verdict | PortcullisError] = []
    try:
        outcomes = await judge.judge(payloads, context)
    finally:
        verdicts = [outcome for outcome in outcomes if isinstance(outcome, Verdict)]
        await usage.record(
            UsageRecorded(
                key_id=message.key_id,
                at_ms=int(clock.now() * 1000),
                requests=len(payloads),
                malicious=sum(verdict.is_malicious for verdict in verdicts),
                failed=len(payloads) - len(verdicts),
            ),
            context.attempt_of,
        )
    tracing.annotate("portcullis.items", len(outcomes))
    tracing.annotate("portcullis.failed_items", sum(isinstance(outcome, PortcullisError) for outcome in outcomes))
    return Answer(ItemResults(results=tuple(_item(outcome, message.rate_degraded) for outcome in outcomes)))


def _item(outcome: Verdict | PortcullisError, rate_degraded: bool) -> ItemResult:
    if isinstance(outcome, PortcullisError):
        return ItemResult(error=ErrorBody(code=outcome.code, detail=outcome.detail, retry_after=outcome.retry_after))
    if rate_degraded and not outcome.degraded:
        outcome = msgspec.structs.replace(outcome, degraded=True)
    count_verdict(outcome)
    return ItemResult(verdict=outcome)


def _payload(payload: msgspec.Raw) -> DetectPayload:
    try:
        return _decode_payload(payload)
    except msgspec.ValidationError as error:
        # msgspec's sentence names the field and what is expected of it, never its value: "Expected ... - at `$.text`".
        problem, _, path = str(error).partition(" - at `$")
        field = path.strip("`.") or "body"
        raise PortcullisError(ErrorCode.INVALID_FIELD, fields=((field, problem),)) from None
    except (ValueError, RecursionError):  # malformed JSON, bytes that are not UTF-8, nesting without end
        raise PortcullisError(ErrorCode.BAD_REQUEST) from None


async def list_breakers(breakers: Breakers, replica: str) -> Answer:
    return Answer(report(breakers, replica))


async def reset_breaker(message: BreakersReset, breakers: Breakers, replica: str) -> Answer:
    """Close a breaker of this replica. Raises NOT_FOUND for a name that none has."""
    breaker = breakers.get(message.name)
    if breaker is None:
        raise PortcullisError(ErrorCode.NOT_FOUND)
    breaker.reset()
    return Answer(report({message.name: breaker}, replica))


def report(breakers: Breakers, replica: str) -> BreakerReport:
    """`failures` and `successes` are those in the rolling window."""
    return BreakerReport(replica=replica, breakers=tuple(_status(name, breaker, replica) for name, breaker in breakers.items()))


def _status(name: str, breaker: EngineBreaker, replica: str) -> BreakerStatus:
    successes, failures = breaker.counts()
    state = breaker.state
    closed = state == "closed"
    return BreakerStatus(
        name=name,
        state=state,
        replica=replica,
        failures=failures,
        successes=successes,
        opened_at=None if closed else _iso(breaker.opened_at),
        retry_at=_iso(breaker.open_until) if state == "open" else None,
        reason=breaker.reason,
    )


def _iso(time: datetime) -> str:
    return time.isoformat(timespec="milliseconds")
