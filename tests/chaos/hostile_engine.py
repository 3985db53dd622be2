"""A primary engine (kind `detect`) that answers well or ill, as told: raw asyncio, since no framework would let it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

NAME = "hostile-engine"
VERDICT = {
    "is_malicious": True,
    "confidence": 0.93,
    "threat_types": ["injection"],
    "processing_time_ms": 1.0,
    "endpoint": NAME,
}

MODES = ("hang", "die", "status_500", "garbage", "nan", "missing_field", "redirect", "huge", "drip", "busy", "refuse")
"""Everything that is a failure. `ok` is the other one. `refuse`: closes each connection at once."""


def _http(status: str, body: bytes, extra: str = "") -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n{extra}\r\n"
    return head.encode() + body


class HostileEngine:
    def __init__(self, port: int, judge: Callable[[str], dict[str, object]] = lambda _: VERDICT) -> None:
        """`judge`: the verdict on a text, when all is well."""
        self.judge = judge
        self.asked: list[tuple[float, str]] = []
        """When (epoch seconds) it was asked to judge what."""
        self.url = f"http://127.0.0.1:{port}"
        self.port = port
        self.mode = "ok"
        self.detections = 0
        self.head = ""
        """Of the last detection, in lower case."""
        self.writers: set[asyncio.StreamWriter] = set()

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            self.writers.add(writer)
            try:
                while await self._one(reader, writer):
                    pass
            finally:
                self.writers.discard(writer)
                writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Answer one request; False ends the connection."""
        if self.mode == "refuse":
            return False
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        if self.mode == "refuse":  # told so while the connection was kept
            return False
        length = next((int(line[15:]) for line in head.split("\r\n") if line.startswith("content-length:")), 0)
        body = await reader.readexactly(length)
        if head.startswith("get "):
            healthy = self.mode == "ok"
            writer.write(_http("200 OK" if healthy else "503 Service Unavailable", b'{"status":"x"}'))
            await writer.drain()
            return True
        self.detections += 1
        self.head = head
        text = str(json.loads(body)["text"])
        self.asked.append((time.time(), text))
        match self.mode:
            case "hang":
                await reader.read()  # until the caller gives up
                return False
            case "die":
                writer.write(_http("200 OK", json.dumps(VERDICT).encode())[:40])
                await writer.drain()
                return False
            case "status_500":
                writer.write(_http("500 Internal Server Error", b'{"error":"boom","details":""}'))
            case "busy":
                writer.write(_http("503 Service Unavailable", b'{"error":"busy","details":"","retry_after":1}'))
            case "garbage":
                writer.write(_http("200 OK", b"\xff\xfe<html>not json"))
            case "nan":
                writer.write(_http("200 OK", json.dumps(VERDICT | {"confidence": float("nan")}).encode()))
            case "missing_field":
                writer.write(_http("200 OK", b'{"is_malicious": false}'))
            case "redirect":
                writer.write(_http("302 Found", b"", f"Location: {self.url}/elsewhere\r\n"))
            case "huge":
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 104857600\r\n\r\n")
                for _ in range(1600):
                    writer.write(b" " * 65536)
                    await writer.drain()
            case "drip":
                for byte in _http("200 OK", json.dumps(VERDICT).encode()):
                    writer.write(bytes([byte]))
                    await writer.drain()
                    await asyncio.sleep(1)
            case _:
                writer.write(_http("200 OK", json.dumps(self.judge(text)).encode()))
        await writer.drain()
        return True


@asynccontextmanager
async def hostile_engine(
    port: int, judge: Callable[[str], dict[str, object]] = lambda _: VERDICT
) -> AsyncIterator[HostileEngine]:
    engine = HostileEngine(port, judge)
    server = await asyncio.start_server(engine.handle, "127.0.0.1", port)
    try:
        yield engine
    finally:
        server.close()
        for writer in engine.writers:  # kept connections would go on to answer in place of the next engine on this port
            writer.close()
