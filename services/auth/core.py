"""The rules of keys: what is stored of one, when it is valid, what it may do, and how usage adds up. No I/O."""

from __future__ import annotations

import hmac
import math
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from enum import Enum
from typing import Final

from libs.common.contracts import DayUsage, KeyRecord, Principal, Scope, UsageRecorded
from libs.common.errors import ErrorCode, PortcullisError
from libs.common.keys import ID_LENGTH

SCOPES: Final[tuple[Scope, ...]] = ("detect", "batch", "admin")
SELF_REGISTERED_SCOPES: Final[tuple[Scope, ...]] = ("detect", "batch")
DEFAULT_PER_MINUTE: Final = 60
DEFAULT_PER_DAY: Final = 10_000
ADMIN_MAX_PER_MINUTE: Final = 1_000_000
ADMIN_MAX_PER_DAY: Final = 1_000_000_000
MAX_NAME_CHARACTERS: Final = 100
PROFILE_DAYS: Final = 30

_KEY_ID = re.compile(rf"[0-9A-Za-z]{{{ID_LENGTH}}}", re.ASCII)
# Control characters, lone surrogates, line and paragraph separators: they break logs, tables and PostgreSQL (NUL).
_FORBIDDEN_CATEGORIES = frozenset({"Cc", "Cs", "Zl", "Zp"})


class StoreUnavailableError(PortcullisError):
    """PostgreSQL could not be asked. Never to be taken for "there is no such key"."""

    def __init__(self, internal: str, retry_after: int = 1) -> None:
        super().__init__(ErrorCode.STAGE_UNAVAILABLE, internal=internal, retry_after=retry_after)


class StoreRefusesError(StoreUnavailableError):
    """PostgreSQL is there, but not for us: wrong password, or no such database."""


@dataclass(frozen=True, slots=True)
class StoredKey:
    """A row of `api_keys`. Verifiers are HMACs (32 bytes); all times are aware, in UTC.

    `pepper_id` and `previous_pepper_id`: of the pepper under which each verifier is, as far as is known.
    """

    key_id: str
    name: str
    scopes: tuple[Scope, ...]
    limit_minute: int
    limit_day: int
    created_at: datetime
    verifier: bytes = field(repr=False)
    previous_verifier: bytes | None = field(default=None, repr=False)
    previous_valid_until: datetime | None = None
    expires_at: datetime | None = None
    revoked_at: datetime | None = None
    pepper_id: str | None = None
    previous_pepper_id: str | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """What a key has been used for. `days`: oldest first, days without usage left out."""

    requests: int = 0
    malicious: int = 0
    last_used_at: datetime | None = None
    days: tuple[DayUsage, ...] = ()


@dataclass(frozen=True, slots=True)
class KeyChanges:
    """What an administrator changes of a key; None: as it was."""

    name: str | None = None
    scopes: tuple[Scope, ...] | None = None
    limit_minute: int | None = None
    limit_day: int | None = None
    expires_at: datetime | None = None


# --- verification --------------------------------------------------------------------------------------------------------


class Match(Enum):
    """Which of a key's secrets was presented."""

    CURRENT = "current"
    PREVIOUS = "previous"


def verifier_of(pepper: bytes, digest: str) -> bytes:
    """HMAC-SHA-256 over a key's digest (hex): what the store holds. Neither the key nor its digest can be had from it."""
    return hmac.digest(pepper, digest.encode(), "sha256")


def pepper_id(pepper: bytes) -> str:
    """Tells peppers from one another, 8 hex digits: stored beside what is under a pepper, it shows what is not yet exchanged.

    An HMAC, of which 32 bits are kept: a pepper that was drawn at random cannot be had from it.
    """
    return hmac.digest(pepper, b"portcullis pepper id", "sha256")[:4].hex()


class Peppers:
    """The secrets under which keys are stored. New ones are under the current one; while it is exchanged, others may still be
    under the previous one.
    """

    def __init__(self, current: bytes, previous: bytes | None = None) -> None:
        self._all = (current,) if previous is None else (current, previous)
        self.current_id = pepper_id(current)

    @property
    def is_exchanging(self) -> bool:
        return len(self._all) > 1

    def verifier(self, digest: str) -> bytes:
        """Under the current pepper: what is to be stored."""
        return verifier_of(self._all[0], digest)

    def verifiers(self, digest: str) -> tuple[bytes, ...]:
        """Under each of them, the current one first: what may be stored."""
        return tuple([verifier_of(pepper, digest) for pepper in self._all])


@dataclass(frozen=True, slots=True)
class LeftBehind:
    """A secret that is stored under another pepper than the current one, or is not known to be under that: `old`. The same
    secret under the current pepper: `new`.
    """

    key_id: str
    match: Match
    old: bytes = field(repr=False)
    new: bytes = field(repr=False)
    pepper_id: str


class VerifiableKey:
    """A stored key made ready for the request's path: the answer is built once, the times are plain numbers."""

    __slots__ = ("_expires", "_pepper_ids", "_previous", "_previous_until", "_verifier", "principal", "revoked")

    def __init__(self, key: StoredKey) -> None:
        self.principal = Principal(key_id=key.key_id, scopes=key.scopes, limit_minute=key.limit_minute, limit_day=key.limit_day)
        self._verifier = key.verifier
        self._previous = key.previous_verifier
        self._pepper_ids = (key.pepper_id, key.previous_pepper_id)
        self._previous_until = key.previous_valid_until.timestamp() if key.previous_valid_until else -math.inf
        self._expires = key.expires_at.timestamp() if key.expires_at else math.inf
        self.revoked = key.revoked_at is not None

    def is_valid(self, now: float) -> bool:
        """Neither revoked nor expired at `now` (epoch s)."""
        return not self.revoked and now < self._expires

    def match(self, presented: Sequence[bytes], now: float) -> Match | None:
        """Which secret `presented` (its verifier under each pepper) is.

        None when it is neither, or when the key is not valid at `now` (epoch s).
        """
        if not self.is_valid(now):
            return None
        if _fits(presented, self._verifier):
            return Match.CURRENT
        if self._previous is not None and _fits(presented, self._previous) and now < self._previous_until:
            return Match.PREVIOUS
        return None

    def left_behind(self, match: Match, presented: Sequence[bytes], current_id: str) -> LeftBehind | None:
        """What is to be stored anew of the secret that was presented and found to be `match`; None: it is where it belongs.

        What counts is the verifier. The id beside it may be unknown.
        """
        old, its_id = (self._verifier, self._pepper_ids[0]) if match is Match.CURRENT else (self._previous, self._pepper_ids[1])
        if old is None or (its_id == current_id and old == presented[0]):
            return None
        return LeftBehind(self.principal.key_id, match, old, presented[0], current_id)

    def valid_until(self, match: Match) -> float:
        """When this secret stops working, epoch s; infinity if it has no end."""
        return min(self._expires, self._previous_until) if match is Match.PREVIOUS else self._expires


def _fits(presented: Sequence[bytes], stored: bytes) -> bool:
    """Whether it is stored under one of the peppers. All are compared, each in constant time."""
    return True in [hmac.compare_digest(verifier, stored) for verifier in presented]


def is_key_id(value: str) -> bool:
    """Whether `value` can be a key's id at all; nothing else is looked up, cached or written."""
    return _KEY_ID.fullmatch(value) is not None


def require_scope(principal: Principal, scope: Scope) -> None:
    if scope not in principal.scopes:
        raise PortcullisError(ErrorCode.FORBIDDEN, f"This key does not have the scope {scope!r}.")


def equal_secrets(one: str, other: str) -> bool:
    """Compared in constant time."""
    return hmac.compare_digest(one.encode(), other.encode())


# --- fields --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Caps:
    """The highest limits that may be asked for."""

    per_minute: int
    per_day: int


ADMIN_CAPS: Final = Caps(ADMIN_MAX_PER_MINUTE, ADMIN_MAX_PER_DAY)


class Fields:
    """Collects what is wrong with a request's fields, so that the caller hears of all of it at once."""

    def __init__(self) -> None:
        self._problems: list[tuple[str, str]] = []

    def name(self, value: str) -> str:
        if not 1 <= len(value) <= MAX_NAME_CHARACTERS or value.isspace():
            self._problems.append(("name", f"must be 1 to {MAX_NAME_CHARACTERS} characters and not blank"))
        elif any(unicodedata.category(character) in _FORBIDDEN_CATEGORIES for character in value):
            self._problems.append(("name", "must not contain control characters"))
        return value

    def limit(self, path: str, value: int, maximum: int) -> int:
        if not 1 <= value <= maximum:
            self._problems.append((path, f"must be from 1 to {maximum}"))
        return value

    def limits(self, per_minute: int | None, per_day: int | None, caps: Caps) -> tuple[int, int]:
        """Both limits, with the defaults (no higher than the caps) in place of None."""
        return (
            self.limit(
                "rate_limit_per_minute",
                min(DEFAULT_PER_MINUTE, caps.per_minute) if per_minute is None else per_minute,
                caps.per_minute,
            ),
            self.limit("rate_limit_per_day", min(DEFAULT_PER_DAY, caps.per_day) if per_day is None else per_day, caps.per_day),
        )

    def scopes(self, value: tuple[Scope, ...]) -> tuple[Scope, ...]:
        """Each once, in the order of SCOPES."""
        if not value:
            self._problems.append(("scopes", "must name at least one scope"))
        return tuple(scope for scope in SCOPES if scope in value)

    def expiry(self, value: str | None, now: datetime) -> datetime | None:
        """An ISO 8601 time with an offset, in the future."""
        if value is None:
            return None
        try:
            # astimezone on a time near year 1 or 9999 overflows.
            parsed = datetime.fromisoformat(value)
            if parsed.tzinfo is None:
                raise ValueError
            parsed = parsed.astimezone(UTC)
        except (ValueError, OverflowError):
            self._problems.append(("expires_at", "must be an ISO 8601 time with an offset, such as 2030-01-01T00:00:00Z"))
            return None
        if parsed <= now:
            self._problems.append(("expires_at", "must lie in the future"))
        return parsed

    def refuse(self, path: str, problem: str) -> None:
        self._problems.append((path, problem))

    def check(self) -> None:
        """Raises `PortcullisError` INVALID_FIELD when something was wrong."""
        if self._problems:
            raise PortcullisError(ErrorCode.INVALID_FIELD, fields=tuple(self._problems))


# --- what a caller sees --------------------------------------------------------------------------------------------------


def utc(seconds: float) -> datetime:
    """Epoch seconds as a time in UTC, to the millisecond: what is shown is what is stored."""
    return datetime.fromtimestamp(math.floor(seconds * 1000) / 1000, UTC)


def iso(time: datetime) -> str:
    """ISO 8601 in UTC with milliseconds and a Z."""
    return time.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _iso(time: datetime | None) -> str | None:
    return iso(time) if time is not None else None


def record_of(key: StoredKey, usage: Usage) -> KeyRecord:
    return KeyRecord(
        key_id=key.key_id,
        name=key.name,
        scopes=key.scopes,
        rate_limit_per_minute=key.limit_minute,
        rate_limit_per_day=key.limit_day,
        created_at=iso(key.created_at),
        expires_at=_iso(key.expires_at),
        last_used_at=_iso(usage.last_used_at),
        revoked_at=_iso(key.revoked_at),
        total_requests=usage.requests,
        malicious_detections=usage.malicious,
        days=usage.days,
    )


def first_profile_day(now: datetime) -> date:
    """The oldest of the 30 UTC days, today included, that a profile shows."""
    return now.astimezone(UTC).date() - timedelta(days=PROFILE_DAYS - 1)


# --- usage ---------------------------------------------------------------------------------------------------------------

# No event that a proxy can have written is from before this gateway existed, or counts more than a batch's worth by far.
_EARLIEST_MS = int(datetime(2020, 1, 1, tzinfo=UTC).timestamp() * 1000)
_LATEST_MS = int(datetime(2200, 1, 1, tzinfo=UTC).timestamp() * 1000)
_MOST_UNITS = 1_000_000


def is_sane(event: UsageRecorded) -> bool:
    """Whether an event can be counted. One that cannot must be passed over, or it would stop the count for ever."""
    return (
        is_key_id(event.key_id)
        and _EARLIEST_MS <= event.at_ms < _LATEST_MS
        and 0 <= event.requests <= _MOST_UNITS
        and 0 <= event.malicious <= _MOST_UNITS
    )


@dataclass(slots=True)
class Tally:
    requests: int = 0
    malicious: int = 0
    last_ms: int = 0


@dataclass(slots=True)
class UsageBatch:
    """Events added up. `days`: by key and UTC day; `totals`: by key."""

    days: dict[tuple[str, date], Tally] = field(default_factory=dict)
    totals: dict[str, Tally] = field(default_factory=dict)


def add_up(events: Iterable[UsageRecorded]) -> UsageBatch:
    """Sane events (`is_sane`) by key and by day."""
    batch = UsageBatch()
    for event in events:
        day = datetime.fromtimestamp(event.at_ms / 1000, UTC).date()
        for tally in (
            batch.days.setdefault((event.key_id, day), Tally()),
            batch.totals.setdefault(event.key_id, Tally()),
        ):
            tally.requests += event.requests
            tally.malicious += event.malicious
            tally.last_ms = max(tally.last_ms, event.at_ms)
    return batch


@dataclass(frozen=True, slots=True)
class StreamState:
    """What a stream says of itself. `created` tells a re-created stream, whose sequences begin again, from the old one."""

    created: str
    first_sequence: int
    last_sequence: int


@dataclass(frozen=True, slots=True)
class Position:
    """Everything up to `sequence` of the stream created at `created` has been counted."""

    created: str
    sequence: int


def resume(stored: Position | None, stream: StreamState) -> Position:
    """Where to go on counting.

    A stream that was re-created, or that lost its end in a crash of the server (its last sequence is behind what was already
    counted), hands out sequences anew: nothing that it holds from there on has been counted.
    """
    if stored is None or stored.created != stream.created:
        return Position(stream.created, 0)
    return Position(stream.created, min(stored.sequence, stream.last_sequence))


def lost_events(position: Position, stream: StreamState) -> int:
    """How many events the stream has dropped (age or size) before they were counted."""
    return max(0, stream.first_sequence - position.sequence - 1) if position.sequence else 0
