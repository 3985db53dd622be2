"""The rules of jobs: what is kept of one, how it ends, whose turn it is, when an item is given up. No I/O."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final, Literal

import msgspec

from libs.common.contracts import ErrorBody, ItemResult, JobState, JobStatus, JobWebhook
from libs.common.errors import CATALOGUE, ErrorCode, PortcullisError

FINAL: Final[frozenset[JobState]] = frozenset({"done", "failed", "cancelled"})
MAX_FAILURES: Final = 5
"""An item that has failed so often, each time by itself, is given up."""
SUSPECT_AFTER: Final = 3
"""An item that was in so many messages that came to nothing is sent in one of its own."""
RATE_SPAN_MS: Final = 60_000
CREDIT_LIFE_SECONDS: Final = 60.0
"""Units that were taken and not used can be used for so long: after that, the window in which they count is over."""

_EXPIRED: Final = "The job was not done within the time that jobs may take."
KEY_GONE: Final = "The API key is no longer valid, or may no longer submit batches."
LOST: Final = "The item was lost before it was judged."

# Nothing is wrong with the item: it is tried again for as long as the job may take.
_TRANSIENT: Final = frozenset(
    {
        ErrorCode.STAGE_UNAVAILABLE,
        ErrorCode.OVERLOADED,
        ErrorCode.NO_ENGINE,
        ErrorCode.DEADLINE_EXCEEDED,
        ErrorCode.RATE_LIMITED,
    }
)
# Of these, what an item may have caused itself, by ending or delaying whoever worked on it.
_VAGUE: Final = frozenset({ErrorCode.STAGE_UNAVAILABLE, ErrorCode.NO_ENGINE, ErrorCode.DEADLINE_EXCEEDED})

Outcome = Literal["benign", "malicious", "failed"]


# --- a job ---------------------------------------------------------------------------------------------------------------


class JobRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What is kept of a job besides its items and results. Times are epoch milliseconds.

    `position`: the place (stream sequence) of the last result that `done`, `malicious` and `failed` include; they are counted
    by position, so that a crash at any point counts nothing twice. `mark_*`: where it stood some time ago, to tell its speed.
    `traceparent`: of the submission, to which the traces of its items go back.
    """

    key_id: str
    job_id: str
    state: JobState
    created_ms: int
    updated_ms: int
    stored_items: int = 0
    stored_bytes: int = 0
    total: int = 0
    digest: str = ""
    threshold: float | None = None
    detailed: bool = False
    webhook_url: str | None = None
    webhook_secret: str | None = None
    traceparent: str = ""
    started_ms: int | None = None
    finished_ms: int | None = None
    reason: str | None = None
    done: int = 0
    malicious: int = 0
    failed: int = 0
    position: int = 0
    mark_ms: int = 0
    mark_done: int = 0
    next_mark_ms: int = 0
    next_mark_done: int = 0

    @property
    def over(self) -> bool:
        return self.state in FINAL


def new_job_id(deadline_ms: int, attempt_of: str) -> str:
    """Sorts by time, and is the same when the same request is sent again.

    12 hex digits of the request's deadline, 16 of a hash of its origin. It need not be a secret: jobs are looked up by key.
    """
    return f"{deadline_ms & 0xFFFFFFFFFFFF:012x}{hashlib.sha256(attempt_of.encode()).hexdigest()[:16]}"


def seal(
    record: JobRecord,
    now_ms: int,
    *,
    total: int,
    digest: str,
    threshold: float | None,
    detailed: bool,
    webhook: tuple[str, str] | None,
    traceparent: str = "",
) -> JobRecord:
    """The submission is complete. `webhook`: URL and secret."""
    url, secret = webhook if webhook is not None else (None, None)
    return msgspec.structs.replace(
        record,
        state="queued",
        updated_ms=now_ms,
        total=total,
        digest=digest,
        threshold=threshold,
        detailed=detailed,
        webhook_url=url,
        webhook_secret=secret,
        traceparent=traceparent,
    )


def count(record: JobRecord, outcomes: Iterable[tuple[int, Outcome]], now_ms: int) -> JobRecord:
    """Add what has been stored behind `record.position`, (place, outcome) in order; the job is done with its last item.

    One that is over stays as it ended: what was in hand then may have been stored afterwards.
    """
    done, malicious, failed, position = record.done, record.malicious, record.failed, record.position
    for place, outcome in outcomes:
        done += 1
        malicious += outcome == "malicious"
        failed += outcome == "failed"
        position = place
    if done == record.done:
        return record
    if record.over:
        return msgspec.structs.replace(record, done=done, malicious=malicious, failed=failed, position=position)
    changed = msgspec.structs.replace(
        record,
        state="running",
        started_ms=record.started_ms or now_ms,
        updated_ms=now_ms,
        done=done,
        malicious=malicious,
        failed=failed,
        position=position,
    )
    if done >= record.total:
        return msgspec.structs.replace(changed, state="done", finished_ms=now_ms)
    return _mark(changed, now_ms)


def _mark(record: JobRecord, now_ms: int) -> JobRecord:
    """Move the marks on, so that the older one is one to two spans back."""
    if not record.next_mark_ms:
        return msgspec.structs.replace(
            record, mark_ms=record.started_ms or now_ms, mark_done=0, next_mark_ms=now_ms, next_mark_done=record.done
        )
    if now_ms - record.next_mark_ms < RATE_SPAN_MS:
        return record
    return msgspec.structs.replace(
        record,
        mark_ms=record.next_mark_ms,
        mark_done=record.next_mark_done,
        next_mark_ms=now_ms,
        next_mark_done=record.done,
    )


def started(record: JobRecord, now_ms: int) -> JobRecord:
    return msgspec.structs.replace(record, state="running", started_ms=now_ms, updated_ms=now_ms)


def end(record: JobRecord, state: Literal["failed", "cancelled"], reason: str | None, now_ms: int) -> JobRecord:
    return msgspec.structs.replace(record, state=state, reason=reason, finished_ms=now_ms, updated_ms=now_ms)


def expire(record: JobRecord, now_ms: int, max_run_ms: int) -> JobRecord | None:
    """The job, failed, when it has had its time; else None."""
    return end(record, "failed", _EXPIRED, now_ms) if now_ms - record.created_ms > max_run_ms else None


def status_of(record: JobRecord, now_ms: int, *, with_secret: bool = False) -> JobStatus:
    rate, end_at = _speed(record, now_ms)
    webhook = None
    if record.webhook_url is not None:
        webhook = JobWebhook(url=record.webhook_url, secret=record.webhook_secret if with_secret else None)
    return JobStatus(
        job_id=record.job_id,
        state=record.state,
        total=record.total,
        done=record.done,
        malicious=record.malicious,
        failed=record.failed,
        created_at=iso(record.created_ms),
        detailed=record.detailed,
        items_per_second=rate,
        estimated_end_at=end_at,
        started_at=iso(record.started_ms) if record.started_ms is not None else None,
        finished_at=iso(record.finished_ms) if record.finished_ms is not None else None,
        reason=record.reason,
        webhook=webhook,
    )


def _speed(record: JobRecord, now_ms: int) -> tuple[float | None, str | None]:
    """Items a second, and when the last one will be done at that speed; of a job that is over, that of the whole.

    Up to now and not to the last result: a job that waits for its key's limits becomes slower all the time.
    """
    if record.started_ms is None:
        return None, None
    since, done, until = record.mark_ms or record.started_ms, record.done - record.mark_done, now_ms
    if record.over:
        since, done, until = record.started_ms, record.done, record.finished_ms or record.updated_ms
    if done <= 0 or until <= since:
        return None, None
    per_second = done * 1000 / (until - since)
    if record.over:
        return round(per_second, 3), None
    return round(per_second, 3), iso(until + int((record.total - record.done) / per_second * 1000))


def iso(ms: int) -> str:
    return datetime.fromtimestamp(ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


# --- items ---------------------------------------------------------------------------------------------------------------


def outcome_of(result: ItemResult) -> Outcome:
    if result.verdict is None:
        return "failed"
    return "malicious" if result.verdict.is_malicious else "benign"


def error_result(code: str, detail: str) -> ItemResult:
    return ItemResult(error=ErrorBody(code=code, detail=detail))


def code_of(error: ErrorBody) -> ErrorCode:
    """A code of a newer release cannot be told from an outage."""
    return ErrorCode(error.code) if error.code in CATALOGUE else ErrorCode.STAGE_UNAVAILABLE


def is_transient(code: ErrorCode) -> bool:
    return code in _TRANSIENT


@dataclass(slots=True)
class _Doubt:
    """`apart`: a message was refused for one of its items, which may be this one."""

    own: int = 0
    vague: int = 0
    apart: bool = False
    successes_seen: int = 0


class Doubts:
    """Which items may be at fault themselves. `key` is whatever names an item.

    An error of an item's own counts against it. A message that comes to nothing (a stage died, or took too long) says nothing
    about its items; but an item that was in several of those is then sent alone, and when that comes to nothing while other
    messages go through, it counts. Kept by each replica for itself: a replica that starts anew gives every item its chances anew.
    """

    def __init__(self) -> None:
        self._successes = 0
        self._of: dict[tuple[str, int], _Doubt] = {}

    def __len__(self) -> int:
        return len(self._of)

    def succeeded(self) -> None:
        """A message has gone through."""
        self._successes += 1

    def clear(self, item: tuple[str, int]) -> None:
        """The item has its result."""
        self._of.pop(item, None)

    def forget_job(self, job_id: str) -> None:
        for item in [item for item in self._of if item[0] == job_id]:
            del self._of[item]

    def alone(self, item: tuple[str, int]) -> bool:
        """Whether the item is to be sent in a message of its own."""
        doubt = self._of.get(item)
        return doubt is not None and (doubt.own > 0 or doubt.apart or doubt.vague >= SUSPECT_AFTER)

    def unproven(self, item: tuple[str, int]) -> bool:
        """Whether the item is a suspect, and nothing has gone through since it failed: it may be the item, or an outage."""
        doubt = self._of.get(item)
        return doubt is not None and doubt.vague >= SUSPECT_AFTER and self._successes == doubt.successes_seen

    def failed(self, item: tuple[str, int], code: ErrorCode, *, attributed: bool) -> bool:
        """The item has no verdict; whether it is to be given up now.

        `attributed`: it was the item that failed, or the only one of a message that did.
        """
        if is_transient(code) and code not in _VAGUE:
            return False
        doubt = self._of.setdefault(item, _Doubt(successes_seen=self._successes))
        if not is_transient(code):
            if attributed:
                doubt.own += 1
            else:
                doubt.apart = True
        else:
            alone = attributed and self.alone(item)
            doubt.vague += 1
            if alone and self._successes > doubt.successes_seen:
                doubt.own += 1
            doubt.successes_seen = self._successes
        return doubt.own >= MAX_FAILURES

    def retry_seconds(self, item: tuple[str, int], rng: random.Random) -> float:
        """How long to leave a failed item alone: 1 s, doubled with each failure of its own, ±25 %."""
        doubt = self._of.get(item)
        return min(60.0, 2.0 ** (max(0, doubt.own - 1) if doubt is not None else 0)) * rng.uniform(0.75, 1.25)


def split(sizes: list[int], most_items: int, most_characters: int) -> list[int]:
    """How many items each message takes, in order; one that is too large by itself has a message of its own."""
    counts: list[int] = []
    held = characters = 0
    for size in sizes:
        if held and (held >= most_items or characters + size > most_characters):
            counts.append(held)
            held = characters = 0
        held += 1
        characters += size
    return [*counts, held] if held else counts


# --- whose turn it is ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Queue:
    """A job that is not over, as its queue is seen: items that wait, and items that some replica has in hand."""

    key_id: str
    job_id: str
    waiting: int
    in_hand: int
    created_ms: int = 0


@dataclass(slots=True)
class _Turn:
    """Times are monotonic seconds; `served`: when it had its last turn, counted in turns."""

    blocked_until: float = 0.0
    in_flight: int = 0
    served: int = 0


class Schedule:
    """Fair over keys first, and over the jobs of a key then: the one with the fewest messages in flight, then the one that has
    waited longest for its turn."""

    def __init__(self, most_per_job: int) -> None:
        self._most_per_job = most_per_job
        self._turns = 0
        self._waiting: dict[tuple[str, str], int] = {}
        self._keys: dict[str, _Turn] = {}
        self._jobs: dict[tuple[str, str], _Turn] = {}

    def refresh(self, queues: Iterable[Queue]) -> None:
        """What there is to do now, from those who know; jobs that are not named have none."""
        self._waiting = {(queue.key_id, queue.job_id): queue.waiting for queue in queues if queue.waiting > 0}
        keys = {key_id for key_id, _ in self._waiting}
        self._keys = {key: turn for key, turn in self._keys.items() if key in keys or turn.in_flight}
        self._jobs = {job: turn for job, turn in self._jobs.items() if job in self._waiting or turn.in_flight}

    @property
    def has_waiting(self) -> bool:
        return bool(self._waiting)

    def take(self, now: float, most: int) -> tuple[str, str, int] | None:
        """Whose turn it is, and how many items to fetch. `done` must follow."""
        ready = [job for job in self._waiting if self._ready(job, now)]
        if not ready:
            return None
        self._turns += 1
        job = min(ready, key=self._order)
        for turn in (self._key(job[0]), self._job(job)):
            turn.in_flight += 1
            turn.served = self._turns
        items = min(most, self._waiting[job])
        self._waiting[job] -= items
        if not self._waiting[job]:
            del self._waiting[job]
        return (*job, items)

    def done(self, key_id: str, job_id: str) -> None:
        self._key(key_id).in_flight -= 1
        self._job((key_id, job_id)).in_flight -= 1

    def block_key(self, key_id: str, until: float) -> None:
        """The key has used up its limits until then."""
        self._key(key_id).blocked_until = until

    def block_job(self, key_id: str, job_id: str, until: float) -> None:
        self._job((key_id, job_id)).blocked_until = until

    def drop(self, key_id: str, job_id: str) -> None:
        self._waiting.pop((key_id, job_id), None)

    def _ready(self, job: tuple[str, str], now: float) -> bool:
        turn = self._job(job)
        return self._key(job[0]).blocked_until <= now and turn.blocked_until <= now and turn.in_flight < self._most_per_job

    def _order(self, job: tuple[str, str]) -> tuple[int, int, int, int]:
        key, own = self._key(job[0]), self._job(job)
        return key.in_flight, key.served, own.in_flight, own.served

    def _key(self, key_id: str) -> _Turn:
        return self._keys.setdefault(key_id, _Turn())

    def _job(self, job: tuple[str, str]) -> _Turn:
        return self._jobs.setdefault(job, _Turn())


@dataclass(slots=True)
class Purse:
    """Units of keys' limits that were taken and not used: by items that had a result already, or that nobody could judge."""

    _units: dict[str, list[tuple[float, int]]] = field(default_factory=dict)
    """By key: since when, and how many."""

    def put(self, key_id: str, units: int, since: float) -> None:
        """`since`: when they were taken of the limits, however often they have been here in the meantime."""
        if units > 0:
            self._units.setdefault(key_id, []).append((since, units))

    def take(self, key_id: str, most: int, now: float) -> tuple[int, float]:
        """How many, and since when the oldest of them are held."""
        held = sorted(lot for lot in self._units.pop(key_id, []) if now - lot[0] <= CREDIT_LIFE_SECONDS)
        taken, oldest = 0, now
        while held and taken < most:
            since, units = held.pop(0)
            oldest = min(oldest, since)
            used = min(units, most - taken)
            taken += used
            if used < units:
                held.insert(0, (since, units - used))
        if held:
            self._units[key_id] = held
        return taken, oldest


# --- refusals ------------------------------------------------------------------------------------------------------------


def not_found() -> PortcullisError:
    return PortcullisError(ErrorCode.NOT_FOUND, "There is no such job.")


def conflict() -> PortcullisError:
    return PortcullisError(ErrorCode.CONFLICT, "The Idempotency-Key was used before, with another body.")


def superseded() -> PortcullisError:
    return PortcullisError(ErrorCode.CONFLICT, "The submission was given up in favour of a later one.")


# --- webhooks ------------------------------------------------------------------------------------------------------------


def webhook_pause_seconds(attempt: int) -> float:
    """After the given attempt, counted from 1: 1 s, 5 s, 25 s, … up to an hour."""
    return min(3600.0, 5.0 ** (attempt - 1))
