"""The errors that a caller can see: a stable code, one public sentence, an HTTP status.

A stage raises `PortcullisError`; the bus turns it into a reply; the edge turns the reply into problem+json. Whatever else is
worth knowing (`internal`) goes to the log of the stage that raised it and never crosses the bus.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class ErrorCode(StrEnum):
    """Stable names; they are part of the public interface (`type` in problem+json ends with them)."""

    BAD_REQUEST = "bad_request"
    INVALID_CREDENTIALS = "invalid_credentials"
    FORBIDDEN = "forbidden"
    NOT_FOUND = "not_found"
    CONFLICT = "conflict"
    PAYLOAD_TOO_LARGE = "payload_too_large"
    UNSUPPORTED_MEDIA_TYPE = "unsupported_media_type"
    INVALID_FIELD = "invalid_field"
    RATE_LIMITED = "rate_limited"
    OVERLOADED = "overloaded"
    HEADERS_TOO_LARGE = "headers_too_large"
    STAGE_UNAVAILABLE = "stage_unavailable"
    NO_ENGINE = "no_engine"
    INTERNAL = "internal"
    DEADLINE_EXCEEDED = "deadline_exceeded"


@dataclass(frozen=True, slots=True)
class ErrorKind:
    """What every error of one code has in common. `retryable`: the same call may succeed later."""

    status: int
    title: str
    detail: str
    retryable: bool


CATALOGUE: dict[ErrorCode, ErrorKind] = {
    ErrorCode.BAD_REQUEST: ErrorKind(400, "Malformed request", "The request could not be read.", False),
    # One and the same answer whether the key is missing, malformed, unknown, revoked or expired.
    ErrorCode.INVALID_CREDENTIALS: ErrorKind(
        401, "Invalid credentials", "A valid API key is needed, in X-API-Key or Authorization: Bearer.", False
    ),
    ErrorCode.FORBIDDEN: ErrorKind(403, "Forbidden", "The credentials do not allow this call.", False),
    ErrorCode.NOT_FOUND: ErrorKind(404, "Not found", "There is nothing here by that name.", False),
    ErrorCode.CONFLICT: ErrorKind(409, "Conflict", "The request contradicts an earlier one.", False),
    ErrorCode.PAYLOAD_TOO_LARGE: ErrorKind(413, "Payload too large", "The body is larger than allowed.", False),
    ErrorCode.UNSUPPORTED_MEDIA_TYPE: ErrorKind(
        415, "Unsupported media type", "Send JSON, with Content-Type: application/json.", False
    ),
    ErrorCode.INVALID_FIELD: ErrorKind(422, "Invalid field", "A field of the request is not valid.", False),
    ErrorCode.RATE_LIMITED: ErrorKind(429, "Rate limit exceeded", "The key's rate limit is used up.", True),
    ErrorCode.OVERLOADED: ErrorKind(429, "Overloaded", "The gateway is full at the moment.", True),
    ErrorCode.HEADERS_TOO_LARGE: ErrorKind(431, "Headers too large", "The request's headers are too large.", False),
    ErrorCode.STAGE_UNAVAILABLE: ErrorKind(503, "Unavailable", "A part of the gateway is not available.", True),
    ErrorCode.NO_ENGINE: ErrorKind(503, "No engine", "No detection engine can answer at the moment.", True),
    # A bug in a stage: to the caller the stage is not available, and a guess in place of a verdict is out of the question.
    ErrorCode.INTERNAL: ErrorKind(503, "Unavailable", "A part of the gateway failed.", True),
    ErrorCode.DEADLINE_EXCEEDED: ErrorKind(504, "Deadline exceeded", "No answer within the deadline.", True),
}


class PortcullisError(Exception):
    """A refusal or failure with a public face.

    Parameters
    ----------
    code: which error, from the catalogue.
    detail: a public sentence in place of the catalogue's; never holds a text, a key or an address of a server.
    internal: for the log only.
    retry_after: seconds, whole, ≥ 1; for 429 and 503.
    fields: for `INVALID_FIELD`: (path, message) pairs.
    """

    def __init__(
        self,
        code: ErrorCode,
        detail: str | None = None,
        *,
        internal: str = "",
        retry_after: int | None = None,
        fields: tuple[tuple[str, str], ...] = (),
    ) -> None:
        self.code = code
        self.kind = CATALOGUE[code]
        self.detail = detail if detail is not None else self.kind.detail
        self.internal = internal
        if retry_after is None and self.kind.retryable and self.kind.status in (429, 503):
            retry_after = 1
        self.retry_after = retry_after
        self.fields = fields
        super().__init__(f"{code}: {internal or self.detail}")
