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

Redis may be of several parts, each with keys of its own, as in a cluster. Then all of this holds of each part for itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from libs.common import telemetry
from libs.common.clock import Clock
from services.limiter.core import MAX_LIMIT, Decision, KeyState, KeyStates, Policy
from services.limiter.metrics import DEGRADED_SECONDS, LimitMetrics
from services.limiter.ports import Heartbeat, KeyUnavailableError, RateStore, StoreForgotError, StoreUnavailableError

log = logging.getLogger(__name__)

BEAT_SECONDS = 1.0
RETRY_SECONDS = 0.2


class Whole:
    """All parts of the store together, for the status and the metrics; and the turns by which what happened to which is in order.

    A turn begins with each outage of a part and with each decision that was made without it. What was in line with one part in
    some turn is in line with another part, too, if that had no outage since.
    """

    def __init__(
        self, on_change: Callable[[bool], None] = lambda up: None, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self.turn = 0
        self._on_change = on_change
        self._monotonic = monotonic
        self._away: set[Health] = set()
        self._away_since = 0.0
        telemetry.STORE_UP.labels("redis").set(1)

    @property
    def up(self) -> bool:
        """Whether no part is away."""
        return not self._away

    def next_turn(self) -> int:
        self.turn += 1
        return self.turn

    def lost(self, part: Health) -> None:
        if not self._away:
            self._away_since = self._monotonic()
            telemetry.STORE_UP.labels("redis").set(0)
            self._on_change(False)
        self._away.add(part)

    def found(self, part: Health) -> None:
        """It is there again, or there is no such part any more."""
        if part in self._away:
            self.count_outage()
            self._away.discard(part)
            if not self._away:
                telemetry.STORE_UP.labels("redis").set(1)
                self._on_change(True)

    def count_outage(self) -> None:
        """Time without some part, since this was counted last."""
        if self._away:
            now = self._monotonic()
            DEGRADED_SECONDS.inc(now - self._away_since)
            self._away_since = now


class Health:
    """Whether the store, or a part of it, answers; how often it has stopped to; and how many replicas share it."""

    def __init__(
        self,
        heartbeat: Heartbeat,
        on_change: Callable[[bool], None],
        *,
        name: str = "Redis",
        whole: Whole | None = None,
        monotonic: Callable[[], float] = time.monotonic,
        beat_seconds: float = BEAT_SECONDS,
        retry_seconds: float = RETRY_SECONDS,
    ) -> None:
        """`name`: what the log calls it. `whole`: of which this is a part; None: it is all there is."""
        self.up = True
        self.outages = 0
        self.replicas = 1
        self.whole = Whole(monotonic=monotonic) if whole is None else whole
        self.lost_in = self.whole.turn
        """The turn of its last outage. A part that is new may lack what went before."""
        self._heartbeat = heartbeat
        self._on_change = on_change
        self._name = name
        self._beat_seconds = beat_seconds
        self._retry_seconds = retry_seconds
        self._lost = asyncio.Event()

    def of(self, key: str) -> Health:
        """As `Healths`: of a store that is one part."""
        return self

    def lost(self, how: str = "does not answer") -> None:
        """The store did not answer, or not from what it had been told: nobody asks it again until a heartbeat is answered."""
        if self.up:
            self.up = False
            self.outages += 1
            self.lost_in = self.whole.next_turn()
            self._lost.set()
            log.warning("%s %s; limits are this replica's own until it answers a heartbeat", self._name, how)
            self.whole.lost(self)
            self._on_change(False)

    def found(self) -> None:
        """It is there (again)."""
        if not self.up:
            self.up = True
            self._lost.clear()
            log.warning("%s answers again", self._name)
            self.whole.found(self)
            self._on_change(True)

    def retire(self) -> None:
        """It is no part of the store any more, and nobody will miss it."""
        self.up = False
        self.whole.found(self)

    async def check(self) -> None:
        """One heartbeat, and what follows from it."""
        try:
            self.replicas = max(1, await self._heartbeat.beat())
        except StoreUnavailableError as error:
            self.whole.count_outage()
            self.lost("has lost its data" if isinstance(error, StoreForgotError) else f"does not answer ({error})")
            return
        self.found()

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


class Healths(Protocol):
    """The parts of a store."""

    def of(self, key: str) -> Health:
        """The part that decides about `key`, as far as is known."""
        ...


class Limiter:
    """The limits of one policy, over a store that may go away, in part or as a whole."""

    def __init__(
        self, policy: Policy, store: RateStore, health: Healths, clock: Clock, max_keys: int, *, name: str = "key"
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
        state, health = self._states.get(key), self._health.of(key)
        turn = health.whole.turn
        if health.up:
            is_in_line = state.synced >= health.lost_in and state.synced >= state.apart
            known = None if is_in_line else state.used(self._policy, self._clock_ms())
            try:
                decision = await self._store.decide(key, limits, cost, known, partial=partial)
            except KeyUnavailableError:
                pass
            except StoreUnavailableError as error:
                health.lost(f"does not answer ({error})")
            else:
                state.record(self._policy, decision.granted, decision.used, self._clock_ms())
                state.synced = turn
                return decision, False
        state.apart = health.whole.next_turn()
        if partial:
            return self._decide_partial(state, limits, cost, health.replicas), True
        lowest = min(limits)
        if cost <= lowest:
            cost = min(cost * health.replicas, lowest)
        return state.decide(self._policy, limits, cost, self._clock_ms()), True

    def _decide_partial(self, state: KeyState, limits: tuple[int, ...], cost: int, replicas: int) -> Decision:
        """What fits when each unit counts once for every replica; a whole limit that is below their number is one unit."""
        now_ms = self._clock_ms()
        room = min(limit - used for limit, used in zip(limits, state.used(self._policy, now_ms), strict=True))
        lowest = min(limits)
        granted = max(0, min(cost, room // replicas)) or int(cost > 0 and 0 < room == lowest)
        decision = state.decide(self._policy, limits, min(granted * replicas, lowest), now_ms)
        return replace(decision, granted=granted)

    def _clock_ms(self) -> int:
        return int(self._clock.monotonic() * 1000)
