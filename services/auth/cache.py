"""Keys in memory: how a request is authenticated without PostgreSQL, and what happens when PostgreSQL is needed or away."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from libs.common import tasks, tracing
from libs.common.clock import Clock
from libs.common.contracts import Credential, Principal
from libs.common.errors import ErrorCode, PortcullisError
from services.auth import metrics
from services.auth.core import LeftBehind, Match, Peppers, StoredKey, StoreUnavailableError, VerifiableKey, is_key_id

Find = Callable[[Sequence[str]], Awaitable[dict[str, StoredKey]]]

STALE_SECONDS: Final = 30.0
"""How long a key that was read once keeps working while PostgreSQL is away."""
UNKNOWN_TTL_SECONDS: Final = 2.0
UNKNOWN_ENTRIES: Final = 16_384
PATIENCE_SECONDS: Final = 0.1
"""How long a request with a known, somewhat old key waits for PostgreSQL before the old knowledge is used."""
LOOKUP_TIMEOUT_SECONDS: Final = 1.0
RETRY_PAUSE_SECONDS: Final = 1.0
"""After a failed read, known keys are not refreshed for so long."""
RECHECK_SECONDS: Final = 1.0
"""A secret that does not fit a cached key is checked against PostgreSQL if the cached key is older than this."""
BATCH_KEYS: Final = 256


@dataclass(slots=True)
class _Entry:
    key: VerifiableKey
    read_at: float


@dataclass(slots=True, eq=False)
class _Flight:
    """One read of one key. `overtaken`: the key was changed after the read began, so its outcome must not be used.

    `traceparent`: of the request that has asked for it first.
    """

    key_id: str
    overtaken: bool = False
    traceparent: str = field(default_factory=tracing.here)
    outcome: asyncio.Future[VerifiableKey | None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    def __post_init__(self) -> None:
        # A refresh that nobody waits for may fail: that is not an unhandled error.
        self.outcome.add_done_callback(lambda outcome: outcome.cancelled() or outcome.exception())


class KeyCache:
    """What this replica knows of keys: bounded, least recently used first out.

    - An entry read up to `ttl_seconds` ago is used without PostgreSQL; in the second half of that time it is refreshed in the
      background, so that a key in use never waits. While PostgreSQL is away, entries are good for 30 s after their last read.
    - Reads are made by one task, as many keys at a time as have come up: concurrent misses of one key are one read, and a
      flood of unknown keys is a few large queries on one connection.
    - `forget` (a key was changed) drops the entry and whatever a read that is under way will bring.
    """

    def __init__(self, find: Find, clock: Clock, *, ttl_seconds: float, entries: int, is_up: Callable[[], bool]) -> None:
        self._find = find
        self._clock = clock
        self._ttl = ttl_seconds
        self._refresh_after = ttl_seconds / 2
        self._entries = entries
        self._is_up = is_up
        self._known: dict[str, _Entry] = {}  # in the order of use
        self._unknown: dict[str, float] = {}  # when it was found not to exist, in the order of that
        self._flights: dict[str, _Flight] = {}
        self._queue: list[_Flight] = []
        self._reader: asyncio.Task[None] | None = None
        self._failed_at = -RETRY_PAUSE_SECONDS

    def __len__(self) -> int:
        return len(self._known) + len(self._unknown)

    async def get(self, key_id: str, *, max_age_seconds: float | None = None) -> VerifiableKey | None:
        """The key, None when there is none. `max_age_seconds` asks for newer knowledge than usual.

        Raises `StoreUnavailableError` when that is not known and PostgreSQL cannot be asked.
        """
        entry = self._known.get(key_id)
        if entry is None:
            return await self._get_unknown(key_id)
        # Put to the end: a dict keeps the order of insertion.
        del self._known[key_id]
        self._known[key_id] = entry
        age = self._clock.monotonic() - entry.read_at
        if max_age_seconds is not None:
            if age <= max_age_seconds:
                metrics.HIT.inc()
                return entry.key
            if not self._is_up():
                raise StoreUnavailableError("PostgreSQL is away and the secret is not known")
            return await self._read(key_id, LOOKUP_TIMEOUT_SECONDS)
        if age <= self._ttl:
            metrics.HIT.inc()
            if age > self._refresh_after:
                self.refresh(key_id)
            return entry.key
        return await self._get_old(entry, key_id, age)

    def refresh(self, key_id: str) -> None:
        """Read a key anew in the background; until then, what is known of it is good."""
        if key_id not in self._flights and not self._recently_failed():
            self._begin(key_id)

    def forget(self, key_id: str) -> None:
        self._known.pop(key_id, None)
        self._unknown.pop(key_id, None)
        if (flight := self._flights.pop(key_id, None)) is not None:
            flight.overtaken = True

    def clear(self) -> None:
        """Forget everything: changes may have been missed."""
        self._known.clear()
        self._unknown.clear()
        for flight in self._flights.values():
            flight.overtaken = True
        self._flights.clear()

    async def close(self) -> None:
        if self._reader is not None:
            await tasks.end(self._reader)

    async def _get_unknown(self, key_id: str) -> VerifiableKey | None:
        if not is_key_id(key_id):
            return None
        found_at = self._unknown.get(key_id)
        up = self._is_up()
        if found_at is not None:
            if up and self._clock.monotonic() - found_at <= UNKNOWN_TTL_SECONDS:
                metrics.UNKNOWN.inc()
                return None
            del self._unknown[key_id]
        if not up:
            raise StoreUnavailableError("PostgreSQL is away and the key is not known")
        return await self._read(key_id, LOOKUP_TIMEOUT_SECONDS)

    async def _get_old(self, entry: _Entry, key_id: str, age: float) -> VerifiableKey | None:
        usable = age <= STALE_SECONDS
        if usable and (not self._is_up() or self._recently_failed()):
            metrics.STALE.inc()
            self.refresh(key_id)
            return entry.key
        try:
            return await self._read(key_id, PATIENCE_SECONDS if usable else LOOKUP_TIMEOUT_SECONDS)
        except StoreUnavailableError:
            if usable and self._known.get(key_id) is entry:
                metrics.STALE.inc()
                return entry.key
            raise

    def _recently_failed(self) -> bool:
        return self._clock.monotonic() - self._failed_at < RETRY_PAUSE_SECONDS

    async def _read(self, key_id: str, timeout_seconds: float) -> VerifiableKey | None:
        with tracing.span("look up key"):
            try:
                async with asyncio.timeout(timeout_seconds):
                    while True:
                        flight = self._flights.get(key_id) or self._begin(key_id)
                        # Shielded: the flight belongs to everybody who waits for this key.
                        key = await asyncio.shield(flight.outcome)
                        if not flight.overtaken:
                            metrics.READ.inc()
                            return key
            except TimeoutError:
                raise StoreUnavailableError("PostgreSQL did not answer in time") from None

    def _begin(self, key_id: str) -> _Flight:
        flight = self._flights[key_id] = _Flight(key_id)
        self._queue.append(flight)
        if self._reader is None or self._reader.done():
            self._reader = asyncio.get_running_loop().create_task(self._read_queue())
        return flight

    async def _read_queue(self) -> None:
        while self._queue:
            flights, self._queue = self._queue[:BATCH_KEYS], self._queue[BATCH_KEYS:]
            # One read for many requests is shown in the trace of one of them: of the first.
            tracing.enter(flights[0].traceparent)
            # The age of what is read counts from before the read.
            began = self._clock.monotonic()
            try:
                found = await self._find([flight.key_id for flight in flights])
            except StoreUnavailableError as error:
                self._failed_at = self._clock.monotonic()
                self._end(flights, error)
            else:
                for flight in flights:
                    self._land(flight, found.get(flight.key_id), began)
            finally:
                # Nobody may wait for ever, whatever ended the read; after a regular end there is nothing left to do.
                self._end(flights, StoreUnavailableError("the read was broken off"))

    def _land(self, flight: _Flight, stored: StoredKey | None, began: float) -> None:
        key = VerifiableKey(stored) if stored is not None else None
        if not flight.overtaken:
            del self._flights[flight.key_id]
            self._known.pop(flight.key_id, None)
            if key is not None:
                self._known[flight.key_id] = _Entry(key, began)
                if len(self._known) > self._entries:
                    del self._known[next(iter(self._known))]
            else:
                self._unknown[flight.key_id] = began
                if len(self._unknown) > UNKNOWN_ENTRIES:
                    del self._unknown[next(iter(self._unknown))]
        if not flight.outcome.done():
            flight.outcome.set_result(key)

    def _end(self, flights: list[_Flight], error: StoreUnavailableError) -> None:
        for flight in flights:
            if not flight.outcome.done():
                if self._flights.get(flight.key_id) is flight:
                    del self._flights[flight.key_id]
                flight.outcome.set_exception(error)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls, and with which of the key's secrets. `valid_until`: the end of that, epoch s.

    `verifiers`: of the secret that was presented, under each pepper.
    """

    principal: Principal
    match: Match
    verifiers: tuple[bytes, ...] = field(repr=False)
    valid_until: float = math.inf


class Authenticator:
    """From a credential to a caller.

    `leave`: what is done with a secret that is not under the current pepper. It must not take any time; nobody waits for it.
    """

    def __init__(
        self, cache: KeyCache, clock: Clock, peppers: Peppers, leave: Callable[[LeftBehind], None] | None = None
    ) -> None:
        self._cache = cache
        self._clock = clock
        self._peppers = peppers
        self._leave = leave

    async def authenticate(self, credential: Credential) -> Caller:
        """Raises `PortcullisError` INVALID_CREDENTIALS (malformed, unknown, revoked, expired: one and the same), or
        `StoreUnavailableError`.
        """
        presented = self._peppers.verifiers(credential.digest)
        for max_age_seconds in (None, RECHECK_SECONDS):
            # A secret that does not fit what is cached may be one that was issued a moment ago.
            key = await self._cache.get(credential.key_id, max_age_seconds=max_age_seconds)
            if key is None:
                break
            if (match := key.match(presented, self._clock.now())) is not None:
                tracing.annotate("portcullis.key_id", credential.key_id)
                if self._leave is not None:
                    left = key.left_behind(match, presented, self._peppers.current_id)
                    if left is not None:
                        self._leave(left)
                return Caller(key.principal, match, presented, key.valid_until(match))
            if key.revoked:
                break
        raise PortcullisError(ErrorCode.INVALID_CREDENTIALS)

    async def identify(self, key_id: str) -> Principal:
        """The owner of a valid key whose secret has been checked before. Raises as `authenticate`."""
        key = await self._cache.get(key_id)
        if key is None or not key.is_valid(self._clock.now()):
            raise PortcullisError(ErrorCode.INVALID_CREDENTIALS)
        return key.principal
