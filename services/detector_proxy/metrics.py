"""What the proxy counts, beside what the bus counts of every stage."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

ENGINE_CALLS = Counter("portcullis_engine_calls_total", "Calls of an engine, by outcome (ok or why not).", ["role", "outcome"])
ENGINE_DURATION = Histogram(
    "portcullis_engine_duration_seconds",
    "Time spent on an engine, breaker and retries included.",
    ["role"],
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
)
POOL_RETRIES = Counter(
    "portcullis_pool_retries_total", "Requests sent to another worker of a pool, by reason.", ["pool", "reason"]
)
BREAKER_CHANGES = Counter("portcullis_breaker_changes_total", "Changes of a breaker's state.", ["breaker", "after"])
BREAKER_STATE = Gauge("portcullis_breaker_state", "0 closed, 1 half open, 2 open.", ["breaker"])
USAGE_EVENTS = Counter(
    "portcullis_usage_events_total",
    "Usage events: stored (acknowledged), resent, untracked (sent, but too many were waiting to be acknowledged), lost.",
    ["outcome"],
)
USAGE_WAITING = Gauge("portcullis_usage_waiting", "Usage events that have not been acknowledged yet.")
