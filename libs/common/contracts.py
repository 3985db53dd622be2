"""The messages on the bus: frozen, JSON, version 1 (the `v1` of their subjects).

Fields may be added with a default; none is renamed, removed or given another meaning within a version, so that services of
neighbouring releases run side by side. Unknown fields are ignored for the same reason. Golden examples: tests/contract.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Raw, Struct

MAX_TEXT_CHARACTERS = 100_000

ThreatType = Literal["jailbreak", "injection", "system_prompt_leak", "data_extraction", "encoding_attack", "delimiter_attack"]
THREAT_TYPES: tuple[ThreatType, ...] = (
    "jailbreak",
    "injection",
    "system_prompt_leak",
    "data_extraction",
    "encoding_attack",
    "delimiter_attack",
)
Scope = Literal["detect", "batch", "admin"]
BreakerState = Literal["closed", "open", "half_open"]

Probability = Annotated[float, Meta(ge=0.0, le=1.0)]


NULL = Raw(b"null")


class Message(Struct, frozen=True, kw_only=True):
    """Base of everything that crosses the bus."""


# --- who calls -----------------------------------------------------------------------------------------------------------


class Credential(Message, frozen=True):
    """An API key as it crosses the bus: its public id and the SHA-256 of the whole key, hex. The key itself stays at the edge."""

    key_id: str
    digest: str


class Principal(Message, frozen=True):
    """A caller whose key has been verified. Limits are units per sliding minute and per sliding day."""

    key_id: str
    scopes: tuple[Scope, ...]
    limit_minute: int
    limit_day: int


class RateState(Message, frozen=True):
    """What is left of a key's limits after this call.

    `reset_*`: seconds until the next unit is free, 0 when one is free now. `degraded`: Redis could not be asked, so the limits
    were those of this limiter process alone.
    """

    limit_minute: int
    remaining_minute: int
    reset_minute: float
    limit_day: int
    remaining_day: int
    reset_day: float
    degraded: bool = False


# --- a detection ---------------------------------------------------------------------------------------------------------


class DetectPayload(Message, frozen=True):
    """What is to be judged. `threshold` None: that of the model which answers."""

    text: Annotated[str, Meta(min_length=1, max_length=MAX_TEXT_CHARACTERS)]
    threshold: Probability | None = None
    detailed: bool = False


class DetectRequest(Message, frozen=True):
    """edge → auth. `payload` is a `DetectPayload` that stays encoded until the proxy: no stage before it reads a text."""

    credential: Credential
    payload: Raw
    cost: Annotated[int, Meta(ge=1)] = 1


class AuthenticatedDetect(Message, frozen=True):
    """auth → limiter."""

    principal: Principal
    payload: Raw
    cost: Annotated[int, Meta(ge=1)] = 1


class AdmittedDetect(Message, frozen=True):
    """limiter → detector_proxy."""

    principal: Principal
    rate: RateState
    payload: Raw
    cost: Annotated[int, Meta(ge=1)] = 1


# --- many texts ----------------------------------------------------------------------------------------------------------


MAX_ITEMS_PER_MESSAGE = 64
"""Texts that one message on the bus carries; a message is also bounded in bytes, by the server's `max_payload`."""


class AdmissionRequest(Message, frozen=True):
    """edge → auth: units for many texts, which then go straight to the proxy. All of `cost` is taken, or nothing."""

    credential: Credential
    cost: Annotated[int, Meta(ge=1)]


class AuthenticatedAdmission(Message, frozen=True):
    """auth → limiter. `partial`: take as much of `cost` as there is room for."""

    principal: Principal
    cost: Annotated[int, Meta(ge=1)]
    partial: bool = False


class Admission(Message, frozen=True):
    """The limiter's answer: `granted` units were taken from the key's limits (0 only where the request was `partial`)."""

    principal: Principal
    granted: int
    rate: RateState


class TakeRequest(Message, frozen=True):
    """jobs → auth: up to `cost` units of the limits of a key that is known by its id alone, for work accepted earlier."""

    key_id: str
    cost: Annotated[int, Meta(ge=1)]


class DetectItems(Message, frozen=True):
    """edge or jobs → detector_proxy: texts whose units have been taken. Answered by `ItemResults`, in the same order.

    `rate_degraded`: the limiter ran without Redis when it admitted them. `threshold` None: that of the model which answers.
    """

    key_id: str
    texts: Annotated[
        tuple[Annotated[str, Meta(min_length=1, max_length=MAX_TEXT_CHARACTERS)], ...],
        Meta(min_length=1, max_length=MAX_ITEMS_PER_MESSAGE),
    ]
    threshold: Probability | None = None
    detailed: bool = False
    rate_degraded: bool = False


class ModelItems(Message, frozen=True):
    """detector_proxy → a worker of a pool; answered by `ModelItemResults`, in the same order. Done after interactive work."""

    texts: Annotated[
        tuple[Annotated[str, Meta(min_length=1, max_length=MAX_TEXT_CHARACTERS)], ...],
        Meta(min_length=1, max_length=MAX_ITEMS_PER_MESSAGE),
    ]
    detailed: bool = False


class Coverage(Message, frozen=True):
    """What was read of a text. `truncated`: some of it was not."""

    tokens: int
    windows: int
    truncated: bool


class Span(Message, frozen=True):
    """Characters [start, end) of the text as sent, and the probability of the window or sentence there."""

    start: int
    end: int
    score: float
    transform: str | None = None


class Transform(Message, frozen=True):
    """Something that the normaliser undid: what, and how often."""

    name: str
    count: int


class Verdict(Message, frozen=True):
    """An engine's judgement. `threat_types` is empty when `is_malicious` is false. `timings`: milliseconds by stage."""

    is_malicious: bool
    confidence: Probability
    threat_types: tuple[ThreatType, ...]
    endpoint: str
    degraded: bool
    coverage: Coverage | None = None
    reason: str | None = None
    spans: tuple[Span, ...] = ()
    transforms: tuple[Transform, ...] = ()
    timings: dict[str, float] = {}


class ModelRequest(Message, frozen=True):
    """detector_proxy → a worker of a pool."""

    text: Annotated[str, Meta(min_length=1, max_length=MAX_TEXT_CHARACTERS)]
    detailed: bool = False


class ModelResult(Message, frozen=True):
    """A worker's judgement, before any threshold is applied.

    `confidence` is the calibrated probability; `threshold` the one that the model was shipped with; `threat_types` those that
    would be named if the text is malicious (never empty).
    """

    confidence: Probability
    threshold: Probability
    threat_types: tuple[ThreatType, ...]
    model: str
    coverage: Coverage
    reason: str | None = None
    spans: tuple[Span, ...] = ()
    transforms: tuple[Transform, ...] = ()
    timings: dict[str, float] = {}


# --- keys ----------------------------------------------------------------------------------------------------------------


class RegisterRequest(Message, frozen=True):
    """edge → limiter → auth. Limits None: the defaults. `admin_digest`: SHA-256 of an admin token, hex."""

    name: str
    address: str
    rate_limit_per_minute: int | None = None
    rate_limit_per_day: int | None = None
    admin_digest: str | None = None


class AccountRequest(Message, frozen=True):
    """A caller about its own key: profile, rotate, revoke."""

    credential: Credential


class DayUsage(Message, frozen=True):
    """One UTC day (ISO date)."""

    date: str
    requests: int
    malicious: int


class KeyRecord(Message, frozen=True):
    """A key as its owner or an administrator sees it. Times are ISO 8601 in UTC."""

    key_id: str
    name: str
    scopes: tuple[Scope, ...]
    rate_limit_per_minute: int
    rate_limit_per_day: int
    created_at: str
    expires_at: str | None = None
    last_used_at: str | None = None
    revoked_at: str | None = None
    total_requests: int = 0
    malicious_detections: int = 0
    days: tuple[DayUsage, ...] = ()


class IssuedKey(Message, frozen=True):
    """A new or rotated key: the only message that holds one. `previous_valid_until`: the end of the old key's grace period."""

    api_key: str
    record: KeyRecord
    previous_valid_until: str | None = None


class AnsweredAccount(Message, frozen=True):
    """auth → limiter: the answer to a keyed call (a `KeyRecord`, an `IssuedKey` or null), to be sent on with the key's limits."""

    principal: Principal
    result: Raw


class AdminCredential(Message, frozen=True):
    """Who asks: the SHA-256 of the admin token (hex), or a key that has the scope `admin`."""

    admin_digest: str | None = None
    credential: Credential | None = None


class AdminListKeys(Message, frozen=True):
    """A page of keys, oldest first. `after`: the last key_id of the page before."""

    admin: AdminCredential
    after: str | None = None
    limit: Annotated[int, Meta(ge=1, le=1000)] = 100


class AdminCreateKey(Message, frozen=True):
    admin: AdminCredential
    name: str
    scopes: tuple[Scope, ...] | None = None
    rate_limit_per_minute: int | None = None
    rate_limit_per_day: int | None = None
    expires_at: str | None = None


class AdminKey(Message, frozen=True):
    """Get or delete one key."""

    admin: AdminCredential
    key_id: str


class AdminUpdateKey(Message, frozen=True):
    """Only what is not None is changed."""

    admin: AdminCredential
    key_id: str
    name: str | None = None
    scopes: tuple[Scope, ...] | None = None
    rate_limit_per_minute: int | None = None
    rate_limit_per_day: int | None = None
    expires_at: str | None = None


class KeyList(Message, frozen=True):
    keys: tuple[KeyRecord, ...]
    next_after: str | None = None


class KeyChanged(Message, frozen=True):
    """Broadcast to every auth replica: forget what is cached of this key."""

    key_id: str


# --- breakers ------------------------------------------------------------------------------------------------------------


class BreakersListRequest(Message, frozen=True):
    pass


class BreakersResetRequest(Message, frozen=True):
    """edge → auth."""

    admin: AdminCredential
    name: str


class BreakersReset(Message, frozen=True):
    """auth → every proxy replica."""

    name: str


class BreakerStatus(Message, frozen=True):
    """One breaker in one replica. Times are ISO 8601 in UTC; `retry_at`: when an open breaker lets a probe through."""

    name: str
    state: BreakerState
    replica: str
    failures: int
    successes: int
    opened_at: str | None = None
    retry_at: str | None = None
    reason: str | None = None


class BreakerReport(Message, frozen=True):
    """One replica's answer."""

    replica: str
    breakers: tuple[BreakerStatus, ...]


class BreakerChanged(Message, frozen=True):
    name: str
    replica: str
    before: BreakerState
    after: BreakerState
    at: str
    reason: str


# --- processes -----------------------------------------------------------------------------------------------------------


class InstanceLeft(Message, frozen=True):
    """A process that has finished everything it had in hand is about to disconnect."""

    service: str
    instance: str


class TraceKept(Message, frozen=True):
    """Broadcast when requests turned out to be worth it: whoever has spans of these traces (32 hex digits each) exports them."""

    trace_ids: tuple[str, ...]


# --- usage ---------------------------------------------------------------------------------------------------------------


class UsageRecorded(Message, frozen=True):
    """One admitted call. `at_ms`: epoch milliseconds. `failed`: units that got no verdict."""

    key_id: str
    at_ms: int
    requests: int
    malicious: int
    failed: int = 0


# --- errors, and results of many texts -----------------------------------------------------------------------------------


class FieldError(Message, frozen=True):
    field: str
    message: str


class ErrorBody(Message, frozen=True):
    """A `PortcullisError` on the wire."""

    code: str
    detail: str
    retry_after: int | None = None
    fields: tuple[FieldError, ...] = ()


class ItemResult(Message, frozen=True):
    """What became of one text of many: a verdict, or why there is none. Never both, never neither."""

    verdict: Verdict | None = None
    error: ErrorBody | None = None


class ItemResults(Message, frozen=True):
    """The proxy's answer to `DetectItems`."""

    results: tuple[ItemResult, ...]


class ModelItemResult(Message, frozen=True):
    result: ModelResult | None = None
    error: ErrorBody | None = None


class ModelItemResults(Message, frozen=True):
    """A worker's answer to `ModelItems`."""

    results: tuple[ModelItemResult, ...]


# --- jobs ----------------------------------------------------------------------------------------------------------------


JobOperation = Literal["create", "append", "seal", "get", "list", "results", "cancel"]
JobState = Literal["open", "queued", "running", "done", "failed", "cancelled"]
"""`open`: still being submitted, and shown to nobody; the last three are final."""

MAX_JOB_APPEND = 256
"""Items of one `JobAppend`; it is also bounded in bytes, by the server's `max_payload`."""
MAX_ITEM_ID_CHARACTERS = 256

# The length, too: `$` also matches before a newline at the end, and an id becomes part of a subject.
JobId = Annotated[str, Meta(pattern="^[0-9a-f]{28}$", max_length=28)]
ItemId = Annotated[str, Meta(max_length=MAX_ITEM_ID_CHARACTERS)]
ItemIndex = Annotated[int, Meta(ge=0)]


class JobRequest(Message, frozen=True):
    """edge → auth. `payload` is the operation's own message (`JobCreate`, …), which stays encoded: it may hold texts."""

    credential: Credential
    operation: JobOperation
    payload: Raw


class AuthenticatedJobRequest(Message, frozen=True):
    """auth → jobs, on the operation's own subject."""

    principal: Principal
    payload: Raw


class JobCreate(Message, frozen=True):
    """Begin a submission. `idempotency`: SHA-256 of the caller's key for it, hex. Answered by `JobOpened`.

    A submission with the same key that was never sealed is given up in favour of this one.
    """

    idempotency: str | None = None


class JobOpened(Message, frozen=True):
    """`sealed`: the job has been submitted before, under the same idempotency key; nothing is to be appended."""

    job_id: str
    sealed: bool


class JobItem(Message, frozen=True):
    """`id`: the caller's own name for it."""

    text: Annotated[str, Meta(min_length=1, max_length=MAX_TEXT_CHARACTERS)]
    id: ItemId | None = None


class JobAppend(Message, frozen=True):
    """Items from `first_index` on. Appending the same once more changes nothing. Answered by null, when they are stored."""

    job_id: JobId
    first_index: ItemIndex
    items: Annotated[tuple[JobItem, ...], Meta(min_length=1, max_length=MAX_JOB_APPEND)]


class JobSeal(Message, frozen=True):
    """The submission is complete: run it. Answered by `JobStatus`.

    `digest`: SHA-256 over the body as it was sent, hex; CONFLICT when an earlier submission under the same idempotency key had
    another one. `threshold` None: that of the model which answers. `webhook_url`: told when the job is over.
    """

    job_id: JobId
    total: Annotated[int, Meta(ge=1)]
    digest: str
    threshold: Probability | None = None
    detailed: bool = False
    webhook_url: str | None = None


class DetectOptions(Message, frozen=True):
    """What a client asks for, for all its texts. `confidence_threshold` None: that of the model which answers."""

    confidence_threshold: Probability | None = None
    detailed_response: bool = False


class WebhookTarget(Message, frozen=True):
    """Where to say that a job is over: an http or https URL at a public address."""

    url: Annotated[str, Meta(min_length=1, max_length=2000)]


MAX_SUBMIT = 1000
"""Items of one `JobSubmit`."""


class JobSubmit(Message, frozen=True):
    """A client's whole submission, on NATS: what `POST /v1/detect/batch` takes as a job. Answered by `JobStatus`.

    `idempotency_key`: the same once more is the same job, and CONFLICT with anything else in the message.
    """

    requests: Annotated[tuple[JobItem, ...], Meta(min_length=1, max_length=MAX_SUBMIT)]
    config: DetectOptions | None = None
    idempotency_key: Annotated[str, Meta(pattern="^[!-~]{1,255}$")] | None = None
    webhook: WebhookTarget | None = None


class JobGet(Message, frozen=True):
    """Ask for a job (answered by `JobStatus`), or cancel it (the same)."""

    job_id: JobId


class JobList(Message, frozen=True):
    """A page of the caller's jobs, newest first. `before`: the last job_id of the page before. Answered by `JobPage`."""

    before: JobId | None = None
    limit: Annotated[int, Meta(ge=1, le=100)] = 20


class JobWebhook(Message, frozen=True):
    """`secret`: signs what is sent to `url` (Standard Webhooks); shown to whoever submits, and in no other answer."""

    url: str
    secret: str | None = None


class JobStatus(Message, frozen=True):
    """A job as its owner sees it. Times are ISO 8601 in UTC; `items_per_second` over the last minute, None when unknown.

    `done` counts every item that has a result; `malicious` and `failed` are parts of it. `reason`: why a job failed.
    """

    job_id: str
    state: JobState
    total: int
    done: int
    malicious: int
    failed: int
    created_at: str
    detailed: bool = False
    items_per_second: float | None = None
    estimated_end_at: str | None = None
    started_at: str | None = None
    finished_at: str | None = None
    reason: str | None = None
    webhook: JobWebhook | None = None


class JobPage(Message, frozen=True):
    jobs: tuple[JobStatus, ...]
    next_before: str | None = None


class JobResults(Message, frozen=True):
    """Results in the order in which they were stored, after the one at `after`. Answered by `JobResultPage`."""

    job_id: JobId
    after: Annotated[int, Meta(ge=0)] = 0
    limit: Annotated[int, Meta(ge=1, le=1000)] = 256


class JobResult(Message, frozen=True):
    """The one result of an item; stored once, and never changed. Its owner's clients see it on NATS at that moment."""

    index: ItemIndex
    result: ItemResult
    id: ItemId | None = None


class StoredJobResult(Message, frozen=True):
    """A result with its place: what `after` takes to go on behind it."""

    cursor: int
    result: JobResult


class JobResultPage(Message, frozen=True):
    """As much as fits in a message. `more`: there were further ones when it was made."""

    results: tuple[StoredJobResult, ...]
    more: bool


class DeadLetter(Message, frozen=True):
    """An item that was given up: its result is an error, and it is kept with the reason."""

    key_id: str
    job_id: str
    index: ItemIndex
    item: JobItem | None
    reason: str
    at: str


# --- the reply ---------------------------------------------------------------------------------------------------------


class Reply(Message, frozen=True):
    """The answer to any request: `result` (encoded; its type follows from the subject) or `error`."""

    result: Raw = NULL
    error: ErrorBody | None = None
    rate: RateState | None = None


encode = msgspec.json.Encoder().encode


def raw(message: Struct | None) -> Raw:
    """`message` encoded, to be embedded in another."""
    return Raw(encode(message))
