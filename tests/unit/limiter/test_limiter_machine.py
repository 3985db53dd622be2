"""Calls, outages of the store, losses of its data and time in any order, against a log of what was truly admitted, and when.

`test_core.py` holds the rule alone against such a log; here are replicas over a store that goes and comes, and what they tell.
"""

from __future__ import annotations

import math
import random
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

import msgspec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from libs.common.clock import ManualClock
from libs.common.context import RequestContext
from libs.common.contracts import Admission, AuthenticatedAdmission, AuthenticatedDetect, Principal, RateState
from services.limiter import handlers
from services.limiter.core import PER_KEY, RETRY_BANDS, RETRY_JITTER, Decision, KeyState
from services.limiter.failover import Health, Limiter
from services.limiter.handlers import RateLimitedError
from services.limiter.ports import StoreForgotError, StoreUnavailableError
from tests.fuzz.budget import examples
from tests.unit.limiter.rule import DAY, MINUTE, ExactLog

T = TypeVar("T")
CONTEXT = RequestContext(2**53, "request", "trace")
PAYLOAD = msgspec.Raw(b"{}")
SPARE_SECONDS = 0.002
"""Times are whole milliseconds, and the clock is a float."""


def at_once(call: Coroutine[Any, Any, T]) -> T:
    """What a call comes to that never has to wait."""
    try:
        call.send(None)
    except StopIteration as ended:
        value: T = ended.value
        return value
    raise AssertionError("it waits")


class Store:
    """One key's state for all replicas."""

    def __init__(self, clock: ManualClock) -> None:
        self.away = False
        self.state = KeyState(PER_KEY)
        self.replicas: set[Beats] = set()
        self._clock = clock

    def forget(self) -> None:
        self.state = KeyState(PER_KEY)
        self.replicas.clear()

    async def decide(
        self, key: str, limits: Sequence[int], cost: int, known: Sequence[int] | None, *, partial: bool = False
    ) -> Decision:
        if self.away:
            raise StoreUnavailableError
        return self.state.decide(PER_KEY, limits, cost, int(self._clock.monotonic() * 1000), known, partial=partial)


class Beats:
    """One replica's heartbeat."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._was_known = False

    async def beat(self) -> int:
        was_known, self._was_known = self._was_known, not self._store.away
        if self._store.away:
            raise StoreUnavailableError
        forgotten = self not in self._store.replicas
        self._store.replicas.add(self)
        if was_known and forgotten:
            raise StoreForgotError
        return len(self._store.replicas)


def bands(fewest: int, most: int) -> tuple[int, int]:
    """The least and the most that Retry-After may say when between `fewest` and `most` calls were refused in the window."""

    def band(refused: int) -> tuple[float, float]:
        return next((low, high) for limit, low, high in RETRY_BANDS if limit is None or refused <= limit)

    return max(1, math.ceil(band(fewest)[0] * (1 - RETRY_JITTER))), math.floor(band(most)[1] * (1 + RETRY_JITTER))


class LimiterMachine(RuleBasedStateMachine):
    """`calm`: the store has never been away, so that it alone decided."""

    @initialize(
        replicas=st.sampled_from((1, 1, 2, 3)),
        minute=st.integers(1, 40),
        days=st.sampled_from((1, 2, 10, 1000)),
        seed=st.integers(),
    )
    def begin(self, replicas: int, minute: int, days: int, seed: int) -> None:
        self.clock = ManualClock()
        self.store = Store(self.clock)
        beats = [Beats(self.store) for _ in range(replicas)]
        self.health = [Health(each, lambda _: None, monotonic=self.clock.monotonic) for each in beats]
        self.limiters = [Limiter(PER_KEY, self.store, health, self.clock, 10) for health in self.health]
        for _ in range(2):  # at the second beat all know of all
            self.everybody_beats()
        self.principal = Principal(key_id="k", scopes=("detect",), limit_minute=minute, limit_day=minute * days)
        self.rng = random.Random(seed)
        self.log = ExactLog()
        self.refusals: list[float] = []
        self.calm = True
        self.losses = 0

    # --- what is called ---------------------------------------------------------------------------------------------------

    def ask(self, replica: int, cost: int) -> RateLimitedError | None:
        """A call of `cost` units: None, or the refusal."""
        limiter = self.limiters[replica % len(self.limiters)]
        local = self.store.away or not self.health[replica % len(self.limiters)].up
        message = AuthenticatedDetect(principal=self.principal, payload=PAYLOAD, cost=cost)
        try:
            at_once(handlers.admit(message, CONTEXT, limiter, self.rng))
        except RateLimitedError as refusal:
            self.refused(refusal, cost, local)
            return refusal
        self.admitted(cost)
        return None

    def admitted(self, units: int) -> None:
        self.log.admit(self.clock.monotonic(), units)

    def refused(self, refusal: RateLimitedError, cost: int, local: bool) -> None:
        now = self.clock.monotonic()
        self.refusals.append(now)
        assert refusal.rate is not None
        assert refusal.rate.degraded is local
        assert refusal.retry_after is not None
        assert bands(1, 1)[0] <= refusal.retry_after <= bands(31, 31)[1]
        if not self.calm:
            return
        # Had the windows been 1.9 % longer, an exact limiter would have refused it too.
        assert any(
            self.log.units(now, (window.span_ms + window.width_ms + 1) / 1000) + cost > limit
            for limit, window in zip((self.principal.limit_minute, self.principal.limit_day), PER_KEY.windows, strict=True)
        )
        longer = PER_KEY.windows[0].span_ms / 1000 + SPARE_SECONDS
        fewest, most = (sum(at > now - seconds for at in self.refusals) for seconds in (MINUTE, longer))
        low, high = bands(fewest, most)
        assert low <= refusal.retry_after <= high

    @rule(replica=st.integers(0, 2), cost=st.integers(1, 45))
    def call(self, replica: int, cost: int) -> None:
        self.ask(replica, cost)

    @rule(replica=st.integers(0, 2), calls=st.integers(2, 60))
    def burst(self, replica: int, calls: int) -> None:
        for _ in range(calls):
            self.ask(replica, 1)

    @rule(replica=st.integers(0, 2), cost=st.integers(1, 45))
    def take(self, replica: int, cost: int) -> None:
        limiter = self.limiters[replica % len(self.limiters)]
        message = AuthenticatedAdmission(principal=self.principal, cost=cost, partial=True)
        answer = at_once(handlers.admit_many(message, CONTEXT, limiter, self.rng))
        assert isinstance(answer.result, Admission)
        assert 0 <= answer.result.granted <= cost
        if answer.result.granted:
            self.admitted(answer.result.granted)
        self.told(answer.rate)

    @rule(replica=st.integers(0, 2))
    def come_back_when_told(self, replica: int) -> None:
        """`t` of `RateLimit`: a refused caller who waits for so long is admitted, and one who comes sooner is not."""
        refusal = self.ask(replica, 1)
        alone = len(self.limiters) == 1 or (self.health[replica % len(self.limiters)].up and not self.store.away)
        if refusal is None or refusal.rate is None or not alone:  # without the store, a unit counts for each replica
            return
        wait = max(refusal.rate.reset_minute, refusal.rate.reset_day)
        assert wait > 0
        if wait > 2 * SPARE_SECONDS:
            self.clock.advance(wait - SPARE_SECONDS)
            assert self.ask(replica, 1) is not None
            self.clock.advance(SPARE_SECONDS)
        self.clock.advance(SPARE_SECONDS)
        assert self.ask(replica, 1) is None

    def told(self, rate: RateState | None) -> None:
        """Nobody is told of more than there is."""
        assert rate is not None
        if self.calm or len(self.limiters) == 1:
            now = self.clock.monotonic()
            assert rate.remaining_minute <= rate.limit_minute - self.log.units(now, MINUTE)
            assert rate.remaining_day <= rate.limit_day - self.log.units(now, DAY)

    # --- what happens to it -----------------------------------------------------------------------------------------------

    @rule(seconds=st.sampled_from((0.001, 0.3, 0.937, 0.94, 5.0, 29.0, 59.9, 60.0, 60.151, 61.1, 400.0, 1350.0, 86_000.0)))
    def wait(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @rule()
    def lose_the_store(self) -> None:
        self.store.away = True
        self.calm = False

    @precondition(lambda self: self.store.away)
    @rule(with_its_data=st.booleans())
    def the_store_comes_back(self, with_its_data: bool) -> None:
        self.store.away = False
        if not with_its_data:
            self.forget()

    @rule()
    def forget(self) -> None:
        """Also without having been away. A beat comes before the next call: what a second has time for is left out."""
        self.calm = False
        self.losses += 1
        self.store.forget()
        self.everybody_beats()

    def everybody_beats(self) -> None:
        for health in self.health:
            at_once(health.check())

    @rule(replica=st.integers(0, 2))
    def heartbeat(self, replica: int) -> None:
        at_once(self.health[replica % len(self.health)].check())

    # --- what holds -------------------------------------------------------------------------------------------------------

    @invariant()
    def never_more_than_the_limit(self) -> None:
        """With one replica whatever happens to the store; with several, one limit for each that was on its own."""
        times = 1 if self.calm or len(self.limiters) == 1 else 1 + self.losses + len(self.limiters)
        now = self.clock.monotonic()
        assert self.log.units(now, MINUTE) <= times * self.principal.limit_minute
        assert self.log.units(now, DAY) <= times * self.principal.limit_day


LimiterMachine.TestCase.settings = settings(max_examples=examples(100), stateful_step_count=40)
TestLimiterMachine = LimiterMachine.TestCase
