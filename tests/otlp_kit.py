"""Traces of the shape that the gateway's have, made with opentelemetry-sdk's own encoder."""

from __future__ import annotations

import random
import time
import urllib.request
from collections.abc import Sequence

from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags
from opentelemetry.util.types import AttributeValue

SCOPE = InstrumentationScope("portcullis")
MS = 1_000_000


def context(trace_id: int, span_id: int) -> SpanContext:
    return SpanContext(trace_id, span_id, is_remote=False, trace_flags=TraceFlags(TraceFlags.SAMPLED))


def span(
    name: str,
    *,
    trace_id: int = 0xABC,
    span_id: int = 1,
    parent_id: int | None = None,
    service: str = "edge",
    kind: SpanKind = SpanKind.INTERNAL,
    start_ns: int | None = None,
    duration_ms: float = 5.0,
    error: str | None = None,
    attributes: dict[str, AttributeValue] | None = None,
    events: Sequence[Event] = (),
    links: Sequence[Link] = (),
) -> ReadableSpan:
    """One span that has ended."""
    start = time.time_ns() if start_ns is None else start_ns
    return ReadableSpan(
        name,
        context(trace_id, span_id),
        parent=context(trace_id, parent_id) if parent_id is not None else None,
        resource=Resource({"service.name": f"portcullis-{service.replace('_', '-')}", "service.instance.id": f"{service}-1"}),
        attributes=attributes or {},
        events=events,
        links=links,
        kind=kind,
        status=Status(StatusCode.ERROR, error) if error is not None else Status(StatusCode.UNSET),
        start_time=start,
        end_time=start + int(duration_ms * MS),
        instrumentation_scope=SCOPE,
    )


def encoded(spans: Sequence[ReadableSpan]) -> bytes:
    """As an exporter sends them."""
    return bytes(encode_spans(spans).SerializeToString())


def post(url: str, spans: Sequence[ReadableSpan]) -> int:
    """To a console; the status of its answer."""
    request = urllib.request.Request(f"{url}/v1/traces", encoded(spans), {"Content-Type": "application/x-protobuf"})
    with urllib.request.urlopen(request, timeout=10) as response:
        return int(response.status)


class _Maker:
    """Spans of one trace, each after the other or within the other."""

    def __init__(self, rng: random.Random, start_ns: int) -> None:
        self.trace_id = rng.getrandbits(128) | 1
        self.spans: list[ReadableSpan] = []
        self._rng = rng
        self._start_ns = start_ns

    def add(
        self,
        name: str,
        service: str,
        at_ms: float,
        duration_ms: float,
        parent: int | None,
        kind: SpanKind = SpanKind.INTERNAL,
        error: str | None = None,
        attributes: dict[str, AttributeValue] | None = None,
        events: Sequence[Event] = (),
    ) -> int:
        span_id = self._rng.getrandbits(64) | 1
        self.spans.append(
            span(
                name,
                trace_id=self.trace_id,
                span_id=span_id,
                parent_id=parent,
                service=service,
                kind=kind,
                start_ns=self._start_ns + int(at_ms * MS),
                duration_ms=duration_ms,
                error=error,
                attributes=attributes,
                events=events,
            )
        )
        return span_id

    def event(self, name: str, at_ms: float) -> Event:
        return Event(name, {}, self._start_ns + int(at_ms * MS))


def request_trace(kind: str = "ok", age_seconds: float = 0.0, rng: random.Random | None = None) -> list[ReadableSpan]:
    """A detection over HTTP. `kind`: ok, malicious, fallback (the primary engine fails), refused, failed or slow."""
    rng = rng or random.Random()
    make = _Maker(rng, time.time_ns() - int(age_seconds * 1e9))
    model_ms = 1300.0 if kind == "slow" else rng.uniform(2.5, 6)
    engine_ms = rng.uniform(40, 90) if kind == "fallback" else 0.0
    reached = 2.6 if kind == "refused" else 4.0 + engine_ms + model_ms + 1.5
    status, outcome = {"refused": (429, "rate_limited"), "failed": (503, "no_engine")}.get(kind, (200, "ok"))
    facts: dict[str, AttributeValue] = {
        "http.request.method": "POST",
        "http.route": "/v1/detect",
        "http.response.status_code": status,
        "portcullis.request_id": f"{rng.getrandbits(128):032x}",
        "portcullis.outcome": outcome,
    }
    if status == 200:
        facts |= {"portcullis.is_malicious": kind == "malicious", "portcullis.degraded": kind == "fallback"}
    root = make.add(
        "POST /v1/detect", "edge", 0, reached + 0.8, None, SpanKind.SERVER, "no_engine" if kind == "failed" else None, facts
    )
    send = make.add("send detect.v1.request", "edge", 0.2, reached, root, SpanKind.PRODUCER)
    auth = make.add("process detect.v1.request", "auth", 0.5, 0.6, send, SpanKind.CONSUMER)
    forward = make.add("send detect.v1.authenticated", "auth", 0.9, 0.15, auth, SpanKind.PRODUCER)
    limiter = make.add("process detect.v1.authenticated", "limiter", 1.3, 1.1, forward, SpanKind.CONSUMER)
    make.add("EVALSHA sliding_window", "limiter", 1.4, 0.7, limiter, SpanKind.CLIENT)
    if kind == "refused":
        return make.spans
    forward = make.add("send detect.v1.admitted", "limiter", 2.2, 0.15, limiter, SpanKind.PRODUCER)
    proxy = make.add("process detect.v1.admitted", "detector_proxy", 2.7, reached - 3, forward, SpanKind.CONSUMER)
    at = 2.9
    if kind in ("fallback", "failed"):
        make.add("engine detect", "detector_proxy", at, max(engine_ms, 1.0), proxy, SpanKind.CLIENT, "timeout")
        at += max(engine_ms, 1.0)
    if kind == "failed":
        make.add("send model.v1.fallback", "detector_proxy", at, 0.3, proxy, SpanKind.PRODUCER, "stage_unavailable")
        return make.spans
    ask = make.add("send model.v1.fallback", "detector_proxy", at, model_ms + 1.2, proxy, SpanKind.PRODUCER)
    worker = make.add("process model.v1.fallback", "fallback_model", at + 0.4, model_ms + 0.6, ask, SpanKind.CONSUMER)
    make.add("tokenize", "fallback_model", at + 0.5, 0.3, worker)
    queue_ms = model_ms * 0.7 if kind == "slow" else 0.2
    make.add("queue", "fallback_model", at + 0.8, queue_ms, worker)
    make.add(
        "inference", "fallback_model", at + 0.8 + queue_ms, model_ms - queue_ms, worker,
        attributes={"portcullis.tokens": 34, "portcullis.batch_size": 3}, events=[make.event("batched", at + 0.9 + queue_ms)],
    )  # fmt: skip
    return make.spans
