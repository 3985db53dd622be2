"""Logs and metrics of every service. Neither ever holds a text or a key."""

from __future__ import annotations

import contextvars
import logging
import sys
import time
from typing import Any

import msgspec
from prometheus_client import Counter, Gauge, Histogram, start_http_server

from libs.common import tracing
from libs.common.settings import CommonSettings

request_id_var: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="")

STAGE_REQUESTS = Counter(
    "portcullis_stage_requests_total", "Messages handled by a stage, by outcome (ok or an error code).", ["subject", "outcome"]
)
STAGE_DURATION = Histogram(
    "portcullis_stage_duration_seconds",
    "Time from a message's arrival in a stage to its forward or reply.",
    ["subject"],
    buckets=(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
)
STAGE_IN_FLIGHT = Gauge("portcullis_stage_in_flight", "Messages that a stage is working on.", ["subject"])
NATS_EVENTS = Counter(
    "portcullis_nats_events_total", "Trouble on the NATS connection: disconnected, slow_consumer, error.", ["event"]
)
RESENT = Counter("portcullis_requests_resent_total", "Requests sent again because a process that may have had them died.")


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
            "service": self._service,
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


def serve_metrics(settings: CommonSettings) -> None:
    """Serve /metrics of this process on its own port, if one is configured."""
    if settings.metrics_port:
        start_http_server(settings.metrics_port, addr=settings.metrics_host)
