"""What auth counts, beside what the bus counts of every stage."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

CACHE_LOOKUPS = Counter(
    "portcullis_auth_cache_lookups_total",
    "Keys looked up: hit (known), unknown (known not to exist), read (PostgreSQL was asked), stale (it was away or slow).",
    ["outcome"],
)
HIT, UNKNOWN, READ, STALE = (CACHE_LOOKUPS.labels(outcome) for outcome in ("hit", "unknown", "read", "stale"))
CACHE_ENTRIES = Gauge("portcullis_auth_cache_entries", "Keys that this process knows, or knows not to exist.")
KEYS_UNDER_PREVIOUS_PEPPER = Gauge(
    "portcullis_auth_keys_under_previous_pepper",
    "While the pepper is exchanged: valid keys not known to be under the current one. NaN: not counted yet.",
)
POSTGRES_DURATION = Histogram(
    "portcullis_postgres_statement_duration_seconds",
    "Time that PostgreSQL took for a statement that succeeded.",
    buckets=(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5),
)
USAGE_READ = Counter("portcullis_usage_events_read_total", "Usage events read, by what became of them.", ["outcome"])
COUNTED, SKIPPED, LOST = (USAGE_READ.labels(outcome) for outcome in ("counted", "skipped", "lost"))
DOOR = Counter(
    "portcullis_door_connections_total",
    "Clients that wanted to connect to NATS: admitted, or why not (an error code).",
    ["outcome"],
)
DOOR_ADMITTED = DOOR.labels("admitted")
