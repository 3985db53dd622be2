"""Who means harm at the HTTP door, with connections that want to be kept for ever, and where the stages behind it matter.

What could be read in two ways is in `tests/bad_inputs.py`.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time

import psutil
import pytest

from libs.common import contracts
from libs.common.context import RequestContext
from libs.common.contracts import DetectRequest
from libs.common.keys import digest, generate
from libs.common.stages import Answer
from services.edge.metrics import IN_FLIGHT
from tests.integration.test_edge import BODY, KEY, POST, RATE, VERDICT, Fleet, assert_only_problem, fleet, until

__all__ = ["fleet"]

GET = b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n"
CLOSE = b"Connection: close\r\n\r\n"
CHUNKED = POST + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
WHOLE = b"%x\r\n" % len(BODY) + BODY + b"\r\n"


def calls() -> float:
    """What the edge has in hand."""
    (family,) = IN_FLIGHT.collect()
    (sample,) = family.samples
    return float(sample.value)


async def test_a_body_that_looks_like_a_request_is_a_body(fleet: Fleet) -> None:
    smuggled = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n"
    async with fleet.edge() as edge:
        answer = await edge.raw(GET + b"Content-Length: %d\r\n\r\n" % len(smuggled) + smuggled + GET + CLOSE)
        assert answer.count(b"HTTP/1.1 200 ") == 2
        assert b"openapi" not in answer


@pytest.mark.parametrize("split", [True, False])
async def test_what_comes_after_the_body_is_no_header(fleet: Fleet, split: bool) -> None:
    """A proxy in front has set or taken out headers, and passes trailers on as they are."""
    seen: list[contracts.Credential] = []

    async def note(message: DetectRequest, _: RequestContext) -> Answer:
        seen.append(message.credential)
        return Answer(VERDICT, RATE)

    trailers = b"0\r\nHost: evil.example\r\nX-API-Key: " + generate().encode() + b"\r\nX-Request-ID: theirs\r\n\r\n"
    pieces = (CHUNKED + WHOLE, trailers) if split else (CHUNKED + WHOLE + trailers,)
    async with fleet.auth(note), fleet.edge() as edge:
        answer = await edge.raw(*pieces)
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert b"theirs" not in answer
    assert [credential.digest for credential in seen] == [digest(KEY)]


FLOODS = {
    "one trailer": (WHOLE + b"0\r\nX: ", b"a" * 65_536),
    "trailers": (WHOLE + b"0\r\n", b"X: y\r\n" * 10_000),
    "one extension": (b"1;", b"a" * 65_536),
}


@pytest.mark.parametrize("name", FLOODS)
async def test_what_is_around_the_chunks_is_bounded(fleet: Fleet, name: str) -> None:
    """It is no body, so that the bound of bodies would never be met."""
    begin, flood = FLOODS[name]
    async with fleet.auth(), fleet.edge(body_timeout_seconds=60) as edge:
        _, writer = await asyncio.open_connection("127.0.0.1", edge.port)
        writer.write(CHUNKED + begin)
        sent = 0

        async def send() -> None:
            nonlocal sent
            while True:
                writer.write(flood)
                await writer.drain()
                sent += len(flood)

        sending = asyncio.create_task(send())
        with pytest.raises(ConnectionError):
            await asyncio.wait_for(sending, 20)
        assert sent < 16_000_000  # what the buffers of both ends take in the meantime
        writer.close()
        assert (await edge.detect()).status_code == 200


async def test_who_is_still_sending_reads_why_it_is_refused(fleet: Fleet) -> None:
    async with fleet.auth(), fleet.edge() as edge:
        for _ in range(20):
            reader, writer = await asyncio.open_connection("127.0.0.1", edge.port)
            writer.write(GET + b"X: ")
            for _ in range(16):
                writer.write(b"a" * 65_536)
                await asyncio.sleep(0)
            answer = await asyncio.wait_for(reader.read(), 20)  # to the end, which comes although we have not stopped
            assert answer.startswith(b"HTTP/1.1 431 ")
            writer.transport.abort()
        assert (await edge.detect()).status_code == 200


async def test_a_long_conversation_is_no_flood(fleet: Fleet) -> None:
    async with fleet.auth(), fleet.edge() as edge:
        reader, writer = await asyncio.open_connection("127.0.0.1", edge.port)
        for _ in range(2):
            for _ in range(40):
                writer.write(GET + b"X: " + b"a" * 1000 + b"\r\n\r\n")
                await reader.readuntil(b'{"status":"alive"}')
            writer.write(POST + b"Content-Length: %d\r\n\r\n" % len(BODY))
            await writer.drain()
            await asyncio.sleep(0.01)  # the headers and the body shall not arrive together
            writer.write(BODY)
            assert (await reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 200 ")
            await reader.readuntil(b'"endpoint":"test"')
            await reader.readuntil(b"}")
        small = b"".join(b"1\r\n%c\r\n" % byte for byte in b" " * 20_000 + BODY)
        writer.write(CHUNKED + small + b"0\r\n\r\n")
        assert b" 200 " in await reader.read(-1)
        writer.close()


async def test_a_body_that_drips_has_its_time_in_all_and_not_for_each_drop(fleet: Fleet) -> None:
    async with fleet.edge(body_timeout_seconds=0.3) as edge:
        reader, writer = await asyncio.open_connection("127.0.0.1", edge.port)
        # Not "Connection: close": a connection that is closed while drops still come is reset, perhaps before its answer is read.
        writer.write(POST + b"Content-Length: 100000\r\n\r\n")

        async def drip() -> None:
            while True:
                writer.write(b" ")
                await asyncio.sleep(0.02)

        dripping = asyncio.create_task(drip())
        assert_only_problem(await asyncio.wait_for(reader.readuntil(b"}"), 10), 400)
        dripping.cancel()
        writer.close()


async def test_who_reads_no_answers_is_let_go(fleet: Fleet) -> None:
    """Its calls would be in hand for ever, and a few hundred such connections would be all that the edge takes."""
    async with fleet.edge(read_timeout_seconds=0.3) as edge:
        taker = socket.socket()
        taker.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**12)  # before connecting: the kernel would let it grow
        taker.connect(("127.0.0.1", edge.port))
        taker.setblocking(False)
        loop = asyncio.get_running_loop()
        before = calls()
        await loop.sock_sendall(taker, b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 1000)

        async def held() -> bool:
            return calls() > before

        async def let_go() -> bool:
            return calls() == before

        await until(held)
        await until(let_go)
        taker.close()


async def test_who_reads_slowly_gets_everything(fleet: Fleet) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**12)  # else the kernel would take it all for the caller
        port = listener.getsockname()[1]
        async with fleet.edge(read_timeout_seconds=0.5, edge_port=port, edge_socket_fd=os.dup(listener.fileno())):
            taker = socket.socket()
            taker.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**12)
            taker.connect(("127.0.0.1", port))
            reader, writer = await asyncio.open_connection(sock=taker, limit=2**12)
            count = 20
            writer.write(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * count + GET + CLOSE)
            began, answered = time.monotonic(), b""
            while piece := await reader.read(2**16):
                answered += piece
                await asyncio.sleep(0.01)
            assert answered.count(b"HTTP/1.1 200 ") == count + 1
            assert time.monotonic() - began > 0.5  # longer than who takes nothing would have had
            writer.close()


async def test_callers_that_leave_in_the_middle_leave_nothing_behind(fleet: Fleet) -> None:
    """In every state a request can be in; a stage that never answers holds those that are whole."""

    async def never(_: DetectRequest, __: RequestContext) -> Answer:
        await asyncio.Event().wait()
        raise AssertionError

    states = [
        b"",
        b"POST /v1",
        POST,
        POST + b"Content-Length: 50\r\n\r\n" + BODY,
        CHUNKED + WHOLE,
        POST + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY,
        GET + b"\r\n" + POST + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY,
    ]
    async with fleet.auth(never), fleet.edge(request_timeout_seconds=1, body_timeout_seconds=1, header_timeout_seconds=1) as edge:
        process = psutil.Process()
        files, in_flight = process.num_fds(), calls()
        for _ in range(30):
            connections = [await asyncio.open_connection("127.0.0.1", edge.port) for _ in states]
            for (_, writer), state in zip(connections, states, strict=True):
                writer.write(state)
            for _, writer in connections:
                await writer.drain()
                writer.transport.abort()

        async def as_before() -> bool:
            return process.num_fds() <= files and calls() == in_flight

        await until(as_before)
