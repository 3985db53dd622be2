"""What can go wrong, by the code of the gateway's problem documents (RFC 9457). Neither a text nor a key is ever in an error."""

from __future__ import annotations

import re
from collections.abc import Mapping

import msgspec

_TYPE_PREFIX = "urn:portcullis:problem:"
# draft-ietf-httpapi-ratelimit-headers: `"minute";r=0;t=12, "day";r=40;t=0`.
_USED_UP = re.compile(r'"\w+";r=0;t=(\d+)')


class FieldProblem(msgspec.Struct, frozen=True):
    """A field of a request that is not valid: its path, such as `config.confidence_threshold`, and what is wrong."""

    field: str
    message: str


class PortcullisError(Exception):
    """Base of all errors of this package.

    Attributes
    ----------
    code: the gateway's stable name of the error, or one of this client's own.
    status: of HTTP; None when there was no answer.
    detail: a sentence for people.
    request_id: to be named when the gateway's operators are asked; None when there is none.
    retry_after: seconds after which it is worth asking again; None when the gateway does not say.
    fields: what is wrong with which field, for `InvalidFieldError`.
    """

    def __init__(
        self,
        detail: str,
        *,
        code: str,
        status: int | None = None,
        request_id: str | None = None,
        retry_after: float | None = None,
        fields: tuple[FieldProblem, ...] = (),
    ) -> None:
        self.detail = detail
        self.code = code
        self.status = status
        self.request_id = request_id
        self.retry_after = retry_after
        self.fields = fields
        said = "; ".join(f"{field.field}: {field.message}" for field in fields)
        super().__init__(f"{detail} ({said})" if said else detail)


class BadRequestError(PortcullisError):
    """The request could not be read."""


class InvalidCredentialsError(PortcullisError):
    """The key is missing, malformed, unknown, revoked or expired."""


class ForbiddenError(PortcullisError):
    """The credentials do not allow this call; most often the admin token is needed."""


class NotFoundError(PortcullisError):
    """There is no such thing, or it is somebody else's."""


class ConflictError(PortcullisError):
    """The idempotency key was used before, with another body."""


class PayloadTooLargeError(PortcullisError):
    """The body is larger than the gateway takes."""


class UnsupportedMediaTypeError(PortcullisError):
    """The gateway does not take this content type."""


class InvalidFieldError(PortcullisError):
    """A field is not valid, see `fields`: an empty text, or one of more than 100 000 characters, most often."""


class RateLimitedError(PortcullisError):
    """The key's limit is used up."""


class OverloadedError(PortcullisError):
    """The gateway is full at the moment."""


class HeadersTooLargeError(PortcullisError):
    """The request's headers are too large."""


class UnavailableError(PortcullisError):
    """A part of the gateway, or every detection engine, is away or failed."""


class DeadlineExceededError(PortcullisError):
    """There was no verdict within the deadline."""


class ConnectionFailedError(PortcullisError):
    """The gateway could not be reached, or the connection broke off. `sent`: the gateway may have got the request."""

    def __init__(self, detail: str, *, sent: bool) -> None:
        self.sent = sent
        super().__init__(detail, code="connection_failed")


class UnexpectedAnswerError(PortcullisError):
    """The answer is not one of Portcullis: another server listens there, or another version."""

    def __init__(self, detail: str, *, status: int | None = None, request_id: str | None = None) -> None:
        super().__init__(detail, code="unexpected_answer", status=status, request_id=request_id)


class JobUnfinishedError(PortcullisError):
    """A job did not come to its end in the time that it was waited for."""

    def __init__(self, detail: str) -> None:
        super().__init__(detail, code="job_unfinished")


_BY_CODE: dict[str, type[PortcullisError]] = {
    "bad_request": BadRequestError,
    "invalid_credentials": InvalidCredentialsError,
    "forbidden": ForbiddenError,
    "not_found": NotFoundError,
    "conflict": ConflictError,
    "payload_too_large": PayloadTooLargeError,
    "unsupported_media_type": UnsupportedMediaTypeError,
    "invalid_field": InvalidFieldError,
    "rate_limited": RateLimitedError,
    "overloaded": OverloadedError,
    "headers_too_large": HeadersTooLargeError,
    "stage_unavailable": UnavailableError,
    "no_engine": UnavailableError,
    "internal": UnavailableError,
    "deadline_exceeded": DeadlineExceededError,
}
# A code that this release does not know belongs to a newer gateway; its status still tells what to do about it.
_BY_STATUS: dict[int, type[PortcullisError]] = {
    400: BadRequestError,
    401: InvalidCredentialsError,
    403: ForbiddenError,
    404: NotFoundError,
    409: ConflictError,
    413: PayloadTooLargeError,
    415: UnsupportedMediaTypeError,
    422: InvalidFieldError,
    429: OverloadedError,
    431: HeadersTooLargeError,
    503: UnavailableError,
    504: DeadlineExceededError,
}

REFUSED_UNDONE = (RateLimitedError, OverloadedError)
"""Nothing was done: even what must not be done twice may be asked again."""
PASSING = (RateLimitedError, OverloadedError, UnavailableError, ConnectionFailedError)
"""The same call may succeed later."""


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """A problem document, or the `error` of one item of many, which has a `code` in place of a `type`."""

    status: int
    detail: str
    type: str = ""
    code: str = ""
    request_id: str | None = None
    errors: tuple[FieldProblem, ...] = ()
    retry_after: float | None = None


_PROBLEM = msgspec.json.Decoder(Problem)


def from_problem(problem: Problem, *, request_id: str | None = None, used_up_seconds: float = 0.0) -> PortcullisError:
    """The error that a problem document stands for. `used_up_seconds`: until the key has a unit again."""
    code = problem.code or problem.type.removeprefix(_TYPE_PREFIX)
    kind = _BY_CODE.get(code) or _BY_STATUS.get(problem.status, PortcullisError)
    retry_after = problem.retry_after
    if retry_after is not None:
        retry_after = max(retry_after, used_up_seconds)
    return kind(
        problem.detail,
        code=code,
        status=problem.status,
        request_id=problem.request_id or request_id,
        retry_after=retry_after,
        fields=problem.errors,
    )


def from_answer(status: int, headers: Mapping[str, str], body: bytes) -> PortcullisError:
    """The error that an answer which is no success stands for. `headers`: by lower-case name."""
    request_id = headers.get("x-request-id")
    used_up_seconds = max((float(seconds) for seconds in _USED_UP.findall(headers.get("ratelimit", ""))), default=0.0)
    try:
        return from_problem(_PROBLEM.decode(body), request_id=request_id, used_up_seconds=used_up_seconds)
    except (msgspec.DecodeError, UnicodeDecodeError):
        pass
    kind = _BY_STATUS.get(status)
    if kind is not None and status in (429, 503):  # a proxy in between may say so in words of its own
        after = headers.get("retry-after", "")
        return kind(
            f"The gateway, or a proxy before it, answered {status}.",
            code="overloaded" if status == 429 else "stage_unavailable",
            status=status,
            request_id=request_id,
            retry_after=float(after) if after.isascii() and after.isdigit() else None,
        )
    return UnexpectedAnswerError(f"The server answered {status}, not as Portcullis does.", status=status, request_id=request_id)
