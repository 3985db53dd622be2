"""What the edge counts, beside what the bus counts of every process; and which of it strangers may see.

`/metrics` of the gateway itself is open to whoever reaches it, so that it shows calls, their durations and how full the edge is,
and neither what administrators do nor anything of the process and the stages. Everything is on the process's own port.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from nats.micro.service import EndpointInfo, EndpointStats
from prometheus_client import Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import Metric

from libs.common.recent import RecentDurations

REQUESTS = Counter("portcullis_http_requests_total", "Requests answered, by route and status.", ["method", "route", "status"])
DURATION = Histogram(
    "portcullis_http_request_duration_seconds",
    "Time from a request's headers to the end of its answer, by route and class of status (2xx; none: the caller left).",
    ["route", "status_class"],
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
)
IN_FLIGHT = Gauge("portcullis_http_in_flight", "Calls that the edge is working on.")
IN_FLIGHT_LIMIT = Gauge("portcullis_http_in_flight_limit", "Calls that the edge works on at most; more are refused.")
BATCHES = Gauge("portcullis_batches_in_flight", "Batches that are being answered.")
BATCH_ITEMS = Counter("portcullis_batch_items_total", "Items of batches answered, by outcome (ok or an error code).", ["outcome"])

_PUBLIC = (REQUESTS, DURATION, IN_FLIGHT, IN_FLIGHT_LIMIT)
_NOT_PUBLIC = "/admin"
_LIFE_SECONDS = 1.0


class PublicPage:
    """The public metrics in Prometheus' text format; made at most once a second, since anybody may ask, as often as they like."""

    def __init__(self) -> None:
        self._made_at = -_LIFE_SECONDS
        self._page = b""

    def render(self, now: float) -> bytes:
        """`now`: seconds of a monotonic clock."""
        if now - self._made_at >= _LIFE_SECONDS:
            self._page, self._made_at = generate_latest(self), now
        return self._page

    def collect(self) -> Iterator[Metric]:
        for metric in _PUBLIC:
            for family in metric.collect():
                family.samples = [each for each in family.samples if not each.labels.get("route", "").startswith(_NOT_PUBLIC)]
                yield family


def status_class(status: int) -> str:
    return f"{status // 100}xx" if status else "none"


class CallMeter:
    """Calls of one kind, for whoever asks `$SRV.STATS`: as `libs.common.meter` tells of messages."""

    def __init__(self, name: str, in_flight: Callable[[], int]) -> None:
        self._name = name
        self._in_flight = in_flight
        self._requests = 0
        self._failed = 0
        self._refused = 0
        self._processing_ns = 0
        self._recent = RecentDurations()

    def count(self, status: int, spent_ns: int) -> None:
        """One call. `status` 0: the caller has gone, which is nobody's failure."""
        self._requests += 1
        self._failed += status >= 500
        self._refused += 400 <= status < 500
        self._processing_ns += spent_ns
        self._recent.add(spent_ns, time.perf_counter_ns())

    def info(self) -> EndpointInfo:
        return EndpointInfo(name=self._name, subject=self._name, queue_group="edge", metadata={})

    def stats(self) -> EndpointStats:
        """`data` as that of a stage; nothing waits here."""
        now_ns = time.perf_counter_ns()
        return EndpointStats(
            name=self._name,
            subject=self._name,
            queue_group="edge",
            num_requests=self._requests,
            num_errors=self._failed + self._refused,
            processing_time=self._processing_ns,
            average_processing_time=self._processing_ns // self._requests if self._requests else 0,
            last_error="",
            data={
                "in_flight": self._in_flight(),
                "queued": 0,
                "refused": self._refused,
                "p50_ms": self._recent.percentile_ms(0.5, now_ns),
                "p99_ms": self._recent.percentile_ms(0.99, now_ns),
            },
        )


class CallMeters:
    """Single texts, many texts, and everything else: their durations have nothing to do with each other."""

    def __init__(self, in_flight: Callable[[], int]) -> None:
        # All calls are counted as one number; telling them once is enough.
        self._detect = CallMeter("http-detect", in_flight)
        self._batch = CallMeter("http-batch", lambda: 0)
        self._others = CallMeter("http-others", lambda: 0)
        self.all = (self._detect, self._batch, self._others)
        self._by_route = {"/v1/detect": self._detect, "/v1/detect/batch": self._batch}

    def count(self, route: str, status: int, spent_seconds: float) -> None:
        self._by_route.get(route, self._others).count(status, int(spent_seconds * 1e9))
