"""What jobs counts, beside what the bus counts of every stage.

What is "in all replicas" is read off the streams, and every replica shows the same: take the maximum, not the sum.
"""

from __future__ import annotations

from prometheus_client import Counter, Gauge

OPEN = Gauge("portcullis_jobs_open", "Jobs that are not over, in all replicas.")
WAITING = Gauge("portcullis_job_items_waiting", "Items of jobs that nobody has had in hand yet, in all replicas.")
IN_HAND = Gauge("portcullis_job_items_in_hand", "Items that were handed out and have no result yet, in all replicas.")
ENDED = Counter("portcullis_jobs_ended_total", "Jobs that this replica has ended, by their state.", ["state"])
ITEMS = Counter("portcullis_job_items_total", "Items of jobs that this replica has stored a result for.", ["outcome"])
for _outcome in ("benign", "malicious", "failed"):
    ITEMS.labels(_outcome)
RETRIED = Counter("portcullis_job_items_retried_total", "Items given back to be tried again, by the reason.", ["code"])
REDELIVERED = Counter("portcullis_job_items_redelivered_total", "Items that this replica got and that somebody had had before.")
DEAD = Counter("portcullis_job_dead_letters_total", "Items that were given up.")
HELD_UP = Counter(
    "portcullis_job_turns_held_up_total",
    "Turns of a job that got no units: its key's limits are used up, or the stages that give them are not there.",
    ["reason"],
)
LIMITS, UNAVAILABLE = HELD_UP.labels("limits"), HELD_UP.labels("unavailable")
WEBHOOKS = Counter("portcullis_webhooks_total", "Attempts to deliver a webhook, by what became of them.", ["outcome"])
DELIVERED, FAILED, GIVEN_UP = (WEBHOOKS.labels(outcome) for outcome in ("delivered", "failed", "given_up"))
STREAM_BYTES = Gauge("portcullis_job_stream_bytes", "What a stream of jobs holds, in all replicas.", ["stream"])
STREAM_LIMIT = Gauge("portcullis_job_stream_limit_bytes", "What it may hold; what does not fit is refused.", ["stream"])
