"""Traces as they arrive: OTLP in protobuf, from whoever reaches the port. Everything is cut to a size; nothing is believed."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable
from typing import Any, Final

from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTracePartialSuccess,
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Status

from services.console.core import Attributes, Event, Link, Span, Value

MAX_BODY_BYTES: Final = 4 * 1024**2
"""Of one message, unpacked; the exporters' batches of 512 spans have some 300 KB."""

MAX_NAME: Final = 200
MAX_VALUE: Final = 512
"""Characters of an attribute's value."""
MAX_ATTRIBUTES: Final = 64
MAX_EVENTS: Final = 64
MAX_LINKS: Final = 64
MAX_SAFE_INTEGER: Final = 2**53 - 1
"""Larger numbers would not survive a browser."""

_KINDS: Final = ("internal", "internal", "server", "client", "producer", "consumer")
_SERVICE_PREFIX: Final = "portcullis-"


class UnreadableError(ValueError):
    """The body is not what it should be; the text says how."""


def unpack(body: bytes, encoding: str) -> bytes:
    """The body without its Content-Encoding. Raises `UnreadableError`, also when it would become too large."""
    if encoding in ("", "identity"):
        return body
    if encoding != "gzip":
        raise UnreadableError(f"Content-Encoding {encoding[:20]!r} is not known; send gzip or identity")
    reader = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
    try:
        plain = reader.decompress(body, MAX_BODY_BYTES + 1)
    except zlib.error:
        raise UnreadableError("the body is not gzip") from None
    if len(plain) > MAX_BODY_BYTES or not reader.eof:
        raise UnreadableError("the body is too large, or not all of it")
    return plain


def read(body: bytes) -> tuple[list[Span], int]:
    """The spans of an ExportTraceServiceRequest, and how many were refused (without ids). Raises `UnreadableError`."""
    try:
        request = ExportTraceServiceRequest.FromString(body)
    except DecodeError:
        raise UnreadableError("the body is not an ExportTraceServiceRequest") from None
    spans: list[Span] = []
    refused = 0
    for resource_spans in request.resource_spans:
        resource = dict(_attributes(resource_spans.resource.attributes))
        service = _service(str(resource.get("service.name", "unknown"))[:MAX_NAME])
        instance = str(resource.get("service.instance.id", ""))[:MAX_NAME]
        for scope_spans in resource_spans.scope_spans:
            for span in scope_spans.spans:
                if len(span.trace_id) == 16 and len(span.span_id) == 8 and any(span.trace_id) and any(span.span_id):
                    spans.append(_span(span, service, instance))
                else:
                    refused += 1
    return spans, refused


def _service(name: str) -> str:
    """Our services are called here as everywhere else in this system."""
    return name.removeprefix(_SERVICE_PREFIX).replace("-", "_") if name.startswith(_SERVICE_PREFIX) else name


def answer(refused: int) -> bytes:
    """What the exporter is told."""
    if not refused:
        return bytes(ExportTraceServiceResponse().SerializeToString())
    said = ExportTracePartialSuccess(rejected_spans=refused, error_message="spans without valid ids")
    return bytes(ExportTraceServiceResponse(partial_success=said).SerializeToString())


def _span(span: Any, service: str, instance: str) -> Span:
    failed = span.status.code == Status.STATUS_CODE_ERROR
    return Span(
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id[:8].hex(),
        name=span.name[:MAX_NAME],
        kind=_KINDS[span.kind] if 0 <= span.kind < len(_KINDS) else "internal",
        service=service,
        instance=instance,
        start_ns=span.start_time_unix_nano,
        end_ns=max(span.start_time_unix_nano, span.end_time_unix_nano),
        failed=failed,
        error=span.status.message[:MAX_VALUE] if failed else "",
        attributes=_attributes(span.attributes),
        events=tuple(
            Event(event.name[:MAX_NAME], event.time_unix_nano, _attributes(event.attributes))
            for event in span.events[:MAX_EVENTS]
        ),
        links=tuple(
            Link(link.trace_id[:16].hex(), link.span_id[:8].hex(), _attributes(link.attributes))
            for link in span.links[:MAX_LINKS]
        ),
    )


def _attributes(pairs: Iterable[Any]) -> Attributes:
    found: list[tuple[str, Value]] = []
    for pair in pairs:
        if len(found) >= MAX_ATTRIBUTES:
            break
        found.append((pair.key[:MAX_NAME], _value(pair.value)))
    return tuple(found)


def _value(value: Any) -> Value:
    """A scalar; of lists the scalars in them, and of what is nested deeper nothing."""
    match value.WhichOneof("value"):
        case "string_value":
            return _cut(value.string_value)
        case "bool_value":
            return bool(value.bool_value)
        case "int_value":
            number = int(value.int_value)
            return number if abs(number) <= MAX_SAFE_INTEGER else str(number)
        case "double_value":
            real = float(value.double_value)
            return real if math.isfinite(real) else str(real)
        case "bytes_value":
            return f"{len(value.bytes_value)} bytes"
        case "array_value":
            inner = value.array_value.values[:MAX_ATTRIBUTES]
            flat = [each for each in inner if each.WhichOneof("value") not in ("array_value", "kvlist_value")]
            return _cut(
                ", ".join(str(_value(each)) for each in flat) + (", …" if len(flat) < len(value.array_value.values) else "")
            )
        case "kvlist_value":
            return f"{len(value.kvlist_value.values)} values"
        case _:
            return ""


def _cut(text: str) -> str:
    return text if len(text) <= MAX_VALUE else text[:MAX_VALUE] + "…"
