"""What the gateway tells, as frozen records. Times are aware datetimes; fields of a newer gateway are ignored."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import msgspec

from portcullis_client.errors import PortcullisError


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """Base of all."""


# --- detections ----------------------------------------------------------------------------------------------------------


class Coverage(Record, frozen=True):
    """What was read of a text. `truncated`: some of it was not."""

    tokens: int
    windows: int
    truncated: bool


class Span(Record, frozen=True):
    """Characters [start, end) of the text, and the probability there; `transform`: how they were read, `base64` say."""

    start: int
    end: int
    score: float
    transform: str | None = None


class Transform(Record, frozen=True):
    """Something that the normaliser undid: what, and how often."""

    name: str
    count: int


class Verdict(Record, frozen=True):
    """A judgement. `confidence`: the calibrated probability that the text is malicious.

    `degraded`: the configured engine could not be asked, or limits were kept without Redis. `reason`, `spans`, `transforms` and
    `timings` (milliseconds by stage) are there when details were asked for. `request_id` and `processing_time_ms` are those of
    the whole call, and None for one text of many.
    """

    is_malicious: bool
    confidence: float
    threat_types: tuple[str, ...]
    endpoint: str
    degraded: bool
    coverage: Coverage | None = None
    processing_time_ms: float | None = None
    request_id: str | None = None
    reason: str | None = None
    spans: tuple[Span, ...] = ()
    transforms: tuple[Transform, ...] = ()
    timings: dict[str, float] = {}


class Item(Record, frozen=True):
    """A text to be judged among others. `id`: your own name for it."""

    text: str
    id: str | None = None


class ItemResult(Record, frozen=True):
    """What became of one text of many: a verdict, or why there is none. Never both, never neither.

    `index`: its place among those that were given, from 0. `cursor`: its place among the stored results of a job.
    """

    index: int
    id: str | None = None
    verdict: Verdict | None = None
    error: PortcullisError | None = None
    cursor: str | None = None

    def unwrap(self) -> Verdict:
        """The verdict. Raises the error when there is none."""
        if self.verdict is None:
            raise self.error or ValueError("neither verdict nor error")
        return self.verdict


# --- jobs ----------------------------------------------------------------------------------------------------------------


class Webhook(Record, frozen=True):
    """Who is told when a job is over. `secret`: what that is signed with; shown once, to whoever submits, and in no repr."""

    url: str
    secret: str | None = None

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return [("url", self.url)]

    def __repr__(self) -> str:
        return f"Webhook(url={self.url!r})"


class Job(Record, frozen=True):
    """An asynchronous batch. `done` counts the items that have a result; `malicious` and `failed` are parts of it."""

    id: str
    state: str
    total: int
    done: int
    malicious: int
    failed: int
    created_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None
    items_per_second: float | None = None
    estimated_end_at: datetime | None = None
    reason: str | None = None
    webhook: Webhook | None = None

    @property
    def finished(self) -> bool:
        """Nothing more will happen to it."""
        return self.state in ("done", "failed", "cancelled")


class JobPage(Record, frozen=True):
    """Jobs, newest first. `next_before`: what to pass as `before` for older ones; None at the end."""

    jobs: tuple[Job, ...]
    next_before: str | None = None


# --- keys ----------------------------------------------------------------------------------------------------------------


class IssuedKey(Record, frozen=True):
    """A new key, shown this once: its repr leaves it out. `previous_valid_until`: until when the old one works on."""

    api_key: str
    key_id: str
    name: str
    scopes: tuple[str, ...]
    rate_limit_per_minute: int
    rate_limit_per_day: int
    created_at: datetime
    expires_at: datetime | None = None
    previous_valid_until: datetime | None = None

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return [(name, getattr(self, name)) for name in self.__struct_fields__ if name != "api_key"]

    def __repr__(self) -> str:
        return f"IssuedKey({', '.join(f'{name}={value!r}' for name, value in self.__rich_repr__())})"


class DayUsage(Record, frozen=True):
    """One calendar day in UTC (ISO date)."""

    date: str
    requests: int
    malicious: int


class KeyRecord(Record, frozen=True):
    """A key as an administrator sees it."""

    key_id: str
    name: str
    scopes: tuple[str, ...]
    rate_limit_per_minute: int
    rate_limit_per_day: int
    created_at: datetime
    expires_at: datetime | None = None
    last_used_at: datetime | None = None
    revoked_at: datetime | None = None
    total_requests: int = 0
    malicious_detections: int = 0
    days: tuple[DayUsage, ...] = ()


class Profile(KeyRecord, frozen=True):
    """The caller's own key. `requests_*` and `remaining_*` count units of the sliding minute and day; None: unknown now."""

    requests_this_minute: int | None = None
    requests_today: int | None = None
    remaining_this_minute: int | None = None
    remaining_today: int | None = None


class KeyPage(Record, frozen=True):
    """Keys, oldest first. `next_after`: what to pass as `after` for more; None at the end."""

    keys: tuple[KeyRecord, ...]
    next_after: str | None = None
