"""Limits while Redis is there and while it is away.

Redis decides as long as it answers within 0.1 s. This process follows every such decision in a state of its own, so that it can
go on where Redis left off. The first call that gets no answer is decided here, and so is every further one, without asking,
until a heartbeat is answered again: the limiter fails open, but bounded.

What is promised while Redis is away: a key's units that Redis had told this replica of still count, so there is no fresh window
to be had. A unit admitted here counts once for each replica that Redis knew of, on the grounds that the others admit as much:
together the N of them admit no more than the limit if calls are spread evenly, and up to N times it if they are not. What is
not kept: keys beyond `max_keys`, and what a key used through other replicas since this one saw it last.

An outage that no call falls into is none, but the data may be gone: a heartbeat that Redis has forgotten is an outage, too.

When Redis is back it is told, with the first call of each key, how many units are in use to this replica's knowledge, so that
an outage (or a Redis that lost its data in it) hands out no second window either.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from libs.common import telemetry
from libs.common.clock import Clock
from services.limiter.core import MAX_LIMIT, Decision, KeyState, KeyStates, Policy
from services.limiter.metrics import DEGRADED_SECONDS, LimitMetrics
from services.limiter.ports import Heartbeat, RateStore, StoreForgotError, StoreUnavailableError

log = logging.getLogger(__name__)

BEAT_SECONDS = 1.0
RETRY_SECONDS = 0.2


class Health:
    """Whether the store answers, how often it has stopped to, and how many replicas share it."""

    def __init__(
        self,
        heartbeat: Heartbeat,
        on_change: Callable[[bool], None],
        *,
        monotonic: Callable[[], float] = time.monotonic,
        beat_seconds: float = BEAT_SECONDS,
        retry_seconds: float = RETRY_SECONDS,
    ) -> None:
        self.up = True
        self.outages = 0
        self.replicas = 1
        self._heartbeat = heartbeat
        self._on_change = on_change
        self._beat_seconds = beat_seconds
        self._retry_seconds = retry_seconds
        self._lost = asyncio.Event()
        self._monotonic = monotonic
        self._down_since = 0.0
        telemetry.STORE_UP.labels("redis").set(1)

    def lost(self, how: str = "does not answer") -> None:
        """The store did not answer, or not from what it had been told: nobody asks it again until a heartbeat is answered."""
        if self.up:
            self.up = False
            self.outages += 1
            self._lost.set()
            self._down_since = self._monotonic()
            telemetry.STORE_UP.labels("redis").set(0)
            log.warning("Redis %s; limits are this replica's own until it answers a heartbeat", how)
            self._on_change(False)

    async def check(self) -> None:
        """One heartbeat, and what follows from it."""
        try:
            self.replicas = max(1, await self._heartbeat.beat())
        except StoreUnavailableError as error:
            self._count_outage()
            self.lost("has lost its data" if isinstance(error, StoreForgotError) else f"does not answer ({error})")
            return
        self._count_outage()
        if not self.up:
            self.up = True
            self._lost.clear()
            telemetry.STORE_UP.labels("redis").set(1)
            log.warning("Redis answers again")
            self._on_change(True)

    def _count_outage(self) -> None:
        """Time without the store, since this was counted last."""
        if not self.up:
            now = self._monotonic()
            DEGRADED_SECONDS.inc(now - self._down_since)
            self._down_since = now

    async def watch(self) -> None:
        """Check for ever: at leisure while the store is up, and often while it is away."""
        while True:
            if self.up:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._beat_seconds):
                        await self._lost.wait()
            if not self.up:
                await asyncio.sleep(self._retry_seconds)
            await self.check()


class Limiter:
    """The limits of one policy, over a store that may go away."""

    def __init__(
        self, policy: Policy, store: RateStore, health: Health, clock: Clock, max_keys: int, *, name: str = "key"
    ) -> None:
        """`name`: whose limits these are, for the metrics: `key` or `address`."""
        self._policy = policy
        self._store = store
        self._health = health
        self._clock = clock
        self._states = KeyStates(policy, max_keys)
        self._metrics = LimitMetrics(name)

    async def decide(self, key: str, limits: Sequence[int], cost: int, *, partial: bool = False) -> tuple[Decision, bool]:
        """Admit `cost` units of `key` in every window or in none (0: only look; `partial`: as many as fit); and whether the store
        had no part in it.
        """
        limits = tuple(min(limit, MAX_LIMIT) for limit in limits)
        decision, local = await self._decide(key, limits, min(cost, MAX_LIMIT + 1), partial=partial)
        if cost:
            self._metrics.count(decision, limits, local=local)
        return decision, local

    async def _decide(self, key: str, limits: tuple[int, ...], cost: int, *, partial: bool) -> tuple[Decision, bool]:
        state = self._states.get(key)
        outages = self._health.outages
        if self._health.up:
            known = None if state.synced == outages else state.used(self._policy, self._clock_ms())
            try:
                decision = await self._store.decide(key, limits, cost, known, partial=partial)
            except StoreUnavailableError as error:
                self._health.lost(f"does not answer ({error})")
            else:
                state.record(self._policy, decision.granted, decision.used, self._clock_ms())
                state.synced = outages
                return decision, False
        if partial:
            return self._decide_partial(state, limits, cost), True
        lowest = min(limits)
        if cost <= lowest:
            cost = min(cost * self._health.replicas, lowest)
        return state.decide(self._policy, limits, cost, self._clock_ms()), True

    def _decide_partial(self, state: KeyState, limits: tuple[int, ...], cost: int) -> Decision:
        """What fits when each unit counts once for every replica; a whole limit that is below their number is one unit."""
        replicas, now_ms = self._health.replicas, self._clock_ms()
        room = min(limit - used for limit, used in zip(limits, state.used(self._policy, now_ms), strict=True))
        lowest = min(limits)
        granted = max(0, min(cost, room // replicas)) or int(cost > 0 and 0 < room == lowest)
        decision = state.decide(self._policy, limits, min(granted * replicas, lowest), now_ms)
        return replace(decision, granted=granted)

    def _clock_ms(self) -> int:
        return int(self._clock.monotonic() * 1000)
