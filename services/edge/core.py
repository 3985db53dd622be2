"""What the edge reads off a request and writes on an answer; no I/O."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TypeVar

import msgspec

from libs.common import keys
from libs.common.contracts import AdminCredential, BreakerReport, BreakerStatus, Credential, RateState
from libs.common.errors import ErrorCode, PortcullisError
from services.edge.schemas import Breaker, DetectConfig

T = TypeVar("T")

Headers = Mapping[bytes, bytes]
"""By lower-case name; values as they came."""

_FORM = "application/x-www-form-urlencoded"
_JSON_WHITESPACE = b" \t\n\r"


# --- bodies --------------------------------------------------------------------------------------------------------------


def require_json(headers: Headers, body: bytes | bytearray) -> None:
    """Raise UNSUPPORTED_MEDIA_TYPE unless `body` counts as JSON by its Content-Type.

    curl's default for `-d` is the form type; people leave it, so it is taken when the body begins like a JSON object.
    """
    require_no_encoding(headers)
    media_type = headers.get(b"content-type", b"").decode("latin-1").partition(";")[0].strip().lower()
    if media_type in ("", "application/json") or (media_type.endswith("+json") and "/" in media_type):
        return
    if media_type == _FORM and body.lstrip(_JSON_WHITESPACE).startswith(b"{"):
        return
    raise PortcullisError(ErrorCode.UNSUPPORTED_MEDIA_TYPE)


def require_no_encoding(headers: Headers) -> None:
    """Raise UNSUPPORTED_MEDIA_TYPE when the body is compressed or the like."""
    if headers.get(b"content-encoding", b"identity").lower() != b"identity":
        raise PortcullisError(ErrorCode.UNSUPPORTED_MEDIA_TYPE, "Send the body as it is, without Content-Encoding.")


def decode_json(body: bytes | bytearray, decoder: msgspec.json.Decoder[T]) -> T:
    """The body as the decoder's type. Raises BAD_REQUEST when it is not JSON, INVALID_FIELD when a field is wrong."""
    try:
        body.decode()  # msgspec does not look into the strings of fields that it skips
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        message = str(error)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _malformed(error) from None
    # A wrong field was found first, but what comes after it may not be JSON at all.
    try:
        msgspec.json.decode(body)
    except msgspec.ValidationError:
        pass  # a number beyond what the generic decoder holds
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _malformed(error) from None
    raise invalid_field(*_field_and_message(message))


def invalid_field(field: str, message: str) -> PortcullisError:
    return PortcullisError(ErrorCode.INVALID_FIELD, fields=((field, message),))


def _malformed(error: Exception) -> PortcullisError:
    if isinstance(error, UnicodeDecodeError):
        return PortcullisError(ErrorCode.BAD_REQUEST, "The body is not valid UTF-8.")
    if isinstance(error, RecursionError):
        return PortcullisError(ErrorCode.BAD_REQUEST, "The body is nested too deeply.")
    return PortcullisError(ErrorCode.BAD_REQUEST, "The body is not valid JSON.")


def _field_and_message(message: str) -> tuple[str, str]:
    """msgspec's sentence, "Expected `str`, got `int` - at `$.config.text`", taken apart. It holds types, never values."""
    what, _, path = message.partition(" - at `")
    field = path.rstrip("`").removeprefix("$").removeprefix(".")
    if not path and what.startswith("Object missing required field `"):
        return what.removeprefix("Object missing required field `").rstrip("`"), "This field is required"
    return field or "body", what


def query_config(query: Mapping[str, str]) -> DetectConfig:
    """`confidence_threshold` and `detailed_response` of a query. Raises INVALID_FIELD."""
    try:
        return msgspec.convert(
            {name: query[name] for name in DetectConfig.__struct_fields__ if name in query}, DetectConfig, strict=False
        )
    except msgspec.ValidationError as error:
        raise invalid_field(*_field_and_message(str(error))) from None


def prefers_async(headers: Headers) -> bool:
    """Whether `Prefer: respond-async` (RFC 7240) is there."""
    preferences = headers.get(b"prefer", b"").decode("latin-1").lower().split(",")
    return any(preference.partition(";")[0].strip() == "respond-async" for preference in preferences)


# --- who calls -----------------------------------------------------------------------------------------------------------


def _bearer(headers: Headers) -> str | None:
    scheme, _, token = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else None


def credential(headers: Headers) -> Credential:
    """The API key of a request as it crosses the bus. Raises INVALID_CREDENTIALS when there is none or it is mistyped."""
    key = headers[b"x-api-key"].decode("latin-1") if b"x-api-key" in headers else _bearer(headers)
    parsed = keys.parse(key) if key else None
    if parsed is None:
        raise PortcullisError(ErrorCode.INVALID_CREDENTIALS)
    return Credential(key_id=parsed.key_id, digest=parsed.digest)


def admin_digest(headers: Headers) -> str | None:
    """The digest of an admin token: X-Admin-Token, or a Bearer token that is not an API key."""
    token = headers[b"x-admin-token"].decode("latin-1") if b"x-admin-token" in headers else _bearer(headers)
    return keys.digest(token) if token and not token.startswith(keys.PREFIX) else None


def admin_credential(headers: Headers) -> AdminCredential:
    """The admin token, or a key that may have the scope `admin`. Raises FORBIDDEN when there is neither."""
    if (digest := admin_digest(headers)) is not None:
        return AdminCredential(admin_digest=digest)
    try:
        return AdminCredential(credential=credential(headers))
    except PortcullisError:
        raise admin_needed() from None


def admin_needed() -> PortcullisError:
    return PortcullisError(ErrorCode.FORBIDDEN, "The admin token is needed, in X-Admin-Token or Authorization: Bearer.")


# --- time ----------------------------------------------------------------------------------------------------------------


def timeout_seconds(headers: Headers, longest: float) -> float:
    """`X-Request-Timeout` in seconds, which may lower `longest` but not raise it. Raises INVALID_FIELD when it is no number."""
    value = headers.get(b"x-request-timeout")
    if value is None:
        return longest
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not seconds > 0:  # NaN too
        raise invalid_field("X-Request-Timeout", "Expected a number of seconds greater than 0")
    return min(seconds, longest)


# --- answers -------------------------------------------------------------------------------------------------------------


def rate_headers(rate: RateState) -> dict[str, str]:
    """The state of a key's limits, twice: as everybody's X-RateLimit-*, and as draft-ietf-httpapi-ratelimit-headers has it.

    `t`: whole seconds until a unit is free, rounded up.
    """
    minute, day = math.ceil(rate.reset_minute), math.ceil(rate.reset_day)
    return {
        "x-ratelimit-limit-minute": str(rate.limit_minute),
        "x-ratelimit-remaining-minute": str(rate.remaining_minute),
        "x-ratelimit-limit-day": str(rate.limit_day),
        "x-ratelimit-remaining-day": str(rate.remaining_day),
        "ratelimit-policy": f'"minute";q={rate.limit_minute};w=60, "day";q={rate.limit_day};w=86400',
        "ratelimit": f'"minute";r={rate.remaining_minute};t={minute}, "day";r={rate.remaining_day};t={day}',
    }


_SEVERITY = {"closed": 0, "half_open": 1, "open": 2}


def merge_breakers(reports: Iterable[BreakerReport]) -> tuple[Breaker, ...]:
    """What the replicas report, by breaker; the order of names and replicas is stable."""
    by_name: dict[str, list[BreakerStatus]] = {}
    for report in reports:
        for status in report.breakers:
            by_name.setdefault(status.name, []).append(status)
    return tuple(
        Breaker(
            name=name,
            state=max((status.state for status in statuses), key=_SEVERITY.__getitem__),
            replicas=tuple(sorted(statuses, key=lambda status: status.replica)),
        )
        for name, statuses in sorted(by_name.items())
    )


def host_allowed(host: str, allowed: tuple[str, ...]) -> bool:
    """Whether a Host header names this gateway. `host`: with or without port; `allowed`: lower case, see the settings."""
    if "*" in allowed:
        return True
    name = host.lower()
    name = name[: name.find("]") + 1] if name.startswith("[") else name.partition(":")[0]
    return any(name == pattern or (pattern.startswith("*.") and name.endswith(pattern[1:])) for pattern in allowed)
