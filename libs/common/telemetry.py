"""Logs and metrics of every service. Neither ever holds a text or a key."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import sys
import time
from typing import Any

import msgspec
from prometheus_client import Counter, Gauge, Histogram, disable_created_metrics, start_http_server

from libs.common import probes, tracing
from libs.common.probes import ProcessHealth
from libs.common.settings import CommonSettings

log = logging.getLogger(__name__)

request_id_var: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="")

# A series more for each counter and histogram, to say when it began: Prometheus sees that by itself.
disable_created_metrics()  # type: ignore[no-untyped-call]

LATENCY_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
"""Buckets of durations that somebody waits for."""

BUILD = Gauge("portcullis_build_info", "1; the version that runs.", ["version"])
LOOP_LAG = Histogram(
    "portcullis_event_loop_lag_seconds",
    "How much later than due a process's event loop came to a timer: what everything in it waits.",
    buckets=(0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5),
)
TASKS = Gauge("portcullis_event_loop_tasks", "Tasks of a process's event loop that are not done; at rest always as many.")

STAGE_REQUESTS = Counter(
    "portcullis_stage_requests_total", "Messages handled by a stage, by outcome (ok or an error code).", ["subject", "outcome"]
)
STAGE_DURATION = Histogram(
    "portcullis_stage_duration_seconds",
    "Time from a message's arrival in a stage to its forward or reply, by result (ok, refused: 4xx, failed: 5xx).",
    ["subject", "result"],
    buckets=LATENCY_SECONDS,
)
STAGE_IN_FLIGHT = Gauge("portcullis_stage_in_flight", "Messages that a stage is working on.", ["subject"])
STAGE_LIMIT = Gauge("portcullis_stage_in_flight_limit", "Messages that a stage works on at most; more are refused.", ["subject"])
STAGE_QUEUED = Gauge("portcullis_stage_queued", "Messages that have come to a stage and that nobody works on yet.", ["subject"])

NATS_CONNECTED = Gauge("portcullis_nats_connected", "1 while this process is connected to NATS.")
NATS_EVENTS = Counter(
    "portcullis_nats_events_total", "Trouble on the NATS connection: disconnected, slow_consumer, error.", ["event"]
)
for _event in ("disconnected", "slow_consumer", "error"):
    NATS_EVENTS.labels(_event)  # shown from the start: what appears with its first event has no increase to alert on
RESENT = Counter("portcullis_requests_resent_total", "Requests sent again because a process that may have had them died.")
RETRIES_LEFT = Gauge("portcullis_retry_budget_left", "Requests that this process may send again now, whatever the reason.")
RETRIES_WITHHELD = Counter(
    "portcullis_retries_withheld_total",
    "Requests not sent again because the budget was used up: resend (a process died), pool (to another worker).",
    ["kind"],
)
RESEND_WITHHELD, POOL_WITHHELD = RETRIES_WITHHELD.labels("resend"), RETRIES_WITHHELD.labels("pool")

STORE_UP = Gauge("portcullis_store_up", "1 while a process's store (postgres of auth, redis of limiter) answers.", ["store"])
CONNECTIONS = Gauge("portcullis_pool_connections_in_use", "Connections in use of a pool: postgres, redis, engine.", ["pool"])
CONNECTIONS_LIMIT = Gauge("portcullis_pool_connections_limit", "Connections that a pool may have.", ["pool"])

LAG_EVERY_SECONDS = 0.5
METRICS_RETRY_SECONDS = 5.0


def exemplar() -> dict[str, str] | None:
    """What leads from an observation to the trace of the present work, where that trace is kept."""
    trace_id = tracing.current_trace_id()
    return None if trace_id is None else {"trace_id": trace_id}


class _JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def __init__(self, service: str, instance: str) -> None:
        super().__init__()
        self._service = service
        self._instance = instance

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname,
            "service": tracing.service() or self._service,
            "instance": self._instance,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if request_id := request_id_var.get():
            entry["request_id"] = request_id
        if traceparent := tracing.here():
            entry["trace_id"], entry["span_id"] = traceparent[3:35], traceparent[36:52]
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(entry).decode()


def setup_logging(service: str, instance: str, settings: CommonSettings) -> None:
    """Log to stderr: JSON when it is not a terminal (or as `PORTCULLIS_LOG_FORMAT` says)."""
    as_json = settings.log_format == "json" or (settings.log_format == "auto" and not sys.stderr.isatty())
    handler = logging.StreamHandler(sys.stderr)
    if as_json:
        handler.setFormatter(_JsonFormatter(service, instance))
    else:
        handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)-7s {service} %(name)s: %(message)s"))
    logging.basicConfig(level=settings.log_level, handlers=[handler], force=True)


async def serve_metrics(settings: CommonSettings, health: ProcessHealth) -> None:
    """Serve /metrics of this process, and what probes ask it, on its own port, if one is configured.

    A port that is taken is tried again for ever: that nobody can look must not keep a service from its work.
    """
    waiting = False
    while settings.metrics_port:
        try:
            server, _ = start_http_server(settings.metrics_port, addr=settings.metrics_host)
            server.set_app(probes.beside(server.get_app(), health))  # type: ignore[arg-type]  # typeshed has its own alias
        except OSError as error:
            if not waiting:
                log.warning("metrics are not served on %s:%d yet: %s", settings.metrics_host, settings.metrics_port, error)
            waiting = True
            await asyncio.sleep(METRICS_RETRY_SECONDS)
        else:
            return


async def watch_loop(health: ProcessHealth) -> None:
    """Measure for ever how late the event loop is and how many tasks it has, and tell `health` that it turns."""
    loop = asyncio.get_running_loop()
    while True:
        TASKS.set(len(asyncio.all_tasks(loop)))
        due = loop.time() + LAG_EVERY_SECONDS
        await asyncio.sleep(LAG_EVERY_SECONDS)
        LOOP_LAG.observe(max(0.0, loop.time() - due))
        health.beat()
