"""What auth needs of the outside, as its rules see it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from datetime import date, datetime
from typing import Protocol

from services.auth.core import KeyChanges, LeftBehind, Position, StoredKey, StreamState, Usage, UsageBatch


class KeyStore(Protocol):
    """Keys. Every method raises `StoreUnavailableError` when the store cannot be asked in time."""

    async def find(self, key_ids: Sequence[str]) -> dict[str, StoredKey]:
        """The keys among `key_ids` that exist."""
        ...

    async def add(self, key: StoredKey) -> None: ...

    async def replace_secret(
        self, key_id: str, *, current: Sequence[bytes], new: bytes, pepper_id: str, previous_valid_until: datetime
    ) -> StoredKey | None:
        """Make `new` (under the pepper `pepper_id`) the verifier and keep the present one as the previous one.

        None when the present one is not one of `current` any more.
        """
        ...

    async def store_anew(self, secret: LeftBehind) -> None:
        """Put a secret under the current pepper, if it is still stored as `secret.old`. The secret itself stays what it is."""
        ...

    async def count_left(self, pepper_id: str, now: datetime) -> int:
        """How many keys are valid at `now`, and have a valid secret that is not known to be under the pepper `pepper_id`."""
        ...

    async def revoke(self, key_id: str, at: datetime) -> StoredKey | None:
        """Revoke; a key that is revoked already keeps its time. None: no such key."""
        ...

    async def change(self, key_id: str, changes: KeyChanges) -> StoredKey | None:
        """None: no such key, or revoked."""
        ...

    async def usage(self, key_ids: Sequence[str]) -> dict[str, Usage]:
        """Totals (without days) of the keys that have any."""
        ...

    async def days(self, key_id: str, since: date) -> Usage:
        """Totals and the days from `since` on."""
        ...

    async def page(self, after: str | None, limit: int) -> list[StoredKey] | None:
        """Keys in the order of their creation, after the key `after`; None: no key `after`."""
        ...


class KeyAnnouncer(Protocol):
    """Tells every replica, this one first, to forget what it has cached of a key."""

    async def changed(self, key_id: str) -> None: ...


class UsageLedger(Protocol):
    """The counts, in the hands of the one replica that may write them."""

    async def position(self) -> Position | None:
        """Up to where has been counted."""
        ...

    async def write(self, batch: UsageBatch, before: Position | None, after: Position) -> None:
        """Add the batch and move the position from `before` to `after`, both or neither.

        Raises `PositionMovedError` when the position is not `before` any more: somebody else has counted.
        """
        ...

    async def forget_days_before(self, day: date) -> None: ...


class PositionMovedError(Exception):
    """Another replica counts; this one must begin anew."""


class UsageLedgers(Protocol):
    def lead(self) -> AbstractAsyncContextManager[UsageLedger | None]:
        """The ledger, if no other replica holds it."""
        ...


class UsageReader(Protocol):
    """Events in the order of the stream, without a gap."""

    async def batch(self) -> list[tuple[int, bytes]]:
        """The next (sequence, body) pairs; empty when there are none for a while. Raises `StreamError`."""
        ...


class StreamError(Exception):
    """The stream could not be read on; open it anew."""


class UsageStream(Protocol):
    async def state(self) -> StreamState:
        """Raises `StreamError`."""
        ...

    def read(self, after_sequence: int) -> AbstractAsyncContextManager[UsageReader]: ...
