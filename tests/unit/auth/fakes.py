"""Auth's outside, by hand: keys and counts in memory, a stream in a list."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, date, datetime

from libs.common import keys
from libs.common.contracts import Credential, DayUsage
from libs.common.errors import PortcullisError
from services.auth.cache import Authenticator
from services.auth.core import (
    KeyChanges,
    LeftBehind,
    Match,
    Peppers,
    Position,
    StoredKey,
    StoreUnavailableError,
    StreamState,
    Tally,
    Usage,
    UsageBatch,
)
from services.auth.ports import PositionMovedError, StreamError, UsageReader

PEPPER = b"a-pepper-for-the-tests"
PEPPERS = Peppers(PEPPER)
CREATED = datetime(2026, 1, 2, 3, 4, 5, 678000, tzinfo=UTC)


def credential_of(api_key: str) -> Credential:
    parsed = keys.parse(api_key)
    assert parsed is not None
    return Credential(key_id=parsed.key_id, digest=parsed.digest)


def new_key(**changes: object) -> tuple[str, StoredKey]:
    """A key's text and its row."""
    api_key = keys.generate()
    credential = credential_of(api_key)
    stored = StoredKey(
        key_id=credential.key_id,
        name="app",
        scopes=("detect", "batch"),
        limit_minute=60,
        limit_day=10_000,
        created_at=CREATED,
        verifier=PEPPERS.verifier(credential.digest),
        pepper_id=PEPPERS.current_id,
    )
    return api_key, replace(stored, **changes)  # type: ignore[arg-type]  # fields by name, in tests only


class MemoryKeys:
    """`KeyStore`. `away`: as if PostgreSQL could not be asked. `gate`: reads wait for it after they have read."""

    def __init__(self, *stored: StoredKey) -> None:
        self.rows = {key.key_id: key for key in stored}
        self.used: dict[str, Usage] = {}
        self.away = False
        self.gate: asyncio.Event | None = None
        self.finds: list[list[str]] = []

    async def _ask(self) -> None:
        await asyncio.sleep(0)  # as with the real one, others may come in between
        if self.away:
            raise StoreUnavailableError("away")

    async def find(self, key_ids: Sequence[str]) -> dict[str, StoredKey]:
        self.finds.append(list(key_ids))
        await self._ask()
        found = {key_id: self.rows[key_id] for key_id in key_ids if key_id in self.rows}
        if self.gate is not None:
            await self.gate.wait()
            await self._ask()
        return found

    async def add(self, key: StoredKey) -> None:
        await self._ask()
        self.rows[key.key_id] = key

    async def replace_secret(
        self, key_id: str, *, current: Sequence[bytes], new: bytes, pepper_id: str, previous_valid_until: datetime
    ) -> StoredKey | None:
        await self._ask()
        row = self.rows.get(key_id)
        if row is None or row.verifier not in current or row.revoked_at is not None:
            return None
        self.rows[key_id] = replace(
            row,
            verifier=new,
            pepper_id=pepper_id,
            previous_verifier=row.verifier,
            previous_pepper_id=row.pepper_id,
            previous_valid_until=previous_valid_until,
        )
        return self.rows[key_id]

    async def store_anew(self, secret: LeftBehind) -> None:
        await self._ask()
        row = self.rows.get(secret.key_id)
        if row is None:
            return
        if secret.match is Match.CURRENT and row.verifier == secret.old:
            self.rows[secret.key_id] = replace(row, verifier=secret.new, pepper_id=secret.pepper_id)
        if secret.match is Match.PREVIOUS and row.previous_verifier == secret.old:
            self.rows[secret.key_id] = replace(row, previous_verifier=secret.new, previous_pepper_id=secret.pepper_id)

    async def count_left(self, pepper_id: str, now: datetime) -> int:
        await self._ask()
        valid = [row for row in self.rows.values() if row.revoked_at is None and (row.expires_at is None or row.expires_at > now)]
        return sum(
            row.pepper_id != pepper_id
            or (row.previous_valid_until is not None and row.previous_valid_until > now and row.previous_pepper_id != pepper_id)
            for row in valid
        )

    async def revoke(self, key_id: str, at: datetime) -> StoredKey | None:
        await self._ask()
        row = self.rows.get(key_id)
        if row is None:
            return None
        self.rows[key_id] = replace(row, revoked_at=row.revoked_at or at)
        return self.rows[key_id]

    async def change(self, key_id: str, changes: KeyChanges) -> StoredKey | None:
        await self._ask()
        row = self.rows.get(key_id)
        if row is None or row.revoked_at is not None:
            return None
        self.rows[key_id] = replace(
            row,
            name=changes.name if changes.name is not None else row.name,
            scopes=changes.scopes if changes.scopes is not None else row.scopes,
            limit_minute=changes.limit_minute if changes.limit_minute is not None else row.limit_minute,
            limit_day=changes.limit_day if changes.limit_day is not None else row.limit_day,
            expires_at=changes.expires_at if changes.expires_at is not None else row.expires_at,
        )
        return self.rows[key_id]

    async def usage(self, key_ids: Sequence[str]) -> dict[str, Usage]:
        await self._ask()
        return {key_id: replace(self.used[key_id], days=()) for key_id in key_ids if key_id in self.used}

    async def days(self, key_id: str, since: date) -> Usage:
        await self._ask()
        usage = self.used.get(key_id, Usage())
        return replace(usage, days=tuple(day for day in usage.days if day.date >= since.isoformat()))

    async def page(self, after: str | None, limit: int) -> list[StoredKey] | None:
        await self._ask()
        ordered = sorted(self.rows.values(), key=lambda key: (key.created_at, key.key_id))
        if after is None:
            return ordered[:limit]
        if after not in self.rows:
            return None
        last = (self.rows[after].created_at, after)
        return [key for key in ordered if (key.created_at, key.key_id) > last][:limit]


class KeyRing:
    """Keys in memory, and what becomes of those who show one. Whoever uses it sets both."""

    store: MemoryKeys
    authenticator: Authenticator

    def add(self, **changes: object) -> tuple[str, StoredKey]:
        api_key, stored = new_key(**changes)
        self.store.rows[stored.key_id] = stored
        return api_key, stored

    async def outcome(self, api_key: str) -> str:
        try:
            await self.authenticator.authenticate(credential_of(api_key))
        except PortcullisError as error:
            return error.code
        return "ok"


class MemoryLedger:
    """`UsageLedger` and `UsageLedgers`; its state outlives the leaders. Writes into the usage of `store`."""

    def __init__(self, store: MemoryKeys) -> None:
        self.store = store
        self.stored: Position | None = None
        self.led = False
        self.before_commit: Callable[[], None] = lambda: None
        self.after_commit: Callable[[], None] = lambda: None

    @asynccontextmanager
    async def lead(self) -> AsyncIterator[MemoryLedger | None]:
        if self.led:
            yield None
            return
        self.led = True
        try:
            yield self
        finally:
            self.led = False

    async def position(self) -> Position | None:
        return self.stored

    async def write(self, batch: UsageBatch, before: Position | None, after: Position) -> None:
        if self.stored != before:
            raise PositionMovedError
        self.before_commit()
        self.stored = after
        for (key_id, day), tally in batch.days.items():
            if key_id in self.store.rows:
                self._add(key_id, day, tally)
        self.after_commit()

    async def forget_days_before(self, day: date) -> None:
        for key_id, usage in self.store.used.items():
            self.store.used[key_id] = replace(usage, days=tuple(d for d in usage.days if d.date >= day.isoformat()))

    def _add(self, key_id: str, day: date, tally: Tally) -> None:
        old = self.store.used.get(key_id, Usage())
        days = {d.date: (d.requests, d.malicious) for d in old.days}
        requests, malicious = days.get(day.isoformat(), (0, 0))
        days[day.isoformat()] = (requests + tally.requests, malicious + tally.malicious)
        at = datetime.fromtimestamp(tally.last_ms / 1000, UTC)
        self.store.used[key_id] = Usage(
            old.requests + tally.requests,
            old.malicious + tally.malicious,
            max(at, old.last_used_at) if old.last_used_at else at,
            tuple(DayUsage(date=d, requests=r, malicious=m) for d, (r, m) in sorted(days.items())),
        )


class MemoryStream:
    """`UsageStream`. Reading ends with `StreamError` when everything has been read."""

    def __init__(self, created: str = "then") -> None:
        self.created = created
        self.events: list[tuple[int, bytes]] = []
        self.next_sequence = 1
        self.batch_events = 3

    def publish(self, body: bytes) -> None:
        self.events.append((self.next_sequence, body))
        self.next_sequence += 1

    async def state(self) -> StreamState:
        first = self.events[0][0] if self.events else self.next_sequence
        return StreamState(self.created, first, self.next_sequence - 1)

    @asynccontextmanager
    async def read(self, after_sequence: int) -> AsyncIterator[UsageReader]:
        yield _MemoryReader([event for event in self.events if event[0] > after_sequence], self.batch_events)


class _MemoryReader:
    def __init__(self, events: list[tuple[int, bytes]], batch_events: int) -> None:
        self._events = events
        self._batch_events = batch_events

    async def batch(self) -> list[tuple[int, bytes]]:
        if not self._events:
            raise StreamError("the end")
        batch, self._events = self._events[: self._batch_events], self._events[self._batch_events :]
        return batch


class RecordingAnnouncer:
    """`KeyAnnouncer`."""

    def __init__(self, forget: Callable[[str], None]) -> None:
        self.announced: list[str] = []
        self._forget = forget

    async def changed(self, key_id: str) -> None:
        self.announced.append(key_id)
        self._forget(key_id)
