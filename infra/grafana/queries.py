"""Queries that the dashboards have in common."""

from __future__ import annotations

CALLS = 'route=~"/v1/.*|/auth/.*"'
"""What callers ask for; not the health checks, the pages and the metrics."""
RATE = "$__rate_interval"
REPLICA = "{{service}} {{replica}}"
STAGE = "{{service}} {{subject}}"


def quantile(share: float, metric: str, by: str = "", matching: str = "") -> str:
    """A percentile of a histogram by some labels, over all replicas that the others do not tell apart."""
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({share}, sum by ({labels}) (rate({metric}_bucket{{{matching}}}[{RATE}])))"


def rate(metric: str, by: str = "", matching: str = "") -> str:
    labels = f" by ({by})" if by else ""
    return f"sum{labels} (rate({metric}{{{matching}}}[{RATE}]))"


def share(metric: str, part: str, matching: str = "", by: str = "") -> str:
    both = ",".join(filter(None, (matching, part)))
    return f"{rate(metric, by, both)} / ({rate(metric, by, matching)} > 0)"
