"""Engines, workers, verdicts."""

from __future__ import annotations

from grafana_foundation_sdk.models.dashboard import Dashboard

from infra.grafana.panels import board, lines
from infra.grafana.queries import RATE, quantile, rate, share


def dashboard() -> Dashboard:
    return board(
        "portcullis-model",
        "Portcullis: engines and model",
        "Which engine answers, how long it takes, and how near the workers are to their limits.",
        [
            (
                "Engines",
                [
                    lines(
                        "Calls by outcome",
                        "primary: the configured engine; fallback: the pool. What is not ok names the reason.",
                        (rate("portcullis_engine_calls_total", "role, outcome"), "{{role}} {{outcome}}"),
                        unit="reqps",
                        stacked=True,
                    ),
                    lines(
                        "Time of a call",
                        "Points lead to traces.",
                        (quantile(0.5, "portcullis_engine_duration_seconds", "role, result"), "p50 {{role}} {{result}}"),
                        (quantile(0.99, "portcullis_engine_duration_seconds", "role, result"), "p99 {{role}} {{result}}"),
                        unit="s",
                        exemplars=True,
                    ),
                    lines(
                        "Breakers",
                        "0 closed, 1 half open, 2 open.",
                        ("max by (breaker, replica) (portcullis_breaker_state)", "{{breaker}} in proxy {{replica}}"),
                        (f"sum by (breaker) (increase(portcullis_breaker_changes_total[{RATE}]))", "changes of {{breaker}}"),
                        unit="short",
                    ),
                    lines(
                        "Calls under way",
                        "At the limit single texts go to the other engine at once, and bulk waits.",
                        ("sum by (role, lane) (portcullis_engine_in_flight)", "{{role}} {{lane}}"),
                        ("sum by (role, lane) (portcullis_engine_in_flight_limit)", "limit of {{role}} {{lane}}"),
                        unit="short",
                    ),
                    lines(
                        "Tried with another worker",
                        "",
                        (rate("portcullis_pool_retries_total", "pool, reason"), "{{pool}} {{reason}}"),
                        unit="reqps",
                    ),
                    lines(
                        "Degraded verdicts",
                        "",
                        (share("portcullis_verdicts_total", 'degraded="true"'), "degraded"),
                        unit="percentunit",
                    ),
                ],
            ),
            (
                "Workers",
                [
                    lines(
                        "Busy",
                        "Time of the model by sessions. Single texts at 100 %: start more workers. Bulk takes what is left over.",
                        (
                            "sum by (lane) (rate(portcullis_model_inference_duration_seconds_sum[$__rate_interval]))"
                            " / scalar(sum(portcullis_model_sessions))",
                            "{{lane}}",
                        ),
                        unit="percentunit",
                    ),
                    lines(
                        "Queue",
                        "Tokens that wait, against the most that may.",
                        (
                            "max by (replica, lane) (portcullis_model_queue_tokens / portcullis_model_queue_limit_tokens)",
                            "{{lane}} of worker {{replica}}",
                        ),
                        unit="percentunit",
                    ),
                    lines(
                        "Wait for a batch",
                        "",
                        (quantile(0.5, "portcullis_model_queue_wait_seconds", "lane"), "p50 {{lane}}"),
                        (quantile(0.99, "portcullis_model_queue_wait_seconds", "lane"), "p99 {{lane}}"),
                        unit="s",
                    ),
                    lines(
                        "Time of a batch in the model",
                        "",
                        (quantile(0.5, "portcullis_model_inference_duration_seconds", "lane"), "p50 {{lane}}"),
                        (quantile(0.99, "portcullis_model_inference_duration_seconds", "lane"), "p99 {{lane}}"),
                        unit="s",
                    ),
                    lines(
                        "Tokens",
                        "Padding is work for nothing: texts of unlike length share batches.",
                        (rate("portcullis_model_tokens_total", "lane"), "{{lane}}"),
                        (rate("portcullis_model_padding_tokens_total", "lane"), "padding of {{lane}}"),
                        unit="short",
                        stacked=True,
                    ),
                    lines(
                        "Windows in a batch",
                        "On average.",
                        (
                            f"{rate('portcullis_model_batch_windows_sum', 'lane')}"
                            f" / {rate('portcullis_model_batch_windows_count', 'lane')}",
                            "{{lane}}",
                        ),
                        unit="short",
                    ),
                    lines(
                        "Texts",
                        "Turned away: the queue was full, or too long for their deadline (late); the proxy tries another worker.",
                        (rate("portcullis_model_texts_total", "lane"), "{{lane}}"),
                        (rate("portcullis_model_refused_total", "lane, reason"), "turned away from {{lane}}: {{reason}}"),
                        (rate("portcullis_model_truncated_texts_total"), "not everything undone"),
                        unit="reqps",
                    ),
                    lines(
                        "Preparing a text, p99",
                        "",
                        (quantile(0.99, "portcullis_model_prepare_duration_seconds", "step"), "{{step}}"),
                        unit="s",
                    ),
                ],
            ),
            (
                "Verdicts",
                [
                    lines(
                        "Malicious",
                        "The share of texts. A jump is an attack, a change of callers, or a change of the model.",
                        (share("portcullis_verdicts_total", 'verdict="malicious"'), "malicious"),
                        unit="percentunit",
                    ),
                    lines(
                        "Kinds of attack",
                        "",
                        (rate("portcullis_threats_total", "threat"), "{{threat}}"),
                        unit="reqps",
                        stacked=True,
                    ),
                    lines(
                        "Models in use",
                        "Workers by model. Two at a time: an exchange is under way, or a worker failed to load the new one.",
                        ("count by (model, pool) (portcullis_model_info)", "{{model}} for {{pool}}"),
                        (f"sum by (outcome) (increase(portcullis_model_reloads_total[{RATE}]))", "exchange {{outcome}}"),
                        unit="short",
                    ),
                ],
            ),
        ],
    )
