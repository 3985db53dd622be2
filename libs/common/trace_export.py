"""Sends the spans of kept traces to a collector: OTLP over HTTP, by the standard `OTEL_*` variables, in a thread of its own.

The thread is paced: after each batch it rests for a multiple of the processor time that the batch took, so that exporting can
never take more than a small share of one processor, whatever is asked for. What does not fit is dropped, and counted.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Protocol

from libs.common import VERSION, tracing
from libs.common.clock import SystemClock
from libs.common.settings import CommonSettings
from libs.common.tracing import Head, PerSecond, Recorded, Recorder, Standard

log = logging.getLogger(__name__)

EVERY_MS: Final = "2000"
"""How often spans are sent, unless `OTEL_BSP_SCHEDULE_DELAY` (milliseconds) says otherwise. To send costs much the
same however few there are."""
BATCH_SPANS: Final = 256
PROCESSOR_SHARE: Final = 0.05
STOP_SECONDS: Final = 2.0
"""How long the last spans may take when the process ends."""

_EXPORTED = tracing.SPANS.labels("exported")
_FAILED = tracing.SPANS.labels("failed")


def recorder_for(settings: CommonSettings, environment: Mapping[str, str]) -> Recorder | None:
    """The recorder that the operator wants; None without a collector. Raises ValueError: one line for the operator."""
    if environment.get("OTEL_SDK_DISABLED", "").lower() == "true" or environment.get("OTEL_TRACES_EXPORTER", "otlp") == "none":
        return None
    if not (environment.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or environment.get("OTEL_EXPORTER_OTLP_ENDPOINT")):
        return None
    protocol = environment.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or environment.get("OTEL_EXPORTER_OTLP_PROTOCOL")
    if protocol not in (None, "", "http/protobuf"):
        raise ValueError(f"OTEL_EXPORTER_OTLP_PROTOCOL={protocol} is not spoken here; set it to http/protobuf (port 4318)")
    head: Head = PerSecond(settings.trace_per_second, SystemClock())
    if name := environment.get("OTEL_TRACES_SAMPLER"):
        head = Standard(name, environment.get("OTEL_TRACES_SAMPLER_ARG", ""))
    return Recorder(head, slow_ms=settings.trace_slow_ms, ring_spans=settings.trace_buffer_spans)


class Sink(Protocol):
    """Where batches go; `libs.common.trace_wire.Wire` is one."""

    def send(self, batch: Sequence[Recorded]) -> bool:
        """Whether they have been taken. Blocks."""
        ...

    def close(self) -> None: ...


class Exporter:
    """The thread. `open_sink` is called in it, with the first spans."""

    def __init__(self, recorder: Recorder, open_sink: Callable[[], Sink], every_seconds: float) -> None:
        self._recorder = recorder
        self._every_seconds = every_seconds
        self._open_sink = open_sink
        self._sink: Sink | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="trace-export", daemon=True)
        self._reachable = True
        self._thread.start()

    def close(self) -> None:
        """Send what is left, for at most `STOP_SECONDS`."""
        self._stop.set()
        self._thread.join(STOP_SECONDS)

    def _run(self) -> None:
        while not self._stop.wait(self._every_seconds):
            self._empty(paced=True)
        self._empty(paced=False)
        if self._sink is not None:
            self._sink.close()

    def _empty(self, *, paced: bool) -> None:
        while batch := self._recorder.take(BATCH_SPANS):
            began = time.thread_time()
            if self._sink is None:
                self._sink = self._open_sink()
            self._send(self._sink, batch)
            spent = time.thread_time() - began
            if paced and self._stop.wait(spent / PROCESSOR_SHARE - spent):
                return

    def _send(self, sink: Sink, batch: Sequence[Recorded]) -> None:
        taken = sink.send(batch)
        (_EXPORTED if taken else _FAILED).inc(len(batch))
        if taken is not self._reachable:
            self._reachable = taken
            if taken:
                log.warning("the collector takes traces again")
            else:
                log.warning("the collector does not take traces; they are dropped until it does")


def start(service: str, instance: str, settings: CommonSettings) -> Exporter | None:
    """Record and export from now on, if the operator wants it. `service`: as the bus calls it. Raises as `recorder_for`."""
    recorder = recorder_for(settings, os.environ)
    every_ms = float(os.environ.get("OTEL_BSP_SCHEDULE_DELAY") or EVERY_MS)
    tracing.use(recorder)
    if recorder is None:
        return None

    def open_sink() -> Sink:
        # The SDK is loaded here: it takes 0.3 s and some memory, and nobody waits for it here.
        from libs.common.trace_wire import Wire

        return Wire(service, instance, VERSION)

    return Exporter(recorder, open_sink, every_ms / 1000)
