"""The configuration of jobs."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from libs.common.settings import CommonSettings


class Settings(CommonSettings):
    """Sizes of streams are used only when a stream does not exist yet."""

    jobs_retention_hours: Annotated[float, Field(gt=0, le=24 * 90)] = 72.0
    """How long a job and its results can be read after its end, and an Idempotency-Key is remembered."""
    jobs_max_run_hours: Annotated[float, Field(gt=0, le=24 * 90)] = 168.0
    """A job that is not done by then fails; what it has by then can be read."""
    jobs_max_items: Annotated[int, Field(ge=1, le=1_000_000)] = 100_000
    """Items of one job."""
    jobs_max_bytes: Annotated[int, Field(ge=1024)] = 64 * 1024**2
    """Bytes of the items of one job."""
    jobs_open_per_key: Annotated[int, Field(ge=1)] = 8
    """Jobs of one key that are not over; with the two bounds above, this bounds what is stored for a key."""
    jobs_open: Annotated[int, Field(ge=1, le=10_000)] = 500
    """Jobs of all keys that are not over."""
    jobs_items_stream_bytes: Annotated[int, Field(ge=1024**2)] = 2 * 1024**3
    """Bound of the stream of items that wait; a submission that does not fit is refused."""
    jobs_results_stream_bytes: Annotated[int, Field(ge=1024**2)] = 2 * 1024**3
    """Bound of the stream of results; while it is full, jobs wait."""
    jobs_slots: Annotated[int, Field(ge=1, le=64)] = 4
    """Messages with texts that one replica has at the proxy at a time."""
    jobs_message_items: Annotated[int, Field(ge=1, le=64)] = 32
    """Texts of one message."""
    jobs_message_timeout_seconds: Annotated[float, Field(gt=0, le=300)] = 60.0
    """How long the proxy may take for one message."""
    jobs_ack_wait_seconds: Annotated[float, Field(ge=1)] = 15.0
    """When a replica dies, how long until another takes the items that it had in hand."""
    webhook_allow_private: bool = False
    """Let webhooks go to private, loopback and link-local addresses. For gateways whose callers are all trusted."""
    webhook_timeout_seconds: Annotated[float, Field(gt=0, le=60)] = 10.0
    """How long a receiver may take to answer."""
    webhook_attempts: Annotated[int, Field(ge=1, le=20)] = 8
    """How often a webhook is tried, with pauses of 1 s that grow fivefold up to 1 h."""
