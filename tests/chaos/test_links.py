"""The fault kit itself: a link does what its name says, else the matrix shows nothing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator

import pytest

from tests.chaos.links import Link, Links


@pytest.fixture
def links() -> Iterator[Links]:
    links = Links()
    yield links
    links.close()


@pytest.fixture
async def echo() -> AsyncIterator[int]:
    """The port of a server that sends back what it gets."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    yield server.sockets[0].getsockname()[1]
    server.close()


@pytest.fixture
def link(links: Links, echo: int) -> Link:
    return links.to(echo)


async def _echoed(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, data: bytes) -> bytes:
    writer.write(data)
    return await asyncio.wait_for(reader.readexactly(len(data)), 10)


async def test_what_is_sent_arrives_whole_and_in_order(link: Link) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", link.port)
    data = b"".join(number.to_bytes(4) for number in range(200_000))
    assert await _echoed(reader, writer, data) == data
    writer.close()


async def test_cut_drops_what_is_there_and_refuses_what_comes(link: Link) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", link.port)
    assert await _echoed(reader, writer, b"before") == b"before"
    with link.cut():
        with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
            await asyncio.wait_for(reader.readexactly(1), 10)
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", link.port)
    reader, writer = await asyncio.open_connection("127.0.0.1", link.port)
    assert await _echoed(reader, writer, b"after") == b"after"
    writer.close()


async def test_held_accepts_and_is_silent_and_brings_it_all_afterwards(link: Link) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", link.port)
    assert await _echoed(reader, writer, b"before") == b"before"
    with link.held():
        writer.write(b"during")
        late_reader, late_writer = await asyncio.open_connection("127.0.0.1", link.port)
        late_writer.write(b"late")
        for silent in (reader, late_reader):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(silent.read(1), 0.3)
    assert await asyncio.wait_for(reader.readexactly(6), 10) == b"during"
    assert await asyncio.wait_for(late_reader.readexactly(4), 10) == b"late"
    writer.close()
    late_writer.close()


async def test_slow_adds_its_time_in_each_direction(link: Link) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", link.port)
    with link.slow(0.15):
        began = time.monotonic()
        assert await _echoed(reader, writer, b"x") == b"x"
        assert time.monotonic() - began >= 0.3
    writer.close()
