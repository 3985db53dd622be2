"""What the proxy counts, beside what the bus counts of every stage. Engines go by their role: their names are not ours."""

from __future__ import annotations

from typing import get_args

from prometheus_client import Counter, Gauge, Histogram

from libs.common.contracts import ThreatType, Verdict

ENGINE_CALLS = Counter("portcullis_engine_calls_total", "Calls of an engine, by outcome (ok or why not).", ["role", "outcome"])
ENGINE_DURATION = Histogram(
    "portcullis_engine_duration_seconds",
    "Time spent on an engine that was asked, retries included, by result (ok, failed).",
    ["role", "result"],
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
)
ENGINE_IN_FLIGHT = Gauge(
    "portcullis_engine_in_flight", "Calls of an engine under way; lanes: single texts, bulk.", ["role", "lane"]
)
ENGINE_LIMIT = Gauge(
    "portcullis_engine_in_flight_limit", "Calls under way at most; more go elsewhere, or wait.", ["role", "lane"]
)
POOL_RETRIES = Counter(
    "portcullis_pool_retries_total", "Requests sent to another worker of a pool, by reason.", ["pool", "reason"]
)
BREAKER_CHANGES = Counter("portcullis_breaker_changes_total", "Changes of a breaker's state.", ["breaker", "after"])
BREAKER_STATE = Gauge("portcullis_breaker_state", "0 closed, 1 half open, 2 open.", ["breaker"])
VERDICTS = Counter(
    "portcullis_verdicts_total",
    "Verdicts; degraded: the configured engine, or Redis, had no part in it.",
    ["verdict", "degraded"],
)
THREATS = Counter("portcullis_threats_total", "Kinds of attack that malicious verdicts named.", ["threat"])
USAGE_EVENTS = Counter(
    "portcullis_usage_events_total",
    "Usage events: stored (acknowledged), resent, untracked (sent, but too many were waiting to be acknowledged), lost.",
    ["outcome"],
)
USAGE_WAITING = Gauge("portcullis_usage_waiting", "Usage events that have not been acknowledged yet.")

_VERDICTS = {
    (malicious, degraded): VERDICTS.labels("malicious" if malicious else "benign", str(degraded).lower())
    for malicious in (False, True)
    for degraded in (False, True)
}
_THREATS = {threat: THREATS.labels(threat) for threat in get_args(ThreatType)}


def count_verdict(verdict: Verdict) -> None:
    """One text's verdict, as the caller gets it."""
    _VERDICTS[verdict.is_malicious, verdict.degraded].inc()
    for threat in verdict.threat_types:
        _THREATS[threat].inc()
