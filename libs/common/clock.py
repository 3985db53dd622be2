"""Time, injected: the rules of every service ask a clock, so that tests drive one instead of sleeping."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Both readings are in seconds."""

    def now(self) -> float:
        """Seconds since the Unix epoch; for deadlines and dates that other processes read."""
        ...

    def monotonic(self) -> float:
        """Seconds since some fixed point in this process; for durations."""
        ...


class SystemClock:
    """The machine's own clock."""

    def now(self) -> float:
        return time.time()

    def monotonic(self) -> float:
        return time.monotonic()


class ManualClock:
    """A clock that stands still until it is advanced. For tests and for simulations."""

    def __init__(self, start: float = 1_800_000_000.0) -> None:
        self._now = start
        self._monotonic = 0.0

    def now(self) -> float:
        return self._now

    def monotonic(self) -> float:
        return self._monotonic

    def advance(self, seconds: float) -> None:
        self._now += seconds
        self._monotonic += seconds
