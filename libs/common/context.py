"""What travels with every request in the headers of its messages: deadline, request id, trace, and the time spent so far."""

from __future__ import annotations

import random
import re
import secrets
from dataclasses import dataclass, field

from libs.common.errors import ErrorCode, PortcullisError

DEADLINE_HEADER = "Portcullis-Deadline"
REQUEST_ID_HEADER = "Portcullis-Request-Id"
TRACEPARENT_HEADER = "traceparent"
TIMINGS_HEADER = "Portcullis-Timings"

MAX_DEADLINE_MS = 1 << 53
"""Beyond it no float holds a millisecond, and far beyond it none holds anything."""

# A request id ends up in headers, logs and answers: no spaces, no control characters, bounded.
REQUEST_ID_PATTERN = re.compile(r"[A-Za-z0-9._:@/+=-]{1,128}", re.ASCII)
# W3C Trace Context, version 00: https://www.w3.org/TR/trace-context/#traceparent-header
TRACEPARENT_PATTERN = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}", re.ASCII)
# What is passed on from stage to stage with every message, so that all headers together stay within `bus.HEADER_RESERVE_BYTES`.
TIMING_PATTERN = re.compile(r"([a-z_]{1,24})=([0-9]{1,9}(?:\.[0-9]{1,6})?)", re.ASCII)
MOST_TIMINGS = 12


def new_request_id() -> str:
    return secrets.token_hex(16)


# Ids of traces and spans need not be secret, and one is made for every step of every request.
_ids = random.Random(secrets.randbits(256))  # noqa: S311


def new_span_id() -> str:
    return f"{_ids.getrandbits(64) or 1:016x}"


def new_traceparent() -> str:
    """Of a trace that begins here, and of which nothing is known to be recorded (flag `sampled` unset)."""
    return f"00-{_ids.getrandbits(128) or 1:032x}-{new_span_id()}-00"


@dataclass(frozen=True, slots=True)
class RequestContext:
    """`deadline_ms`: epoch milliseconds. `timings`: milliseconds by stage, in the order of the path.

    `attempt_of` is unique per request (unlike the request id, which is the caller's to choose) and the same when it has to be
    sent again: the key for doing things once. A stage reads it off the origin, so that it needs no header.
    """

    deadline_ms: int
    request_id: str
    traceparent: str
    timings: dict[str, float] = field(default_factory=dict)
    attempt_of: str = field(default_factory=new_request_id)

    def remaining_seconds(self, now: float) -> float:
        """Seconds until the deadline, negative after it. `now`: epoch seconds."""
        return self.deadline_ms / 1000 - now

    def within(self, traceparent: str) -> RequestContext:
        """The same request, as the children of another span see it."""
        return RequestContext(self.deadline_ms, self.request_id, traceparent, self.timings, self.attempt_of)

    def headers(self) -> dict[str, str]:
        headers = {
            DEADLINE_HEADER: str(self.deadline_ms),
            REQUEST_ID_HEADER: self.request_id,
            TRACEPARENT_HEADER: self.traceparent,
        }
        if self.timings:
            headers[TIMINGS_HEADER] = ",".join(f"{stage}={ms:.3f}" for stage, ms in self.timings.items())
        return headers


def parse_timings(value: str | None) -> dict[str, float]:
    """`auth=0.41,limiter=0.52` → a dict; what cannot be read is left out, since timings never decide anything.

    What can is sent on, and shown: hence only names and finite numbers, and no more of them than there are stages.
    """
    parts = (value or "").split(",", MOST_TIMINGS)[:MOST_TIMINGS]
    found = (TIMING_PATTERN.fullmatch(part.strip()) for part in parts)
    return {timing[1]: float(timing[2]) for timing in found if timing is not None}


def from_headers(headers: dict[str, str], origin: str | None = None) -> RequestContext:
    """The context of an incoming message; `origin` is where its answer goes (see `libs.common.bus`).

    Raises `PortcullisError` BAD_REQUEST when the deadline is missing or not a number: a message that could be executed at any
    later time is worse than one refused. A missing or insane id or trace is replaced.
    """
    try:
        deadline_ms = int(headers[DEADLINE_HEADER])
        if abs(deadline_ms) > MAX_DEADLINE_MS:
            raise ValueError
    except (KeyError, ValueError):
        raise PortcullisError(ErrorCode.BAD_REQUEST, f"The message has no valid {DEADLINE_HEADER} header.") from None
    request_id = headers.get(REQUEST_ID_HEADER, "")
    traceparent = headers.get(TRACEPARENT_HEADER, "")
    return RequestContext(
        deadline_ms=deadline_ms,
        request_id=request_id if REQUEST_ID_PATTERN.fullmatch(request_id) else new_request_id(),
        traceparent=traceparent if TRACEPARENT_PATTERN.fullmatch(traceparent) else new_traceparent(),
        timings=parse_timings(headers.get(TIMINGS_HEADER)),
        attempt_of=origin or new_request_id(),
    )
