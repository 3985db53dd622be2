"""What travels in the headers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from libs.common.bus import HEADER_RESERVE_BYTES
from libs.common.context import (
    DEADLINE_HEADER,
    MOST_TIMINGS,
    REQUEST_ID_HEADER,
    TIMINGS_HEADER,
    TRACEPARENT_HEADER,
    RequestContext,
    from_headers,
    new_request_id,
    new_traceparent,
    parse_timings,
)
from libs.common.errors import ErrorCode, PortcullisError


def test_headers_survive_the_way_there_and_back() -> None:
    context = RequestContext(1_800_000_000_000, new_request_id(), new_traceparent(), {"auth": 0.5, "limiter": 1.25})
    assert from_headers(context.headers(), origin=context.attempt_of) == context


@pytest.mark.parametrize("deadline", [None, "", "soon", "1.5", "0x10"])
def test_a_message_without_a_deadline_is_refused(deadline: str | None) -> None:
    headers = {} if deadline is None else {DEADLINE_HEADER: deadline}
    with pytest.raises(PortcullisError) as caught:
        from_headers(headers)
    assert caught.value.code == ErrorCode.BAD_REQUEST


@pytest.mark.parametrize("bad", ["", "a b", "x" * 129, "a\r\nX-Evil: 1", "é"])
def test_an_insane_request_id_is_replaced(bad: str) -> None:
    context = from_headers({DEADLINE_HEADER: "1", REQUEST_ID_HEADER: bad})
    assert context.request_id != bad
    assert len(context.request_id) == 32


@pytest.mark.parametrize("bad", ["", "00-0-0-00", f"00-{'0' * 32}-{'1' * 16}-01", f"00-{'1' * 32}-{'0' * 16}-01", "ff-x"])
def test_an_invalid_traceparent_is_replaced(bad: str) -> None:
    assert from_headers({DEADLINE_HEADER: "1", TRACEPARENT_HEADER: bad}).traceparent != bad


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
    given = {DEADLINE_HEADER: "1", REQUEST_ID_HEADER: "x" * 128, TIMINGS_HEADER: flood}
    context = from_headers(given)
    assert len(context.timings) == MOST_TIMINGS
    spent = replace(context, timings={**context.timings, "detector_proxy": 123456.789})
    assert sum(len(name) + len(value) + 4 for name, value in spent.headers().items()) <= HEADER_RESERVE_BYTES
