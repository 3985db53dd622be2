"""Who is let in: single texts up to a limit that follows their latency, and none that would wait past its deadline."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable

from libs.common.clock import Clock
from libs.common.errors import ErrorCode, PortcullisError
from services.edge.limit import AdaptiveLimit
from services.edge.metrics import DETECT_BASE, DETECT_IN_FLIGHT, DETECT_LIMIT, Shed, shed
from services.edge.ports import Answered
from services.edge.replies import Refused

RETRY_AFTER_SECONDS = (1, 3)
"""Who is refused together is not asked to come back together."""
ENGINE = "engine"
"""The part of an answer's timings that the primary engine took."""


class Admission:
    """Lets single texts through to the stages, or says at once that there is no room for them.

    Nobody waits here: what would have to is better off with another replica, or later.
    """

    def __init__(self, limit: AdaptiveLimit, clock: Clock) -> None:
        self._limit = limit
        self._clock = clock
        DETECT_LIMIT.set_function(lambda: int(limit.value))
        DETECT_IN_FLIGHT.set_function(lambda: limit.in_flight)
        DETECT_BASE.set_function(lambda: limit.base_seconds)

    def check(self, remaining_seconds: float) -> None:
        """Raises OVERLOADED when a text with so many seconds left would be refused now."""
        if self._limit.full:
            raise _refusal(Shed.LIMIT)
        if self._limit.wait_seconds() > max(0.0, remaining_seconds):  # what is late already is answered as that
            raise _refusal(Shed.DEADLINE)

    async def through(self, ask: Callable[[], Awaitable[Answered]], remaining_seconds: float) -> Answered:
        """What `ask` answers, if it is let in. Raises OVERLOADED as `check`, or what `ask` raises."""
        self.check(remaining_seconds)
        began = self._clock.monotonic()
        self._limit.begin(began)
        try:
            answered = await ask()
        except (PortcullisError, Refused) as failure:
            error = failure.error if isinstance(failure, Refused) else failure
            # Others say nothing about how long a verdict takes.
            if error.code == ErrorCode.DEADLINE_EXCEEDED:
                self._measure(began, 0.0)
            elif error.code == ErrorCode.OVERLOADED:
                self._limit.refuse(began, self._clock.monotonic())
            raise
        else:
            self._measure(began, answered.timings.get(ENGINE, 0.0) / 1000)
            return answered
        finally:
            self._limit.end()

    def _measure(self, began: float, elsewhere_seconds: float) -> None:
        now = self._clock.monotonic()
        self._limit.measure(began, max(0.0, now - began - elsewhere_seconds), now)


def _refusal(reason: Shed) -> PortcullisError:
    shed(reason)
    return PortcullisError(ErrorCode.OVERLOADED, retry_after=random.randint(*RETRY_AFTER_SECONDS))  # noqa: S311  # spreads retries
