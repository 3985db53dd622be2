"""When a call is made again, and after which pause."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tenacity import RetryCallState, retry_if_exception

from portcullis_client import errors
from portcullis_client.errors import ConnectionFailedError, PortcullisError

Notice = Callable[[PortcullisError, float], None]
"""Told before each pause: why, and for how many seconds."""


@dataclass(frozen=True, slots=True)
class Retry:
    """How persistent a call is.

    attempts: in all, the first included. 1: never again.
    budget_seconds: the pauses of one call together; a call whose next pause would exceed it fails at once.
    patience_seconds: the pauses of `detect_many` and `results` together since the last result.
    first_pause_seconds, longest_pause_seconds: where the gateway names no time, pauses are random up to a bound that doubles.
    """

    attempts: int = 5
    budget_seconds: float = 30.0
    patience_seconds: float = 120.0
    first_pause_seconds: float = 0.5
    longest_pause_seconds: float = 10.0

    def pause_seconds(self, error: BaseException | None, attempt: int) -> float:
        """The pause after attempt number `attempt`, from 1 on: never less than the gateway asks for, and never the same twice."""
        bound = min(self.longest_pause_seconds, self.first_pause_seconds * 2 ** min(attempt - 1, 30))
        after = error.retry_after if isinstance(error, PortcullisError) else None
        if after is None:
            return random.uniform(bound / 2, bound)  # noqa: S311  # spreads out retries
        return after + random.uniform(0, min(bound, 0.25 * after))  # noqa: S311

    def options(self, *, idempotent: bool, notice: Notice | None) -> dict[str, Any]:
        """For tenacity's `Retrying` and `AsyncRetrying` alike."""

        def stop(state: RetryCallState) -> bool:
            return state.attempt_number >= self.attempts or state.idle_for + state.upcoming_sleep > self.budget_seconds

        def tell(state: RetryCallState) -> None:
            error = state.outcome.exception() if state.outcome else None
            if notice is not None and isinstance(error, PortcullisError):
                notice(error, state.upcoming_sleep)

        return {
            "retry": retry_if_exception(lambda error: worth_repeating(error, idempotent=idempotent)),
            "wait": lambda state: self.pause_seconds(state.outcome.exception() if state.outcome else None, state.attempt_number),
            "stop": stop,
            "before_sleep": tell,
            "reraise": True,
        }


def worth_repeating(error: BaseException, *, idempotent: bool) -> bool:
    """Whether the same call may succeed later, and does no harm if it was done already."""
    if isinstance(error, ConnectionFailedError) and not error.sent:
        return True
    return isinstance(error, errors.PASSING if idempotent else errors.REFUSED_UNDONE)
