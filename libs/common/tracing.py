"""Traces: what each process records of every request, and which of it is kept.

Whether a request is worth a trace is known when it is over. So every process records the spans of all of them, as plain tuples in
a bounded ring, and exports those of the traces that are kept (docs/adr/0009-a-trace-is-kept-when-its-end-is-known.md):

- from the beginning, when the caller asks for it (the `sampled` flag of its `traceparent`), and a few each second; the flag then
  travels with the messages;
- in the end, when the request failed or was slow: the process in which the trace began (the edge; `jobs` for what nobody waits
  for) knows that, and tells the others on `events.v1.trace.kept`.

Without a collector (`OTEL_EXPORTER_OTLP_ENDPOINT`) nothing is recorded, and a `traceparent` is passed on as it came.

An attribute never holds a text, a key, a header's value or an inbox. `libs.common.trace_export` sends what is kept.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import TracebackType
from typing import Final, Protocol

from prometheus_client import Counter

from libs.common.clock import Clock
from libs.common.context import new_span_id, new_traceparent
from libs.common.errors import PortcullisError

# The numbers of opentelemetry.trace.SpanKind.
INTERNAL: Final = 0
SERVER: Final = 1
CLIENT: Final = 2
PRODUCER: Final = 3
CONSUMER: Final = 4

Value = str | int | float | bool
Attributes = tuple[tuple[str, Value], ...]
Event = tuple[str, int]
"""Name, and when (epoch nanoseconds)."""
Recorded = tuple[str, str, str, str, int, int, int, Attributes, Attributes, tuple[Event, ...], tuple[str, ...], str, str]
"""A span that has ended: trace, span and parent id (hex; "" without a parent), name, kind, begin and end (epoch ns), attributes
that all spans of this name share, its own, events, links (each a traceparent), what went wrong ("": nothing), and the service.

Nothing but tuples of strings and numbers, which the garbage collector stops to look at: there are tens of thousands."""

SPANS = Counter(
    "portcullis_trace_spans_total",
    "Spans of kept traces, by what became of them: exported, dropped (too many wait), failed (the collector did not take them).",
    ["outcome"],
)
KEPT = Counter(
    "portcullis_traces_kept_total",
    "Traces kept, by the process in which they began, and why: asked (by the caller), rate, failed, refused, slow.",
    ["reason"],
)

MAX_KEPT: Final = 4096
"""Traces whose late spans are still recognised."""
MAX_NEWS: Final = 1024
"""Traces that are told to the others at a time (34 bytes each); more in so short a time are not."""
QUEUE_SPANS: Final = 8192
"""Spans that wait for the exporter. What is merely refused (4xx) is kept only while half of that is free: a flood of refusals
must not push out the failures."""
REFUSED_PER_SECOND: Final = 20
"""Refusals that are kept of each second. More would be alike, and exporting them would take from a gateway that is too full
already what answers need."""

_ODD: Final = frozenset("13579bdf")

_here: ContextVar[str] = ContextVar("traceparent", default="")
_hop: ContextVar[Span | None] = ContextVar("hop", default=None)
_service: ContextVar[str] = ContextVar("service", default="")


class Head(Protocol):
    """Decides at the beginning of a trace. `asked`: the flag of the caller's traceparent, None without one."""

    retroactive: bool
    """Whether failures and slow requests are kept besides."""

    def reason(self, trace_id: str, asked: bool | None) -> str:
        """Why to keep it; "" if there is no reason yet."""
        ...


class FirstOfSecond:
    """The first `most` of each second."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._second = -1
        self._taken = 0

    def take(self, second: int) -> bool:
        """Whether one that comes in this second is among them; it counts."""
        if second != self._second:
            self._second, self._taken = second, 0
        if self._taken >= self._most:
            return False
        self._taken += 1
        return True


class PerSecond:
    """What callers ask for, and the first `most` others of each second."""

    retroactive = True

    def __init__(self, most: int, clock: Clock) -> None:
        self._clock = clock
        self._first = FirstOfSecond(most)

    def reason(self, trace_id: str, asked: bool | None) -> str:
        if asked:
            return "asked"
        return "rate" if self._first.take(int(self._clock.monotonic())) else ""


class Standard:
    """`OTEL_TRACES_SAMPLER`, when the operator sets it: then it alone decides. `argument`: `OTEL_TRACES_SAMPLER_ARG`.

    https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/
    """

    retroactive = False

    def __init__(self, name: str, argument: str = "") -> None:
        """Raises ValueError for a name or a ratio that there is not."""
        kind = name.removeprefix("parentbased_")
        self._heed_parent = kind != name
        if kind not in ("always_on", "always_off", "traceidratio"):
            raise ValueError(
                f"OTEL_TRACES_SAMPLER={name} is not known; take always_on, always_off, traceidratio or parentbased_…"
            )
        ratio = {"always_on": 1.0, "always_off": 0.0}.get(kind)
        if ratio is None:
            ratio = float(argument or 1)
        if not 0 <= ratio <= 1:
            raise ValueError(f"OTEL_TRACES_SAMPLER_ARG={argument} is not between 0 and 1")
        self._bound = round(ratio * 2**64)

    def reason(self, trace_id: str, asked: bool | None) -> str:
        if self._heed_parent and asked is not None:
            return "asked" if asked else ""
        return "rate" if int(trace_id[16:], 16) < self._bound else ""


class Span:
    """A step that has begun. `traceparent`: what its own steps, here or in other processes, name as their parent.

    `refused`: of the first span of a trace, that the caller was told that it cannot have what it wants (4xx).
    """

    __slots__ = (
        "_events", "_kind", "_own", "_parent_id", "_recorder", "_service", "_shared", "_started",
        "error", "links", "name", "refused", "traceparent",
    )  # fmt: skip

    def __init__(self, recorder: Recorder, name: str, kind: int, parent: str, shared: Attributes) -> None:
        self.traceparent = f"{parent[:36]}{new_span_id()}{parent[52:]}"
        self.name = name
        self.links: tuple[str, ...] = ()
        self.error = ""
        self.refused = False
        self._recorder = recorder
        self._kind = kind
        self._parent_id = parent[36:52]
        self._shared = shared
        self._own: list[tuple[str, Value]] = []
        self._events: tuple[Event, ...] = ()
        self._service = _service.get()
        self._started = recorder.time_ns()

    def __bool__(self) -> bool:
        return True

    @property
    def is_slow(self) -> bool:
        """Whether it has taken as long as a request that is kept for it."""
        return self._recorder.time_ns() - self._started >= self._recorder.slow_ns

    def set(self, key: str, value: Value) -> None:
        self._own.append((key, value))

    def event(self, name: str) -> None:
        """Something happened now. `name` is one of a few."""
        self._events = (*self._events, (name, self._recorder.time_ns()))

    def fail(self, error: str) -> None:
        """It went wrong; `error` is one of a few words (`error.type`)."""
        self.error = error

    def end(self) -> None:
        self._recorder.add(self._recorded(self._recorder.time_ns()), self.traceparent[54] in _ODD)

    def _recorded(self, ended: int) -> Recorded:
        here = self.traceparent
        return (
            here[3:35], here[36:52], self._parent_id, self.name, self._kind, self._started, ended,
            self._shared, tuple(self._own), self._events, self.links, self.error, self._service,
        )  # fmt: skip

    def __enter__(self) -> Span:
        return self

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> None:
        if error is not None and not self.error:
            self.fail(word_for(error))
        self.end()


class Root(Span):
    """The first span of a trace in this system: with its end it is known whether the trace is kept."""

    __slots__ = ()

    def end(self) -> None:
        ended = self._recorder.time_ns()
        sampled = self.traceparent[54] in _ODD
        if not sampled:
            failed = bool(self.error) and not self.refused
            self._recorder.judge(self.traceparent[3:35], ended - self._started, failed=failed, refused=self.refused)
        self._recorder.add(self._recorded(ended), sampled)


class _NoSpan(Span):
    """Stands for a span where none is recorded."""

    __slots__ = ()

    def __init__(self) -> None:
        self.traceparent = self.name = self.error = ""
        self.links = ()

    def __bool__(self) -> bool:
        return False

    @property
    def is_slow(self) -> bool:
        return False

    def set(self, key: str, value: Value) -> None:
        pass

    def event(self, name: str) -> None:
        pass

    def fail(self, error: str) -> None:
        pass

    def end(self) -> None:
        pass


NO_SPAN: Final[Span] = _NoSpan()


class Recorder:
    """What one process remembers. Written by the event loop; `take` is for the exporter's thread.

    `ring_spans`, `queue_spans`: bounds of what waits for a decision, and of what waits to be exported.
    """

    def __init__(
        self,
        head: Head,
        *,
        slow_ms: float,
        ring_spans: int,
        queue_spans: int = QUEUE_SPANS,
        time_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self.time_ns = time_ns
        self.retroactive = head.retroactive
        self._head = head
        self.slow_ns = int(slow_ms * 1e6)
        self._ring: deque[Recorded] = deque(maxlen=ring_spans)
        self._queue: deque[Recorded] = deque()
        self._queue_spans = queue_spans
        self._kept: dict[str, None] = {}
        self._newly_kept: deque[str] = deque()
        self._news: list[str] = []
        self._dropped = SPANS.labels("dropped")
        self._refusals = FirstOfSecond(REFUSED_PER_SECOND)

    @property
    def waiting(self) -> int:
        """Spans that wait to be exported."""
        return len(self._queue)

    def root(self, name: str, kind: int, parent: str, shared: Attributes, link: str = "") -> Root:
        """`parent`: the caller's traceparent, "" without one. `link`: that of what it goes back to, kept if that is."""
        asked = (parent or link)[54] in _ODD if parent or link else None
        if asked and self._half_full:
            asked = False  # nobody outside may fill the queue
        traceparent = parent or new_traceparent()
        reason = self._head.reason(traceparent[3:35], asked)
        if reason:
            KEPT.labels(reason).inc()
        root = Root(self, name, kind, f"{traceparent[:53]}{'01' if reason else '00'}", shared)
        if not parent:
            root._parent_id = ""
        if link:
            root.links = (link,)
        return root

    def add(self, span: Recorded, sampled: bool) -> None:
        if not sampled and span[0] not in self._kept:
            self._ring.append(span)
        elif len(self._queue) < self._queue_spans:
            self._queue.append(span)
        else:
            self._dropped.inc()

    def judge(self, trace_id: str, spent_ns: int, *, failed: bool, refused: bool) -> None:
        """A trace that began here is over."""
        if not self.retroactive or trace_id in self._kept:
            return
        reason = "failed" if failed else "slow" if spent_ns >= self.slow_ns else "refused" if refused else ""
        if not reason or (reason == "refused" and not self._has_room_for_a_refusal()):
            return
        KEPT.labels(reason).inc()
        self.keep((trace_id,))
        if len(self._news) < MAX_NEWS:
            self._news.append(trace_id)

    def keep(self, trace_ids: Iterable[str]) -> None:
        """These are kept, whoever has decided so."""
        for trace_id in trace_ids:
            if trace_id in self._kept:
                continue
            if len(self._kept) >= MAX_KEPT:
                del self._kept[next(iter(self._kept))]
            self._kept[trace_id] = None
            self._newly_kept.append(trace_id)

    def news(self) -> tuple[str, ...]:
        """What the others have not been told yet."""
        news, self._news = tuple(self._news), []
        return news

    def is_kept(self, traceparent: str) -> bool:
        return traceparent[54] in _ODD or traceparent[3:35] in self._kept

    def take(self, most: int) -> list[Recorded]:
        """The next spans to export, oldest first, and no more by us."""
        self._fetch_kept()
        taken: list[Recorded] = []
        while self._queue and len(taken) < most:
            taken.append(self._queue.popleft())
        return taken

    def _fetch_kept(self) -> None:
        """Out of the ring with what has been kept since the last time; later spans of these do not get there any more."""
        wanted = set()
        while self._newly_kept:
            wanted.add(self._newly_kept.popleft())
        if not wanted:
            return
        # A copy, made in one step: the event loop goes on writing.
        found = [span for span in self._ring.copy() if span[0] in wanted]
        room = max(0, self._queue_spans - len(self._queue))
        self._queue.extend(found[:room])
        if len(found) > room:
            self._dropped.inc(len(found) - room)

    def _has_room_for_a_refusal(self) -> bool:
        return not self._half_full and self._refusals.take(self.time_ns() // 1_000_000_000)

    @property
    def _half_full(self) -> bool:
        return len(self._queue) * 2 > self._queue_spans


_recorder: Recorder | None = None


def use(recorder: Recorder | None) -> None:
    """Record with this from now on; None: not at all."""
    global _recorder
    _recorder = recorder


def recorder() -> Recorder | None:
    return _recorder


def begin(name: str, kind: int, parent: str, shared: Attributes = ()) -> Span:
    """Begin a step below the span that `parent` (a traceparent) names. `end()` it, or use it in a `with`."""
    if _recorder is None or not (_recorder.retroactive or parent[54] in _ODD):
        return NO_SPAN
    return Span(_recorder, name, kind, parent, shared)


def root(name: str, kind: int, parent: str = "", shared: Attributes = (), *, link: str = "") -> Span:
    """Begin a trace here, or this system's part of one that the caller has begun (`parent`).

    `link`: the traceparent of an earlier trace that this one goes back to.
    """
    return _recorder.root(name, kind, parent, shared, link) if _recorder is not None else NO_SPAN


def enter(traceparent: str, hop: Span | None = None) -> None:
    """This task works below `traceparent` from now on. `hop`: the span that `annotate` means."""
    _here.set(traceparent)
    _hop.set(hop)


def serve(service: str) -> None:
    """This task, and what it starts from now on, works for this service of the process."""
    _service.set(service)


def service() -> str:
    """The service that this task works for; "" where nobody has said so."""
    return _service.get()


@contextmanager
def aside() -> Iterator[None]:
    """In the block the task may work for others, and after it for whom it did before."""
    before = _here.get(), _hop.get(), _service.get()
    try:
        yield
    finally:
        _here.set(before[0])
        _hop.set(before[1])
        _service.set(before[2])


def here() -> str:
    """The traceparent below which this task works, "" if it works for nobody."""
    return _here.get()


def annotate(key: str, value: Value) -> None:
    """Say something of the request on this process's own span of it."""
    if (hop := _hop.get()) is not None:
        hop.set(key, value)


def fail(error: str) -> None:
    """As `annotate`: the request failed, though its answer does not say so."""
    if (hop := _hop.get()) is not None:
        hop.fail(error)


def refuse() -> None:
    """As `annotate`: something of the request was refused, or has to be done again."""
    if (hop := _hop.get()) is not None:
        hop.refused = True


def current_trace_id() -> str | None:
    """The trace that this task works for, if it is known to be kept: an exemplar must lead somewhere."""
    traceparent = _here.get()
    if _recorder is None or not traceparent or not _recorder.is_kept(traceparent):
        return None
    return traceparent[3:35]


class span:  # noqa: N801  # used like a function
    """`with span("SELECT keys", CLIENT) as step:` a step of what this task works for; nothing when it works for nobody."""

    __slots__ = ("_before", "_span")

    def __init__(self, name: str, kind: int = INTERNAL, shared: Attributes = ()) -> None:
        self._before = _here.get()
        self._span = begin(name, kind, self._before, shared) if self._before else NO_SPAN

    def __enter__(self) -> Span:
        if self._span:
            _here.set(self._span.traceparent)
        return self._span

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._span:
            _here.set(self._before)
            self._span.__exit__(kind, error, trace)


def record(
    name: str, seconds: float, *, ago: float = 0.0, shared: Attributes = (), own: Attributes = (), error: str = ""
) -> None:
    """A step of what this task works for that took `seconds` and ended `ago` seconds before now."""
    traceparent = _here.get()
    if _recorder is None or not traceparent:
        return
    ended = _recorder.time_ns() - int(ago * 1e9)
    began = ended - int(seconds * 1e9)
    ids = traceparent[3:35], new_span_id(), traceparent[36:52]
    span = (*ids, name, INTERNAL, began, ended, shared, own, (), (), error, _service.get())
    _recorder.add(span, traceparent[54] in _ODD)


def is_slow(seconds: float) -> bool:
    """Whether a request that took so long is kept for it."""
    return _recorder is not None and seconds * 1e9 >= _recorder.slow_ns


def word_for(error: BaseException) -> str:
    """What `error.type` says of an exception: the code of ours, else the name of its class. Never its text."""
    if isinstance(error, asyncio.CancelledError):
        return "cancelled"
    return str(error.code) if isinstance(error, PortcullisError) else type(error).__name__


def messaging(operation: str, subject: str, queue_group: str = "") -> Attributes:
    """Of the semantic conventions for messaging (1.4x); `operation`: send or process."""
    place = "messaging.destination.template" if "*" in subject else "messaging.destination.name"
    attributes: Attributes = (
        ("messaging.system", "nats"),
        ("messaging.operation.name", operation),
        ("messaging.operation.type", operation),
        (place, subject),
    )
    return (*attributes, ("messaging.consumer.group.name", queue_group)) if queue_group else attributes
