"""The last traces, in bounded memory: which are kept, which are shown first, and a trace as a tree. No I/O."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Final, Literal

import msgspec

Value = str | int | float | bool
Attributes = tuple[tuple[str, Value], ...]
State = Literal["failed", "slow", "degraded", "refused", "ok"]
Order = Literal["notable", "newest", "slowest"]
Wanted = Literal["all", "failed", "slow", "degraded", "refused", "malicious"]

RANK: Final[dict[State, int]] = {"failed": 0, "slow": 1, "degraded": 2, "refused": 3, "ok": 4}
"""What somebody who looks for trouble wants to see first."""
NOTABLE: Final = frozenset[State]({"failed", "slow", "degraded"})
MAX_TRACE_SPANS: Final = 2_000
"""Spans of one trace; a batch of a thousand texts has fewer."""
SPAN_BYTES: Final = 400
"""About what a span takes besides its texts."""
ATTRIBUTE_BYTES: Final = 120


class Event(msgspec.Struct, frozen=True):
    """Something that happened within a span; `at_ns`: epoch."""

    name: str
    at_ns: int
    attributes: Attributes = ()


class Link(msgspec.Struct, frozen=True):
    """A span of another trace (or of this one) that this one has to do with."""

    trace_id: str
    span_id: str
    attributes: Attributes = ()


class Span(msgspec.Struct, frozen=True):
    """One step. Ids in hex, `parent_id` "" for none; times in epoch nanoseconds, the end not before the start.

    `error`: what its status says, where that is an error; "" otherwise, and `failed` tells.
    """

    trace_id: str
    span_id: str
    parent_id: str
    name: str
    kind: str
    service: str
    instance: str
    start_ns: int
    end_ns: int
    failed: bool = False
    error: str = ""
    attributes: Attributes = ()
    events: tuple[Event, ...] = ()
    links: tuple[Link, ...] = ()

    def get(self, key: str) -> Value | None:
        """The attribute of that name; of equal names the last."""
        return next((value for name, value in reversed(self.attributes) if name == key), None)

    @property
    def bytes(self) -> int:
        """About what it takes."""
        pairs = list(self.attributes)
        for event in self.events:
            pairs += event.attributes
        for link in self.links:
            pairs += link.attributes
        texts = (
            len(self.name)
            + len(self.error)
            + sum(len(key) + (len(value) if isinstance(value, str) else 8) for key, value in pairs)
        )
        return SPAN_BYTES + texts + ATTRIBUTE_BYTES * (len(pairs) + len(self.events) + len(self.links))


class Summary(msgspec.Struct, frozen=True):
    """A trace in one line. `complete`: its first span has come. `services`: in the order in which they begin."""

    trace_id: str
    name: str
    service: str
    state: State
    start_ms: float
    duration_ms: float
    spans: int
    services: tuple[str, ...]
    complete: bool
    request_id: str = ""
    key_id: str = ""
    outcome: str = ""
    status: int | None = None
    slow: bool = False
    degraded: bool = False
    malicious: bool | None = None


class SpanRow(msgspec.Struct, frozen=True):
    """A span as the waterfall has it: `offset_us` from the beginning of the trace; `depth`: below how many others."""

    span_id: str
    parent_id: str
    depth: int
    name: str
    kind: str
    service: str
    instance: str
    offset_us: float
    duration_us: float
    failed: bool
    error: str
    attributes: dict[str, Value]
    events: tuple[dict[str, object], ...]
    links: tuple[dict[str, object], ...]


class TraceView(msgspec.Struct, frozen=True):
    """A trace with all that is known of it, each span below its parent. `cut`: spans that found no room."""

    summary: Summary
    spans: tuple[SpanRow, ...]
    cut: int = 0


class Query(msgspec.Struct, frozen=True):
    """Which traces, in which order. `search`: part of a request id, name or outcome; beginning of a trace id or key id."""

    search: str = ""
    show: Wanted = "all"
    order: Order = "notable"
    service: str = ""
    limit: int = 50


class _Trace:
    """The spans of one trace that have come so far."""

    def __init__(self, trace_id: str) -> None:
        self.trace_id = trace_id
        self.spans: dict[str, Span] = {}
        self.bytes = 0
        self.cut = 0
        self._summary: Summary | None = None

    def add(self, span: Span) -> None:
        """What is sent again takes the place of what was sent before."""
        before = self.spans.get(span.span_id)
        if before is None and len(self.spans) >= MAX_TRACE_SPANS:
            self.cut += 1
            return
        self.spans[span.span_id] = span
        self.bytes += span.bytes - (before.bytes if before is not None else 0)
        self._summary = None

    def summary(self, slow_ms: float) -> Summary:
        if self._summary is None:
            self._summary = _summarise(self.trace_id, list(self.spans.values()), self.spans, slow_ms)
        return self._summary


def _summarise(trace_id: str, spans: list[Span], by_id: dict[str, Span], slow_ms: float) -> Summary:
    begin = min(span.start_ns for span in spans)
    ordered = sorted(spans, key=lambda span: span.start_ns)
    root = _root(ordered, by_id)
    # A trace of ours begins with a call over HTTP, which may have a parent at the caller's, or with a span without parent.
    complete = root.kind == "server" or not root.parent_id
    duration_ms = (root.end_ns - root.start_ns if complete else max(span.end_ns for span in spans) - begin) / 1e6
    status = root.get("http.response.status_code")
    outcome = str(root.get("portcullis.outcome") or "")
    degraded = any(span.get("portcullis.degraded") is True for span in spans)
    slow = duration_ms >= slow_ms
    state: State
    if root.failed or (isinstance(status, int) and status >= 500) or (not complete and any(span.failed for span in spans)):
        state = "failed"
    elif slow:
        state = "slow"
    elif isinstance(status, int) and status >= 400:
        state = "refused"
    elif degraded or any(span.failed for span in spans):
        state = "degraded"  # something failed on the way, and the request got its answer nevertheless
    else:
        state = "ok"
    malicious = root.get("portcullis.is_malicious")
    return Summary(
        trace_id=trace_id,
        name=root.name,
        service=root.service,
        state=state,
        start_ms=begin / 1e6,
        duration_ms=duration_ms,
        spans=len(spans),
        services=tuple(dict.fromkeys(span.service for span in ordered)),
        complete=complete,
        request_id=str(_first(ordered, "portcullis.request_id") or ""),
        key_id=str(_first(ordered, "portcullis.key_id") or ""),
        outcome=outcome,
        status=status if isinstance(status, int) else None,
        slow=slow,
        degraded=degraded,
        malicious=malicious if isinstance(malicious, bool) else None,
    )


def _root(ordered: list[Span], by_id: dict[str, Span]) -> Span:
    """The first span without a parent here; a call over HTTP if there is one among those."""
    tops = [span for span in ordered if span.parent_id not in by_id] or ordered
    return next((span for span in tops if span.kind == "server"), tops[0])


def _first(spans: list[Span], key: str) -> Value | None:
    return next((value for span in spans if (value := span.get(key)) is not None), None)


class TraceStore:
    """Traces by id, the one that grew last at the end.

    Failures, slow requests and degraded ones have up to half of the room to themselves, however many ordinary traces come.
    """

    def __init__(self, max_spans: int, max_bytes: int, slow_ms: float) -> None:
        self.revision = 0
        """Grows with every change."""
        self.spans = 0
        self.bytes = 0
        self.evicted = 0
        """Traces that had to go."""
        self._max_spans = max_spans
        self._max_bytes = max_bytes
        self._slow_ms = slow_ms
        self._ordinary: OrderedDict[str, _Trace] = OrderedDict()
        self._notable: OrderedDict[str, _Trace] = OrderedDict()
        self._notable_spans = 0
        self._notable_bytes = 0

    def __len__(self) -> int:
        return len(self._ordinary) + len(self._notable)

    def add(self, spans: Iterable[Span]) -> None:
        touched: dict[str, _Trace] = {}
        for span in spans:
            trace = touched.get(span.trace_id)
            if trace is None:
                trace = touched[span.trace_id] = self._take_out(span.trace_id) or _Trace(span.trace_id)
            trace.add(span)
        for trace in touched.values():
            self._put(trace)
        while len(self) and (self.spans > self._max_spans or self.bytes > self._max_bytes):
            self._evict()
        if touched:
            self.revision += 1

    def find(self, query: Query) -> list[Summary]:
        """The summaries that match, at most `query.limit`."""
        found = [
            summary
            for traces in (self._notable, self._ordinary)
            for trace in traces.values()
            if _matches(summary := trace.summary(self._slow_ms), query)
        ]
        match query.order:
            case "newest":
                found.sort(key=lambda each: -each.start_ms)
            case "slowest":
                found.sort(key=lambda each: -each.duration_ms)
            case "notable":
                found.sort(key=lambda each: (RANK[each.state], -each.start_ms))
        return found[: query.limit]

    def get(self, trace_id: str) -> TraceView | None:
        trace = self._notable.get(trace_id) or self._ordinary.get(trace_id)
        if trace is None:
            return None
        summary = trace.summary(self._slow_ms)
        begin = min(span.start_ns for span in trace.spans.values())
        rows = tuple(_row(span, depth, begin) for span, depth in in_tree_order(list(trace.spans.values())))
        return TraceView(summary, rows, trace.cut)

    def counts(self) -> dict[str, int]:
        """How many traces are kept, by state; `all` of them; and those with a malicious verdict."""
        counts: dict[str, int] = {"all": len(self), "malicious": 0} | dict.fromkeys(RANK, 0)
        for traces in (self._notable, self._ordinary):
            for trace in traces.values():
                summary = trace.summary(self._slow_ms)
                counts[summary.state] += 1
                counts["malicious"] += summary.malicious is True
        return counts

    def _take_out(self, trace_id: str) -> _Trace | None:
        notable = trace_id in self._notable
        trace = (self._notable if notable else self._ordinary).pop(trace_id, None)
        if trace is not None:
            self._weigh(trace, notable, -1)
        return trace

    def _put(self, trace: _Trace) -> None:
        notable = trace.summary(self._slow_ms).state in NOTABLE
        (self._notable if notable else self._ordinary)[trace.trace_id] = trace
        self._weigh(trace, notable, 1)

    def _weigh(self, trace: _Trace, notable: bool, sign: int) -> None:
        self.spans += sign * len(trace.spans)
        self.bytes += sign * trace.bytes
        if notable:
            self._notable_spans += sign * len(trace.spans)
            self._notable_bytes += sign * trace.bytes

    def _evict(self) -> None:
        too_many = 2 * self._notable_spans > self._max_spans or 2 * self._notable_bytes > self._max_bytes
        notable = bool(self._notable) and (too_many or not self._ordinary)
        _, trace = (self._notable if notable else self._ordinary).popitem(last=False)
        self._weigh(trace, notable, -1)
        self.evicted += 1


def _matches(summary: Summary, query: Query) -> bool:
    match query.show:
        case "all":
            pass
        case "malicious":
            if summary.malicious is not True:
                return False
        case "slow":
            if not summary.slow:
                return False
        case "degraded":
            if not (summary.degraded or summary.state == "degraded"):
                return False
        case _:
            if summary.state != query.show:
                return False
    if query.service and query.service not in summary.services:
        return False
    wanted = query.search.strip().lower()
    if not wanted:
        return True
    return (
        wanted in summary.request_id.lower()
        or summary.trace_id.startswith(wanted)
        or wanted in summary.name.lower()
        or wanted in summary.outcome.lower()
        or summary.key_id.lower().startswith(wanted)
    )


def in_tree_order(spans: list[Span]) -> list[tuple[Span, int]]:
    """Each span after its parent, with its depth; siblings by their beginning. Whatever is left (circles) stands by itself."""
    by_id = {span.span_id: span for span in spans}
    children: dict[str, list[Span]] = {}
    tops = []
    for span in sorted(spans, key=lambda each: (each.start_ns, -each.end_ns)):
        if span.parent_id in by_id and span.parent_id != span.span_id:
            children.setdefault(span.parent_id, []).append(span)
        else:
            tops.append(span)
    ordered: list[tuple[Span, int]] = []
    seen: set[str] = set()
    for top in (*tops, *spans):
        waiting = [(top, 0)]
        while waiting:
            span, depth = waiting.pop()
            if span.span_id in seen:
                continue
            seen.add(span.span_id)
            ordered.append((span, depth))
            waiting.extend((child, depth + 1) for child in reversed(children.get(span.span_id, [])))
    return ordered


def _row(span: Span, depth: int, begin_ns: int) -> SpanRow:
    def offset_us(at_ns: int) -> float:
        return (at_ns - begin_ns) / 1000

    return SpanRow(
        span_id=span.span_id,
        parent_id=span.parent_id,
        depth=depth,
        name=span.name,
        kind=span.kind,
        service=span.service,
        instance=span.instance,
        offset_us=offset_us(span.start_ns),
        duration_us=(span.end_ns - span.start_ns) / 1000,
        failed=span.failed,
        error=span.error,
        attributes=dict(span.attributes),
        events=tuple(
            {"name": event.name, "offset_us": offset_us(event.at_ns), "attributes": dict(event.attributes)}
            for event in span.events
        ),
        links=tuple(
            {"trace_id": link.trace_id, "span_id": link.span_id, "attributes": dict(link.attributes)} for link in span.links
        ),
    )
