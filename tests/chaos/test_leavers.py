"""Callers that leave in the middle of whatever they were doing, thousands of them: nothing of them stays behind.

`PORTCULLIS_TEST_LEAVERS` of them (10 000 by `just chaos`; some hundreds in every test run).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import struct
from collections.abc import Iterable

import aiohttp

from tests.bad_inputs import CHUNKED, GET, KEY, POST, call
from tests.bench.load import issued_key
from tests.chaos.kit import Stack, wait_for_detection
from tests.chaos.questions import question
from tests.chaos.vitals import Health, assert_answers, held, most_held, until_at_rest, until_let_go

LEAVERS = int(os.environ.get("PORTCULLIS_TEST_LEAVERS", "400"))
AT_A_TIME = 100
SETTLE_SAMPLES = 8
"""Of what is held at rest, half a second apart: some of it comes and goes by the second."""
LET_GO_SECONDS = 30.0
_RESET = struct.pack("ii", 1, 0)
"""SO_LINGER: on, for no time."""

_TEXT = call(json.dumps({"text": question(0).text}).encode()).replace(b"Connection: close\r\n", b"")
_LINE = json.dumps({"text": question(1).text}).encode() + b"\n"
_LIST = json.dumps({"requests": [{"text": question(number).text} for number in range(10)]}).encode()
_UPLOAD = CHUNKED.replace(b"/v1/detect", b"/v1/detect/batch").replace(
    b"close\r\n", b"close\r\nContent-Type: application/x-ndjson\r\n"
)
_JOB = _UPLOAD.replace(b"\r\n\r\n", b"\r\nPrefer: respond-async\r\n\r\n")
_CHUNK = b"%x\r\n%b\r\n" % (len(_LINE), _LINE)

STATES: dict[str, tuple[bytes, int]] = {
    "connected": (b"", 0),
    "half the headers": (POST, 0),
    "half a body": (POST + b"Content-Length: 50\r\n\r\n{", 0),
    "a text": (_TEXT, 0),
    "two texts, and half the first answer": (_TEXT * 2, 40),
    "a batch": (call(_LIST, "/v1/detect/batch"), 0),
    "a batch, and half its answer": (call(_LIST, "/v1/detect/batch"), 300),
    "half an upload": (_UPLOAD + _CHUNK * 5 + b"100\r\n{", 0),
    "half an upload, and its first results": (_UPLOAD + _CHUNK * 20, 300),
    "half a job": (_JOB + _CHUNK * 5, 0),
    "answers that are never read": (GET.replace(b"health/live", b"openapi.json") + b"\r\n", 1),
}
"""What is sent, and how many bytes of the answer are read, before the caller leaves."""


async def _leave(stack: Stack, key: str, number: int) -> None:
    """Every state in turn, by a close in good order, by a reset."""
    request, wanted = list(STATES.values())[number % len(STATES)]
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", stack.port)
    except ConnectionError:
        return
    try:
        writer.write(request.replace(KEY, key.encode()))
        await writer.drain()
        if wanted:
            async with asyncio.timeout(10):
                await reader.readexactly(wanted)
    except (ConnectionError, asyncio.IncompleteReadError, TimeoutError):
        pass  # refused for want of room: that, too, is a caller who leaves
    finally:
        if number // len(STATES) % 2:
            connected: socket.socket = writer.get_extra_info("socket")
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            writer.transport.abort()
        else:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()


async def _all_leave(stack: Stack, key: str, numbers: Iterable[int]) -> None:
    places = asyncio.Semaphore(AT_A_TIME)

    async def one(number: int) -> None:
        async with places:
            await _leave(stack, key, number)

    async with asyncio.TaskGroup() as group:
        for number in numbers:
            group.create_task(one(number))


async def test_nothing_of_those_who_leave_in_the_middle_stays_behind(stack: Stack) -> None:
    await asyncio.to_thread(wait_for_detection, stack, 30)
    # A key of their own: the jobs that they leave half submitted count as open for ten minutes.
    token = stack.secret("PORTCULLIS_ADMIN_TOKEN")
    async with aiohttp.ClientSession(stack.url) as session, issued_key(session, token) as key:
        await _all_leave(stack, key, range(2 * AT_A_TIME))
        await until_at_rest(stack)
        health = await asyncio.to_thread(Health.of, stack)
        samples = []
        for _ in range(SETTLE_SAMPLES):
            samples.append(await asyncio.to_thread(held, stack))
            await asyncio.sleep(0.5)
        before = await asyncio.to_thread(most_held, samples, stack)
        await _all_leave(stack, key, range(LEAVERS))
        await until_at_rest(stack)
        await until_let_go(stack, before, LET_GO_SECONDS)
    await assert_answers(stack)
    assert await asyncio.to_thread(Health.of, stack) == health
    print(f"\n{LEAVERS} left; held at most, pools included: {dict(before)}")
