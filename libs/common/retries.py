"""How often a process may ask again. No I/O.

Asking again helps when one of many has failed, and does harm when all are late because there is too much to do: then every retry
is more of what is too much, and a short overload never ends. So retries are a bounded part of the requests, whatever the reason.
"""

from __future__ import annotations

from typing import Final

from libs.common.clock import Clock

WINDOW_SECONDS: Final = 10
SHARE: Final = 0.1
FLOOR_PER_SECOND: Final = 10.0


class RetryBudget:
    """In any `WINDOW_SECONDS`, retries are at most `share` of the requests, or `floor_per_second` on average if that is more.

    After Finagle's RetryBudget (https://twitter.github.io/finagle/guide/Clients.html#retries), with its window (`ttl`, 10 s) and
    its floor (`minRetriesPerSec`, 10), without which a process that is asked little could not retry at all. There the floor comes
    on top of the share; here the larger of the two counts, so that 10 % are 10 % from 100 requests a second on. Time is counted
    in whole seconds: the window is up to one of them shorter.
    """

    def __init__(self, clock: Clock, *, share: float = SHARE, floor_per_second: float = FLOOR_PER_SECOND) -> None:
        self._clock = clock
        self._share = share
        self._floor = floor_per_second * WINDOW_SECONDS
        self._requests = [0] * WINDOW_SECONDS
        self._retries = [0] * WINDOW_SECONDS
        self._newest = int(clock.monotonic())

    def count(self) -> None:
        """A request is made (not a retry)."""
        self._forget()
        self._requests[self._newest % WINDOW_SECONDS] += 1

    def take(self) -> bool:
        """Whether one retry may be made now; if so, it counts as made."""
        if self.left < 1:
            return False
        self._retries[self._newest % WINDOW_SECONDS] += 1
        return True

    @property
    def left(self) -> float:
        """Retries that may be made now."""
        self._forget()
        return max(self._floor, self._share * sum(self._requests)) - sum(self._retries)

    def _forget(self) -> None:
        second = int(self._clock.monotonic())
        for stale in range(max(self._newest + 1, second - WINDOW_SECONDS + 1), second + 1):
            self._requests[stale % WINDOW_SECONDS] = self._retries[stale % WINDOW_SECONDS] = 0
        self._newest = max(self._newest, second)
