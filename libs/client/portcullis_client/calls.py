"""Every call of the gateway's HTTP interface, as a value: what is sent, and how the answer is read. No I/O."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Generic, Protocol, TypeVar
from urllib.parse import quote

import msgspec

from portcullis_client import errors, types
from portcullis_client.errors import PortcullisError, UnexpectedAnswerError

T = TypeVar("T")

NDJSON = "application/x-ndjson"
JSON = "application/json"

encode = msgspec.json.Encoder().encode
encode_lines = msgspec.json.Encoder().encode_lines


class Body(Protocol):
    """A body that need not be in memory, and can be sent more than once. `length`: in bytes."""

    @property
    def length(self) -> int: ...

    def pieces(self) -> Iterator[bytes]: ...

    def pieces_async(self) -> AsyncIterator[bytes]: ...


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """`idempotent`: done twice, it does no harm. `admin`: needs the admin token, if there is one."""

    method: str
    path: str
    read: Callable[[bytes], T]
    idempotent: bool = True
    admin: bool = False
    params: Mapping[str, str] = field(default_factory=dict)
    body: bytes | Body | None = None
    content_type: str = JSON
    accept: str = JSON
    headers: Mapping[str, str] = field(default_factory=dict)


def _reader(kind: type[T]) -> Callable[[bytes], T]:
    decoder = msgspec.json.Decoder(kind)

    def read(body: bytes) -> T:
        try:
            return decoder.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise UnexpectedAnswerError("The answer cannot be read: is this the address of a Portcullis gateway?") from None

    return read


def _nothing(_: bytes) -> None:
    return None


_read_verdict = _reader(types.Verdict)
_read_job = _reader(types.Job)
_read_jobs = _reader(types.JobPage)
_read_issued = _reader(types.IssuedKey)
_read_profile = _reader(types.Profile)
_read_key = _reader(types.KeyRecord)
_read_keys = _reader(types.KeyPage)


def _segment(name: str) -> str:
    return quote(name, safe="")


def _given(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def encode_text(value: Any) -> bytes:
    """JSON. Raises ValueError for a text that is no Unicode: half a surrogate pair, from broken JSON or a file name."""
    try:
        return encode(value)
    except UnicodeEncodeError:
        raise ValueError("The text holds half a surrogate pair, which is not a character.") from None


# --- detections ----------------------------------------------------------------------------------------------------------


def detect(text: str, *, threshold: float | None, detailed: bool) -> Call[types.Verdict]:
    config = _given(confidence_threshold=threshold, detailed_response=detailed or None)
    document: dict[str, Any] = {"text": text} | ({"config": config} if config else {})
    return Call("POST", "/v1/detect", _read_verdict, body=encode_text(document))


def config_params(threshold: float | None, *, detailed: bool) -> dict[str, str]:
    return _given(
        confidence_threshold=None if threshold is None else repr(threshold), detailed_response="true" if detailed else None
    )


def detect_portion(lines: bytes, *, threshold: float | None, detailed: bool) -> Call[None]:
    return Call(
        "POST",
        "/v1/detect/batch",
        _nothing,
        params=config_params(threshold, detailed=detailed),
        body=lines,
        content_type=NDJSON,
        accept=NDJSON,
    )


class _Stopped(msgspec.Struct, frozen=True, kw_only=True):
    complete: bool
    error: errors.Problem | None = None


class _Line(types.Record, frozen=True):
    """A result, or the summary that ends a stream, or the error before it."""

    index: int | None = None
    id: str | None = None
    cursor: str | None = None
    is_malicious: bool | None = None
    error: errors.Problem | None = None
    summary: _Stopped | None = None


_read_line = _reader(_Line)


@dataclass(frozen=True, slots=True)
class End:
    """The last line of a stream; `error`: why it ended before its last item."""

    error: PortcullisError | None


def result_line(line: bytes) -> types.ItemResult | End | None:
    """What a line of results says; None for a line that says nothing of its own."""
    read = _read_line(line)
    if read.summary is not None:
        problem = read.summary.error
        return End(errors.from_problem(problem) if problem is not None else None)
    if read.index is None:
        return None  # why the stream ends early; the summary says it again
    if read.error is not None:
        return types.ItemResult(index=read.index, id=read.id, cursor=read.cursor, error=errors.from_problem(read.error))
    return types.ItemResult(index=read.index, id=read.id, cursor=read.cursor, verdict=_read_verdict(line))


# --- jobs ----------------------------------------------------------------------------------------------------------------


def submit_job(
    body: Body, idempotency_key: str, *, threshold: float | None, detailed: bool, webhook_url: str | None
) -> Call[types.Job]:
    """`body`: NDJSON, one item a line."""
    return Call(
        "POST",
        "/v1/detect/batch",
        _read_job,
        params=config_params(threshold, detailed=detailed) | _given(webhook_url=webhook_url),
        body=body,
        content_type=NDJSON,
        headers={"Prefer": "respond-async", "Idempotency-Key": idempotency_key},
    )


def job(job_id: str) -> Call[types.Job]:
    return Call("GET", f"/v1/jobs/{_segment(job_id)}", _read_job)


def jobs(before: str | None, limit: int | None) -> Call[types.JobPage]:
    return Call("GET", "/v1/jobs", _read_jobs, params=_given(before=before, limit=None if limit is None else str(limit)))


def job_results(job_id: str, after: str | None) -> Call[None]:
    return Call("GET", f"/v1/jobs/{_segment(job_id)}/results", _nothing, params=_given(after=after), accept=NDJSON)


def cancel_job(job_id: str) -> Call[None]:
    return Call("DELETE", f"/v1/jobs/{_segment(job_id)}", _nothing)


# --- keys ----------------------------------------------------------------------------------------------------------------


def register(name: str, per_minute: int | None, per_day: int | None, *, admin: bool) -> Call[types.IssuedKey]:
    document = _given(name=name, rate_limit_per_minute=per_minute, rate_limit_per_day=per_day)
    return Call("POST", "/auth/register", _read_issued, idempotent=False, admin=admin, body=encode(document))


def profile() -> Call[types.Profile]:
    return Call("GET", "/auth/profile", _read_profile)


def rotate() -> Call[types.IssuedKey]:
    return Call("POST", "/auth/rotate", _read_issued, idempotent=False)


def revoke() -> Call[None]:
    return Call("DELETE", "/auth/key", _nothing, idempotent=False)


def list_keys(after: str | None, limit: int | None) -> Call[types.KeyPage]:
    params = _given(after=after, limit=None if limit is None else str(limit))
    return Call("GET", "/admin/keys", _read_keys, admin=True, params=params)


def get_key(key_id: str) -> Call[types.KeyRecord]:
    return Call("GET", f"/admin/keys/{_segment(key_id)}", _read_key, admin=True)


def create_key(name: str, **fields: Any) -> Call[types.IssuedKey]:
    return Call(
        "POST", "/admin/keys", _read_issued, idempotent=False, admin=True, body=encode(_given(name=name, **_timed(fields)))
    )


def update_key(key_id: str, **fields: Any) -> Call[types.KeyRecord]:
    return Call("PATCH", f"/admin/keys/{_segment(key_id)}", _read_key, admin=True, body=encode(_given(**_timed(fields))))


def revoke_key(key_id: str) -> Call[None]:
    return Call("DELETE", f"/admin/keys/{_segment(key_id)}", _nothing, idempotent=False, admin=True)


def _timed(fields: dict[str, Any]) -> dict[str, Any]:
    expires_at = fields.get("expires_at")
    if isinstance(expires_at, datetime) and expires_at.tzinfo is None:
        raise ValueError("expires_at needs a time zone")
    return fields
