"""What the limiter does with each message."""

from __future__ import annotations

import random

from libs.common import tracing
from libs.common.context import RequestContext
from libs.common.contracts import (
    Admission,
    AdmittedDetect,
    AnsweredAccount,
    AuthenticatedAdmission,
    AuthenticatedDetect,
    Principal,
    RateState,
    RegisterRequest,
)
from libs.common.errors import ErrorCode, PortcullisError
from libs.common.stages import Answer, Forward
from libs.common.subjects import DETECT_ADMITTED, REGISTER_ADMITTED
from services.limiter.core import Decision, address_key, retry_after_seconds
from services.limiter.failover import Limiter


class RateLimitedError(PortcullisError):
    """A refusal, with the state of the key's limits for the answer's headers (None: the call was not made with a key)."""

    def __init__(self, detail: str, retry_after: int, rate: RateState | None = None) -> None:
        super().__init__(ErrorCode.RATE_LIMITED, detail, retry_after=retry_after)
        self.rate = rate


async def admit(message: AuthenticatedDetect, _: RequestContext, limiter: Limiter, rng: random.Random) -> Forward:
    """Take the call's units from the key's limits. Raises `RateLimitedError`."""
    principal, cost = message.principal, message.cost
    decision, degraded = await limiter.decide(principal.key_id, (principal.limit_minute, principal.limit_day), cost)
    rate = _rate(principal, decision, degraded)
    if not decision.admitted:
        raise RateLimitedError(_refusal(principal, rate, cost), retry_after_seconds(decision.refused, rng), rate)
    return Forward(DETECT_ADMITTED, AdmittedDetect(principal=principal, rate=rate, payload=message.payload, cost=cost))


async def admit_many(message: AuthenticatedAdmission, _: RequestContext, limiter: Limiter, rng: random.Random) -> Answer:
    """Take units for many texts: all of them, or, where the request is `partial`, as many as there is room for.

    Raises `RateLimitedError`, unless the request is partial: that it was granted nothing is an answer.
    """
    principal, cost = message.principal, message.cost
    limits = (principal.limit_minute, principal.limit_day)
    decision, degraded = await limiter.decide(principal.key_id, limits, cost, partial=message.partial)
    rate = _rate(principal, decision, degraded)
    if not decision.admitted:
        raise RateLimitedError(_refusal(principal, rate, cost), retry_after_seconds(decision.refused, rng), rate)
    granted = decision.granted if message.partial else cost
    return Answer(Admission(principal=principal, granted=granted, rate=rate), rate=rate)


async def register(message: RegisterRequest, _: RequestContext, limiter: Limiter, rng: random.Random, per_hour: int) -> Forward:
    """Let an address register so many keys an hour. Raises `RateLimitedError`."""
    decision, _degraded = await limiter.decide(address_key(message.address), (per_hour,), 1)
    if not decision.admitted:
        raise RateLimitedError(
            f"This address has registered {per_hour} keys within an hour, which is the most.",
            retry_after_seconds(decision.refused, rng),
        )
    return Forward(REGISTER_ADMITTED, message)


async def answered(message: AnsweredAccount, _: RequestContext, limiter: Limiter) -> Answer:
    """Send auth's answer on, with the state of the key's limits; that costs nothing."""
    principal = message.principal
    decision, degraded = await limiter.decide(principal.key_id, (principal.limit_minute, principal.limit_day), 0)
    return Answer(message.result, _rate(principal, decision, degraded))


def _rate(principal: Principal, decision: Decision, degraded: bool) -> RateState:
    if degraded:
        tracing.annotate("portcullis.degraded", True)
    minute, day = decision.used
    reset_minute, reset_day = decision.reset_ms
    return RateState(
        limit_minute=principal.limit_minute,
        remaining_minute=max(0, principal.limit_minute - minute),
        reset_minute=reset_minute / 1000,
        limit_day=principal.limit_day,
        remaining_day=max(0, principal.limit_day - day),
        reset_day=reset_day / 1000,
        degraded=degraded,
    )


def _refusal(principal: Principal, rate: RateState, cost: int) -> str:
    units = "1 unit" if cost == 1 else f"{cost} units"
    for limit, remaining, window in (
        (principal.limit_day, rate.remaining_day, "day"),
        (principal.limit_minute, rate.remaining_minute, "minute"),
    ):
        if cost > limit:
            return f"A call of {units} can never pass this key's limit of {limit} a {window}; send fewer texts at a time."
        if cost > remaining:
            return f"This key's limit of {limit} units a {window} leaves {remaining}; the call costs {units}."
    # Redis being away, a unit may count for several replicas.
    return "This key's rate limit is used up."
