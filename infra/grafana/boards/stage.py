"""One stage, its replicas, and what it stands on."""

from __future__ import annotations

from grafana_foundation_sdk.models.dashboard import Dashboard

from infra.grafana.panels import board, lines, variable
from infra.grafana.queries import RATE, REPLICA, quantile, rate


def dashboard() -> Dashboard:
    chosen = 'service=~"$service",replica=~"$replica"'
    subject = f'{chosen},subject=~"$subject"'
    return board(
        "portcullis-stage",
        "Portcullis: one stage",
        "What a stage does, how long it takes, what it waits for, and whether one replica is unlike the others.",
        [
            (
                "What it does",
                [
                    lines(
                        "Messages by outcome",
                        "ok, or the code of the error.",
                        (rate("portcullis_stage_requests_total", "outcome", subject), "{{outcome}}"),
                        unit="reqps",
                        stacked=True,
                    ),
                    lines(
                        "Time by result",
                        "refused: for a reason that lies in the message (4xx). Points lead to traces.",
                        (quantile(0.5, "portcullis_stage_duration_seconds", "result", subject), "p50 {{result}}"),
                        (quantile(0.99, "portcullis_stage_duration_seconds", "result", subject), "p99 {{result}}"),
                        unit="s",
                        exemplars=True,
                    ),
                    lines(
                        "In flight",
                        "At its limit a stage refuses.",
                        (f"sum by (subject) (portcullis_stage_in_flight{{{subject}}})", "{{subject}}"),
                        (f"sum by (subject) (portcullis_stage_in_flight_limit{{{subject}}})", "limit of {{subject}}"),
                        unit="short",
                    ),
                    lines(
                        "Waiting",
                        "Messages that have come and that nobody works on; of a worker, texts that wait for a batch, too.",
                        (f"sum by (subject) (portcullis_stage_queued{{{subject}}})", "{{subject}}"),
                        unit="short",
                    ),
                ],
            ),
            (
                "Its replicas",
                [
                    lines(
                        "Messages by replica",
                        "NATS picks at random: they should be alike.",
                        (rate("portcullis_stage_requests_total", "service, replica", subject), REPLICA),
                        unit="reqps",
                    ),
                    lines(
                        "Time by replica, p99",
                        "",
                        (
                            quantile(0.99, "portcullis_stage_duration_seconds", "service, replica", subject),
                            REPLICA,
                        ),
                        unit="s",
                    ),
                    lines(
                        "Lateness of the event loop, p95",
                        "Everything in a process waits this long: it computes too much, or gets no processor.",
                        (
                            quantile(0.95, "portcullis_event_loop_lag_seconds", "service, replica", chosen),
                            REPLICA,
                        ),
                        unit="s",
                    ),
                    lines(
                        "Processor time",
                        "1: one processor, which is all that one event loop can use.",
                        (rate("process_cpu_seconds_total", "service, replica", chosen), REPLICA),
                        unit="short",
                    ),
                    lines(
                        "Memory",
                        "Resident.",
                        (f"process_resident_memory_bytes{{{chosen}}}", REPLICA),
                        unit="bytes",
                    ),
                    lines(
                        "Tasks and open files",
                        "At rest always as many: what only grows is something that is never let go.",
                        (f"portcullis_event_loop_tasks{{{chosen}}}", f"{REPLICA} tasks"),
                        (f"process_open_fds{{{chosen}}}", f"{REPLICA} files"),
                        unit="short",
                    ),
                    lines(
                        "Running for",
                        "A fall to zero is a restart.",
                        (f"time() - process_start_time_seconds{{{chosen}}}", REPLICA),
                        unit="s",
                    ),
                ],
            ),
            (
                "What it stands on",
                [
                    lines(
                        "Connections in use",
                        "Of the pools of PostgreSQL, Redis and the HTTP engine; at 100 % calls wait for one.",
                        (
                            f"portcullis_pool_connections_in_use{{{chosen}}} / portcullis_pool_connections_limit{{{chosen}}}",
                            "{{service}} {{replica}} {{pool}}",
                        ),
                        unit="percentunit",
                    ),
                    lines(
                        "Trouble with NATS",
                        "slow_consumer: messages were dropped.",
                        (
                            f"sum by (service, replica, event) (increase(portcullis_nats_events_total{{{chosen}}}[{RATE}]))",
                            "{{service}} {{replica}} {{event}}",
                        ),
                        (f"1 - portcullis_nats_connected{{{chosen}}}", "{{service}} {{replica}} without NATS"),
                        unit="short",
                    ),
                    lines(
                        "Traces",
                        "kept: why, in the process where they began. spans: whether the collector has them.",
                        (rate("portcullis_traces_kept_total", "reason", chosen), "kept: {{reason}}"),
                        (rate("portcullis_trace_spans_total", "outcome", chosen), "spans: {{outcome}}"),
                        unit="short",
                    ),
                    lines(
                        "Sent again",
                        "Requests sent once more because a process that may have had them died; withheld: the budget of "
                        "retries was used up, of these and of those to another worker of a pool.",
                        (rate("portcullis_requests_resent_total", "service", chosen), "{{service}}"),
                        (rate("portcullis_retries_withheld_total", "service, kind", chosen), "withheld: {{service}} {{kind}}"),
                        (f"min by (service) (portcullis_retry_budget_left{{{chosen}}})", "left: {{service}}"),
                        unit="reqps",
                    ),
                ],
            ),
        ],
        [
            variable("service", "Service", 'label_values(up{job="portcullis"}, service)'),
            variable("replica", "Replica", 'label_values(up{job="portcullis",service=~"$service"}, replica)'),
            variable("subject", "Subject", 'label_values(portcullis_stage_in_flight{service=~"$service"}, subject)'),
        ],
    )
