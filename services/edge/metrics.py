"""What the edge counts, beside what the bus counts of every process; and which of it strangers may see.

`/metrics` of the gateway itself is open to whoever reaches it, so that it shows calls, their durations and how full the edge is,
and neither what administrators do nor anything of the process and the stages. Everything is on the process's own port.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import Metric

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
