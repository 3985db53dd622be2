"""What stands on the other side in benchmarks: a detection engine that answers at once, and a collector that reads and drops.

`python -m tests.bench.stub PORT`. As little HTTP as is needed for keep-alive clients that send a Content-Length.
"""

from __future__ import annotations

import asyncio
import sys
from typing import cast

import uvloop

_VERDICT = b'{"is_malicious":false,"confidence":0.01,"threat_types":[],"processing_time_ms":0.1}'
_LENGTH = b"content-length:"


def _answer(body: bytes, kind: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\nContent-Length: %d\r\n\r\n%b" % (kind, len(body), body)


_JUDGED = _answer(_VERDICT, b"application/json")
_DROPPED = _answer(b"", b"application/x-protobuf")


class Stub(asyncio.Protocol):
    def __init__(self) -> None:
        self._held = b""
        self._transport: asyncio.WriteTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.WriteTransport", transport)  # uvloop's is none by its class

    def data_received(self, data: bytes) -> None:
        self._held += data
        while (end := self._held.find(b"\r\n\r\n")) >= 0:
            head = self._held[:end].lower()
            at = head.find(_LENGTH)
            length = int(head[at + len(_LENGTH) :].split(b"\r\n", 1)[0]) if at >= 0 else 0
            if len(self._held) < end + 4 + length:
                return
            self._held = self._held[end + 4 + length :]
            assert self._transport is not None
            self._transport.write(_DROPPED if b" /v1/traces " in head.split(b"\r\n", 1)[0] else _JUDGED)


async def serve(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(Stub, "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1])))
