"""Is it well? If not, which stage is it?"""

from __future__ import annotations

from grafana_foundation_sdk.models.dashboard import Dashboard

from infra.grafana.panels import GOOD_BELOW, bars, board, lines, number
from infra.grafana.queries import CALLS, STAGE, quantile, rate, share


def dashboard() -> Dashboard:
    return board(
        "portcullis-overview",
        "Portcullis: overview",
        "Is it well? If not, which stage is it?",
        [
            (
                "Is it well?",
                [
                    number(
                        "Calls",
                        "What callers ask, a second.",
                        rate("portcullis_http_requests_total", matching=CALLS),
                        unit="reqps",
                    ),
                    number(
                        "Failed calls",
                        "The share that was answered with 5xx: callers see these.",
                        share("portcullis_http_requests_total", 'status=~"5.."', CALLS),
                        unit="percentunit",
                        steps=GOOD_BELOW["share"],
                    ),
                    number(
                        "Detection, p99",
                        "One detection in a hundred takes longer.",
                        quantile(0.99, "portcullis_http_request_duration_seconds", matching='route="/v1/detect"') + " >= 0",
                        unit="s",
                        steps=GOOD_BELOW["seconds"],
                        empty="none",
                    ),
                    number(
                        "Degraded",
                        "The share of verdicts without the primary engine, or without Redis.",
                        share("portcullis_verdicts_total", 'degraded="true"'),
                        unit="percentunit",
                        steps=GOOD_BELOW["share"],
                    ),
                    number(
                        "Replicas away",
                        "Processes that cannot be scraped.",
                        'count(up{job="portcullis"} == 0) or vector(0)',
                        unit="short",
                        steps=GOOD_BELOW["any"],
                    ),
                    number(
                        "Open breakers",
                        "Engines that are not asked, since they failed; counted in each replica of the proxy.",
                        "count(portcullis_breaker_state == 2) or vector(0)",
                        unit="short",
                        steps=GOOD_BELOW["any"],
                    ),
                    number(
                        "Stores away",
                        "Processes whose PostgreSQL or Redis does not answer.",
                        "count(portcullis_store_up == 0) or vector(0)",
                        unit="short",
                        steps=GOOD_BELOW["any"],
                    ),
                    number(
                        "Alerts",
                        "Firing now; each has its section in docs/operations/runbooks.md.",
                        'count(ALERTS{alertstate="firing",alertname=~"Portcullis.*"}) or vector(0)',
                        unit="short",
                        steps=GOOD_BELOW["any"],
                    ),
                ],
            ),
            (
                "Which stage?",
                [
                    bars(
                        "Slowest stages, p99",
                        "Each stage's own time, that of the engine within the proxy's. The longest bar is where to look.",
                        (
                            f"topk(12, {quantile(0.99, 'portcullis_stage_duration_seconds', 'service, subject')} > 0)",
                            STAGE,
                        ),
                        unit="s",
                        steps=GOOD_BELOW["seconds"],
                    ),
                    bars(
                        "Fullest stages",
                        "Messages in flight against the most that the stage takes; at the end of the bar it refuses.",
                        (
                            "topk(12, max by (service, subject) (portcullis_stage_in_flight / portcullis_stage_in_flight_limit))",
                            STAGE,
                        ),
                        unit="percentunit",
                        steps=GOOD_BELOW["full"],
                    ),
                    lines(
                        "Time by stage, p99",
                        "Points lead to traces.",
                        (quantile(0.99, "portcullis_stage_duration_seconds", "service, subject"), STAGE),
                        unit="s",
                        exemplars=True,
                    ),
                    lines(
                        "Failed messages by stage",
                        "Failures of this system, by error code; refusals that callers caused are not among them.",
                        (
                            rate(
                                "portcullis_stage_requests_total",
                                "service, subject, outcome",
                                'outcome=~"internal|overloaded|expired|stage_unavailable|no_engine|deadline_exceeded"',
                            )
                            + " > 0",
                            "{{service}} {{subject}} {{outcome}}",
                        ),
                        unit="reqps",
                    ),
                    lines(
                        "Messages by stage",
                        "A stage that gets fewer than the one before it loses or refuses some.",
                        (
                            rate("portcullis_stage_requests_total", "service, subject", 'subject=~"detect.*|model.*"'),
                            STAGE,
                        ),
                        unit="reqps",
                    ),
                    lines(
                        "Waiting messages by stage",
                        "They have come, and nobody works on them yet.",
                        ("sum by (service, subject) (portcullis_stage_queued) > 0", STAGE),
                        unit="short",
                    ),
                ],
            ),
            (
                "What callers see",
                [
                    lines(
                        "Calls by status",
                        "",
                        (rate("portcullis_http_requests_total", "status", CALLS), "{{status}}"),
                        unit="reqps",
                        stacked=True,
                    ),
                    lines(
                        "Time of a detection",
                        "From the request's headers to the end of the answer. Points lead to traces. base: with hardly any other "
                        "under way, which the edge's limit goes by.",
                        *(
                            (
                                quantile(part, "portcullis_http_request_duration_seconds", matching='route="/v1/detect"'),
                                f"p{part * 100:g}",
                            )
                            for part in (0.5, 0.95, 0.99)
                        ),
                        ("max(portcullis_detect_base_seconds < 1e9)", "base"),
                        unit="s",
                        exemplars=True,
                    ),
                    lines(
                        "In flight at the edge",
                        "Beyond the limits calls are refused with 429. That of single texts follows their latency.",
                        ("sum(portcullis_http_in_flight)", "calls"),
                        ("sum(portcullis_http_in_flight_limit)", "limit"),
                        ("sum(portcullis_detect_in_flight)", "single texts"),
                        ("sum(portcullis_detect_in_flight_limit)", "limit of single texts"),
                        ("sum(portcullis_batches_in_flight)", "batches"),
                        unit="short",
                    ),
                    lines(
                        "Refused for want of room",
                        "limit: single texts take too long already; deadline: they would wait past it; full: of everything.",
                        (rate("portcullis_shed_total", "reason"), "{{reason}}"),
                        unit="reqps",
                        stacked=True,
                    ),
                    lines(
                        "Verdicts",
                        "",
                        (rate("portcullis_verdicts_total", "verdict, degraded"), "{{verdict}}, degraded: {{degraded}}"),
                        unit="reqps",
                        stacked=True,
                    ),
                ],
            ),
        ],
    )
