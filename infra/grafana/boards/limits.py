"""Callers, the limiter, keys."""

from __future__ import annotations

from grafana_foundation_sdk.models.dashboard import Dashboard

from infra.grafana.panels import board, lines
from infra.grafana.queries import quantile, rate

LITTLE_LEFT = 'le="0.9"'


def dashboard() -> Dashboard:
    return board(
        "portcullis-limits",
        "Portcullis: limits and tenants",
        "Who is refused, and why; keys, the limiter, Redis and PostgreSQL. No metric names a key: ./run portcullis admin does.",
        [
            (
                "Callers",
                [
                    lines(
                        "Decisions on keys",
                        "postponed: a job's turn, of which nothing fitted its key's limit.",
                        (
                            rate("portcullis_limiter_decisions_total", "decision, store", 'limit="key"'),
                            "{{decision}} by {{store}}",
                        ),
                        unit="reqps",
                        stacked=True,
                    ),
                    lines(
                        "Near their limit",
                        "The share of decisions after which more than 90 % of the key's limit was in use.",
                        (
                            f"1 - {rate('portcullis_limiter_used_ratio_bucket', 'window', LITTLE_LEFT)}"
                            f" / {rate('portcullis_limiter_used_ratio_count', 'window')}",
                            "{{window}}",
                        ),
                        unit="percentunit",
                        highest=1,
                    ),
                    lines(
                        "Units taken",
                        "Texts, of keys; registrations, of addresses.",
                        (rate("portcullis_limiter_units_total", "limit"), "{{limit}}"),
                        unit="reqps",
                    ),
                    lines(
                        "Refused calls by route",
                        "401: no valid key. 403: not for this key. 429: over its limit, or the gateway is full.",
                        (
                            rate("portcullis_http_requests_total", "route, status", 'status=~"401|403|429"') + " > 0",
                            "{{status}} {{route}}",
                        ),
                        unit="reqps",
                    ),
                    lines(
                        "Registrations",
                        "By what became of them; an address may make only so many an hour.",
                        (rate("portcullis_http_requests_total", "status", 'route="/auth/register"'), "{{status}}"),
                        unit="reqps",
                    ),
                    lines(
                        "Clients on NATS",
                        "Connections that were asked for.",
                        (rate("portcullis_door_connections_total", "outcome"), "{{outcome}}"),
                        unit="reqps",
                    ),
                ],
            ),
            (
                "The limiter",
                [
                    lines(
                        "Without Redis",
                        "The share of time; each replica then limits for itself.",
                        (rate("portcullis_limiter_degraded_seconds_total", "replica"), "limiter {{replica}}"),
                        unit="percentunit",
                        highest=1,
                    ),
                    lines(
                        "Time of a call to Redis",
                        "It is given 0.1 s.",
                        (quantile(0.5, "portcullis_redis_call_duration_seconds"), "p50"),
                        (quantile(0.99, "portcullis_redis_call_duration_seconds"), "p99"),
                        unit="s",
                    ),
                    lines(
                        "Decisions that wait for a connection",
                        "",
                        ("sum by (limit) (portcullis_limiter_waiting)", "{{limit}}"),
                        unit="short",
                    ),
                ],
            ),
            (
                "Keys",
                [
                    lines(
                        "Keys looked up",
                        "read: PostgreSQL was asked. stale: it was away or slow, and what was known of the key was used.",
                        (rate("portcullis_auth_cache_lookups_total", "outcome"), "{{outcome}}"),
                        unit="reqps",
                        stacked=True,
                    ),
                    lines(
                        "Time of a statement",
                        "",
                        (quantile(0.5, "portcullis_postgres_statement_duration_seconds"), "p50"),
                        (quantile(0.99, "portcullis_postgres_statement_duration_seconds"), "p99"),
                        unit="s",
                    ),
                    lines(
                        "Pools",
                        "Connections in use, by the most there may be.",
                        (
                            "max by (service, pool) (portcullis_pool_connections_in_use / portcullis_pool_connections_limit)",
                            "{{service}} {{pool}}",
                        ),
                        unit="percentunit",
                    ),
                    lines(
                        "Stores",
                        "0: does not answer.",
                        ("min by (service, store) (portcullis_store_up)", "{{store}} of {{service}}"),
                        unit="short",
                        highest=1,
                    ),
                    lines(
                        "Keys known",
                        "In the caches of auth.",
                        ("sum by (replica) (portcullis_auth_cache_entries)", "auth {{replica}}"),
                        unit="short",
                    ),
                    lines(
                        "Keys under the previous pepper",
                        "While it is exchanged, when every auth has the new one as the current one. At 0 it can be removed.",
                        ("max(portcullis_auth_keys_under_previous_pepper)", "keys"),
                        unit="short",
                    ),
                    lines(
                        "Usage events",
                        "sent by the proxy; read and counted by auth.",
                        (rate("portcullis_usage_events_total", "outcome"), "sent: {{outcome}}"),
                        (rate("portcullis_usage_events_read_total", "outcome"), "read: {{outcome}}"),
                        ("sum(portcullis_usage_waiting)", "waiting for an acknowledgement"),
                        unit="short",
                    ),
                ],
            ),
        ],
    )
