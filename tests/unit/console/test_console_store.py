"""The store of traces: what is kept, what comes first, what a trace looks like."""

from __future__ import annotations

import random
from typing import Any

import pytest

from services.console.core import MAX_TRACE_SPANS, Query, Span, Summary, TraceStore, in_tree_order

MS = 1_000_000


def span(
    trace: int = 1,
    number: int = 1,
    parent: int | None = None,
    *,
    start_ms: float = 0,
    ms: float = 10,
    kind: str = "server",
    service: str = "edge",
    failed: bool = False,
    status: int | None = None,
    **attributes: Any,
) -> Span:
    return Span(
        trace_id=f"{trace:032x}",
        span_id=f"{number:016x}",
        parent_id=f"{parent:016x}" if parent is not None else "",
        name=f"span {number}",
        kind=kind,
        service=service,
        instance="one",
        start_ns=int(start_ms * MS),
        end_ns=int((start_ms + ms) * MS),
        failed=failed,
        attributes=(
            *(() if status is None else (("http.response.status_code", status),)),
            *((key.replace("__", "."), value) for key, value in attributes.items()),
        ),
    )


def store(max_spans: int = 1000, max_bytes: int = 10_000_000) -> TraceStore:
    return TraceStore(max_spans, max_bytes, slow_ms=1000)


def kept(traces: TraceStore, **query: Any) -> list[int]:
    return [int(each.trace_id, 16) for each in traces.find(Query(**query))]


def only(traces: TraceStore) -> Summary:
    (summary,) = traces.find(Query())
    return summary


def mixed() -> TraceStore:
    """One trace of each state; the numbers say in which order they came."""
    traces = store()
    traces.add([span(1, start_ms=1, status=200, portcullis__request_id="first-request", portcullis__key_id="Kabc")])
    traces.add([span(2, start_ms=2, status=429, portcullis__outcome="rate_limited")])
    traces.add([span(3, start_ms=3, status=200, portcullis__degraded=True, portcullis__is_malicious=True)])
    traces.add([span(4, start_ms=4, ms=1500, status=200)])
    traces.add([span(5, start_ms=5, failed=True, status=503)])
    traces.add([span(6, start_ms=6, status=200)])
    return traces


def test_trouble_comes_first_and_of_equals_the_newest() -> None:
    assert kept(mixed()) == [5, 4, 3, 2, 6, 1]
    assert kept(mixed(), order="newest") == [6, 5, 4, 3, 2, 1]
    assert kept(mixed(), order="slowest")[0] == 4
    assert kept(mixed(), limit=2) == [5, 4]


@pytest.mark.parametrize(
    ("show", "found"), [("all", 6), ("failed", 1), ("slow", 1), ("degraded", 1), ("refused", 1), ("malicious", 1)]
)
def test_each_kind_can_be_asked_for_alone_and_is_counted(show: str, found: int) -> None:
    traces = mixed()
    assert len(kept(traces, show=show)) == found
    assert traces.counts()[show] == found


@pytest.mark.parametrize(
    ("search", "found"),
    [
        ("first-req", [1]),
        ("FIRST", [1]),
        (f"{4:032x}", [4]),
        (f"{4:032x}"[:31], [5, 4, 3, 2, 6, 1]),
        ("rate_lim", [2]),
        ("kab", [1]),
        ("span 1", [5, 4, 3, 2, 6, 1]),
        ("nothing like it", []),
    ],
)
def test_traces_are_found_by_what_is_known_of_a_request(search: str, found: list[int]) -> None:
    assert kept(mixed(), search=search) == found


def test_a_failure_on_the_way_that_was_made_good_is_degraded() -> None:
    traces = store()
    traces.add([span(1, 1, status=200), span(1, 2, 1, kind="client", service="detector_proxy", failed=True)])
    assert only(traces).state == "degraded"


def test_a_server_error_counts_even_if_no_span_says_so() -> None:
    traces = store()
    traces.add([span(1, 1, status=504)])
    assert only(traces).state == "failed"


def test_slow_is_what_the_first_span_says() -> None:
    traces = store()
    # The worker goes on after the caller has been told.
    traces.add([span(1, 1, ms=20, status=200), span(1, 2, 1, kind="internal", start_ms=5, ms=3000)])
    assert (only(traces).state, only(traces).duration_ms) == ("ok", 20)


def test_a_trace_grows_as_its_parts_come_in_any_order() -> None:
    traces = store()
    traces.add([span(1, 2, 1, kind="consumer", service="auth", start_ms=2, ms=1)])
    before = only(traces)
    assert (before.complete, before.name, before.services) == (False, "span 2", ("auth",))
    traces.add([span(1, 1, 77, start_ms=1, ms=5, portcullis__request_id="abc", status=200)])
    after = only(traces)
    assert (after.complete, after.name, after.services, after.duration_ms) == (True, "span 1", ("edge", "auth"), 5)
    assert (after.request_id, after.spans) == ("abc", 2)


def test_what_is_sent_twice_is_kept_once() -> None:
    traces = store()
    for _ in range(3):
        traces.add([span(1, 1), span(1, 2, 1)])
    assert (traces.spans, only(traces).spans) == (2, 2)
    alone = store()
    alone.add([span(1, 1), span(1, 2, 1)])
    assert traces.bytes == alone.bytes


def test_the_revision_grows_with_every_change_and_with_nothing_else() -> None:
    traces = store()
    traces.add([])
    assert traces.revision == 0
    traces.add([span()])
    assert traces.revision == 1


# --- bounds --------------------------------------------------------------------------------------------------------------


def test_the_oldest_ordinary_traces_go_first() -> None:
    traces = store(max_spans=10)
    for number in range(1, 16):
        traces.add([span(number, start_ms=number, status=200)])
    assert kept(traces, order="newest") == list(range(15, 5, -1))
    assert (traces.spans, traces.evicted) == (10, 5)


def test_failures_outlive_a_flood_of_ordinary_traces_and_of_failures_half_the_room() -> None:
    traces = store(max_spans=10)
    for number in range(1, 4):
        traces.add([span(number, start_ms=number, failed=True)])
    for number in range(100, 200):
        traces.add([span(number, start_ms=number, status=200)])
    assert kept(traces, show="failed") == [3, 2, 1]
    for number in range(200, 300):
        traces.add([span(number, start_ms=number, failed=True)])
    for number in range(300, 400):
        traces.add([span(number, start_ms=number, status=200)])
    assert kept(traces, show="failed") == [299, 298, 297, 296, 295]
    assert traces.spans == 10


def test_a_trace_that_turns_out_to_have_failed_is_counted_as_such() -> None:
    traces = store(max_spans=10)
    traces.add([span(1, 2, 1, kind="consumer", service="auth")])
    traces.add([span(1, 1, 77, failed=True)])
    for number in range(100, 200):
        traces.add([span(number, start_ms=number, status=200)])
    assert kept(traces, show="failed") == [1]
    assert traces.spans == 10


def test_bytes_are_bounded_too() -> None:
    traces = store(max_bytes=50_000)
    for number in range(1, 300):
        traces.add([span(number, start_ms=number, text="x" * 500)])
        assert traces.bytes <= 50_000
    assert 10 < len(traces) < 100


def test_one_trace_cannot_grow_without_end() -> None:
    traces = store(max_spans=100_000, max_bytes=100_000_000)
    traces.add([span(1, number, 1 if number > 1 else None) for number in range(1, MAX_TRACE_SPANS + 51)])
    view = traces.get(f"{1:032x}")
    assert view is not None
    assert (len(view.spans), view.cut) == (MAX_TRACE_SPANS, 50)


def test_the_books_are_right_after_anything() -> None:
    rng = random.Random(7)
    traces = store(max_spans=200, max_bytes=150_000)
    for _ in range(2000):
        trace = rng.randrange(60)
        traces.add(
            span(
                trace,
                rng.randrange(30),
                rng.randrange(30),
                start_ms=rng.random() * 1e4,
                failed=rng.random() < 0.2,
                kind="internal",
            )
            for _ in range(rng.randrange(4))
        )
        assert traces.spans <= 200
        assert traces.bytes <= 150_000
    views = [traces.get(each.trace_id) for each in traces.find(Query(limit=1000))]
    assert sum(len(view.spans) for view in views if view is not None) == traces.spans
    assert len(views) == len(traces)


def test_more_than_fits_at_once_leaves_the_store_working() -> None:
    traces = store(max_spans=5)
    traces.add([span(1, number) for number in range(10)])
    assert len(traces) == 0
    traces.add([span(2)])
    assert kept(traces) == [2]


# --- a trace as a tree ---------------------------------------------------------------------------------------------------


def test_each_span_comes_below_its_parent_and_siblings_by_time() -> None:
    spans = [span(1, 4, 1, start_ms=8), span(1, 3, 2, start_ms=5), span(1, 2, 1, start_ms=3), span(1, 1, start_ms=0)]
    assert [(int(each.span_id, 16), depth) for each, depth in in_tree_order(spans)] == [(1, 0), (2, 1), (3, 2), (4, 1)]


def test_orphans_circles_and_deep_chains_are_shown_all_the_same() -> None:
    orphan = span(1, 9, 1234, start_ms=1)
    circle = [span(1, 2, 3), span(1, 3, 2), span(1, 5, 5)]
    chain = [span(1, 100 + number, 99 + number, start_ms=number) for number in range(1500)]
    ordered = in_tree_order([orphan, *circle, *chain])
    assert len(ordered) == 4 + 1500
    assert len({each.span_id for each, _ in ordered}) == len(ordered)
    assert max(depth for _, depth in ordered) == 1499


def test_a_row_says_when_it_began_within_the_trace() -> None:
    traces = store()
    traces.add([span(1, 1, start_ms=100, ms=10), span(1, 2, 1, start_ms=104, ms=2.5)])
    view = traces.get(f"{1:032x}")
    assert view is not None
    assert [(row.offset_us, row.duration_us, row.depth) for row in view.spans] == [(0, 10_000, 0), (4000, 2500, 1)]
    assert store().get("none") is None
