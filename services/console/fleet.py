"""The fleet as its processes tell of themselves in `$SRV.STATS`: who is there, who has gone, what goes through each. No I/O."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

import msgspec

from libs.common import micro
from libs.common.contracts import BreakerChanged, BreakerReport, BreakerState, BreakerStatus, Reply
from libs.common.subjects import DETECT_ADMITTED, DETECT_AUTHENTICATED, DETECT_REQUEST

RATE_SECONDS: Final = 10.0
"""Rates are of so long a time, or of what is known of it."""
HISTORY: Final = 90
"""Looks that are remembered, for the curves of whoever opens the page."""
MISSED_LOOKS: Final = 2
"""A process that does not answer so often has gone: one lost answer may be a busy moment."""
GONE_SECONDS: Final = 600.0
"""How long a process that has gone is still shown."""
MAX_GONE: Final = 64
MAX_REPLICAS: Final = 512
MAX_NEWS: Final = 40

STAGES: Final = ("edge", "auth", "limiter", "detector_proxy", "fallback_model", "jobs")
"""What is shown, in the order of the path."""

HTTP_DETECT: Final = "http-detect"
"""The edge's own name for single detections over HTTP (services/edge/metrics.py)."""
_MAIN: Final = {"edge": HTTP_DETECT, "auth": DETECT_REQUEST, "limiter": DETECT_AUTHENTICATED, "detector_proxy": DETECT_ADMITTED}
"""Whose durations stand for the stage while there is any of it: a batch takes as long as its reader lets it."""

_NAME_PREFIX: Final = "portcullis-"
_STATES: Final[tuple[BreakerState, ...]] = ("closed", "half_open", "open")

Presence = Literal["up", "gone", "left"]
"""`gone`: without a word; `left`: it had said that it would."""


class Now(msgspec.Struct, frozen=True):
    """`data` of an endpoint in STATS (libs/common/meter.py)."""

    in_flight: int = 0
    queued: int = 0
    p50_ms: float | None = None
    p99_ms: float | None = None
    refused: int = 0


class Endpoint(msgspec.Struct, frozen=True):
    name: str
    subject: str = ""
    queue_group: str = ""
    num_requests: int = 0
    num_errors: int = 0
    processing_time: int = 0
    data: Now | None = None


class Stats(msgspec.Struct, frozen=True):
    """The part of ADR-32's STATS answer that matters here."""

    name: str
    id: str
    version: str = ""
    started: str = ""
    metadata: dict[str, str] | None = None
    endpoints: tuple[Endpoint, ...] = ()


class Flow(msgspec.Struct, frozen=True):
    """What goes through: per second, and milliseconds of about the last 10 s (None: nothing went through, or nobody says)."""

    rate: float = 0.0
    failed: float = 0.0
    refused: float = 0.0
    p50_ms: float | None = None
    p99_ms: float | None = None
    mean_ms: float | None = None
    in_flight: int = 0
    queued: int = 0


class EndpointView(msgspec.Struct, frozen=True):
    name: str
    flow: Flow


class Replica(msgspec.Struct, frozen=True):
    """One process. `seen_ms`: epoch milliseconds of its last answer. `note`: what it says of itself beside its status."""

    instance: str
    presence: Presence
    status: str
    version: str
    started: str
    seen_ms: float
    flow: Flow
    endpoints: tuple[EndpointView, ...]
    note: dict[str, str]


class Stage(msgspec.Struct, frozen=True):
    name: str
    status: Literal["ok", "degraded", "down"]
    up: int
    flow: Flow
    replicas: tuple[Replica, ...]


class Engine(msgspec.Struct, frozen=True):
    """The primary engine, as the proxies know it. `kind` "pool": there is none, and the fallback pool is the engine."""

    kind: str | None
    name: str | None
    status: str
    breaker: BreakerState | None


class Breaker(msgspec.Struct, frozen=True):
    name: str
    state: BreakerState
    replicas: tuple[BreakerStatus, ...]


class News(msgspec.Struct, frozen=True):
    """Something that happened; `at_ms`: epoch milliseconds."""

    at_ms: float
    kind: Literal["breaker", "came", "gone", "left"]
    subject: str
    what: str
    detail: str = ""


class Picture(msgspec.Struct, frozen=True):
    """Everything that the page shows of the fleet."""

    at_ms: float
    connected: bool
    stages: tuple[Stage, ...]
    engine: Engine
    breakers: tuple[Breaker, ...]
    stores: dict[str, str]
    news: tuple[News, ...]


class Point(msgspec.Struct, frozen=True, array_like=True):
    """One look at a stage, for its curve."""

    rate: float
    failed: float
    p99_ms: float | None


@dataclass(slots=True)
class _Process:
    """What is known of one process. `looks`: (monotonic seconds, its endpoints), oldest first."""

    service: str
    stats: Stats
    seen: float
    seen_ms: float
    presence: Presence = "up"
    missed: int = 0
    looks: deque[tuple[float, dict[str, Endpoint]]] = field(default_factory=deque)

    def look(self, stats: Stats, now: float, now_ms: float) -> None:
        self.stats, self.seen, self.seen_ms, self.missed = stats, now, now_ms, 0
        self.looks.append((now, {endpoint.name: endpoint for endpoint in stats.endpoints}))
        while len(self.looks) > 2 and now - self.looks[0][0] > RATE_SECONDS + 0.5:
            self.looks.popleft()

    @property
    def instance(self) -> str:
        return (self.stats.metadata or {}).get(micro.INSTANCE) or self.stats.id

    def flows(self) -> dict[str, tuple[Endpoint, Flow]]:
        """By endpoint. Those that every replica hears (no queue group) only serve the running of things, and are left out."""
        if self.presence != "up":
            return {}
        then, before = self.looks[0]
        seconds = self.seen - then
        flows = {}
        for endpoint in self.stats.endpoints:
            if endpoint.queue_group:
                flows[endpoint.name] = (endpoint, _flow(before.get(endpoint.name), endpoint, seconds))
        return flows


def _flow(before: Endpoint | None, now: Endpoint, seconds: float) -> Flow:
    data = now.data or Now()
    if before is None or seconds <= 0:
        return Flow(in_flight=data.in_flight, queued=data.queued, p50_ms=data.p50_ms, p99_ms=data.p99_ms)
    requests = max(0, now.num_requests - before.num_requests)
    refused = max(0, data.refused - (before.data or Now()).refused)
    spent_ns = max(0, now.processing_time - before.processing_time)
    return Flow(
        rate=requests / seconds,
        failed=max(0, now.num_errors - before.num_errors - refused) / seconds,
        refused=refused / seconds,
        p50_ms=data.p50_ms,
        p99_ms=data.p99_ms,
        mean_ms=spent_ns / requests / 1e6 if requests else None,
        in_flight=data.in_flight,
        queued=data.queued,
    )


def _sum(flows: Sequence[Flow], timed: Sequence[Flow]) -> Flow:
    """All of `flows` together; durations of `timed`: the median by how many each had, the p99 of the worst."""
    medians = [(flow.p50_ms, max(flow.rate, 1e-3)) for flow in timed if flow.p50_ms is not None]
    means = [(flow.mean_ms, flow.rate) for flow in timed if flow.mean_ms is not None]
    return Flow(
        rate=sum(flow.rate for flow in flows),
        failed=sum(flow.failed for flow in flows),
        refused=sum(flow.refused for flow in flows),
        p50_ms=_weighted(medians),
        p99_ms=max((flow.p99_ms for flow in timed if flow.p99_ms is not None), default=None),
        mean_ms=_weighted(means),
        in_flight=sum(flow.in_flight for flow in flows),
        queued=sum(flow.queued for flow in flows),
    )


def _weighted(pairs: list[tuple[float, float]]) -> float | None:
    weight = sum(each for _, each in pairs)
    return sum(value * each for value, each in pairs) / weight if weight else None


def _timed(service: str, flows: Iterable[tuple[Endpoint, Flow]]) -> list[Flow]:
    found = list(flows)
    main = _MAIN.get(service)
    leading = [flow for endpoint, flow in found if main in (endpoint.name, endpoint.subject) and flow.p50_ms is not None]
    return leading or [flow for _, flow in found]


_decode_stats = msgspec.json.Decoder(Stats).decode
_decode_reply = msgspec.json.Decoder(Reply).decode
_decode_report = msgspec.json.Decoder(BreakerReport).decode


class Fleet:
    """`look` at what the processes answer, about once a second or less often; `picture` says what is known. Times: monotonic
    seconds, and epoch milliseconds for what is shown."""

    def __init__(self) -> None:
        self._processes: dict[str, _Process] = {}
        self._breakers: tuple[Breaker, ...] = ()
        self._leaving: deque[str] = deque(maxlen=256)
        self._news: deque[News] = deque(maxlen=MAX_NEWS)
        self._history: dict[str, deque[Point]] = {name: deque(maxlen=HISTORY) for name in STAGES}
        self._looked_at: float | None = None

    @property
    def proxies(self) -> int:
        return sum(1 for each in self._processes.values() if each.service == "detector_proxy" and each.presence == "up")

    def look(self, answers: Iterable[bytes], now: float, now_ms: float) -> None:
        """Take in what the processes answered. Answers of strangers, and what cannot be read, are left out."""
        seen = set()
        for stats in filter(None, map(_stats, answers)):
            service = stats.name.removeprefix(_NAME_PREFIX).replace("-", "_")
            if not stats.name.startswith(_NAME_PREFIX) or service not in STAGES:
                continue
            process = self._processes.get(stats.id)
            if process is None:
                if len(self._processes) >= MAX_REPLICAS:
                    continue
                process = self._processes[stats.id] = _Process(service, stats, now, now_ms)
                if self._looked_at is not None:
                    self._tell(now_ms, "came", service, f"{process.instance[:8]} is here")
            if process.presence != "up":
                self._tell(now_ms, "came", service, f"{process.instance[:8]} is back")
            process.presence = "up"
            process.look(stats, now, now_ms)
            seen.add(stats.id)
        for key, process in self._processes.items():
            if key not in seen:
                self._miss(process, now_ms)
        self._forget(now)
        # A point for each second, whoever looks how often.
        points = 1 if self._looked_at is None else min(HISTORY, max(1, round(now - self._looked_at)))
        self._looked_at = now
        for stage in self.stages():
            flow = stage.flow
            point = Point(round(flow.rate, 2), round(flow.failed, 2), flow.p99_ms or flow.mean_ms)
            self._history[stage.name].extend([point] * points)

    def _miss(self, process: _Process, now_ms: float) -> None:
        process.missed += 1
        if process.presence != "up":
            return
        if process.instance in self._leaving:
            process.presence = "left"
            self._tell(now_ms, "left", process.service, f"{process.instance[:8]} has finished and left")
        elif process.missed >= MISSED_LOOKS:
            process.presence = "gone"
            self._tell(now_ms, "gone", process.service, f"{process.instance[:8]} is gone")

    def _forget(self, now: float) -> None:
        away = sorted((each.seen, key) for key, each in self._processes.items() if each.presence != "up")
        for number, (seen, key) in enumerate(reversed(away)):
            if number >= MAX_GONE or now - seen > GONE_SECONDS:
                del self._processes[key]

    def leaves(self, instance: str) -> None:
        """A process has said that it is about to leave."""
        self._leaving.append(instance)

    def look_at_breakers(self, answers: Iterable[bytes]) -> None:
        by_name: dict[str, list[BreakerStatus]] = {}
        for answer in answers:
            try:
                reply = _decode_reply(answer)
                statuses = _decode_report(reply.result).breakers if reply.result is not None else ()
            except (ValueError, RecursionError):
                continue
            for status in statuses:
                by_name.setdefault(status.name, []).append(status)
        self._breakers = tuple(
            Breaker(
                name,
                max((status.state for status in statuses), key=_STATES.index),
                tuple(sorted(statuses, key=lambda status: status.replica)),
            )
            for name, statuses in sorted(by_name.items(), key=lambda pair: (pair[0] != "primary", pair[0]))
        )

    def breaker_changed(self, change: BreakerChanged, now_ms: float) -> None:
        what = f"{change.before} → {change.after}".replace("_", "-")
        self._tell(now_ms, "breaker", change.name, what, f"{change.reason} ({change.replica[:8]})")

    def stages(self) -> tuple[Stage, ...]:
        return tuple(self._stage(name) for name in STAGES)

    def history(self) -> dict[str, list[Point]]:
        """The curves so far, oldest first, by stage."""
        return {name: list(points) for name, points in self._history.items()}

    def picture(self, now_ms: float, *, connected: bool) -> Picture:
        return Picture(
            at_ms=now_ms,
            connected=connected,
            stages=self.stages(),
            engine=self._engine(),
            breakers=self._breakers,
            stores={
                "nats": "up" if connected else "down",
                "redis": self._worst("limiter", micro.STORE_REDIS, ("up", "down")) or "unknown",
                "postgres": self._worst("auth", micro.STORE_POSTGRES, ("up", "down")) or "unknown",
            },
            news=tuple(reversed(self._news)),
        )

    def _stage(self, name: str) -> Stage:
        mine = sorted((each for each in self._processes.values() if each.service == name), key=_by_presence)
        up = [each for each in mine if each.presence == "up"]
        flows = [pair for each in up for pair in each.flows().values()]
        statuses = {_metadata(each).get(micro.STATUS, "ok") for each in up}
        usable = statuses - {"down"}
        return Stage(
            name=name,
            status="down" if not usable else "ok" if statuses == {"ok"} else "degraded",
            up=len(up),
            flow=_sum([flow for _, flow in flows], _timed(name, flows)),
            replicas=tuple(_replica(each) for each in mine),
        )

    def _engine(self) -> Engine:
        values = [
            _metadata(each) for each in self._processes.values() if each.service == "detector_proxy" and each.presence == "up"
        ]
        first = values[0] if values else {}
        breaker = self._worst("detector_proxy", micro.ENGINE_BREAKER, _STATES)
        return Engine(
            kind=first.get(micro.ENGINE_CONFIGURED),
            name=first.get(micro.ENGINE_NAME),
            status=self._worst("detector_proxy", micro.ENGINE_STATUS, ("up", "degraded", "down")) or "down",
            breaker=next((state for state in _STATES if state == breaker), None),
        )

    def _worst(self, service: str, key: str, order: Sequence[str]) -> str | None:
        values = [
            value
            for each in self._processes.values()
            if each.service == service and each.presence == "up" and (value := _metadata(each).get(key)) in order
        ]
        return max(values, key=order.index, default=None)

    def _tell(
        self, at_ms: float, kind: Literal["breaker", "came", "gone", "left"], subject: str, what: str, detail: str = ""
    ) -> None:
        self._news.append(News(at_ms, kind, subject, what, detail))


def _stats(answer: bytes) -> Stats | None:
    try:
        return _decode_stats(answer)
    except (ValueError, RecursionError):
        return None


def _metadata(process: _Process) -> dict[str, str]:
    return process.stats.metadata or {}


def _by_presence(process: _Process) -> tuple[bool, str, str]:
    return process.presence != "up", process.stats.started, process.stats.id


def _replica(process: _Process) -> Replica:
    flows = process.flows()
    metadata = _metadata(process)
    return Replica(
        instance=process.instance,
        presence=process.presence,
        status=metadata.get(micro.STATUS, "ok"),
        version=process.stats.version,
        started=process.stats.started,
        seen_ms=process.seen_ms,
        flow=_sum([flow for _, flow in flows.values()], _timed(process.service, flows.values())),
        endpoints=tuple(EndpointView(endpoint.subject or endpoint.name, flow) for endpoint, flow in flows.values()),
        note={key: value for key, value in metadata.items() if key not in (micro.INSTANCE, micro.STATUS)},
    )
