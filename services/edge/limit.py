"""How many single texts may be under way at a time: no more than the stages work on without making each other wait for long.

No I/O, and no clock of its own: whoever uses it tells the time.
"""

from __future__ import annotations

import math
from statistics import median
from typing import Final

WINDOW_SECONDS: Final = 0.25
WINDOW_ANSWERS: Final = 10
"""A window is closed when it has lasted so long and has so many answers."""
STRONGEST_CUT: Final = 0.5
PATIENCE_SECONDS: Final = 1.0
"""Answers must be late for so long before anything is done about it: what a stop of a moment has held up is soon worked off."""
FORGET_SECONDS: Final = 10.0
"""What was learnt so long before nothing was under way any more says nothing about now."""


class AdaptiveLimit:
    """A limit that follows the latency, as the gradient controller of Envoy's adaptive concurrency filter:

        gradient = (base + tolerated) / latency          limit ← limit · gradient + √limit

    `latency` is the median of a window of answers, `base` what it is when hardly anything is under way (Envoy's minRTT), and
    √limit the room to find out whether more is possible.
    https://www.envoyproxy.io/docs/envoy/latest/configuration/http/http_filters/adaptive_concurrency_filter

    What is done otherwise, and why:

    - the base is not measured at set times, for which Envoy refuses nearly everything: every window in which no more than `least`
      were under way tells it anew, and others can only lower it. When the work itself has become slower, the limit falls until it
      tells that, and rises again;
    - `tolerated` is a time and not a part of the base: it is what callers wait for, who do not mind a few milliseconds of a few;
    - the gradient is never above 1. A limit that nothing comes near is doubled instead, and one that holds nothing back is never
      cut below what was under way (Netflix's Gradient2Limit leaves the limit alone then):
      https://github.com/Netflix/concurrency-limits/blob/main/concurrency-limits-core/src/main/java/com/netflix/concurrency/limits/limit/Gradient2Limit.java
    - answers to what began before a cut say nothing about what it has led to, so that it is not made twice;
    - nothing is cut before answers have been late for `PATIENCE_SECONDS` (the interval of CoDel, RFC 8289, for the same reason).

    It begins at `most`: until something has been measured there is no reason to refuse anything.
    """

    def __init__(self, *, least: int, most: int, tolerated_seconds: float) -> None:
        self.in_flight = 0
        self.value = float(most)
        self.base_seconds = math.inf
        """Infinite until it is known."""
        self._most = float(most)
        self._least = float(least)
        self._tolerated_seconds = tolerated_seconds
        self._since = -math.inf
        self._cut_at = -math.inf
        self._peak = 0
        self._latencies: list[float] = []
        self._refused = 0
        self._last_latency = 0.0
        self._last_peak = 1
        self._late_since: float | None = None

    @property
    def full(self) -> bool:
        return self.in_flight >= int(self.value)

    def wait_seconds(self) -> float:
        """How much longer than on an idle gateway a text would take that came now.

        As much as those of the last window, or a part of that when less is under way: never more, since what a burst will lead to
        is not known.
        """
        waited = max(0.0, self._last_latency - self.base_seconds)
        return waited * min(1.0, self.in_flight / self._last_peak)

    def begin(self, now: float) -> None:
        """One more is under way. `now`: seconds of a monotonic clock, here and everywhere."""
        if not self.in_flight and now - self._since > FORGET_SECONDS:
            self.value, self._last_latency, self._late_since = self._most, 0.0, None
            self._start_window(now)
        self.in_flight += 1
        self._peak = max(self._peak, self.in_flight)

    def end(self) -> None:
        self.in_flight -= 1

    def measure(self, began: float, seconds: float, now: float) -> None:
        """One of them, which began at `began`, took `seconds`, without what somebody else's engine took of it."""
        if began < self._cut_at:
            return
        self._latencies.append(seconds)
        self._close(now)

    def refuse(self, began: float, now: float) -> None:
        """One of them was refused by a stage that is full."""
        if began >= self._cut_at:
            self._refused += 1
            self._close(now)

    def _close(self, now: float) -> None:
        """End the window if it is long enough."""
        if len(self._latencies) + self._refused >= WINDOW_ANSWERS and now - self._since >= WINDOW_SECONDS:
            self._adjust(now)
            self._start_window(now)

    def _adjust(self, now: float) -> None:
        gradient = 1.0
        if self._latencies:
            latency = median(self._latencies)
            self.base_seconds = latency if self._peak <= self._least else min(self.base_seconds, latency)
            self._last_latency, self._last_peak = latency, max(1, self._peak)
            if latency > (allowed := self.base_seconds + self._tolerated_seconds):
                gradient = allowed / latency
        if self._refused > len(self._latencies):  # too much for most of them is too much, whatever the others took
            gradient = STRONGEST_CUT
        if gradient < 1:
            self._late_since = now if self._late_since is None else self._late_since
            if now - self._late_since < PATIENCE_SECONDS:
                return
            # From what was under way: a limit far above it would have to be cut many times before anything changes.
            before = min(self.value, float(self._peak))
            changed = before * max(STRONGEST_CUT, gradient) + math.sqrt(before)
            self._cut_at = now
        else:
            self._late_since = None
            changed = self.value * 2 if self._peak < self.value / 2 else self.value + math.sqrt(self.value)
        self.value = min(self._most, max(self._least, changed))

    def _start_window(self, now: float) -> None:
        self._since = now
        self._peak = self.in_flight
        self._latencies.clear()
        self._refused = 0
