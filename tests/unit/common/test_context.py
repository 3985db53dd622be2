"""What travels in the headers."""

from __future__ import annotations

import msgspec
import pytest

from libs.common.bus import HEADER_RESERVE_BYTES
from libs.common.clock import ManualClock
from libs.common.context import (
    DEADLINE_HEADER,
    MAX_DEADLINE_MS,
    MOST_TIMINGS,
    REQUEST_ID_HEADER,
    TIME_LEFT_HEADER,
    TIMINGS_HEADER,
    TRACEPARENT_HEADER,
    RequestContext,
    from_headers,
    new_request_id,
    new_traceparent,
    parse_timings,
)
from libs.common.errors import ErrorCode, PortcullisError

CLOCK = ManualClock()
HOUR = 3600.0


def off_by(seconds: float) -> ManualClock:
    """Of another host, whose clock differs from `CLOCK` by so much, and which has been up for another time."""
    clock = ManualClock(CLOCK.now() + seconds)
    clock._monotonic = 777.0
    return clock


def test_headers_survive_the_way_there_and_back() -> None:
    ends = CLOCK.monotonic() + 10
    timings = {"auth": 0.5, "limiter": 1.25}
    context = RequestContext(int((CLOCK.now() + 10) * 1000), new_request_id(), new_traceparent(), timings, ends=ends)
    assert from_headers(context.headers(), CLOCK, origin=context.attempt_of) == context
    assert from_headers(context.outgoing(CLOCK), CLOCK, origin=context.attempt_of) == context


@pytest.mark.parametrize("seconds", [-HOUR, -1.0, 0.0, 5.0, HOUR])
def test_a_clock_that_is_slow_gives_nobody_more_time(seconds: float) -> None:
    """Neither the one that sets the deadline when it is ahead, nor the one that reads it when it is behind."""
    there = off_by(-seconds)
    received = from_headers(RequestContext.lasting(10, CLOCK).outgoing(CLOCK), there)
    assert received.remaining_seconds(there) == pytest.approx(min(10, 10 + seconds), abs=0.002)
    there.advance(4)
    assert received.remaining_seconds(there) == pytest.approx(min(10, 10 + seconds) - 4, abs=0.002)


@pytest.mark.parametrize("seconds", [-HOUR, -2.0, 0.0, 2.0])
def test_a_stage_with_another_clock_passes_the_time_on_as_it_got_it(seconds: float) -> None:
    between, worker = off_by(seconds), off_by(0.1)
    received = from_headers(RequestContext.lasting(10, CLOCK).outgoing(CLOCK), between)
    for clock in (CLOCK, between, worker):
        clock.advance(1)
    passed_on = from_headers(received.outgoing(between), worker)
    assert passed_on.deadline_ms == received.deadline_ms
    assert passed_on.remaining_seconds(worker) == pytest.approx(9 - max(0.1, seconds), abs=0.01)
    # A part of it, as a worker is given: late for it only when it is late for us.
    part = received.attempt(2, between)
    assert part.remaining_seconds(between) == pytest.approx(2)
    assert from_headers(part.outgoing(between), worker).remaining_seconds(worker) == pytest.approx(2, abs=0.11)
    worker.advance(3)  # and it has hung before it reads the message
    assert from_headers(part.outgoing(between), worker).remaining_seconds(worker) < 0 or seconds > 0


def test_an_attempt_has_no_more_time_than_the_request() -> None:
    context = RequestContext.lasting(1, CLOCK)
    assert context.attempt(5, CLOCK).remaining_seconds(CLOCK) == pytest.approx(1)
    assert context.attempt(5, CLOCK).deadline_ms == context.deadline_ms


def test_a_clock_that_is_set_in_the_middle_changes_nothing() -> None:
    here = off_by(0)
    context = from_headers(RequestContext.lasting(10, CLOCK).outgoing(CLOCK), here)
    here._now += HOUR
    assert context.remaining_seconds(here) == pytest.approx(10, abs=0.002)
    here._now -= 2 * HOUR
    assert context.remaining_seconds(here) == pytest.approx(10, abs=0.002)


def test_who_says_nothing_of_the_time_left_has_it_until_the_deadline() -> None:
    here = off_by(-2)
    context = from_headers(RequestContext.lasting(10, CLOCK).headers(), here)
    assert context.remaining_seconds(here) == pytest.approx(12, abs=0.002)


@pytest.mark.parametrize("left", ["", "soon", "1.5", "9" * 30])
def test_a_time_left_that_is_none_is_refused(left: str) -> None:
    headers = RequestContext.lasting(10, CLOCK).headers() | {TIME_LEFT_HEADER: left}
    with pytest.raises(PortcullisError) as caught:
        from_headers(headers, CLOCK)
    assert caught.value.code == ErrorCode.BAD_REQUEST


def test_no_time_left_is_said_as_a_number() -> None:
    assert RequestContext.lasting(-5, CLOCK).outgoing(CLOCK)[TIME_LEFT_HEADER] == "0"
    far = RequestContext(MAX_DEADLINE_MS, new_request_id(), new_traceparent()).outgoing(CLOCK)
    assert 0 < int(far[TIME_LEFT_HEADER]) <= MAX_DEADLINE_MS


@pytest.mark.parametrize("deadline", [None, "", "soon", "1.5", "0x10"])
def test_a_message_without_a_deadline_is_refused(deadline: str | None) -> None:
    headers = {} if deadline is None else {DEADLINE_HEADER: deadline}
    with pytest.raises(PortcullisError) as caught:
        from_headers(headers, CLOCK)
    assert caught.value.code == ErrorCode.BAD_REQUEST


@pytest.mark.parametrize("bad", ["", "a b", "x" * 129, "a\r\nX-Evil: 1", "é"])
def test_an_insane_request_id_is_replaced(bad: str) -> None:
    context = from_headers({DEADLINE_HEADER: "1", REQUEST_ID_HEADER: bad}, CLOCK)
    assert context.request_id != bad
    assert len(context.request_id) == 32


@pytest.mark.parametrize("bad", ["", "00-0-0-00", f"00-{'0' * 32}-{'1' * 16}-01", f"00-{'1' * 32}-{'0' * 16}-01", "ff-x"])
def test_an_invalid_traceparent_is_replaced(bad: str) -> None:
    assert from_headers({DEADLINE_HEADER: "1", TRACEPARENT_HEADER: bad}, CLOCK).traceparent != bad


def test_timings_that_cannot_be_read_are_left_out() -> None:
    assert parse_timings("auth=1.5,broken,limiter=x,proxy=2") == {"auth": 1.5, "proxy": 2.0}
    assert parse_timings(None) == {}


@pytest.mark.parametrize(
    "value", ["auth=nan", "auth=inf", "auth=-1", "auth=1e308", "=1", "au th=1", "auth\n=1", "é=1", f"{'a' * 25}=1"]
)
def test_timings_are_names_and_finite_numbers(value: str) -> None:
    """They are sent on to the next stage, and shown to the caller as JSON."""
    assert parse_timings(f"{value},limiter=2") == {"limiter": 2.0}


def test_headers_of_any_timings_are_within_what_is_kept_free_for_them() -> None:
    """A message whose headers are longer than that may be one that ends the connection for good."""
    flood = ",".join(f"{'x' * 23}{letter}=999999999.999999" for letter in "abcdefghijklmnopqrstuvwxyz" * 100)
    given = {
        DEADLINE_HEADER: str(-MAX_DEADLINE_MS),
        TIME_LEFT_HEADER: str(MAX_DEADLINE_MS),
        REQUEST_ID_HEADER: "x" * 128,
        TIMINGS_HEADER: flood,
    }
    context = from_headers(given, CLOCK)
    assert len(context.timings) == MOST_TIMINGS
    spent = msgspec.structs.replace(context, timings={**context.timings, "detector_proxy": 123456.789})
    assert sum(len(name) + len(value) + 4 for name, value in spent.outgoing(CLOCK).items()) <= HEADER_RESERVE_BYTES
