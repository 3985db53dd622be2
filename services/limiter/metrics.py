"""What the limiter counts, beside what the bus counts of every stage. Whose calls they are is in no label: keys have no bound."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

from services.limiter.core import Decision

DECISIONS = Counter(
    "portcullis_limiter_decisions_total",
    "Decisions on limits of keys and addresses: admitted, refused, postponed (nothing of a job's fitted); by redis or local.",
    ["limit", "decision", "store"],
)
UNITS = Counter("portcullis_limiter_units_total", "Units (texts, registrations) that were taken from limits.", ["limit"])
USED = Histogram(
    "portcullis_limiter_used_ratio",
    "How much of a key's limit was in use after a decision (1: all): how near to their limits callers are.",
    ["window"],
    buckets=(0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1),
)
WAITING = Gauge("portcullis_limiter_waiting", "Decisions that wait for a connection to Redis.", ["limit"])
DEGRADED_SECONDS = Counter("portcullis_limiter_degraded_seconds_total", "Time that this replica decided without Redis.")
REDIS_DURATION = Histogram(
    "portcullis_redis_call_duration_seconds",
    "Time of one call to Redis, which decides up to 64 requests, or fails.",
    buckets=(0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1),
)
_WINDOWS = ("minute", "day")


class LimitMetrics:
    """Of one limit: `key` (a minute and a day) or `address`."""

    def __init__(self, limit: str) -> None:
        self._units = UNITS.labels(limit)
        self._used = [USED.labels(window) for window in _WINDOWS] if limit == "key" else []
        self._decisions = {
            (decision, store): DECISIONS.labels(limit, decision, store)
            for decision in ("admitted", "refused", "postponed")
            for store in ("redis", "local")
        }

    def count(self, decision: Decision, limits: tuple[int, ...], *, local: bool) -> None:
        """A decision on a call that costs something."""
        name = "refused" if not decision.admitted else "admitted" if decision.granted else "postponed"
        self._decisions[name, "local" if local else "redis"].inc()
        self._units.inc(decision.granted)
        for histogram, used, limit in zip(self._used, decision.used, limits, strict=False):
            histogram.observe(used / limit if limit else 1.0)
