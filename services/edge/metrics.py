"""What the edge counts, beside what the bus counts of every process; and which of it strangers may see.

`/metrics` of the gateway itself is open to whoever reaches it, so that it shows calls, their durations and how full the edge is,
and neither what administrators do nor anything of the process and the stages. Everything is on the process's own port.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import StrEnum

from prometheus_client import Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import Metric

from libs.common.meter import FAILED, OK, REFUSED, EndpointMeter

REQUESTS = Counter("portcullis_http_requests_total", "Requests answered, by route and status.", ["method", "route", "status"])
DURATION = Histogram(
    "portcullis_http_request_duration_seconds",
    "Time from a request's headers to the end of its answer, by route and class of status (2xx; none: the caller left).",
    ["route", "status_class"],
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
)
IN_FLIGHT = Gauge("portcullis_http_in_flight", "Calls that the edge is working on.")
IN_FLIGHT_LIMIT = Gauge("portcullis_http_in_flight_limit", "Calls that the edge works on at most; more are refused.")
DETECT_IN_FLIGHT = Gauge("portcullis_detect_in_flight", "Single texts that are with the stages.")
DETECT_LIMIT = Gauge(
    "portcullis_detect_in_flight_limit", "Single texts that may be with the stages now; it follows their latency."
)
DETECT_BASE = Gauge(
    "portcullis_detect_base_seconds",
    "What a single text takes when hardly any other is under way, the primary engine's time aside; +Inf until it is known.",
)
SHED = Counter(
    "portcullis_shed_total",
    "Calls refused at once because there was no room, by what was full: all calls (full), single texts by their latency (limit), "
    "their wait against their own deadline (deadline), batches, bodies, connections.",
    ["reason"],
)
BATCHES = Gauge("portcullis_batches_in_flight", "Batches that are being answered.")
BATCH_ITEMS = Counter("portcullis_batch_items_total", "Items of batches answered, by outcome (ok or an error code).", ["outcome"])

_PUBLIC = (REQUESTS, DURATION, IN_FLIGHT, IN_FLIGHT_LIMIT)
_NOT_PUBLIC = "/admin"
_LIFE_SECONDS = 1.0


class Shed(StrEnum):
    """Why a call was refused for want of room."""

    FULL = "full"
    LIMIT = "limit"
    DEADLINE = "deadline"
    BATCHES = "batches"
    BODIES = "bodies"
    CONNECTIONS = "connections"


_SHED = {reason: SHED.labels(reason) for reason in Shed}


def shed(reason: Shed) -> None:
    """Count one call that is refused for want of room."""
    _SHED[reason].inc()


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


class CallMeters:
    """Single texts, many texts, and everything else, for `$SRV.STATS`: their durations have nothing to do with each other."""

    def __init__(self, in_flight: Callable[[], int]) -> None:
        # All calls are counted as one number; telling them once is enough.
        self._detect = self._made("http-detect", in_flight)
        self._batch = self._made("http-batch", _none)
        self._others = self._made("http-others", _none)
        self.all = (self._detect, self._batch, self._others)
        self._by_route = {"/v1/detect": self._detect, "/v1/detect/batch": self._batch}

    def count(self, route: str, status: int, spent_seconds: float) -> None:
        """One call. `status` 0: the caller has gone, which is nobody's failure."""
        result = FAILED if status >= 500 else REFUSED if status >= 400 else OK
        self._by_route.get(route, self._others).add(result, int(spent_seconds * 1e9))

    @staticmethod
    def _made(name: str, in_flight: Callable[[], int]) -> EndpointMeter:
        return EndpointMeter(name, name, "edge", in_flight=in_flight, queued=_none)


def _none() -> int:
    return 0
