"""Jobs and batches."""

from __future__ import annotations

from grafana_foundation_sdk.models.dashboard import Dashboard

from infra.grafana.panels import GOOD_BELOW, board, lines, number
from infra.grafana.queries import RATE, rate


def dashboard() -> Dashboard:
    return board(
        "portcullis-jobs",
        "Portcullis: jobs and batches",
        "What waits, what is done, what is given up, and why nothing moves when nothing moves.",
        [
            (
                "Backlog",
                [
                    number("Open jobs", "Not over yet.", "max(portcullis_jobs_open)", unit="short", width=4),
                    number(
                        "Items waiting", "Nobody has had them yet.", "max(portcullis_job_items_waiting)", unit="short", width=4
                    ),
                    number(
                        "Items in hand",
                        "Handed out, without a result yet.",
                        "max(portcullis_job_items_in_hand)",
                        unit="short",
                        width=4,
                    ),
                    number(
                        "Items a second",
                        "Results stored.",
                        rate("portcullis_job_items_total"),
                        unit="short",
                        width=4,
                    ),
                    number(
                        "Time to go",
                        "At the present speed.",
                        f"max(portcullis_job_items_waiting) / {rate('portcullis_job_items_total')}",
                        unit="s",
                        width=4,
                        empty="none",
                    ),
                    number(
                        "Dead letters",
                        "Items that were given up, within the time shown.",
                        "sum(increase(portcullis_job_dead_letters_total[$__range]))",
                        unit="short",
                        steps=GOOD_BELOW["any"],
                        width=4,
                    ),
                    lines(
                        "Backlog",
                        "",
                        ("max(portcullis_job_items_waiting)", "waiting"),
                        ("max(portcullis_job_items_in_hand)", "in hand"),
                        ("max(portcullis_jobs_open)", "open jobs"),
                        unit="short",
                    ),
                    lines(
                        "Results",
                        "",
                        (rate("portcullis_job_items_total", "outcome"), "{{outcome}}"),
                        unit="reqps",
                        stacked=True,
                    ),
                ],
            ),
            (
                "What holds it up",
                [
                    lines(
                        "Turns without units",
                        "limits: the key's limits are used up, and its jobs wait. unavailable: auth or the limiter is away.",
                        (rate("portcullis_job_turns_held_up_total", "reason"), "{{reason}}"),
                        unit="reqps",
                    ),
                    lines(
                        "Given back",
                        "Items to be tried again, by the reason.",
                        (rate("portcullis_job_items_retried_total", "code"), "{{code}}"),
                        unit="reqps",
                    ),
                    lines(
                        "Redelivered",
                        "Items that somebody had had before: given back, or in the hands of a replica that died.",
                        (rate("portcullis_job_items_redelivered_total"), "redelivered"),
                        unit="reqps",
                    ),
                    lines(
                        "Streams",
                        "What does not fit is refused: of items, submissions; of results, jobs wait.",
                        (
                            "max by (stream) (portcullis_job_stream_bytes / (portcullis_job_stream_limit_bytes > 0))",
                            "{{stream}}",
                        ),
                        unit="percentunit",
                        highest=1,
                    ),
                ],
            ),
            (
                "Ends",
                [
                    lines(
                        "Jobs ended",
                        "",
                        (f"sum by (state) (increase(portcullis_jobs_ended_total[{RATE}]))", "{{state}}"),
                        unit="short",
                    ),
                    lines(
                        "Webhooks",
                        "failed: will be tried again.",
                        (f"sum by (outcome) (increase(portcullis_webhooks_total[{RATE}]))", "{{outcome}}"),
                        unit="short",
                    ),
                ],
            ),
            (
                "Batches",
                [
                    lines("Batches under way", "", ("sum(portcullis_batches_in_flight)", "batches"), unit="short"),
                    lines(
                        "Items of batches",
                        "ok, or the code of the error.",
                        (rate("portcullis_batch_items_total", "outcome"), "{{outcome}}"),
                        unit="reqps",
                        stacked=True,
                    ),
                ],
            ),
        ],
    )
