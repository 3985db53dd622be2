"""Traces as they arrive, from exporters and from strangers."""

from __future__ import annotations

import gzip
import math
import zlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest, ExportTraceServiceResponse
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.sdk.trace import Event
from opentelemetry.trace import Link, SpanKind

from services.console import otlp
from services.console.core import Query, Span, TraceStore
from tests.otlp_kit import context, encoded, request_trace, span


def read_one(**fields: Any) -> Span:
    spans, refused = otlp.read(encoded([span("GET /", **fields)]))
    assert refused == 0
    (found,) = spans
    return found


def request(**fields: object) -> ExportTraceServiceRequest:
    """A message that can be spoilt."""
    message: ExportTraceServiceRequest = ExportTraceServiceRequest.FromString(encoded([span("GET /")]))
    target = message.resource_spans[0].scope_spans[0].spans[0]
    for name, value in fields.items():
        setattr(target, name, value)
    return message


def read_spoilt(**fields: object) -> tuple[list[Span], int]:
    return otlp.read(request(**fields).SerializeToString())


def test_a_span_is_read_as_it_was_made() -> None:
    found = read_one(
        trace_id=0xABC,
        span_id=0xDEF,
        parent_id=0x123,
        service="detector_proxy",
        kind=SpanKind.CLIENT,
        start_ns=1000,
        duration_ms=2,
        error="timeout",
        attributes={"portcullis.degraded": True, "portcullis.tokens": 7, "server.address": "engine", "ratio": 0.5},
        events=[Event("retried", {"attempt": 2}, 1500)],
        links=[Link(context(0x77, 0x88))],
    )
    assert (found.trace_id, found.span_id, found.parent_id) == (f"{0xABC:032x}", f"{0xDEF:016x}", f"{0x123:016x}")
    assert (found.service, found.instance, found.kind) == ("detector_proxy", "detector_proxy-1", "client")
    assert (found.start_ns, found.end_ns, found.failed, found.error) == (1000, 2_001_000, True, "timeout")
    assert dict(found.attributes) == {
        "portcullis.degraded": True,
        "portcullis.tokens": 7,
        "server.address": "engine",
        "ratio": 0.5,
    }
    assert [(event.name, event.at_ns, event.attributes) for event in found.events] == [("retried", 1500, (("attempt", 2),))]
    assert [(link.trace_id, link.span_id) for link in found.links] == [(f"{0x77:032x}", f"{0x88:016x}")]


def test_a_whole_request_becomes_one_complete_trace() -> None:
    spans, refused = otlp.read(encoded(request_trace("fallback")))
    traces = TraceStore(1000, 10_000_000, slow_ms=1000)
    traces.add(spans)
    (summary,) = traces.find(Query())
    assert refused == 0
    assert (summary.complete, summary.state, summary.name) == (True, "degraded", "POST /v1/detect")
    assert summary.services == ("edge", "auth", "limiter", "detector_proxy", "fallback_model")


@pytest.mark.parametrize(
    "ids",
    [
        {"trace_id": b""},
        {"trace_id": b"\x01" * 8},
        {"trace_id": b"\0" * 16},
        {"span_id": b""},
        {"span_id": b"\0" * 8},
        {"span_id": b"\x01" * 9},
    ],
)
def test_spans_without_ids_are_refused_and_the_exporter_is_told(ids: dict[str, bytes]) -> None:
    assert read_spoilt(**ids) == ([], 1)
    said = ExportTraceServiceResponse.FromString(otlp.answer(1))
    assert said.partial_success.rejected_spans == 1
    assert not ExportTraceServiceResponse.FromString(otlp.answer(0)).HasField("partial_success")


@pytest.mark.parametrize(
    ("fields", "duration"),
    [
        ({"start_time_unix_nano": 10, "end_time_unix_nano": 5}, 0),
        ({"start_time_unix_nano": 0, "end_time_unix_nano": 2**64 - 1}, 2**64 - 1),
        ({"start_time_unix_nano": 2**64 - 1, "end_time_unix_nano": 0}, 0),
    ],
)
def test_times_that_cannot_be_do_no_harm(fields: dict[str, int], duration: int) -> None:
    spans, _ = read_spoilt(**fields)
    assert spans[0].end_ns - spans[0].start_ns == duration
    traces = TraceStore(1000, 10_000_000, slow_ms=1000)
    traces.add(spans)
    assert traces.get(spans[0].trace_id) is not None


def test_an_unknown_kind_is_internal() -> None:
    spans, _ = read_spoilt(kind=99)
    assert spans[0].kind == "internal"


def test_everything_is_cut_to_a_size() -> None:
    found = read_one(
        attributes={f"key{number}": "x" * 10_000 for number in range(500)},
        events=[Event("e" * 10_000, {}, 1)] * 500,
        links=[Link(context(1, 2))] * 500,
        error="e" * 10_000,
    )
    assert len(found.attributes) == otlp.MAX_ATTRIBUTES
    assert all(len(str(value)) == otlp.MAX_VALUE + 1 for _, value in found.attributes)
    assert len(found.events) == otlp.MAX_EVENTS
    assert all(len(event.name) == otlp.MAX_NAME for event in found.events)
    assert len(found.links) == otlp.MAX_LINKS
    assert len(found.error) == otlp.MAX_VALUE
    assert found.bytes < 100_000


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (AnyValue(double_value=math.nan), "nan"),
        (AnyValue(double_value=math.inf), "inf"),
        (AnyValue(int_value=2**60), str(2**60)),
        (AnyValue(int_value=-3), -3),
        (AnyValue(bytes_value=b"secret"), "6 bytes"),
        (AnyValue(), ""),
    ],
)
def test_values_that_a_browser_could_not_hold_become_text(value: AnyValue, shown: object) -> None:
    message = request()
    message.resource_spans[0].scope_spans[0].spans[0].attributes.add(key="it", value=value)
    (found,), _ = otlp.read(message.SerializeToString())
    assert found.get("it") == shown


def test_lists_are_shown_flat_and_what_is_nested_is_not_followed() -> None:
    value = AnyValue()
    value.array_value.values.add(string_value="a")
    value.array_value.values.add(int_value=2)
    inner = value.array_value.values.add()
    for _ in range(20):
        inner = inner.array_value.values.add()
    message = request()
    message.resource_spans[0].scope_spans[0].spans[0].attributes.add(key="it", value=value)
    (found,), _ = otlp.read(message.SerializeToString())
    assert found.get("it") == "a, 2, …"


def deeply_nested(depth: int) -> bytes:
    """An AnyValue within an AnyValue within …, which no library would write: field 5 (array) of field 1 (values)."""

    def field(number: int, body: bytes) -> bytes:
        length, encoded_length = len(body), bytearray()
        while length > 127:
            encoded_length.append(length & 127 | 128)
            length >>= 7
        encoded_length.append(length)
        return bytes([number << 3 | 2]) + bytes(encoded_length) + body

    value = b""
    for _ in range(depth):
        value = field(5, field(1, value))
    return field(1, field(1, field(1, field(1, b"key") + field(2, value))))  # resource_spans, resource, attributes


def test_nesting_without_end_is_unreadable_and_not_a_crash() -> None:
    with pytest.raises(otlp.UnreadableError):
        otlp.read(deeply_nested(5000))


@pytest.mark.parametrize("body", [b"\xff" * 100, b"{}", b"\x0a\xff\xff\xff\xff\x0f", encoded(request_trace())[:-3]])
def test_what_is_not_a_message_is_unreadable(body: bytes) -> None:
    with pytest.raises(otlp.UnreadableError):
        otlp.read(body)


@given(st.binary(max_size=300))
def test_any_bytes_are_read_or_unreadable(body: bytes) -> None:
    try:
        spans, refused = otlp.read(body)
    except otlp.UnreadableError:
        return
    assert len(spans) + refused >= 0


# --- packing -------------------------------------------------------------------------------------------------------------


def test_gzip_is_unpacked() -> None:
    body = encoded(request_trace())
    assert otlp.unpack(gzip.compress(body), "gzip") == body
    assert otlp.unpack(body, "identity") == otlp.unpack(body, "") == body


@pytest.mark.parametrize(
    ("body", "encoding"),
    [
        (gzip.compress(b"\0" * (otlp.MAX_BODY_BYTES + 1)), "gzip"),
        (gzip.compress(b"\0" * 300_000_000), "gzip"),
        (gzip.compress(b"half of it")[:-9], "gzip"),
        (b"no gzip", "gzip"),
        (zlib.compress(b"x"), "gzip"),
        (b"x", "br"),
        (b"x", "gzip, gzip"),
    ],
    ids=["a little too large", "a bomb", "cut", "garbage", "zlib", "unknown", "twice"],
)
def test_bombs_and_garbage_are_unreadable(body: bytes, encoding: str) -> None:
    with pytest.raises(otlp.UnreadableError):
        otlp.unpack(body, encoding)
