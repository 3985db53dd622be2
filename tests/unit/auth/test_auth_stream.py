"""What is made of deliveries with a gap."""

from __future__ import annotations

from typing import Any, cast

import nats.errors
import nats.js.errors
import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js import JetStreamContext

from services.auth.ports import StreamError
from services.auth.stream import BATCH_EVENTS, PAUSE_SECONDS, WRITTEN_SECONDS, JetStreamReader


def message(stream_sequence: int, consumer_sequence: int) -> Msg:
    reply = f"$JS.ACK.USAGE.reader.1.{stream_sequence}.{consumer_sequence}.1800000000000000000.0"
    return Msg(cast(Client, None), subject="usage.v1.recorded", reply=reply, data=b"%d" % stream_sequence)


class Subscription:
    """Hands out what it is given, fetch by fetch. `pauses`: the seconds of each pause of its reader."""

    def __init__(self, *fetches: list[Msg]) -> None:
        self._fetches = list(fetches)
        self.pauses: list[float] = []
        self.is_gone = False

    async def pause(self, seconds: float) -> None:
        self.pauses.append(seconds)

    async def fetch(self, _: int, timeout: float) -> list[Msg]:
        if not self._fetches:
            raise nats.errors.TimeoutError
        return self._fetches.pop(0)

    async def consumer_info(self) -> None:
        if self.is_gone:
            raise nats.js.errors.NotFoundError


def reader(*fetches: list[Msg]) -> JetStreamReader:
    return reader_of(Subscription(*fetches))


def reader_of(subscription: Subscription) -> JetStreamReader:
    return JetStreamReader(cast(JetStreamContext.PullSubscription, cast(Any, subscription)), subscription.pause)


async def test_a_batch_is_read_in_order() -> None:
    # Sequences of the stream may be missing (events that were deleted); deliveries may not.
    read = reader([message(5, 1)], [message(6, 2), message(9, 3)])
    assert await read.batch() == [(5, b"5"), (6, b"6"), (9, b"9")]


async def test_what_is_before_a_gap_is_counted_and_what_is_behind_it_is_read_again() -> None:
    read = reader([message(5, 1)], [message(6, 2), message(8, 4)], [message(9, 5)], [message(10, 6)])
    assert await read.batch() == [(5, b"5"), (6, b"6")]
    with pytest.raises(StreamError):
        await read.batch()


async def test_events_are_left_in_the_stream_for_a_while_so_that_they_come_together() -> None:
    subscription = Subscription([message(1, 1)], [message(2, 2)], [message(3, 3)], [])
    read = reader_of(subscription)
    await read.batch()
    await read.batch()
    assert subscription.pauses == [PAUSE_SECONDS, WRITTEN_SECONDS] * 2


async def test_a_count_that_is_behind_does_not_pause() -> None:
    full = [message(number, number) for number in range(1, BATCH_EVENTS + 1)]
    rest = [message(BATCH_EVENTS + 1, BATCH_EVENTS + 1)]
    subscription = Subscription(full[:1], full[1:], rest, [])
    read = reader_of(subscription)
    assert len(await read.batch()) == BATCH_EVENTS
    assert len(await read.batch()) == 1
    assert subscription.pauses == [PAUSE_SECONDS, WRITTEN_SECONDS, WRITTEN_SECONDS]


async def test_what_a_server_may_have_lost_again_is_not_counted() -> None:
    subscription = Subscription([message(1, 1)], [message(2, 2)])
    read = reader_of(subscription)
    subscription.is_gone = True  # with the server's memory, and perhaps with these events
    with pytest.raises(StreamError):
        await read.batch()
