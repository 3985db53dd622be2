"""The bodies of HTTP requests and answers. Unknown fields of a request are ignored, as they are on the bus."""

from __future__ import annotations

from typing import Annotated

from msgspec import UNSET, Meta, Struct, UnsetType

from libs.common.contracts import (
    MAX_TEXT_CHARACTERS,
    BreakerState,
    BreakerStatus,
    Coverage,
    DayUsage,
    JobState,
    Probability,
    Scope,
    Span,
    ThreatType,
    Transform,
)

Limit = Annotated[int, Meta(ge=1)]
# How long a name may be, and of what, is decided by auth; here it is only told.
Name = Annotated[str, Meta(min_length=1, description="Without control characters", extra_json_schema={"maxLength": 100})]
Timestamp = Annotated[str, Meta(description="ISO 8601, UTC", extra_json_schema={"format": "date-time"})]


class DetectConfig(Struct, frozen=True):
    """`confidence_threshold`: from which probability on a text is called malicious; the model's own when it is left out."""

    confidence_threshold: Probability | None = None
    detailed_response: bool = False


class DetectBody(Struct, frozen=True):
    text: Annotated[str, Meta(min_length=1, max_length=MAX_TEXT_CHARACTERS)]
    config: DetectConfig | None = None


class DetectAnswer(Struct, frozen=True, kw_only=True):
    """A verdict. The fields after `coverage` are there with `detailed_response` only; times are in milliseconds."""

    is_malicious: bool
    confidence: Probability
    threat_types: tuple[ThreatType, ...]
    processing_time_ms: float
    endpoint: str
    request_id: str
    degraded: bool
    coverage: Coverage | None
    reason: str | UnsetType | None = UNSET
    spans: tuple[Span, ...] | UnsetType = UNSET
    transforms: tuple[Transform, ...] | UnsetType = UNSET
    timings: dict[str, float] | UnsetType = UNSET


class FieldProblem(Struct, frozen=True):
    """`field`: a path such as `config.confidence_threshold`, or the name of a header."""

    field: str
    message: str


ItemId = Annotated[str, Meta(max_length=256)]


class BatchItem(Struct, frozen=True):
    """One text of many. `id` is the caller's own name for it; it comes back with the result and need not be unique."""

    text: Annotated[str, Meta(min_length=1, max_length=MAX_TEXT_CHARACTERS)]
    id: ItemId | None = None


WebhookUrl = Annotated[
    str,
    Meta(min_length=1, max_length=2000, description="http or https, at a public address", extra_json_schema={"format": "uri"}),
]


class Webhook(Struct, frozen=True):
    url: WebhookUrl


class BatchBody(Struct, frozen=True):
    """`webhook`, of a job (`Prefer: respond-async`): where to say that it is over."""

    requests: Annotated[tuple[BatchItem, ...], Meta(min_length=1, max_length=1000)]
    config: DetectConfig | None = None
    webhook: Webhook | None = None


class ItemProblem(Struct, frozen=True, kw_only=True):
    """Why an item has no verdict, or why a stream ends early. `code` is what the `type` of a `Problem` ends with."""

    code: str
    title: str
    status: int
    detail: str
    errors: tuple[FieldProblem, ...] | UnsetType = UNSET
    retry_after: int | UnsetType = UNSET


class BatchLine(Struct, frozen=True, kw_only=True):
    """What became of one item: the verdict, as a single detection's, or `error`. `index` counts the items from 0.

    The fields after `coverage` are there with `detailed_response` only; times are in milliseconds.
    """

    index: int
    id: str | None
    is_malicious: bool | UnsetType = UNSET
    confidence: Probability | UnsetType = UNSET
    threat_types: tuple[ThreatType, ...] | UnsetType = UNSET
    endpoint: str | UnsetType = UNSET
    degraded: bool | UnsetType = UNSET
    coverage: Coverage | UnsetType | None = UNSET
    reason: str | UnsetType | None = UNSET
    spans: tuple[Span, ...] | UnsetType = UNSET
    transforms: tuple[Transform, ...] | UnsetType = UNSET
    timings: dict[str, float] | UnsetType = UNSET
    error: ItemProblem | UnsetType = UNSET


class BatchSummary(Struct, frozen=True, kw_only=True):
    """The last line. `total` = `malicious` + `benign` + `failed`; `degraded`: how many verdicts are.

    Not `complete`: the items from `next_index` on were neither judged nor charged, for the reason in `error`.
    """

    total: int
    malicious: int
    benign: int
    failed: int
    degraded: int
    complete: bool
    processing_time_ms: float
    next_index: int | UnsetType = UNSET
    error: ItemProblem | UnsetType = UNSET


class BatchAnswer(Struct, frozen=True):
    """All results in the order of asking."""

    results: tuple[BatchLine, ...]
    summary: BatchSummary


class JobWebhook(Struct, frozen=True):
    """`secret`: what its requests are signed with (https://www.standardwebhooks.com); in the answer to the submission only."""

    url: str
    secret: str | UnsetType = UNSET


class JobAnswer(Struct, frozen=True, kw_only=True):
    """A job. `total` items, `done` of which have a result: `malicious` verdicts, benign ones, and `failed`, which have none.

    `items_per_second`: over the last minute or two, of a job that is over its average. `reason`: why it failed.
    """

    id: str
    state: JobState
    total: int
    done: int
    malicious: int
    failed: int
    items_per_second: float | None
    estimated_end_at: Timestamp | None
    created_at: Timestamp
    started_at: Timestamp | None
    finished_at: Timestamp | None
    reason: str | None
    webhook: JobWebhook | None


class JobsAnswer(Struct, frozen=True):
    """A page of jobs, newest first. `next_before`: what `before` takes for the next page."""

    jobs: tuple[JobAnswer, ...]
    next_before: str | None


class JobLine(BatchLine, frozen=True, kw_only=True):
    """As a batch's line. `cursor`: what `after` takes to go on behind it."""

    cursor: str


class RegisterBody(Struct, frozen=True):
    name: Name
    rate_limit_per_minute: Limit | None = None
    rate_limit_per_day: Limit | None = None


class IssuedKeyAnswer(Struct, frozen=True, kw_only=True):
    """A new key, shown this once. `previous_valid_until`: the end of the old key's grace period, after a rotation."""

    api_key: str
    key_id: str
    name: str
    scopes: tuple[Scope, ...]
    rate_limit_per_minute: int
    rate_limit_per_day: int
    created_at: Timestamp
    expires_at: Timestamp | None
    previous_valid_until: Timestamp | UnsetType | None = UNSET


class ProfileAnswer(Struct, frozen=True, kw_only=True):
    """The caller's own key. `requests_*` and `remaining_*` count units of the sliding minute and the sliding day; `days` the last
    30 calendar days in UTC."""

    key_id: str
    name: str
    scopes: tuple[Scope, ...]
    created_at: Timestamp
    last_used_at: Timestamp | None
    expires_at: Timestamp | None
    rate_limit_per_minute: int
    rate_limit_per_day: int
    requests_this_minute: int | None
    requests_today: int | None
    remaining_this_minute: int | None
    remaining_today: int | None
    total_requests: int
    malicious_detections: int
    days: tuple[DayUsage, ...]


class CreateKeyBody(Struct, frozen=True):
    name: Name
    scopes: Annotated[tuple[Scope, ...], Meta(min_length=1)] | None = None
    rate_limit_per_minute: Limit | None = None
    rate_limit_per_day: Limit | None = None
    expires_at: Timestamp | None = None


class UpdateKeyBody(Struct, frozen=True):
    """Only what is given, and is not null, is changed."""

    name: Name | None = None
    scopes: Annotated[tuple[Scope, ...], Meta(min_length=1)] | None = None
    rate_limit_per_minute: Limit | None = None
    rate_limit_per_day: Limit | None = None
    expires_at: Timestamp | None = None


class Breaker(Struct, frozen=True):
    """A breaker in all replicas of the proxy. `state`: the worst of them (open, then half_open)."""

    name: str
    state: BreakerState
    replicas: tuple[BreakerStatus, ...]


class BreakersAnswer(Struct, frozen=True):
    circuit_breakers: tuple[Breaker, ...]


class ServiceHealth(Struct, frozen=True):
    """`status`: ok, degraded or down. `replicas`: processes that answered."""

    status: str
    replicas: int


class EngineHealth(Struct, frozen=True):
    """`status`: up, degraded or down. Null: no proxy says."""

    configured: str | None
    name: str | None
    status: str
    breaker: BreakerState | None


class StoresHealth(Struct, frozen=True):
    """up, down, or unknown when the service that would know is away."""

    redis: str
    postgres: str
    nats: str


class HealthAnswer(Struct, frozen=True):
    """`status`: healthy, degraded or unhealthy."""

    status: str
    version: str
    services: dict[str, ServiceHealth]
    engine: EngineHealth
    stores: StoresHealth


class LiveAnswer(Struct, frozen=True):
    status: str


class ReadyAnswer(Struct, frozen=True):
    """`missing`: what a detection would need and does not have."""

    status: str
    missing: tuple[str, ...]


class Problem(Struct, frozen=True, kw_only=True):
    """RFC 9457. `type` is stable and ends with the error's code. `retry_after`: seconds, for 429 and 503."""

    type: str
    title: str
    status: int
    detail: str
    request_id: str
    errors: tuple[FieldProblem, ...] | UnsetType = UNSET
    retry_after: int | UnsetType = UNSET
