"""The breaker in front of an engine: the circuitbreaker library's, where it is right.

What the base class (2.1.3) gets wrong for concurrent calls, and what holds here instead:

1. it counts consecutive failures only, so that 80 % failures never open it: a failure *rate* over a rolling window opens it too;
2. half-open, it lets every caller through: here exactly one probe, and the rest are refused at once;
3. any exit that is not a failure closes it, a caller's own `CancelledError` too: here a cancelled call is neither success nor
   failure, and a cancelled probe makes room for the next one;
4. a success that arrives after the opening closes it: here the outcome of a call that began before the last change is ignored;
5. it is open for a fixed time: here the time doubles up to a cap, and a success sets it back;
6. it reads the machine's clock: here a clock is injected.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import Any, NoReturn, TypeVar

from circuitbreaker import (  # type: ignore[import-untyped]  # the library ships no types
    STATE_CLOSED,
    STATE_HALF_OPEN,
    STATE_OPEN,
    CircuitBreaker,
    CircuitBreakerError,
)

from libs.common.clock import Clock
from libs.common.contracts import BreakerState
from services.detector_proxy.ports import EngineError

__all__ = ["BreakerChange", "BreakerPolicy", "CircuitBreakerError", "EngineBreaker"]

T = TypeVar("T")

BUCKETS = 10
"""The rolling window is that many buckets of equal length; it forgets a bucket at a time."""
JITTER = 0.2
"""Up to this part is taken off an open time, so that replicas do not probe in step."""


@dataclass(frozen=True, slots=True)
class BreakerPolicy:
    """When a breaker opens, and for how long.

    It opens at `failure_threshold` consecutive failures, or when of at least `minimum_calls` calls in the last `window_seconds`
    the part `failure_rate` has failed. It stays open for `open_seconds`, doubled each time that a probe fails, up to
    `open_max_seconds`.
    """

    failure_threshold: int = 5
    failure_rate: float = 0.5
    minimum_calls: int = 10
    window_seconds: float = 10.0
    open_seconds: float = 1.0
    open_max_seconds: float = 4.0


@dataclass(frozen=True, slots=True)
class BreakerChange:
    """`at`: epoch seconds."""

    name: str
    before: BreakerState
    after: BreakerState
    reason: str
    at: float


def _is_engine_failure(_: type[BaseException], error: BaseException) -> bool:
    return isinstance(error, EngineError) and error.counts


class _Window:
    """Successes and failures of the last seconds, in `BUCKETS` buckets."""

    def __init__(self, seconds: float, now: float) -> None:
        self._bucket_seconds = seconds / BUCKETS
        self._successes = [0] * BUCKETS
        self._failures = [0] * BUCKETS
        self._newest = self._index(now)

    def add(self, now: float, failed: bool) -> None:
        self._forget(now)
        counts = self._failures if failed else self._successes
        counts[self._newest % BUCKETS] += 1

    def totals(self, now: float) -> tuple[int, int]:
        """(successes, failures)"""
        self._forget(now)
        return sum(self._successes), sum(self._failures)

    def clear(self) -> None:
        self._successes = [0] * BUCKETS
        self._failures = [0] * BUCKETS

    def _index(self, now: float) -> int:
        return int(now // self._bucket_seconds)

    def _forget(self, now: float) -> None:
        index = self._index(now)
        for stale in range(max(self._newest + 1, index - BUCKETS + 1), index + 1):
            self._successes[stale % BUCKETS] = 0
            self._failures[stale % BUCKETS] = 0
        self._newest = max(self._newest, index)


class _Call:
    """One admitted call; a context manager whose exit tells the breaker how it went."""

    __slots__ = ("_breaker", "generation")

    def __init__(self, breaker: EngineBreaker, generation: int) -> None:
        self._breaker = breaker
        self.generation = generation

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._breaker._settle(self, error)


class EngineBreaker(CircuitBreaker):  # type: ignore[misc]  # the base class is untyped
    """A breaker for many calls at a time on one event loop. Use `call_async`, or `with breaker.admit():`.

    Both raise `CircuitBreakerError` when the call is not let through. `on_change` is called at each change of state, in the
    middle of the call that causes it: it must be quick and must not raise.
    """

    def __init__(
        self,
        name: str,
        policy: BreakerPolicy,
        clock: Clock,
        on_change: Callable[[BreakerChange], None] | None = None,
        rng: random.Random | None = None,
    ) -> None:
        super().__init__(
            failure_threshold=policy.failure_threshold,
            recovery_timeout=policy.open_seconds,
            expected_exception=_is_engine_failure,
            name=name,
        )
        self._state: BreakerState = STATE_CLOSED
        self.policy = policy
        self.reason: str | None = None
        self._clock = clock
        self._on_change = on_change
        self._random = rng or random.Random()  # noqa: S311  # spreads probes; nothing secret hangs on it
        self._window = _Window(policy.window_seconds, clock.monotonic())
        self._generation = 0
        self._probe: _Call | None = None
        self._failed_probes = 0
        self._opened = clock.monotonic()

    # --- calls -----------------------------------------------------------------------------------------------------------

    def admit(self) -> _Call:
        """Let one call through, or raise `CircuitBreakerError`. The call is over when the returned context manager exits."""
        self.observe()
        if self._state == STATE_CLOSED:
            return _Call(self, self._generation)
        if self._state == STATE_OPEN or self._probe is not None:
            raise CircuitBreakerError(self)
        self._probe = _Call(self, self._generation)
        return self._probe

    def observe(self) -> None:
        """Tell the change to half-open when its time has come, also while nobody calls."""
        if self._state == STATE_OPEN and self.open_remaining <= 0:
            self._move(STATE_HALF_OPEN, "the open time is over")

    def call(self, func: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        with self.admit():
            return func(*args, **kwargs)

    async def call_async(self, func: Callable[..., Awaitable[T]], *args: Any, **kwargs: Any) -> T:
        with self.admit():
            return await func(*args, **kwargs)

    def call_generator(self, func: Callable[..., Iterator[T]], *args: Any, **kwargs: Any) -> Iterator[T]:
        with self.admit():
            yield from func(*args, **kwargs)

    async def call_async_generator(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self.admit():
            async for item in func(*args, **kwargs):
                yield item

    def __enter__(self) -> NoReturn:
        # The base class's own context manager cannot tell one of many concurrent calls from another.
        raise TypeError("use `with breaker.admit():`")

    def _settle(self, call: _Call, error: BaseException | None) -> None:
        if call.generation != self._generation:
            return  # it began before the last change, and says nothing about the engine as it is now
        if error is None:
            self._succeeded(call)
        elif isinstance(error, EngineError) and error.counts:
            self._failed(call, error.reason)
        elif call is self._probe:
            self._probe = None

    def _succeeded(self, call: _Call) -> None:
        self._window.add(self._clock.monotonic(), failed=False)
        self._failure_count = 0
        if call is self._probe:
            self._close("a probe succeeded")

    def _failed(self, call: _Call, reason: str) -> None:
        now = self._clock.monotonic()
        self._window.add(now, failed=True)
        self._failure_count += 1
        if call is self._probe:
            self._failed_probes += 1
            self._open(f"a probe failed: {reason}")
        elif self._failure_count >= self.policy.failure_threshold:
            self._open(f"{self._failure_count} consecutive failures, the last: {reason}")
        else:
            successes, failures = self._window.totals(now)
            calls = successes + failures
            if calls >= self.policy.minimum_calls and failures >= self.policy.failure_rate * calls:
                self._open(f"{failures} of {calls} calls failed, the last: {reason}")

    # --- changes ---------------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Close it by hand, and forget what has been counted."""
        self._close("reset")

    def _open(self, reason: str) -> None:
        policy = self.policy
        # 2 to a bounded power: the exponent itself must not grow for as long as an engine is away.
        seconds = min(policy.open_max_seconds, policy.open_seconds * 2 ** min(self._failed_probes, 32))
        self._recovery_timeout = seconds * (1 - JITTER * self._random.random())
        self._opened = self._clock.monotonic()
        self._probe = None
        self._generation += 1
        self._move(STATE_OPEN, reason)

    def _close(self, reason: str) -> None:
        self._failure_count = 0
        self._failed_probes = 0
        self._window.clear()
        self._probe = None
        self._generation += 1
        if self._state != STATE_CLOSED:
            self._move(STATE_CLOSED, reason)

    def _move(self, after: BreakerState, reason: str) -> None:
        before, self._state = self._state, after
        self.reason = reason
        if self._on_change is not None:
            self._on_change(BreakerChange(self.name, before, after, reason, self._clock.now()))

    # --- what is shown ---------------------------------------------------------------------------------------------------

    @property
    def state(self) -> BreakerState:
        if self._state == STATE_OPEN and self.open_remaining <= 0:
            return "half_open"
        state: BreakerState = self._state
        return state

    @property
    def open_remaining(self) -> float:
        """Seconds until an open breaker lets a probe through; not positive when it would."""
        remaining: float = self._opened + self._recovery_timeout - self._clock.monotonic()
        return remaining

    @property
    def open_until(self) -> datetime:
        return datetime.fromtimestamp(self._clock.now(), UTC) + timedelta(seconds=self.open_remaining)

    @property
    def opened_at(self) -> datetime:
        """When it last opened."""
        elapsed = self._clock.monotonic() - self._opened
        return datetime.fromtimestamp(self._clock.now() - elapsed, UTC)

    def counts(self) -> tuple[int, int]:
        """(successes, failures) in the rolling window."""
        return self._window.totals(self._clock.monotonic())
