"""The kit sees what it is there to see: each invariant, broken once."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, cast

import aiohttp
import pytest

from libs.common.errors import ErrorCode
from tests.bad_inputs import Http
from tests.chaos.hostile_engine import NAME
from tests.chaos.kit import LATE_SECONDS, NOISE_SECONDS, Load, Seen
from tests.chaos.questions import DISTINCT, engines_verdict, is_right, question, released
from tests.chaos.storm import Harmed, Storm
from tests.chaos.test_bad_inputs import check

WELL = {"at": 0.0, "status": 200, "latency": 0.1, "correct": True, "degraded": False}


def _load(**seen: Any) -> Load:
    load = Load(cast("aiohttp.ClientSession", None), "key", 20.0, timeout_seconds=2.0)
    load.seen.append(Seen(**(WELL | seen)))
    return load


@pytest.mark.parametrize(
    "broken",
    [
        {"correct": False},
        {"own": False},
        {"status": 500},
        {"status": 0, "error": "ServerDisconnectedError"},
        {"status": 503, "retry_after": False},
        {"latency": 2.0 + LATE_SECONDS + NOISE_SECONDS + 0.01},
        {"status": 504, "latency": 2.0 + LATE_SECONDS + NOISE_SECONDS + 0.01},
    ],
    ids=str,
)
def test_a_broken_invariant_is_seen(broken: dict[str, Any]) -> None:
    with pytest.raises(AssertionError):
        _load(**broken).assert_invariants()


def test_what_is_well_is_well() -> None:
    _load().assert_invariants()
    _load(status=503).assert_invariants()
    _load(status=0, error="ServerDisconnectedError").assert_invariants(lost_connections=True)


def test_no_answer_at_all_is_late_even_where_connections_may_be_lost() -> None:
    with pytest.raises(AssertionError):
        _load(status=0, error="TimeoutError()", latency=30.0).assert_invariants(lost_connections=True)


def test_the_answer_to_another_text_is_not_right() -> None:
    """Each text of the load has a confidence of its own, of the pool and of the primary engine."""
    for number in range(DISTINCT):
        asked, other = question(number), question((number + 6) % DISTINCT)
        for endpoint, of in (("pool", released()), (NAME, None)):
            for text, right in ((asked.text, True), (other.text, False)):
                confidence = of[text] if of is not None else engines_verdict(text)["confidence"]
                body = {"is_malicious": asked.malicious, "confidence": confidence, "endpoint": endpoint}
                assert is_right(asked, body) is right, (asked, text)


def _storm(*failing: tuple[float, float], harms: tuple[float, ...] = (2.0, 7.0)) -> Storm:
    """Fifty calls a second for twelve seconds, of which those asked in `failing` (from, to) were refused."""
    load = _load()
    load.seen[:] = [
        replace(load.seen[0], at=at, status=503 if any(start <= at < end for start, end in failing) else 200)
        for at in (number / 50 for number in range(600))
    ]
    return Storm(load, [Harmed("auth", at) for at in harms])


def test_a_recovery_ends_when_answers_are_right_again() -> None:
    assert [(each.failed, each.seconds) for each in _storm().recoveries()] == [(0, 0.0), (0, 0.0)]
    first, second = _storm((2.0, 2.5)).recoveries()
    assert first.failed == 25
    assert first.seconds == pytest.approx(0.5)
    assert (second.failed, second.seconds) == (0, 0.0)


def test_a_recovery_that_takes_longer_than_the_next_harm_is_one_of_both() -> None:
    first, second = _storm((2.0, 8.0)).recoveries()
    assert first.seconds == pytest.approx(6.0)
    assert second.seconds == pytest.approx(1.0)
    # Some good answers in between are none.
    first, _ = _storm((2.0, 6.9), (7.0, 8.0)).recoveries()
    assert first.seconds == pytest.approx(6.0)
    with pytest.raises(AssertionError):
        _storm((2.0, 12.0)).assert_stood(1.0)


def test_who_never_recovers_is_seen() -> None:
    assert [each.seconds for each in _storm((9.0, 12.0)).recoveries()] == [0.0, math.inf]


REFUSED = (
    b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/problem+json\r\n\r\n"
    b'{"type":"urn:portcullis:problem:bad_request","status":400,"request_id":"a"}'
)
BAD = Http("", "", b"")


def test_the_answer_to_a_bad_request_is_looked_at() -> None:
    check(BAD, REFUSED)
    for broken in (
        REFUSED.replace(b"400 Bad", b"200 Bad"),
        REFUSED.replace(b"problem+json", b"json"),
        REFUSED.replace(b"bad_request", b"internal"),
        REFUSED.replace(b'"a"', b'""'),
        REFUSED * 2,
        b"",
    ):
        with pytest.raises((AssertionError, ValueError, IndexError)):
            check(BAD, broken)


def test_so_is_the_answer_to_an_odd_one() -> None:
    good = b"HTTP/1.1 200 OK\r\n\r\n"
    check(Http("", "", b"", None), good)
    check(Http("", "", b"", None, or_refused=True), REFUSED.replace(b"400", b"503"))
    check(Http("", "", b"", None, answers=2), good * 2)
    check(
        Http("", "", b"", None, inside=ErrorCode.INVALID_FIELD),
        good + b'{"error":{"type":"urn:portcullis:problem:invalid_field"}}',
    )
    for row, answer in (
        (Http("", "", b"", None), REFUSED),
        (Http("", "", b"", None, or_refused=True), REFUSED),
        (Http("", "", b"", None, answers=2), good),
        (Http("", "", b"", None, inside=ErrorCode.INVALID_FIELD), good + b"{}"),
    ):
        with pytest.raises(AssertionError):
            check(row, answer)
