"""An OTLP/HTTP receiver for tests: it keeps the spans of every trace that is sent to it, as they came."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

KINDS = ("unspecified", "internal", "server", "client", "producer", "consumer")


@dataclass(frozen=True)
class Seen:
    """One span. Times in epoch nanoseconds; `links`: (trace id, span id)."""

    service: str
    instance: str
    name: str
    kind: str
    trace_id: str
    span_id: str
    parent_id: str
    began: int
    ended: int
    attributes: dict[str, object]
    events: tuple[str, ...]
    links: tuple[tuple[str, str], ...]
    failed: bool

    @property
    def ms(self) -> float:
        return (self.ended - self.began) / 1e6


@dataclass
class Collector:
    """`url`: for OTEL_EXPORTER_OTLP_ENDPOINT. `bodies`: what came, byte for byte. `refusing`: answers 400."""

    url: str = ""
    spans: list[Seen] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    refusing: bool = False

    async def receive(self, request: web.Request) -> web.Response:
        body = await request.read()
        if self.refusing:
            return web.Response(status=400)
        self.bodies.append(body)
        self.spans += read(body)
        return web.Response(body=b"", content_type="application/x-protobuf")

    def trace(self, trace_id: str) -> list[Seen]:
        return sorted((span for span in self.spans if span.trace_id == trace_id), key=lambda span: span.began)

    def wait_for(self, trace_id: str, complete: Callable[[list[Seen]], bool], *, seconds: float = 15.0) -> list[Seen]:
        """The spans of a trace, once they are what the test waits for; whatever there is when they never are."""
        deadline = time.monotonic() + seconds
        while not complete(self.trace(trace_id)) and time.monotonic() < deadline:
            time.sleep(0.05)
        return self.trace(trace_id)


def read(body: bytes) -> list[Seen]:
    message = ExportTraceServiceRequest()
    message.ParseFromString(body)
    found = []
    for resource in message.resource_spans:
        own = {each.key: each.value.string_value for each in resource.resource.attributes}
        for scope in resource.scope_spans:
            found += [
                Seen(
                    service=own["service.name"],
                    instance=own["service.instance.id"],
                    name=span.name,
                    kind=KINDS[span.kind],
                    trace_id=span.trace_id.hex(),
                    span_id=span.span_id.hex(),
                    parent_id=span.parent_span_id.hex(),
                    began=span.start_time_unix_nano,
                    ended=span.end_time_unix_nano,
                    attributes={each.key: getattr(each.value, str(each.value.WhichOneof("value"))) for each in span.attributes},
                    events=tuple(event.name for event in span.events),
                    links=tuple((link.trace_id.hex(), link.span_id.hex()) for link in span.links),
                    failed=span.status.code == 2,
                )
                for span in scope.spans
            ]
    return found


@contextmanager
def collecting() -> Iterator[Collector]:
    """A collector on a free loopback port, in a thread of its own."""
    collector = Collector()
    loop = asyncio.new_event_loop()
    ready = threading.Event()

    async def serve() -> web.AppRunner:
        app = web.Application(client_max_size=64 * 1024**2)
        app.router.add_post("/v1/traces", collector.receive)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        collector.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        return runner

    def run() -> None:
        asyncio.set_event_loop(loop)
        runner = loop.run_until_complete(serve())
        ready.set()
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())
        loop.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    ready.wait(10)
    try:
        yield collector
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)


def tree(spans: list[Seen]) -> list[str]:
    """A trace as indented lines, children by their begin, for looking at it and for comparing its shape."""
    ids = {span.span_id for span in spans}
    lines: list[str] = []

    def add(parent: str | None, depth: int) -> None:
        for span in sorted(spans, key=lambda each: each.began):
            if (span.parent_id if span.parent_id in ids else None) == parent:
                lines.append(f"{'  ' * depth}{span.service.removeprefix('portcullis-')}: {span.name}")
                add(span.span_id, depth + 1)

    add(None, 0)
    return lines
