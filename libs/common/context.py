"""What travels with every request in the headers of its messages: deadline, request id, trace, and the time spent so far."""

from __future__ import annotations

import random
import re
import secrets

import msgspec

from libs.common.clock import Clock
from libs.common.errors import ErrorCode, PortcullisError

DEADLINE_HEADER = "Portcullis-Deadline"
TIME_LEFT_HEADER = "Portcullis-Time-Left"
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


class RequestContext(msgspec.Struct, frozen=True, gc=False):
    """`deadline_ms`: epoch milliseconds, as whoever began the request has set it; passed on as it came. `timings`: milliseconds
    by stage, in the order of the path. `ends`: when time is up by this process's monotonic clock; None: by the deadline alone.

    `attempt_of` is unique per request (unlike the request id, which is the caller's to choose) and the same when it has to be
    sent again: the key for doing things once. A stage reads it off the origin, so that it needs no header.
    """

    deadline_ms: int
    request_id: str
    traceparent: str
    timings: dict[str, float] = msgspec.field(default_factory=dict)
    attempt_of: str = msgspec.field(default_factory=new_request_id)
    ends: float | None = None

    @classmethod
    def lasting(cls, seconds: float, clock: Clock, request_id: str = "", traceparent: str = "") -> RequestContext:
        """Of a request that begins here, and may take so long. Without an id or a trace it gets new ones."""
        return cls(
            int((clock.now() + seconds) * 1000),
            request_id or new_request_id(),
            traceparent or new_traceparent(),
            ends=clock.monotonic() + seconds,
        )

    def remaining_seconds(self, clock: Clock) -> float:
        """Seconds until time is up, negative after that. `clock`: this process's."""
        return self.ends - clock.monotonic() if self.ends is not None else self.deadline_ms / 1000 - clock.now()

    def within(self, traceparent: str) -> RequestContext:
        """The same request, as the children of another span see it."""
        return RequestContext(self.deadline_ms, self.request_id, traceparent, self.timings, self.attempt_of, self.ends)

    def as_attempt(self, origin: str | None) -> RequestContext:
        """The same request, as the stage sees it whose answer goes to `origin`."""
        attempt_of = origin or new_request_id()
        return RequestContext(self.deadline_ms, self.request_id, self.traceparent, self.timings, attempt_of, self.ends)

    def attempt(self, seconds: float, clock: Clock) -> RequestContext:
        """A part of the same request, for which there is no more time than `seconds`.

        Its deadline is that much earlier than the request's as there will be time left after it: by the clock that has set the
        request's, and not by ours.
        """
        remaining = self.remaining_seconds(clock)
        seconds = min(seconds, remaining)
        deadline_ms = self.deadline_ms - round((remaining - seconds) * 1000)
        ends = clock.monotonic() + seconds
        return RequestContext(deadline_ms, self.request_id, self.traceparent, attempt_of=self.attempt_of, ends=ends)

    def outgoing(self, clock: Clock) -> dict[str, str]:
        """The headers of a message that asks for something and is sent now."""
        return {**self.headers(), **self.time_left(clock)}

    def time_left(self, clock: Clock) -> dict[str, str]:
        """The header that says for how many milliseconds the sender of a message still waits.

        No other clock is needed to know it. The receiver goes by the deadline or by this, whichever comes first: its own clock
        can give it no more time, and what was long on its way is late all the same.
        """
        return {TIME_LEFT_HEADER: str(max(0, min(round(self.remaining_seconds(clock) * 1000), MAX_DEADLINE_MS)))}

    def headers(self) -> dict[str, str]:
        """Those of every message of this request."""
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


def _milliseconds(headers: dict[str, str], name: str) -> int:
    try:
        value = int(headers[name])
        if abs(value) > MAX_DEADLINE_MS:
            raise ValueError
    except (KeyError, ValueError):
        raise PortcullisError(ErrorCode.BAD_REQUEST, f"The message has no valid {name} header.") from None
    return value


def from_headers(headers: dict[str, str], clock: Clock, origin: str | None = None) -> RequestContext:
    """The context of a message that comes in now; `origin` is where its answer goes (see `libs.common.bus`).

    There is time until the deadline, by this host's clock, and no more of it than the sender had left, which holds where the two
    hosts' clocks do not agree.

    Raises `PortcullisError` BAD_REQUEST when the deadline is missing or not a number: a message that could be executed at any
    later time is worse than one refused. A missing or insane id or trace is replaced.
    """
    deadline_ms = _milliseconds(headers, DEADLINE_HEADER)
    seconds = deadline_ms / 1000 - clock.now()
    if TIME_LEFT_HEADER in headers:
        seconds = min(seconds, _milliseconds(headers, TIME_LEFT_HEADER) / 1000)
    request_id = headers.get(REQUEST_ID_HEADER, "")
    traceparent = headers.get(TRACEPARENT_HEADER, "")
    return RequestContext(
        deadline_ms=deadline_ms,
        request_id=request_id if REQUEST_ID_PATTERN.fullmatch(request_id) else new_request_id(),
        traceparent=traceparent if TRACEPARENT_PATTERN.fullmatch(traceparent) else new_traceparent(),
        timings=parse_timings(headers.get(TIMINGS_HEADER)),
        attempt_of=origin or new_request_id(),
        ends=clock.monotonic() + seconds,
    )
