"""How a batch is read and written, and how many of its items may be under way."""

from __future__ import annotations

import itertools
import json
from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from libs.common.errors import ErrorCode, PortcullisError
from services.edge import core, items
from services.edge.items import EVENTS, JSON, NDJSON, Lines, Pace, Tally
from services.edge.schemas import BatchLine, DetectConfig
from tests.unit.edge.fakes import VERDICT


@given(st.lists(st.binary(max_size=12).filter(lambda line: b"\n" not in line), max_size=12), st.data())
def test_lines_are_the_same_however_they_arrive(lines: list[bytes], data: st.DataObject) -> None:
    whole = b"\n".join(lines)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=6)))
    reader = Lines(8)
    for start, end in itertools.pairwise([0, *cuts, len(whole)]):
        reader.add(whole[start:end])
    reader.end()
    assert list(reader.whole) == [None if len(line) > 8 else line for line in lines if len(line) > 8 or line.strip()]


def test_of_a_line_that_is_too_long_nothing_is_kept() -> None:
    reader = Lines(10)
    for _ in range(1000):
        reader.add(b"x" * 1000)
        assert len(reader._rest) <= 10
    reader.add(b"\n{}")
    reader.end()
    assert list(reader.whole) == [None, b"{}"]


@pytest.mark.parametrize(
    ("line", "id", "code", "field"),
    [
        (b"nonsense", None, ErrorCode.BAD_REQUEST, None),
        (b'{"id":"a"}', "a", ErrorCode.INVALID_FIELD, "text"),
        (b'{"id":"a","text":""}', "a", ErrorCode.INVALID_FIELD, "text"),
        (b'{"id":7,"text":"t"}', None, ErrorCode.INVALID_FIELD, "id"),
        (b'{"id":"' + b"x" * 257 + b'","text":"t"}', None, ErrorCode.INVALID_FIELD, "id"),
        (b'["t"]', None, ErrorCode.INVALID_FIELD, "body"),
        (b'{"text":"\xff"}', None, ErrorCode.BAD_REQUEST, None),
        (b'{"id":"a","text":"' + b"x" * 100_001 + b'"}', "a", ErrorCode.INVALID_FIELD, "text"),
    ],
)
def test_what_is_wrong_with_a_line_is_told_under_its_id(line: bytes, id: str | None, code: ErrorCode, field: str | None) -> None:
    entry = items.read_line(line, 3)
    assert entry.error is not None
    assert (entry.index, entry.id, entry.error.code) == (3, id, code)
    assert [name for name, _ in entry.error.fields] == ([field] if field else [])


def test_a_line_has_its_text_and_id() -> None:
    assert items.read_line(b' {"text":"t","id":"a","more":1}\r', 0) == items.Entry(0, "a", "t")
    assert items.read_line(b'{"text":"t"}', 1) == items.Entry(1, None, "t")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b'{"requests":[{"text":"a"},{"text":"b"},{"text":""}]}', "requests[2].text"),
        (b'{"requests":[{"text":"a"},{"id":"b"}]}', "requests[1]"),
        (b'{"requests":[{"text":"a","id":1}]}', "requests[0].id"),
        (b'{"requests":[]}', "requests"),
        (b'{"requests":[{"text":"a"}],"config":{"confidence_threshold":2}}', "config.confidence_threshold"),
        (b"{}", "requests"),
    ],
)
def test_a_list_names_the_item_that_is_wrong(body: bytes, field: str) -> None:
    with pytest.raises(PortcullisError) as caught:
        items.decode_list(body)
    assert caught.value.code is ErrorCode.INVALID_FIELD
    assert [name for name, _ in caught.value.fields] == [field]


@pytest.mark.parametrize(
    ("accept", "wanted"),
    [
        (b"", NDJSON),
        (b"*/*", NDJSON),
        (b"application/json", JSON),
        (b"application/*", NDJSON),
        (b"text/event-stream", EVENTS),
        (b"text/*, application/*;q=0.5", EVENTS),
        (b"application/json;q=0.4, text/event-stream;q=0.6", EVENTS),
        (b"application/json, */*", NDJSON),
        (b"application/json, */*;q=0.8", JSON),
        (b"application/x-ndjson;q=0, */*", EVENTS),
        (b"image/png", NDJSON),
        (b"APPLICATION/JSON; charset=utf-8", JSON),
        (b"application/json;q=nonsense, text/event-stream;q=0.1", EVENTS),
        (b"\xff;;q==,,", NDJSON),
    ],
)
def test_the_answer_is_of_the_preferred_kind(accept: bytes, wanted: str) -> None:
    assert items.chosen(accept) == wanted


@pytest.mark.parametrize(
    ("prefer", "wanted"),
    [(b"respond-async", True), (b"wait=5, Respond-Async; x=1", True), (b"respond-asynchronously", False), (b"", False)],
)
def test_the_wish_to_be_answered_later_is_seen(prefer: bytes, wanted: bool) -> None:
    assert core.prefers_async({b"prefer": prefer}) is wanted


def test_lines_hold_a_verdict_or_an_error_and_details_only_when_asked_for() -> None:
    entry = items.Entry(4, "a", "text")
    plain = json.loads(items.encode_line(items.line_of(entry, VERDICT, DetectConfig()))[1])
    assert set(plain) == {
        "index", "id", "is_malicious", "confidence", "threat_types", "endpoint", "degraded", "coverage",
    }  # fmt: skip
    detailed = json.loads(items.encode_line(items.line_of(entry, VERDICT, DetectConfig(detailed_response=True)))[1])
    assert set(detailed) - set(plain) == {"reason", "spans", "transforms", "timings"}
    kind, line = items.encode_line(items.line_of(entry, PortcullisError(ErrorCode.NO_ENGINE), DetectConfig()))
    assert (kind, set(json.loads(line))) == ("error", {"index", "id", "error"})


def test_the_summary_adds_up() -> None:
    tally = Tally()
    for line in (
        BatchLine(index=0, id=None, is_malicious=True, degraded=True),
        BatchLine(index=1, id=None, is_malicious=False, degraded=False),
        items.line_of(items.Entry(2, None), PortcullisError(ErrorCode.NO_ENGINE), DetectConfig()),
    ):
        tally.count(line)
    summary = tally.summary(1.0, None, 3)
    assert (summary.total, summary.malicious, summary.benign, summary.failed, summary.degraded) == (3, 1, 1, 1, 1)
    assert summary.complete


# --- how many at a time --------------------------------------------------------------------------------------------------


def play(pace: Pace, messages: int, texts_a_second: float, distance: float = 0.0) -> list[int]:
    """So many messages through one queue, so many seconds away, that is worked on at this rate; the size of each."""
    queue: deque[tuple[int, float]] = deque()
    now = 0.0
    sizes: list[int] = []
    while len(sizes) < messages or queue:
        while len(sizes) < messages and pace.has_room(size := pace.size):
            pace.begin(size, 0)
            queue.append((size, now))
            sizes.append(size)
        size, sent = queue.popleft()
        now += size / texts_a_second
        pace.answered(size, now - sent + distance)
        pace.end(size, 0)
    return sizes


def test_the_first_message_is_one_text_and_a_few_more_follow_before_it_is_back() -> None:
    pace = Pace()
    assert pace.size == 1
    pace.begin(1, 10)
    sent = 1
    while pace.has_room(pace.size):
        sent += pace.size
        pace.begin(pace.size, 10)
    assert items.FIRST_UNDER_WAY / 2 < sent <= items.FIRST_UNDER_WAY


@pytest.mark.parametrize("distance", [0.0, 1.5])
@pytest.mark.parametrize("texts_a_second", [30.0, 300.0, 3000.0])
def test_what_waits_is_done_in_about_half_a_second(texts_a_second: float, distance: float) -> None:
    pace = Pace()
    sizes = play(pace, 3000, texts_a_second, distance)
    assert sizes[0] == 1
    settled = pace._limit / texts_a_second
    assert 0.2 <= settled <= 0.8 or pace._limit == items.MAX_UNDER_WAY
    assert max(sizes) <= items.MAX_ITEMS


def test_slow_messages_leave_one_text_at_a_time_and_never_none() -> None:
    pace = Pace()
    play(pace, 100, 1000.0)
    for _ in range(200):
        pace.begin(1, 0)
        pace.answered(50, 9.0)
        pace.end(1, 0)
    assert (pace.size, pace.has_room(1)) == (1, True)


def test_long_texts_are_bounded_by_their_characters() -> None:
    pace = Pace()
    play(pace, 1000, 3000.0)
    sent = 0
    while pace.has_room(1):
        pace.begin(1, 100_000)
        sent += 1
    assert sent == 5
