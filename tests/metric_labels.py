"""The labels of all metrics, and the values that each may have: a label whose values callers could make up has no bound."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, get_args

from libs.common import subjects
from libs.common.contracts import ThreatType
from libs.common.errors import ErrorCode
from services.edge.metrics import Shed
from services.jobs.core import FINAL
from tests.unit.edge.fakes import FakeStages, gate_of

CODES = tuple(str(code) for code in ErrorCode)
ENGINE_TROUBLE = (
    *("absent", "bad_http", "breaker_open", "busy", "content_encoding", "content_type", "cut_off", "failed", "full", "labels"),
    *("malformed", "no_answer", "no_time", "redirect", "rejected", "timeout", "too_large", "unasked", "unreachable"),
    *(f"status_{first}xx" for first in range(10)),
)
"""What `EngineError`s are for. An engine may answer any status of three digits."""
OUTCOMES = {
    "portcullis_stage_requests": ("ok", "expired", *CODES),
    "portcullis_batch_items": ("ok", *CODES),
    "portcullis_auth_cache_lookups": ("hit", "unknown", "read", "stale"),
    "portcullis_usage_events_read": ("counted", "skipped", "lost"),
    "portcullis_usage_events": ("stored", "resent", "untracked", "lost"),
    "portcullis_door_connections": ("admitted", *CODES),
    "portcullis_engine_calls": ("ok", *ENGINE_TROUBLE),
    "portcullis_model_reloads": ("ok", "failed"),
    "portcullis_job_items": ("benign", "malicious", "failed"),
    "portcullis_webhooks": ("delivered", "failed", "given_up"),
    "portcullis_trace_spans": ("exported", "dropped", "failed"),
}
"""`outcome` is of every metric's own; by family."""
REASONS = {
    "portcullis_pool_retries": ENGINE_TROUBLE,
    "portcullis_shed": tuple(Shed),
    "portcullis_model_refused": ("full", "late"),
    "portcullis_job_turns_held_up": ("limits", "unavailable"),
    "portcullis_traces_kept": ("asked", "rate", "failed", "refused", "slow"),
}


@dataclass(frozen=True, slots=True)
class Bound:
    """`values`: all there are; or `pattern`, which only what an operator configures, or a program's own tables, can fill."""

    text: str
    values: tuple[str, ...] = ()
    pattern: str = ""

    def allows(self, value: str) -> bool:
        return value in self.values or bool(self.pattern and re.fullmatch(self.pattern, value, re.ASCII))


def _subjects() -> tuple[str, ...]:
    heard = {subject for own in subjects.PERMISSIONS.values() for subject in own.subscribe}
    return tuple(sorted(each for each in heard if not each.startswith(("_INBOX.", "$SRV.", "events.", "model.v1.*"))))


def _routes() -> tuple[str, ...]:
    app: Any = gate_of(FakeStages())._app
    # The console's are there only where there is a console.
    return (*sorted({route.path for route in app.routes} | {"/console", "/console/{path:path}"}), "unmatched")


LABELS: dict[str, Bound] = {
    "subject": Bound("the NATS subject that a stage listens to", _subjects(), pattern=r"model\.v1\.[a-z0-9_-]{1,32}(\.batch)?"),
    "result": Bound("whose fault it was, if any", ("ok", "refused", "failed")),
    "outcome": Bound("what became of it"),
    "reason": Bound("why"),
    "code": Bound("an error code", CODES),
    "event": Bound("what went wrong", ("disconnected", "slow_consumer", "error")),
    "store": Bound("what is asked, or decided", ("postgres", "redis", "local")),
    "pool": Bound(
        "connections to what; of workers, their pool", ("postgres", "postgres_background", "redis", "engine"), r"[a-z0-9_-]{1,32}"
    ),
    "method": Bound("of HTTP", ("GET", "POST", "PATCH", "DELETE", "PUT", "HEAD", "OPTIONS", "other")),
    "route": Bound("the template of the path, or `unmatched`", _routes()),
    "status": Bound("of HTTP; 0: the caller left before there was one", pattern=r"0|[1-5]\d\d"),
    "status_class": Bound("of HTTP", ("1xx", "2xx", "3xx", "4xx", "5xx", "none")),
    "role": Bound("which engine", ("primary", "fallback")),
    "breaker": Bound("whose breaker", ("primary", "fallback")),
    "after": Bound("the state that a breaker changed to", ("closed", "half_open", "open")),
    "kind": Bound("of asking again", ("resend", "pool")),
    "lane": Bound("single texts, or those of batches and jobs", ("single", "bulk")),
    "verdict": Bound("", ("malicious", "benign")),
    "degraded": Bound("without the primary engine, or without Redis", ("true", "false")),
    "threat": Bound("a kind of attack", get_args(ThreatType)),
    "limit": Bound("of a key, or of an address that registers", ("key", "address")),
    "decision": Bound("", ("admitted", "refused", "postponed")),
    "window": Bound("of a key's limits", ("minute", "day")),
    "step": Bound("of preparing a text", ("normalise", "tokenise")),
    "model": Bound("the name in the model's config.json", pattern=r"[\w.@+-]{1,128}"),
    "state": Bound("that a job ended in", tuple(sorted(FINAL))),
    "stream": Bound(
        "of jobs",
        (subjects.JOB_ITEMS_STREAM, subjects.JOB_RESULTS_STREAM, subjects.JOB_DEAD_STREAM, subjects.JOB_HOOKS_STREAM),
    ),
    "version": Bound("of Portcullis; of Python", pattern=r"\d+(\.\d+)*[a-z0-9+.-]{0,16}"),
    "le": Bound("a histogram's bucket", pattern=r"[0-9.e+-]+|\+Inf"),
    "generation": Bound("of Python's garbage collector", ("0", "1", "2")),
    "implementation": Bound("of Python", pattern=r"[A-Za-z]+"),
    "major": Bound("of Python", pattern=r"\d+"),
    "minor": Bound("of Python", pattern=r"\d+"),
    "patchlevel": Bound("of Python", pattern=r"\d+\w*"),
}


def allowed(family: str, label: str, value: str) -> bool:
    """Whether a label of a family may have this value."""
    if label == "outcome":
        return value in OUTCOMES[family]
    if label == "reason":
        return value in REASONS[family]
    return LABELS[label].allows(value)
