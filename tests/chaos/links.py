"""A link: a TCP proxy on loopback between a service and what it talks to, which can be cut, held or slowed.

Links run in a thread and an event loop of their own, so that a test that waits does not hold up the traffic.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")

_CHUNK_BYTES = 65536
_CALL_SECONDS = 20.0


class _Ends:
    """Both connections of one caller, and what runs between them."""

    def __init__(self, near: asyncio.StreamWriter) -> None:
        self.writers = [near]
        self.task = asyncio.current_task()

    def drop(self) -> None:
        """With a reset, as when a host goes away or a firewall refuses."""
        for writer in self.writers:
            writer.transport.abort()
        if self.task is not None:
            self.task.cancel()


class Link:
    """`port` on loopback leads to `target_port` there. Its methods may be called from any thread."""

    def __init__(self, links: Links, target_port: int) -> None:
        self.target_port = target_port
        self.port = 0
        self._links = links
        self._server: asyncio.Server | None = None
        self._ends: set[_Ends] = set()
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._delay_seconds = 0.0

    # --- faults ----------------------------------------------------------------------------------------------------------

    @contextmanager
    def cut(self) -> Iterator[None]:
        """Drops the connections that are there and refuses new ones."""
        self._links.call(self._close)
        try:
            yield
        finally:
            self._links.call(self._open)

    @contextmanager
    def held(self) -> Iterator[None]:
        """A partition as a firewall makes it: nothing is refused, and nothing comes through. What was sent arrives afterwards."""
        self._links.call(self._hold)
        try:
            yield
        finally:
            self._links.call(self._release)

    @contextmanager
    def slow(self, seconds: float) -> Iterator[None]:
        """Everything takes `seconds` longer, in each direction."""
        self._delay_seconds = seconds
        try:
            yield
        finally:
            self._delay_seconds = 0.0

    # --- in the loop of the links ----------------------------------------------------------------------------------------

    async def _open(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        for ends in tuple(self._ends):
            ends.drop()

    async def _hold(self) -> None:
        self._flowing.clear()

    async def _release(self) -> None:
        self._flowing.set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ends = _Ends(writer)
        self._ends.add(ends)
        try:
            await self._flowing.wait()  # accepted, and silent
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.target_port)
            ends.writers.append(far_writer)
            _without_delay(writer)
            _without_delay(far_writer)
            await asyncio.gather(self._pump(reader, far_writer), self._pump(far_reader, writer))
        except (OSError, asyncio.CancelledError):
            pass  # whichever end goes away takes the other with it
        except ExceptionGroup as group:
            if group.split(OSError)[1] is not None:
                raise
        finally:
            ends.task = None
            ends.drop()
            self._ends.discard(ends)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Bytes in their order, each `_delay_seconds` after it came."""
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(1024)

        async def deliver() -> None:
            while True:
                due, data = await queue.get()
                if (wait := due - loop.time()) > 0:
                    await asyncio.sleep(wait)
                await self._flowing.wait()
                if not data:
                    break
                writer.write(data)
                await writer.drain()
            if writer.can_write_eof():
                writer.write_eof()

        async with asyncio.TaskGroup() as group:
            group.create_task(deliver())
            data = b"-"
            while data:
                data = await _read(reader)
                await queue.put((loop.time() + self._delay_seconds, data))


async def _read(reader: asyncio.StreamReader) -> bytes:
    with contextlib.suppress(OSError):
        return await reader.read(_CHUNK_BYTES)
    return b""


def _without_delay(writer: asyncio.StreamWriter) -> None:
    writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


class Links:
    """The thread that all links of one stack run in."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="links", daemon=True)
        self._thread.start()
        self._made: list[Link] = []

    def to(self, target_port: int) -> Link:
        """A new link, open."""
        link = Link(self, target_port)
        self.call(link._open)
        self._made.append(link)
        return link

    def call(self, function: Callable[[], Coroutine[Any, Any, T] | Awaitable[T]]) -> T:
        """Run a coroutine function in the loop of the links, and wait for it."""

        async def run() -> T:
            return await function()

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(_CALL_SECONDS)

    def close(self) -> None:
        self.call(self._end)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_CALL_SECONDS)
        self._loop.close()

    async def _end(self) -> None:
        for link in self._made:
            await link._release()
            await link._close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
