"""What travels in the headers."""

from __future__ import annotations

import pytest

from libs.common.context import (
    DEADLINE_HEADER,
    REQUEST_ID_HEADER,
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
