"""The load generator: one process, one event loop, HTTP/1.1 on kept connections, and as little work for a request as can be.

Requests are bytes made beforehand; answers are parsed by httptools, and of their bodies only `degraded` is looked for. What it
costs itself is measured and told (`Stretch.generator`), since it runs on the processors that it measures.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import resource
import struct
import sys
import time
from array import array
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import cast

import httptools

from tests.bench.figures import SHARES, Stretch, percentile
from tests.bench.load import BenchError

ANSWER_SECONDS = 30.0
"""How long the last answers of a run are waited for."""
MOST_CONNECTIONS = 1024
"""Of an open loop, unless more are asked for."""
LEAD_SECONDS = 0.02
_DEGRADED = b'"degraded":true'
_NO_ANSWER = 0


def raise_file_limit() -> int:
    """As many open files as this user may have; started processes inherit it."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return most


def request(port: int, path: str, body: bytes, headers: dict[str, str]) -> bytes:
    """A POST of JSON, whole."""
    lines = [f"POST {path} HTTP/1.1", f"Host: 127.0.0.1:{port}", "Content-Type: application/json", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


@dataclass(slots=True)
class Run:
    """What one run saw. `latencies` in milliseconds: closed loop, from the sending; open loop, from when the request was due."""

    seconds: float = 0.0
    latencies: array[float] = field(default_factory=lambda: array("d"))
    late: array[float] = field(default_factory=lambda: array("d"))
    failures: Counter[int] = field(default_factory=Counter)
    """By status; 0: the connection failed."""
    degraded: int = 0

    def stretch(self, generator_seconds: float, cpu_seconds: dict[str, float]) -> Stretch:
        """Raises `BenchError` when nothing was answered."""
        answered = len(self.latencies)
        if not answered:
            raise BenchError(f"nothing was answered: {dict(self.failures)}")
        p50, p90, p99 = (percentile(self.latencies, share) for share in SHARES)
        failed = self.failures.total()
        return Stretch(
            rate=answered / self.seconds,
            p50=p50,
            p90=p90,
            p99=p99,
            answered=answered,
            failed=failed,
            degraded=self.degraded,
            late=percentile(self.late, 0.99) if self.late else 0.0,
            generator=generator_seconds * 1000 / (answered + failed),
            cpu={stage: seconds * 1000 / answered for stage, seconds in cpu_seconds.items()},
        )


class _Connection(asyncio.Protocol):
    """One request at a time; tells `load` what becomes of it."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._parser = httptools.HttpResponseParser(self)
        self._degraded = False
        self.transport: asyncio.WriteTransport
        self.due = 0.0
        self.busy = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.WriteTransport", transport)  # uvloop's is none by its class

    def send(self, data: bytes, due: float) -> None:
        self.due = due
        self.busy = True
        self._degraded = False
        self.transport.write(data)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        if _DEGRADED in body:
            self._degraded = True

    def on_message_complete(self) -> None:
        self.busy = False
        status = self._parser.get_status_code()
        if not self._parser.should_keep_alive():
            self.transport.close()
        self._load.answered(self, status, self._degraded)

    def connection_lost(self, _: Exception | None) -> None:
        self._load.lost(self)


@dataclass(frozen=True, slots=True)
class Answer:
    """What came for one request; `status` 0: the connection was lost. `seconds`: from when it was due."""

    request: bytes
    status: int
    headers: Mapping[bytes, bytes]
    body: bytes
    seconds: float


class _Witnessed(_Connection):
    """Keeps each answer for somebody who looks at it."""

    def __init__(self, load: Load, witness: Callable[[Answer], None]) -> None:
        super().__init__(load)
        self._witness = witness
        self._request = b""
        self._headers: dict[bytes, bytes] = {}
        self._body = b""

    def send(self, data: bytes, due: float) -> None:
        self._request, self._headers, self._body = data, {}, b""
        super().send(data, due)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.lower()] = value

    def on_body(self, body: bytes) -> None:
        super().on_body(body)
        self._body += body

    def on_message_complete(self) -> None:
        self._tell(self._parser.get_status_code())
        super().on_message_complete()

    def connection_lost(self, error: Exception | None) -> None:
        if self.busy:
            self._tell(_NO_ANSWER)
        super().connection_lost(error)

    def _tell(self, status: int) -> None:
        seconds = time.perf_counter() - self.due
        self._witness(Answer(self._request, status, self._headers, self._body, seconds))


class Load:
    """Connections to one target, kept between runs; `requests` are taken one after the other, without end. One run at a time.

    `witness` is told of each answer when it is there.
    """

    def __init__(self, port: int, requests: Iterator[bytes], witness: Callable[[Answer], None] | None = None) -> None:
        self._port = port
        self._requests = requests
        self._made: Callable[[], _Connection] = partial(_Witnessed, self, witness) if witness else partial(_Connection, self)
        self._idle: deque[_Connection] = deque()
        self._opened: set[_Connection] = set()
        self._opening: set[asyncio.Task[None]] = set()
        self._run = Run()
        self._free: Callable[[], None] = lambda: None
        """What is done when an answer has come, or a connection is there."""
        self._finished = asyncio.Event()
        self._broken: BenchError | None = None

    async def closed(self, callers: int, seconds: float, connections: int = 0) -> Run:
        """So many callers, each of whom asks again when it has been answered; on `connections` in turn, if those are more."""
        await self._connect(max(callers, connections))
        run, finished = self._begin()
        began = time.perf_counter()
        end = began + seconds
        in_flight = callers

        def next_one() -> None:
            nonlocal in_flight
            now = time.perf_counter()
            if now >= end:
                in_flight -= 1
                if in_flight <= 0:
                    finished.set()
            elif self._idle:
                self._idle.popleft().send(next(self._requests), now)
            else:  # it has been closed: the caller goes on with a new one
                self._open_one()

        self._free = next_one
        for _ in range(callers):
            self._idle.popleft().send(next(self._requests), time.perf_counter())
        await self._wait(finished, seconds)
        run.seconds = time.perf_counter() - began
        return run

    async def open(self, due: Sequence[float], connections: int = 16, most: int = MOST_CONNECTIONS) -> Run:
        """A request at each of these seconds after the start, whatever becomes of the others.

        It waits for a free connection where `most` are in use, and the wait counts: latencies are from when it was due.
        """
        await self._connect(connections)
        run, finished = self._begin()
        began = time.perf_counter() + LEAD_SECONDS
        position = 0

        def go_on() -> None:
            nonlocal position
            now = time.perf_counter()
            while position < len(due) and (when := began + due[position]) <= now:
                if not self._idle:
                    if len(self._opened) + len(self._opening) < most:
                        self._open_one()
                    break  # the next free connection comes back here
                run.late.append((now - when) * 1000)
                self._idle.popleft().send(next(self._requests), when)
                position += 1
                now = time.perf_counter()
            if position == len(due):
                if len(run.latencies) + run.failures.total() == len(due):
                    finished.set()
            elif began + due[position] > now:
                timer.set(began + due[position])

        with _Timer(go_on) as timer:
            self._free = go_on
            go_on()
            await self._wait(finished, due[-1] if due else 0.0)
        run.seconds = max(time.perf_counter() - began, due[-1] if due else 0.0)
        return run

    def _begin(self) -> tuple[Run, asyncio.Event]:
        self._run, self._finished, self._broken = Run(), asyncio.Event(), None
        return self._run, self._finished

    async def close(self) -> None:
        self._free = lambda: None
        for connection in tuple(self._opened):
            connection.transport.close()
        await asyncio.sleep(0)

    # --- what connections say --------------------------------------------------------------------------------------------

    def answered(self, connection: _Connection, status: int, degraded: bool) -> None:
        if status == 200:
            self._run.latencies.append((time.perf_counter() - connection.due) * 1000)
            self._run.degraded += degraded
        else:
            self._run.failures[status] += 1
        if not connection.transport.is_closing():
            self._idle.append(connection)
        self._free()

    def lost(self, connection: _Connection) -> None:
        self._opened.discard(connection)
        with contextlib.suppress(ValueError):
            self._idle.remove(connection)
        if connection.busy:
            connection.busy = False
            self._run.failures[_NO_ANSWER] += 1
            self._free()

    # --- connections -----------------------------------------------------------------------------------------------------

    async def _connect(self, count: int) -> None:
        while len(self._idle) < count:
            await asyncio.gather(*(self._open() for _ in range(min(64, count - len(self._idle)))))

    async def _open(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            _, connection = await loop.create_connection(self._made, "127.0.0.1", self._port)
        except OSError as error:
            raise BenchError(f"no connection to 127.0.0.1:{self._port}: {error}") from None
        self._opened.add(connection)
        self._idle.append(connection)

    def _open_one(self) -> None:
        async def open_it() -> None:
            try:
                await self._open()
            except BenchError as error:
                self._broken = error
                self._finished.set()
            self._opening.discard(task)
            self._free()

        task = asyncio.get_running_loop().create_task(open_it())
        self._opening.add(task)

    async def _wait(self, finished: asyncio.Event, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds + ANSWER_SECONDS):
                await finished.wait()
        except TimeoutError:
            raise BenchError(f"answers are missing {ANSWER_SECONDS:.0f} s after the end; {dict(self._run.failures)}") from None
        finally:
            self._free = lambda: None
        if self._broken is not None:
            raise self._broken


Work = Callable[[Load], Awaitable[Run]]
"""A run, as what one system is to be measured by."""


class _Timer:
    """Calls `what` at a time of `time.perf_counter`, to some microseconds: Linux's timerfd.

    The timers of asyncio and of uvloop wake to the millisecond, which is as long as an answer takes here.
    """

    _CLOCK_MONOTONIC = 1  # which perf_counter reads on Linux
    _ABSOLUTE = 1  # TFD_TIMER_ABSTIME

    def __init__(self, what: Callable[[], None]) -> None:
        self._what = what
        self._fd = -1
        self._handle: asyncio.TimerHandle | None = None

    def __enter__(self) -> _Timer:
        if sys.platform == "linux":
            self._libc = ctypes.CDLL(None, use_errno=True)
            self._fd = self._libc.timerfd_create(self._CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
            if self._fd < 0:
                raise OSError(ctypes.get_errno(), "timerfd_create")
            asyncio.get_running_loop().add_reader(self._fd, self._due)
        return self

    def set(self, when: float) -> None:
        if self._fd >= 0:
            seconds, rest = divmod(when, 1)
            self._libc.timerfd_settime(self._fd, self._ABSOLUTE, struct.pack("@4l", 0, 0, int(seconds), int(rest * 1e9)), None)
            return
        if self._handle is not None:
            self._handle.cancel()
        self._handle = asyncio.get_running_loop().call_later(max(0.0, when - time.perf_counter()), self._what)

    def __exit__(self, *_: object) -> None:
        if self._fd >= 0:
            asyncio.get_running_loop().remove_reader(self._fd)
            os.close(self._fd)
        if self._handle is not None:
            self._handle.cancel()

    def _due(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._fd, 8)
        self._what()


@asynccontextmanager
async def loading(port: int, requests: Iterator[bytes], witness: Callable[[Answer], None] | None = None) -> AsyncIterator[Load]:
    load = Load(port, requests, witness)
    try:
        yield load
    finally:
        await load.close()
