"""Recorded spans as the OpenTelemetry SDK's, on their way to a collector. Imported only where something is exported."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Final
from urllib.parse import urlsplit

import requests
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags

from libs.common.tracing import CLIENT, CONSUMER, INTERNAL, PRODUCER, SERVER, Recorded

_SAMPLED: Final = TraceFlags(TraceFlags.SAMPLED)
_KINDS: Final = {
    INTERNAL: SpanKind.INTERNAL,
    SERVER: SpanKind.SERVER,
    CLIENT: SpanKind.CLIENT,
    PRODUCER: SpanKind.PRODUCER,
    CONSUMER: SpanKind.CONSUMER,
}
_OK: Final = Status(StatusCode.UNSET)
_LOOPBACK: Final = frozenset({"127.0.0.1", "localhost", "::1"})


class Wire:
    """One process's connection to the collector, used by one thread. `service`: whose spans those are that name none.

    What the `OTEL_*` variables say of address, headers, certificates, compression and timeout holds.
    """

    def __init__(self, service: str, instance: str, version: str) -> None:
        # It tells of every batch that fails; who uses this tells of the first.
        logging.getLogger("opentelemetry.exporter").setLevel(logging.CRITICAL)
        self._service, self._instance, self._version = service, instance, version
        self._resources: dict[str, Resource] = {}
        self._scope = InstrumentationScope("portcullis", version)
        self._session = requests.Session()
        # No proxy from the environment stands between us and our own loopback.
        self._session.trust_env = not _is_loopback(os.environ)
        self._exporter = OTLPSpanExporter(session=self._session)

    def send(self, batch: Sequence[Recorded]) -> bool:
        """Whether the collector has taken them; tries for as long as `OTEL_EXPORTER_OTLP_TIMEOUT` says (10 s)."""
        return self._exporter.export([self.readable(span) for span in batch]) is SpanExportResult.SUCCESS

    def close(self) -> None:
        self._exporter.shutdown()  # type: ignore[no-untyped-call]
        self._session.close()

    def readable(self, span: Recorded) -> ReadableSpan:
        trace_id, span_id, parent_id, name, kind, began, ended, shared, own, events, links, error, service = span
        attributes = {**dict(shared), **dict(own)}
        if error:
            attributes["error.type"] = error
        trace = int(trace_id, 16)
        return ReadableSpan(
            name=name,
            context=SpanContext(trace, int(span_id, 16), False, _SAMPLED),
            parent=SpanContext(trace, int(parent_id, 16), True, _SAMPLED) if parent_id else None,
            resource=self._resource(service or self._service),
            attributes=attributes,
            events=[Event(each, timestamp=at) for each, at in events],
            links=[_link(each) for each in links],
            kind=_KINDS[kind],
            status=Status(StatusCode.ERROR, error) if error else _OK,
            start_time=began,
            end_time=ended,
            instrumentation_scope=self._scope,
        )

    def _resource(self, service: str) -> Resource:
        """A service as the collector shows it."""
        known = self._resources.get(service)
        if known is None:
            attributes = {
                "service.name": f"portcullis-{service}".replace("_", "-"),
                "service.namespace": "portcullis",
                "service.instance.id": self._instance,
                "service.version": self._version,
            }
            known = self._resources[service] = Resource.create(attributes)
        return known


def _link(traceparent: str) -> Link:
    return Link(SpanContext(int(traceparent[3:35], 16), int(traceparent[36:52], 16), True, _SAMPLED))


def _is_loopback(environment: Mapping[str, str]) -> bool:
    url = environment.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or environment.get("OTEL_EXPORTER_OTLP_ENDPOINT") or ""
    return urlsplit(url).hostname in _LOOPBACK
