"""What is recorded, what is kept, and what is forgotten."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from libs.common import hops, telemetry, tracing
from libs.common.clock import ManualClock
from libs.common.context import RequestContext, new_traceparent
from libs.common.errors import ErrorCode, PortcullisError
from libs.common.tracing import (
    CLIENT,
    CONSUMER,
    REFUSED_PER_SECOND,
    SERVER,
    Attributes,
    Event,
    PerSecond,
    Recorder,
    Span,
    Standard,
)

CALLER = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-"
TRACE = CALLER[3:35]
SLOW_MS = 100.0


class Ended(NamedTuple):
    """A recorded span, with names."""

    trace_id: str
    span_id: str
    parent_id: str
    name: str
    kind: int
    began: int
    ended: int
    shared: Attributes
    own: Attributes
    events: tuple[Event, ...]
    links: tuple[str, ...]
    error: str
    service: str


def taken(recorder: Recorder, most: int = 1000) -> list[Ended]:
    return [Ended(*span) for span in recorder.take(most)]


class Time:
    """Epoch nanoseconds that stand still."""

    def __init__(self) -> None:
        self.now = 1_800_000_000_000_000_000

    def __call__(self) -> int:
        return self.now

    def advance_ms(self, ms: float) -> None:
        self.now += int(ms * 1e6)


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def recorder(time: Time, clock: ManualClock) -> Iterator[Recorder]:
    """Keeps nothing from the beginning unless it is asked to."""
    recorder = Recorder(PerSecond(0, clock), slow_ms=SLOW_MS, ring_spans=100, queue_spans=50, time_ns=time)
    tracing.use(recorder)
    yield recorder
    tracing.use(None)
    tracing.enter("")


def names(recorder: Recorder) -> list[str]:
    return [span.name for span in taken(recorder)]


def step(parent: Span, name: str = "step") -> None:
    tracing.begin(name, CLIENT, parent.traceparent).end()


def value(reason: str) -> float:
    return float(tracing.KEPT.labels(reason)._value.get())


def dropped() -> float:
    return float(tracing.SPANS.labels("dropped")._value.get())


# --- what is kept ---------------------------------------------------------------------------------------------------------


def test_what_goes_well_and_fast_is_not_kept(recorder: Recorder) -> None:
    root = tracing.root("root", SERVER)
    step(root)
    root.end()
    assert names(recorder) == []
    assert recorder.news() == ()


def test_a_failure_is_kept_with_what_came_before_it_and_after_it(recorder: Recorder) -> None:
    before = value("failed")
    root = tracing.root("root", SERVER)
    step(root, "before")
    root.fail("500")
    root.end()
    step(root, "after")
    assert sorted(names(recorder)) == ["after", "before", "root"]
    assert recorder.news() == (root.traceparent[3:35],)
    assert recorder.news() == ()
    assert value("failed") == before + 1


def test_a_slow_request_is_kept(recorder: Recorder, time: Time) -> None:
    fast, slow = tracing.root("fast", SERVER), tracing.root("slow", SERVER)
    time.advance_ms(SLOW_MS - 0.001)
    fast.end()
    time.advance_ms(0.001)
    slow.end()
    assert names(recorder) == ["slow"]


def test_a_refusal_is_kept_while_there_is_room(recorder: Recorder) -> None:
    root = tracing.root("refused", SERVER)
    root.refused = True
    root.end()
    assert recorder.news() == (root.traceparent[3:35],)
    for _ in range(26):  # more than half of what may wait
        step(root)
    another, failed = tracing.root("another", SERVER), tracing.root("failed", SERVER)
    another.refused = True
    another.end()
    failed.fail("503")
    failed.end()
    assert recorder.news() == (failed.traceparent[3:35],)


def test_of_many_refusals_the_first_of_each_second_are_kept(recorder: Recorder, time: Time) -> None:
    def refuse() -> None:
        root = tracing.root("refused", SERVER)
        root.refused = True
        root.end()

    for _ in range(3 * REFUSED_PER_SECOND):
        refuse()
    assert len(recorder.news()) == REFUSED_PER_SECOND
    time.advance_ms(1000)
    refuse()
    assert len(recorder.news()) == 1


def test_what_a_caller_asks_for_is_kept_from_the_beginning(recorder: Recorder) -> None:
    root = tracing.root("root", SERVER, CALLER + "01")
    assert root.traceparent.startswith(f"00-{TRACE}-")
    assert root.traceparent.endswith("-01")
    step(root)
    assert names(recorder) == ["step"]
    root.end()
    assert recorder.news() == (), "the flag has told everybody"


def test_a_caller_that_does_not_ask_has_its_trace_id_and_no_more(recorder: Recorder) -> None:
    root = tracing.root("root", SERVER, CALLER + "00")
    assert root.traceparent.startswith(f"00-{TRACE}-")
    assert root.traceparent.endswith("-00")
    root.end()
    assert names(recorder) == []


def test_callers_cannot_fill_the_queue(recorder: Recorder) -> None:
    roots = [tracing.root("root", SERVER, CALLER + "01") for _ in range(40)]
    for root in roots:
        root.end()
    assert tracing.root("root", SERVER, CALLER + "01").traceparent.endswith("-00")


def test_so_many_a_second_are_kept_from_the_beginning(time: Time, clock: ManualClock) -> None:
    recorder = Recorder(PerSecond(3, clock), slow_ms=SLOW_MS, ring_spans=100, time_ns=time)
    flags = [recorder.root("root", SERVER, "", ()).traceparent[-2:] for _ in range(5)]
    clock.advance(1)
    flags += [recorder.root("root", SERVER, "", ()).traceparent[-2:] for _ in range(2)]
    assert flags == ["01", "01", "01", "00", "00", "01", "01"]


def test_others_are_believed_and_told_only_what_is_new(recorder: Recorder) -> None:
    span = tracing.begin("here", CONSUMER, CALLER + "00")
    span.end()
    recorder.keep((TRACE, TRACE))
    recorder.keep((TRACE,))
    assert names(recorder) == ["here"], "once"
    assert recorder.news() == (), "what others have said is not said again"
    tracing.begin("late", CONSUMER, CALLER + "00").end()
    assert names(recorder) == ["late"]


# --- bounds ---------------------------------------------------------------------------------------------------------------


def test_the_oldest_spans_are_forgotten(recorder: Recorder) -> None:
    root = tracing.root("root", SERVER)
    for number in range(150):
        step(root, str(number))
    recorder.keep((root.traceparent[3:35],))
    before = dropped()
    exported = names(recorder)
    assert exported == [str(number) for number in range(50, 100)], "what the ring of 100 held, as far as 50 may wait"
    assert dropped() == before + 50


def test_what_finds_no_room_to_wait_is_counted(recorder: Recorder) -> None:
    root = tracing.root("root", SERVER, CALLER + "01")
    before = dropped()
    for _ in range(60):
        step(root)
    assert recorder.waiting == 50
    assert dropped() == before + 10


def test_kept_traces_are_remembered_up_to_a_bound(recorder: Recorder) -> None:
    first, *others = (f"{number:032x}" for number in range(1, tracing.MAX_KEPT + 2))
    recorder.keep((first, *others))
    recorder.take(10)  # what was remembered of them before
    tracing.begin("forgotten", CLIENT, f"00-{first}-{'1' * 16}-00").end()
    tracing.begin("known", CLIENT, f"00-{others[0]}-{'1' * 16}-00").end()
    assert names(recorder) == ["known"]


def test_no_more_is_told_at_a_time_than_fits_a_message(recorder: Recorder) -> None:
    for number in range(tracing.MAX_NEWS + 10):
        root = tracing.root("root", SERVER)
        root.fail(str(number))
        root.end()
        recorder.take(10)
    assert len(recorder.news()) == tracing.MAX_NEWS


def test_take_gives_the_oldest_first(recorder: Recorder) -> None:
    root = tracing.root("root", SERVER, CALLER + "01")
    for number in range(5):
        step(root, str(number))
    assert [span.name for span in taken(recorder, 2)] == ["0", "1"]
    assert [span.name for span in taken(recorder, 9)] == ["2", "3", "4"]


# --- the operator's own sampler -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "argument", "asked", "kept"),
    [
        ("always_on", "", None, True),
        ("always_on", "", False, True),
        ("always_off", "", True, False),
        ("traceidratio", "1", None, True),
        ("traceidratio", "0", True, False),
        ("parentbased_always_on", "", None, True),
        ("parentbased_always_on", "", False, False),
        ("parentbased_always_off", "", True, True),
        ("parentbased_always_off", "", None, False),
        ("parentbased_traceidratio", "0", None, False),
        ("parentbased_traceidratio", "0", True, True),
    ],
)
def test_a_standard_sampler_decides_alone(name: str, argument: str, asked: bool | None, kept: bool) -> None:
    head = Standard(name, argument)
    assert bool(head.reason(TRACE, asked)) is kept
    assert not head.retroactive


def test_a_ratio_is_kept_by_trace_id() -> None:
    head = Standard("traceidratio", "0.25")
    kept = sum(bool(head.reason(new_traceparent()[3:35], None)) for _ in range(4000))
    assert 800 < kept < 1200


@pytest.mark.parametrize(("name", "argument"), [("jaeger_remote", ""), ("traceidratio", "2"), ("traceidratio", "often")])
def test_a_sampler_that_there_is_not_is_refused(name: str, argument: str) -> None:
    with pytest.raises(ValueError):
        Standard(name, argument)


def test_where_a_standard_sampler_decides_failures_are_its_own(time: Time) -> None:
    recorder = Recorder(Standard("always_off"), slow_ms=SLOW_MS, ring_spans=10, time_ns=time)
    tracing.use(recorder)
    try:
        root = tracing.root("root", SERVER)
        assert not tracing.begin("step", CLIENT, root.traceparent), "nothing is recorded that nobody could want"
        root.fail("500")
        root.end()
        assert recorder.news() == ()
        assert recorder.take(10) == []
    finally:
        tracing.use(None)


# --- spans ----------------------------------------------------------------------------------------------------------------


def only(recorder: Recorder) -> Ended:
    (span,) = taken(recorder)
    return span


def test_a_span_tells_when_what_below_what_and_what_went_wrong(recorder: Recorder, time: Time) -> None:
    began = time.now
    tracing.serve("auth")
    span = tracing.begin("step", CLIENT, CALLER + "01", (("a", 1),))
    tracing.serve("")
    span.set("b", "two")
    time.advance_ms(3)
    span.event("something")
    time.advance_ms(4)
    span.fail("timeout")
    span.end()
    assert only(recorder) == (
        TRACE, span.traceparent[36:52], CALLER[36:52], "step", CLIENT, began, began + 7_000_000,
        (("a", 1),), (("b", "two"),), (("something", began + 3_000_000),), (), "timeout", "auth",
    )  # fmt: skip


def test_a_root_has_no_parent_but_the_callers(recorder: Recorder) -> None:
    root = tracing.root("root", SERVER, link=CALLER + "01")
    assert root.traceparent.endswith("-01"), "kept as what it goes back to"
    root.end()
    span = only(recorder)
    assert (span.parent_id, span.links) == ("", (CALLER + "01",))
    assert span.trace_id != TRACE


def test_steps_in_steps_and_what_a_task_works_for(recorder: Recorder) -> None:
    tracing.enter(CALLER + "01")
    with tracing.span("outer") as outer:
        assert tracing.here() == outer.traceparent
        with pytest.raises(RuntimeError), tracing.span("inner") as inner:
            raise RuntimeError("a text that must not get into the trace")
    assert tracing.here() == CALLER + "01"
    first, second = taken(recorder)
    assert (first.name, first.parent_id, first.error) == ("inner", outer.traceparent[36:52], "RuntimeError")
    assert first.span_id == inner.traceparent[36:52]
    assert (second.name, second.parent_id, second.error) == ("outer", CALLER[36:52], "")


def test_a_step_that_works_for_nobody_is_none(recorder: Recorder) -> None:
    with tracing.span("watching") as step:
        assert not step
    tracing.record("watching", 1.0)
    recorder.keep((TRACE,))
    assert names(recorder) == []


def test_a_step_that_is_over_can_be_recorded(recorder: Recorder, time: Time) -> None:
    tracing.enter(CALLER + "01")
    tracing.record("queue", 0.5, ago=0.25)
    span = only(recorder)
    assert (time.now - span.ended, span.ended - span.began) == (250_000_000, 500_000_000)


def test_what_is_said_of_the_request_is_on_its_hop(recorder: Recorder) -> None:
    hop = tracing.begin("hop", CONSUMER, CALLER + "01")
    tracing.enter(hop.traceparent, hop)
    with tracing.span("inner"):
        tracing.annotate("portcullis.tokens", 9)
        tracing.fail("failed_items")
    hop.end()
    inner, outer = taken(recorder)
    assert inner.own == ()
    assert (outer.own, outer.error) == ((("portcullis.tokens", 9),), "failed_items")


def test_a_stage_says_what_became_of_a_message(recorder: Recorder) -> None:
    context = RequestContext(1, "the-id", CALLER + "01")
    for outcome, refused in (("ok", False), (ErrorCode.RATE_LIMITED, True), (ErrorCode.NO_ENGINE, False), ("expired", False)):
        span = tracing.begin("process", CONSUMER, context.traceparent)
        hops.handled(span, context, outcome)
        assert span.refused is refused
        said = dict(only(recorder).own)
        assert said == {"portcullis.request_id": "the-id", "portcullis.outcome": str(outcome)}
        assert span.error == ("" if outcome == "ok" else outcome)


def test_whoever_gets_a_message_is_told_the_span_that_sent_it(recorder: Recorder) -> None:
    sends = hops.Hops()
    with sends.sending("detect.v1.request", CALLER + "01") as span:
        assert span.traceparent != CALLER + "01"
        sends.forwarded("_INBOX.edge.1.2", span)
    sends.not_received("_INBOX.edge.1.3")
    sends.not_received("_INBOX.edge.1.2")
    sent, missed = taken(recorder)
    assert sent.name == "send detect.v1.request"
    assert (missed.name, missed.parent_id, missed.error) == (hops.NO_RESPONDERS, span.traceparent[36:52], "stage_unavailable")
    assert [name for name, _ in missed.events] == [hops.NO_RESPONDERS]
    assert "_INBOX" not in str((sent, missed))


def test_words_for_exceptions_are_never_their_texts() -> None:
    assert tracing.word_for(PortcullisError(ErrorCode.NO_ENGINE, "secret", internal="secret")) == "no_engine"
    assert tracing.word_for(ValueError("secret")) == "ValueError"
    assert tracing.word_for(asyncio.CancelledError("secret")) == "cancelled"


# --- without a collector, and where traces are named ------------------------------------------------------------------------


def test_without_a_recorder_the_callers_traceparent_goes_on_as_it_is() -> None:
    tracing.use(None)
    with hops.Hops().sending("detect.v1.request", CALLER + "01") as span:
        assert not span
    assert not tracing.root("root", SERVER, CALLER + "01")
    assert tracing.current_trace_id() is None


def test_an_exemplar_leads_to_a_trace_that_is_kept(recorder: Recorder) -> None:
    assert tracing.current_trace_id() is None
    tracing.enter(CALLER + "00")
    assert tracing.current_trace_id() is None
    recorder.keep((TRACE,))
    assert tracing.current_trace_id() == TRACE
    tracing.enter(CALLER.replace("4bf9", "5bf9") + "01")
    assert tracing.current_trace_id() == TRACE.replace("4bf9", "5bf9")


def test_logs_name_trace_and_span() -> None:
    record = logging.LogRecord("name", logging.INFO, "path", 1, "what happened", None, None)
    tracing.enter(CALLER + "00")
    try:
        line = json.loads(telemetry._JsonFormatter("auth", "1").format(record))
    finally:
        tracing.enter("")
    assert (line["trace_id"], line["span_id"]) == (TRACE, CALLER[36:52])
    assert "trace_id" not in json.loads(telemetry._JsonFormatter("auth", "1").format(record))
