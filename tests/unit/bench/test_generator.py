"""The load generator, on a server in the same process that answers when it is told to."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from tests.bench.generator import Load, loading, request
from tests.bench.load import BenchError

ANSWER = b'HTTP/1.1 200 OK\r\nContent-Length: 18\r\n\r\n{"degraded":false}'
DEGRADED = b'HTTP/1.1 200 OK\r\nContent-Length: 17\r\n\r\n{"degraded":true}'
FULL = b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 0\r\n\r\n"
LAST = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
BODY = b'{"text":"a"}'


class Server:
    """`answer` is asked for each request, by its number, what to send and after how many seconds; None cuts the connection.

    The first answer waits until `held` requests are there.
    """

    def __init__(self, answer: Callable[[int], tuple[bytes | None, float]], held: int = 1) -> None:
        self._answer = answer
        self._held = held
        self._all = asyncio.Event()
        self.seen: list[float] = []
        self.connections = 0
        self.heads: list[bytes] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                await reader.readexactly(len(BODY))
                number = len(self.seen)
                self.seen.append(time.perf_counter())
                self.heads.append(head)
                answer, seconds = self._answer(number)
                if len(self.seen) >= self._held:
                    self._all.set()
                if number == 0:
                    await self._all.wait()
                if seconds:
                    await asyncio.sleep(seconds)
                if answer is None:
                    writer.transport.abort()
                    return
                writer.write(answer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def load_on(server: Server) -> AsyncIterator[Load]:
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    port: int = listening.sockets[0].getsockname()[1]
    async with listening, loading(port, itertools.repeat(request(port, "/v1/detect", BODY, {"X-API-Key": "k"}))) as load:
        yield load


def at_once(_: int) -> tuple[bytes, float]:
    return ANSWER, 0.0


async def test_a_closed_loop_has_so_many_callers_and_counts_what_they_saw() -> None:
    server = Server(at_once)
    async with load_on(server) as load:
        run = await load.closed(callers=4, seconds=0.2)
    assert server.connections == 4
    assert len(run.latencies) == len(server.seen) > 4
    assert not run.failures
    assert run.seconds == pytest.approx(0.2, abs=0.15)
    assert b"POST /v1/detect HTTP/1.1" in server.heads[0]
    assert b"X-API-Key: k" in server.heads[0]
    assert f"Content-Length: {len(json.dumps({'text': 'a'}, separators=(',', ':')))}".encode() in server.heads[0]


async def test_more_connections_than_callers_are_used_in_turn() -> None:
    server = Server(at_once)
    async with load_on(server) as load:
        await load.closed(callers=2, seconds=0.1, connections=10)
    assert server.connections == 10


async def test_refusals_and_degraded_answers_are_counted_apart_from_latencies() -> None:
    server = Server(lambda number: ((FULL, DEGRADED, ANSWER)[number % 3], 0.0))
    async with load_on(server) as load:
        run = await load.closed(callers=1, seconds=0.1)
    stretch = run.stretch(0.01, {"edge": 0.05})
    assert run.failures[429] == pytest.approx(len(server.seen) / 3, abs=1)
    assert run.degraded == pytest.approx(len(server.seen) / 3, abs=1)
    assert stretch.failed == run.failures[429]
    assert stretch.answered == len(server.seen) - stretch.failed
    assert stretch.cpu["edge"] == pytest.approx(50 / stretch.answered)
    assert stretch.generator == pytest.approx(10 / len(server.seen))


async def test_a_cut_connection_is_a_failure_and_its_caller_goes_on_with_a_new_one() -> None:
    server = Server(lambda number: (None if number == 3 else LAST if number == 5 else ANSWER, 0.0))
    async with load_on(server) as load:
        run = await load.closed(callers=1, seconds=0.1)
    assert run.failures == {0: 1}
    assert server.connections == 3
    assert len(run.latencies) == len(server.seen) - 1 > 5


async def test_an_open_loop_does_not_wait_for_a_slow_answer() -> None:
    due = [number * 0.01 for number in range(20)]
    server = Server(at_once, held=len(due))  # the first is answered when the last has been asked
    async with load_on(server) as load:
        run = await load.open(due, connections=1)
    assert len(run.latencies) == len(due)
    assert server.connections > 1


async def test_latency_counts_from_when_a_request_was_due_and_not_from_when_it_was_sent() -> None:
    # One connection, which the first answer holds for 0.3 s: the others wait for it, and their wait is what a caller would feel.
    server = Server(lambda number: (ANSWER, 0.3 if number == 0 else 0.0))
    due = [0.0, 0.05, 0.1, 0.15]
    async with load_on(server) as load:
        run = await load.open(due, connections=1, most=1)
    assert server.connections == 1
    for waited, when in zip(run.latencies, due, strict=True):
        assert waited >= (0.3 - when) * 1000
    assert run.late[1] >= 249  # ms
    assert run.stretch(0.0, {}).late >= 249


async def test_requests_leave_when_they_are_due() -> None:
    server = Server(at_once)
    due = [number * 0.005 for number in range(40)]
    async with load_on(server) as load:
        run = await load.open(due)
    # Never before: a timer that rounds down would send early. (Never much later is for the machine to say.)
    assert min(run.late) >= 0
    assert len(run.late) == len(due)
    assert server.seen[-1] - server.seen[0] >= due[-1] - 0.1


async def test_nobody_there_is_said_in_one_line() -> None:
    async with load_on(Server(at_once)) as load:
        load._port = 1
        with pytest.raises(BenchError, match=r"no connection to 127\.0\.0\.1:1"):
            await load.closed(callers=1, seconds=0.1)


async def test_a_server_that_goes_away_ends_the_load() -> None:
    server = Server(lambda number: (None if number == 0 else ANSWER, 0.0))
    async with load_on(server) as load:
        await load.closed(callers=1, seconds=0.0)
        load._port = 1
        with pytest.raises(BenchError, match="no connection"):
            await load.open([0.0, 0.01, 0.02], connections=0)


async def test_nothing_answered_is_no_figure() -> None:
    async with load_on(Server(lambda _: (FULL, 0.0))) as load:
        run = await load.closed(callers=1, seconds=0.05)
    with pytest.raises(BenchError, match=r"nothing was answered: \{429:"):
        run.stretch(0.0, {})
