"""The thread that sends traces, and how spans look on the wire."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence

import pytest

from libs.common import tracing
from libs.common.clock import ManualClock
from libs.common.settings import CommonSettings
from libs.common.trace_export import Exporter, recorder_for
from libs.common.trace_wire import Wire
from libs.common.tracing import CLIENT, SERVER, PerSecond, Recorded, Recorder
from tests.collector import Collector, collecting
from tests.conftest import wait_until

SETTINGS = CommonSettings()
ENDPOINT = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318"}
CALLER = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


class Sink:
    """Takes batches, or not; `gate` holds it up."""

    def __init__(self) -> None:
        self.taking = True
        self.gate = threading.Event()
        self.gate.set()
        self.batches: list[Sequence[Recorded]] = []
        self.closed = False

    def send(self, batch: Sequence[Recorded]) -> bool:
        self.gate.wait()
        self.batches.append(batch)
        return self.taking

    def close(self) -> None:
        self.closed = True

    @property
    def spans(self) -> int:
        return sum(map(len, self.batches))


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    recorder = Recorder(PerSecond(0, ManualClock()), slow_ms=100, ring_spans=10, queue_spans=1000)
    tracing.use(recorder)
    yield recorder
    tracing.use(None)


def spans(number: int) -> None:
    for _ in range(number):
        tracing.begin("step", CLIENT, CALLER).end()


def value(outcome: str) -> float:
    return float(tracing.SPANS.labels(outcome)._value.get())


@pytest.fixture
def exporting(recorder: Recorder) -> Iterator[Callable[[Sink], Exporter]]:
    started: list[tuple[Exporter, Sink]] = []

    def start(sink: Sink) -> Exporter:
        exporter = Exporter(recorder, lambda: sink, 0.01)
        started.append((exporter, sink))
        return exporter

    yield start
    for exporter, sink in started:
        sink.gate.set()
        exporter.close()


def test_spans_are_sent_in_batches(exporting: Callable[[Sink], Exporter]) -> None:
    sink, before = Sink(), value("exported")
    exporting(sink)
    spans(600)
    wait_until(lambda: sink.spans == 600, what="all spans")
    assert max(map(len, sink.batches)) <= 256
    assert value("exported") == before + 600


def test_the_last_spans_are_sent_at_the_end(exporting: Callable[[Sink], Exporter]) -> None:
    sink = Sink()
    exporter = exporting(sink)
    spans(300)
    exporter.close()
    assert sink.spans == 300
    assert sink.closed


def test_what_the_collector_does_not_take_is_counted_and_told_once(
    exporting: Callable[[Sink], Exporter], caplog: pytest.LogCaptureFixture
) -> None:
    sink, before = Sink(), value("failed")
    sink.taking = False
    with caplog.at_level(logging.WARNING):
        exporting(sink)
        for expected in (5, 10):
            spans(5)
            wait_until(lambda expected=expected: value("failed") == before + expected, what="the failed spans")  # type: ignore[misc]
        sink.taking = True
        spans(5)
        wait_until(lambda: sink.spans == 15, what="the rest")
    told = [record.message for record in caplog.records]
    assert len(told) == 2, told
    assert "does not take traces" in told[0]
    assert "takes traces again" in told[1]


def test_a_collector_that_hangs_holds_up_nobody_and_costs_spans(
    recorder: Recorder, exporting: Callable[[Sink], Exporter]
) -> None:
    sink, before = Sink(), value("dropped")
    sink.gate.clear()
    exporting(sink)
    spans(10)
    wait_until(lambda: recorder.waiting == 0, what="the first batch to be under way")
    spans(1500)
    assert recorder.waiting == 1000
    assert value("dropped") == before + 500


@pytest.mark.parametrize(
    ("environment", "on"),
    [
        ({}, False),
        (ENDPOINT, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:4318/v1/traces"}, True),
        (ENDPOINT | {"OTEL_SDK_DISABLED": "true"}, False),
        (ENDPOINT | {"OTEL_TRACES_EXPORTER": "none"}, False),
        (ENDPOINT | {"OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}, True),
        (ENDPOINT | {"OTEL_TRACES_SAMPLER": "always_on"}, True),
    ],
)
def test_nothing_is_recorded_unless_there_is_a_collector(environment: dict[str, str], on: bool) -> None:
    assert (recorder_for(SETTINGS, environment) is not None) is on


def test_the_operators_sampler_is_heeded() -> None:
    recorder = recorder_for(SETTINGS, ENDPOINT | {"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0"})
    assert recorder is not None
    assert not recorder.retroactive
    assert recorder.root("root", SERVER, CALLER, ()).traceparent.endswith("-00")


@pytest.mark.parametrize(
    "wrong",
    [
        {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"},
        {"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/json"},
        {"OTEL_TRACES_SAMPLER": "xray"},
    ],
)
def test_what_is_not_spoken_here_is_said(wrong: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="OTEL_"):
        recorder_for(SETTINGS, ENDPOINT | wrong)


@pytest.fixture
def collector() -> Iterator[Collector]:
    with collecting() as collector:
        yield collector


def test_on_the_wire(recorder: Recorder, collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    monkeypatch.setenv("OTEL_SERVICE_NAME", "not ours")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    root = tracing.root("POST /v1/detect", SERVER, link=CALLER)
    root.set("portcullis.is_malicious", True)
    root.set("portcullis.tokens", 9)
    root.set("portcullis.tokens", 10)
    root.event("sent again")
    root.fail("503")
    root.end()
    wire = Wire("edge", "0a1b", "0.1.0")
    assert wire.send(recorder.take(10))
    wire.close()
    (seen,) = collector.spans
    assert (seen.service, seen.instance, seen.name, seen.kind) == ("portcullis-edge", "0a1b", "POST /v1/detect", "server")
    assert (seen.trace_id, seen.span_id) == (root.traceparent[3:35], root.traceparent[36:52])
    assert seen.parent_id == ""
    assert seen.attributes == {"portcullis.is_malicious": True, "portcullis.tokens": 10, "error.type": "503"}
    assert seen.events == ("sent again",)
    assert seen.links == ((CALLER[3:35], CALLER[36:52]),)
    assert seen.failed
    assert b"deployment.environment.name" in collector.bodies[0]


def test_a_refusal_of_the_collector_is_no_exception(
    recorder: Recorder, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    collector.refusing = True
    spans(3)
    wire = Wire("edge", "0a1b", "0.1.0")
    assert not wire.send(recorder.take(10))
    wire.close()
