"""A pool of workers on NATS: `model.v1.<pool>`, one queue group, `ModelRequest` in and `ModelResult` out; many texts at a time
go to `model.v1.<pool>.batch`, where the workers take them as bulk work.

The queue group picks a worker at random. One that is full says so at once, and one that hangs says nothing: in both cases the
request is sent again, and goes to another with good odds, as long as the budget of retries lasts: when all workers are full or
late, asking each request of them three times would be what keeps them so. (One that dies is the bus's matter: it sends again by
itself.) A pool without any worker is known within a millisecond and costs nothing to ask, so that it is no business of a
breaker's either.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import msgspec

from libs.common import micro, telemetry
from libs.common.bus import NoRespondersError
from libs.common.clock import Clock
from libs.common.context import RequestContext
from libs.common.contracts import DetectPayload, ErrorBody, Message, ModelItemResults, ModelItems, ModelRequest, ModelResult
from libs.common.errors import ErrorCode, PortcullisError
from libs.common.neighbours import Response
from libs.common.retries import RetryBudget
from libs.common.subjects import DEFAULT_POOL, POOL_PING, model_pool, model_pool_batch
from libs.common.timeouts import GRAIN_SECONDS
from services.detector_proxy.metrics import POOL_RETRIES
from services.detector_proxy.ports import EngineError, EngineResult, Health, Outcome

MAX_ATTEMPTS = 3
ATTEMPT_SECONDS = 2.0
ATTEMPT_SECONDS_PER_CHARACTER = 5e-5
"""How long one worker may take before another is tried. One that would have to let it wait for half of that says "busy" at once,
so that silence means that it hangs; and 100 000 characters take seconds."""
BULK_ATTEMPT_SECONDS = 5.0
"""The same for many texts, which wait for single ones, and for what came before them."""
MARGIN_SECONDS = 2 * GRAIN_SECONDS
"""An attempt ends that much before the caller would cancel it: what came of it is then known, and counted, for certain."""
PING_SECONDS = 0.2

_decode = msgspec.json.Decoder(ModelResult).decode
_decode_many = msgspec.json.Decoder(ModelItemResults).decode
_R = TypeVar("_R")


class _Ping(msgspec.Struct):
    """What we read of the answer to `$SRV.PING` (NATS ADR-32)."""

    metadata: dict[str, str] = {}


_decode_ping = msgspec.json.Decoder(_Ping).decode


class Requester(Protocol):
    """What a pool needs of the bus."""

    @property
    def clock(self) -> Clock: ...

    @property
    def retry_budget(self) -> RetryBudget: ...

    async def request(
        self, subject: str, message: Message, context: RequestContext, *, idempotent: bool = False, again: bool = False
    ) -> Response: ...

    async def gather(
        self, subject: str, message: Message | None, context: RequestContext, *, window_seconds: float
    ) -> list[bytes]: ...


class PoolEngine:
    """See the module. `pool`: its name; the subject follows from it."""

    def __init__(self, bus: Requester, pool: str) -> None:
        self.name = pool
        self._bus = bus
        self._pool = pool
        self._answered_at = -math.inf
        self._subject = model_pool(pool)
        self._bulk_subject = model_pool_batch(pool)

    async def detect(self, payload: DetectPayload, context: RequestContext, timeout_seconds: float) -> EngineResult:
        """Raises `EngineError`: absent, busy, no_answer, rejected, malformed, failed.

        `no_answer` is counted if a worker had its full time, and the pool answered nobody else in it.
        """
        request = ModelRequest(text=payload.text, detailed=payload.detailed)
        patience = ATTEMPT_SECONDS + ATTEMPT_SECONDS_PER_CHARACTER * len(payload.text)
        return await self._attempts(self._subject, request, _result, context, timeout_seconds, patience)

    async def detect_many(
        self, payloads: Sequence[DetectPayload], context: RequestContext, timeout_seconds: float
    ) -> list[Outcome]:
        """As `detect`. That no answer came is never held against the pool: bulk work may have waited for too much else."""
        texts = tuple(payload.text for payload in payloads)
        request = ModelItems(texts=texts, detailed=any(payload.detailed for payload in payloads))
        patience = BULK_ATTEMPT_SECONDS + ATTEMPT_SECONDS_PER_CHARACTER * sum(map(len, texts))

        def outcomes(raw: msgspec.Raw) -> list[Outcome]:
            return _outcomes(raw, len(texts))

        try:
            return await self._attempts(self._bulk_subject, request, outcomes, context, timeout_seconds, patience)
        except EngineError as error:
            raise EngineError(error.reason, counts=error.counts and error.reason != "no_answer") from None

    async def _attempts(
        self,
        subject: str,
        request: Message,
        read: Callable[[msgspec.Raw], _R],
        context: RequestContext,
        timeout_seconds: float,
        patience: float,
    ) -> _R:
        ends = self._bus.clock.monotonic() + timeout_seconds - MARGIN_SECONDS
        failure = EngineError("no_time", counts=False)
        counts = False
        for attempt in range(1, MAX_ATTEMPTS + 1):
            remaining = ends - self._bus.clock.monotonic()
            if remaining <= 0:
                break
            if attempt > 1:
                if not self._bus.retry_budget.take():
                    telemetry.POOL_WITHHELD.inc()
                    counts = False  # another worker may well be in order: nothing is known against the pool as a whole
                    break
                POOL_RETRIES.labels(self._pool, failure.reason).inc()
            # A busy worker could not have done it within the patience: the next one is asked for no more than the deadline.
            last = attempt == MAX_ATTEMPTS or remaining <= patience or failure.reason == "busy"
            seconds = remaining if last else patience
            try:
                answer = await self._ask(subject, request, context, seconds, full=remaining >= patience, again=attempt > 1)
                return read(answer)
            except EngineError as error:
                failure = error
                counts = counts or error.counts
                if error.reason in ("absent", "rejected"):
                    break  # no other worker would say otherwise
        raise EngineError(failure.reason, counts=counts)

    async def _ask(
        self, subject: str, request: Message, context: RequestContext, seconds: float, *, full: bool, again: bool
    ) -> msgspec.Raw:
        # The worker is told this attempt's end: what we no longer wait for, it does not begin. Not told by our clock, whose times
        # would be past for it, or far away, where ours is wrong.
        attempt = context.attempt(seconds, self._bus.clock)
        began = self._bus.clock.monotonic()
        try:
            response = await self._bus.request(subject, request, attempt, idempotent=True, again=again)
        except NoRespondersError:
            raise EngineError("absent", counts=False) from None
        except PortcullisError as error:
            if error.code == ErrorCode.DEADLINE_EXCEEDED:
                # A pool that answers others in the meantime has too much to do, or one worker that hangs. To shut it for that,
                # as the breaker would, would leave nobody to do the work.
                raise EngineError("no_answer", counts=full and self._answered_at < began) from None
            if error.code == ErrorCode.PAYLOAD_TOO_LARGE:
                raise EngineError("rejected", counts=False) from None
            raise EngineError("absent", counts=False) from error
        self._answered_at = self._bus.clock.monotonic()
        if response.reply.error is not None:
            raise _failure(response.reply.error)
        return response.reply.result

    async def health(self) -> Health:
        """Up when a worker of this pool that takes single texts answers that it is."""
        context = RequestContext.lasting(PING_SECONDS, self._bus.clock)
        answers = await self._bus.gather(POOL_PING, None, context, window_seconds=PING_SECONDS)
        states = []
        for answer in answers:
            try:
                metadata = _decode_ping(answer).metadata
            except ValueError:
                continue
            if metadata.get(micro.POOL, DEFAULT_POOL) == self._pool and metadata.get(micro.LANES) != micro.BULK_ONLY:
                states.append(metadata.get(micro.STATUS, "ok"))
        if "ok" in states:
            return "up"
        return "degraded" if "degraded" in states else "down"

    async def close(self) -> None:
        """Nothing of its own to close."""


def _failure(problem: ErrorBody) -> EngineError:
    if problem.code == ErrorCode.OVERLOADED:
        return EngineError("busy", counts=False)
    if problem.code in (ErrorCode.BAD_REQUEST, ErrorCode.INVALID_FIELD, ErrorCode.PAYLOAD_TOO_LARGE):
        return EngineError("rejected", counts=False)
    # A worker that reports a failure is alive; one bad text must not shut the pool for all.
    return EngineError("failed", counts=False)


def _result(raw: msgspec.Raw) -> EngineResult:
    try:
        return _judgement(_decode(raw))
    except (ValueError, RecursionError):
        raise EngineError("malformed") from None


def _outcomes(raw: msgspec.Raw, expected: int) -> list[Outcome]:
    try:
        items = _decode_many(raw).results
    except (ValueError, RecursionError):
        raise EngineError("malformed") from None
    if len(items) != expected:
        raise EngineError("malformed")
    return [
        _judgement(item.result)
        if item.result is not None
        else _failure(item.error)
        if item.error is not None
        else EngineError("malformed")
        for item in items
    ]


def _judgement(result: ModelResult) -> EngineResult:
    return EngineResult(
        confidence=result.confidence,
        model=result.model,
        threshold=result.threshold,
        threat_types=result.threat_types,
        coverage=result.coverage,
        reason=result.reason,
        spans=result.spans,
        transforms=result.transforms,
        timings=result.timings,
    )
