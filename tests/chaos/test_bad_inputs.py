"""Every row of `tests/bad_inputs.py` against a running stack: its answer, in its time, and nobody is harmed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import nats
import nats.errors
import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg

from infra.embedded.home import Home
from infra.embedded.servers import MAX_PAYLOAD_BYTES
from infra.embedded.stack import OPERATOR
from libs.common import keys, subjects
from libs.common.context import DEADLINE_HEADER
from libs.common.errors import CATALOGUE
from services.edge.problems import TYPE_PREFIX
from tests import bad_inputs
from tests.bad_inputs import HTTP, NATS, Http, Nats
from tests.chaos.kit import Stack, wait_for_detection
from tests.chaos.scenario import crowding
from tests.chaos.vitals import Health, assert_answers, until_at_rest
from tests.conftest import arrived

AT_A_TIME = 8
OF_THE_LOOP_SECONDS = 2.0
"""How late this process may read an answer that came in time, on a machine that is busy with other things."""


@pytest.fixture(autouse=True)
async def unharmed(stack: Stack) -> AsyncIterator[None]:
    """The same processes before and after, all of them healthy and at rest, nothing unforeseen in their logs, and right."""
    await asyncio.to_thread(wait_for_detection, stack, 30)
    before = await asyncio.to_thread(Health.of, stack)
    yield
    await until_at_rest(stack)
    await assert_answers(stack)
    assert await asyncio.to_thread(Health.of, stack) == before


# --- HTTP ----------------------------------------------------------------------------------------------------------------


async def _again(writer: asyncio.StreamWriter, row: Http) -> None:
    with contextlib.suppress(ConnectionError):
        while True:
            writer.write(row.again)
            await writer.drain()
            await asyncio.sleep(row.every_seconds)


async def _exchange(stack: Stack, row: Http) -> bytes:
    """All that comes back until the gateway ends the connection."""
    taker = socket.socket()
    if row.sips:
        taker.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**12)  # before connecting: the kernel would let it grow
    taker.connect(("127.0.0.1", stack.port))
    reader, writer = await asyncio.open_connection(sock=taker, limit=2**12 if row.sips else 2**16)
    writer.write(row.begin.replace(bad_inputs.KEY, stack.key.encode()))
    sending = asyncio.create_task(_again(writer, row)) if row.again else None
    answer = b""
    try:
        with contextlib.suppress(ConnectionError):  # cut while we were still sending: what was said before is there
            while piece := await reader.read(2**16):
                answer += piece
                if sending is not None:
                    sending.cancel()
                if row.sips:
                    await asyncio.sleep(0.01)
    finally:
        if sending is not None:
            sending.cancel()
        writer.close()
    return answer


def check(row: Http, answer: bytes) -> None:
    """Raises AssertionError, or ValueError and IndexError where the answer is none."""
    head, _, body = answer.partition(b"\r\n\r\n")
    status = int(head.split(b" ", 2)[1])
    assert answer.count(b"HTTP/1.1 ") == row.answers
    if row.code is not None:
        assert status == CATALOGUE[row.code].status
        assert b"content-type: application/problem+json" in head
        problem = json.loads(body)
        assert (problem["status"], problem["type"]) == (status, TYPE_PREFIX + row.code)
        assert problem["request_id"]
    else:
        assert status == 200 or (row.or_refused and status in (429, 503, 504))
        assert answer.count(b"HTTP/1.1 200 ") == (row.answers if status == 200 else 0)
    if row.inside is not None:
        assert row.inside.encode() in body
    if row.group == "Unicode" and status == 200:
        verdict, text = json.loads(body), json.loads(row.begin.partition(b"\r\n\r\n")[2])["text"]
        assert 0 <= verdict["confidence"] <= 1
        assert verdict["coverage"]["truncated"] is False
        assert all(0 <= span["start"] < span["end"] <= len(text) for span in verdict.get("spans", []))


async def _play(stack: Stack, row: Http) -> str:
    """What is wrong with its answer; nothing when it is as it should be."""
    began = time.monotonic()
    answer = b""
    try:
        async with asyncio.timeout(row.seconds + OF_THE_LOOP_SECONDS * crowding()):
            answer = await _exchange(stack, row)
        check(row, answer)
    except (AssertionError, TimeoutError, ValueError, IndexError) as problem:
        return f"{row.group}, {row.name}: {problem!r} after {time.monotonic() - began:.1f} s: {answer[:300]!r}"
    return ""


async def _all(stack: Stack, rows: Sequence[Http]) -> list[str]:
    places = asyncio.Semaphore(AT_A_TIME)

    async def one(row: Http) -> str:
        if row.every_seconds or row.seconds > bad_inputs.DEADLINE_SECONDS + 5:  # it only waits
            return await _play(stack, row)
        async with places:
            return await _play(stack, row)

    return [problem for problem in await asyncio.gather(*map(one, rows)) if problem]


async def test_every_bad_request_has_its_answer_in_its_time(stack: Stack) -> None:
    quick = [row for row in HTTP if not row.or_refused]
    assert await _all(stack, quick) == []


async def test_every_flood_of_characters_is_answered(stack: Stack) -> None:
    """One after the other: a text of that length is a second of a worker's time."""
    for row in (row for row in HTTP if row.or_refused):
        assert await _all(stack, [row]) == []


# --- NATS ----------------------------------------------------------------------------------------------------------------


class Doors:
    """Connections of a client with a key, and of somebody who may send anything; and what has come back to whom."""

    def __init__(self, client: Client, operator: Client, key_id: str) -> None:
        self.client = client
        self.operator = operator
        self.key_id = key_id
        self.answers: dict[str, bytes] = {}
        self.came = asyncio.Event()

    async def note(self, msg: Msg) -> None:
        self.answers[msg.subject] = msg.data
        self.came.set()

    def inbox(self, row: Nats, number: int) -> str:
        return row.reply or f"_INBOX.{self.key_id if row.by_client else OPERATOR}.bad.{number}"

    async def send(self, row: Nats, number: int) -> None:
        headers = {DEADLINE_HEADER: str(int((time.time() + row.deadline_seconds) * 1000)), **row.headers}
        given = {name: value for name, value in headers.items() if value is not None}
        subject = row.subject.replace(bad_inputs.KEY_ID, self.key_id)
        connection = self.client if row.by_client else self.operator
        await connection.publish(subject, row.body, reply=self.inbox(row, number), headers=None if row.by_client else given)

    async def code(self, row: Nats, number: int) -> str:
        """Of the answer."""
        inbox = self.inbox(row, number)
        async with asyncio.timeout(row.seconds + OF_THE_LOOP_SECONDS * crowding()):
            while inbox not in self.answers:
                self.came.clear()
                await self.came.wait()
        error = json.loads(self.answers[inbox])["error"]
        return str(error["code"]) if error is not None else "ok"


def _nats_port(stack: Stack) -> int:
    port = urlsplit(stack.environment_of("edge")["PORTCULLIS_NATS_URL"]).port
    assert port is not None
    return port


@asynccontextmanager
async def _doors(stack: Stack) -> AsyncIterator[Doors]:
    url = f"nats://127.0.0.1:{_nats_port(stack)}"
    parsed = keys.parse(stack.key)
    assert parsed is not None
    client = await nats.connect(url, token=stack.key, inbox_prefix=subjects.client_inbox(parsed.key_id).encode())
    operator = await nats.connect(url, user=OPERATOR, password=Home(stack.home).secret(f"nats-{OPERATOR}"))
    doors = Doors(client, operator, parsed.key_id)
    try:
        await client.subscribe(f"_INBOX.{parsed.key_id}.bad.*", cb=doors.note)
        for subject in {f"_INBOX.{OPERATOR}.bad.*", *(row.reply for row in NATS if row.reply)} - set(bad_inputs.STAGES):
            await operator.subscribe(subject, cb=doors.note)
        await arrived(client, operator)
        yield doors
    finally:
        await client.close()
        await operator.close()


async def test_every_bad_message_has_its_answer_in_its_time_or_none(stack: Stack) -> None:
    rows = [(number, row) for number, row in enumerate(NATS) if not row.nobody and not row.too_large]
    wrong = []
    async with _doors(stack) as doors:
        for number, row in rows:
            await doors.send(row, number)
            if row.code is not None:  # one at a time: as fast as they can be written would be a flood of another kind
                try:
                    code = await doors.code(row, number)
                except TimeoutError:
                    code = "no answer"
                if code != row.code:
                    wrong.append((row.group, row.name, code))
        # What should not be answered was sent long before this, to the same services.
        await until_at_rest(stack)
        silent = {doors.inbox(row, number): row for number, row in rows if row.code is None}
        wrong += [(row.group, row.name, "answered") for inbox, row in silent.items() if inbox in doors.answers]
    assert wrong == []


async def test_what_belongs_to_another_version_is_nobodys(stack: Stack) -> None:
    async with _doors(stack) as doors:
        for row in (row for row in NATS if row.nobody):
            with pytest.raises(nats.errors.NoRespondersError):
                await doors.operator.request(row.subject, row.body, timeout=row.seconds)


async def test_the_server_takes_no_larger_message(stack: Stack) -> None:
    login = {"user": OPERATOR, "pass": Home(stack.home).secret(f"nats-{OPERATOR}"), "verbose": False}
    for row in (row for row in NATS if row.too_large):
        assert len(row.body) > MAX_PAYLOAD_BYTES
        reader, writer = await asyncio.open_connection("127.0.0.1", _nats_port(stack))
        writer.write(b"CONNECT %b\r\nPUB %b %d\r\n" % (json.dumps(login).encode(), row.subject.encode(), len(row.body)))
        async with asyncio.timeout(row.seconds + OF_THE_LOOP_SECONDS * crowding()):
            assert b"Maximum Payload Violation" in await reader.read(-1)
        writer.close()
