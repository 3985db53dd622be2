"""The usage log against a bus that is not there: what is sent, sent again, and given up, on a driven clock."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec
import pytest
from nats.aio.msg import Msg

from libs.common.bus import Hook
from libs.common.clock import ManualClock
from libs.common.contracts import Message, UsageRecorded
from libs.common.errors import ErrorCode, PortcullisError
from libs.common.subjects import USAGE_RECORDED
from services.detector_proxy import adapters
from services.detector_proxy.adapters import ACK_SECONDS, GIVE_UP_SECONDS, MAX_WAITING, WRITTEN_SECONDS, JetStreamUsageLog
from services.detector_proxy.metrics import USAGE_EVENTS

EVENT = UsageRecorded(key_id="key1", at_ms=1, requests=1, malicious=0)
STORED = b'{"stream":"USAGE","seq":1}'
DUPLICATE = b'{"stream":"USAGE","seq":1,"duplicate":true}'
FULL = b'{"error":{"code":503,"err_code":10077,"description":"maximum messages exceeded"},"stream":"USAGE","seq":0}'
NO_RESPONDERS = b""


class FakeBus:
    def __init__(self) -> None:
        self.clock = ManualClock()
        self.on_drained: list[Hook] = []
        self.on_reconnect: list[Hook] = []
        self.connected = True
        self.sent: list[str] = []
        self.listening: dict[int, Callable[[Msg], None]] = {}

    async def publish(self, subject: str, message: Message, headers: dict[str, str]) -> None:
        assert subject == USAGE_RECORDED
        if not self.connected:
            raise PortcullisError(ErrorCode.STAGE_UNAVAILABLE)
        self.sent.append(headers["Nats-Msg-Id"])

    async def publish_acked(
        self, subject: str, message: Message, headers: dict[str, str], on_reply: Callable[[Msg], None]
    ) -> Callable[[], None]:
        await self.publish(subject, message, headers)
        number = len(self.sent)
        self.listening[number] = on_reply
        return lambda: self.listening.pop(number, None) and None

    def reply(self, body: bytes) -> None:
        """Answer the oldest publish that is still listened for."""
        number = min(self.listening)
        self.listening.pop(number)(Msg(_client=None, data=body))  # type: ignore[arg-type]  # no connection behind it


class Bench:
    def __init__(self) -> None:
        self.bus = FakeBus()
        self.log = JetStreamUsageLog(self.bus)
        self.before = {outcome: self._count(outcome) for outcome in ("stored", "resent", "untracked", "lost")}

    @staticmethod
    def _count(outcome: str) -> float:
        value: float = USAGE_EVENTS.labels(outcome)._value.get()
        return value

    def counted(self, outcome: str) -> float:
        return self._count(outcome) - self.before[outcome]

    async def pass_time(self, seconds: float) -> None:
        elapsed = 0.0
        while elapsed < seconds:
            self.bus.clock.advance(0.25)
            elapsed += 0.25
            await self.log.sweep()


@pytest.mark.parametrize("ack", [STORED, DUPLICATE])
async def test_an_acknowledged_event_is_done_with(ack: bytes) -> None:
    bench = Bench()
    await bench.log.record(EVENT, "a")
    assert bench.bus.sent == ["a"]
    bench.bus.reply(ack)
    await bench.pass_time(GIVE_UP_SECONDS * 2)
    assert bench.bus.sent == ["a"]
    assert (bench.log.waiting, bench.bus.listening) == (0, {})
    assert (bench.counted("stored"), bench.counted("lost")) == (1, 0)


@pytest.mark.parametrize("answer", [None, NO_RESPONDERS, FULL, b"garbage", b"\xff", b"{}"])
async def test_an_event_that_is_not_stored_is_sent_again_under_the_same_id(answer: bytes | None) -> None:
    bench = Bench()
    await bench.log.record(EVENT, "a")
    if answer is not None:
        bench.bus.reply(answer)
    await bench.pass_time(ACK_SECONDS)
    assert bench.bus.sent == ["a", "a"]
    bench.bus.reply(STORED)
    assert (bench.log.waiting, bench.bus.listening) == (0, {})
    assert bench.counted("stored") == 1


async def test_it_backs_off_and_gives_up_before_the_stream_forgets_the_id() -> None:
    bench = Bench()
    await bench.log.record(EVENT, "a")
    await bench.pass_time(GIVE_UP_SECONDS - 1)
    assert 20 <= len(bench.bus.sent) <= 30  # after 2 s, then every 4 s
    assert bench.log.waiting == 1
    await bench.pass_time(20)
    sent = len(bench.bus.sent)
    await bench.pass_time(100)
    assert len(bench.bus.sent) == sent
    assert (bench.log.waiting, bench.bus.listening) == (0, {})
    assert bench.counted("lost") == 1
    assert GIVE_UP_SECONDS < 120  # the server's default window


async def test_without_a_connection_it_is_kept_for_later() -> None:
    bench = Bench()
    bench.bus.connected = False
    await bench.log.record(EVENT, "a")
    assert bench.bus.sent == []
    bench.bus.connected = True
    await bench.pass_time(ACK_SECONDS)
    assert bench.bus.sent == ["a"]


async def test_what_was_acknowledged_just_before_the_connection_was_lost_is_sent_again() -> None:
    bench = Bench()
    (reconnected,) = bench.bus.on_reconnect
    for message_id in ("long ago", "a", "b"):
        await bench.log.record(EVENT, message_id)
        bench.bus.reply(STORED)
        bench.bus.clock.advance(WRITTEN_SECONDS * 0.6)
    await bench.log.record(EVENT, "waits")
    await reconnected()
    assert bench.bus.sent == ["long ago", "a", "b", "waits", "a", "b"]
    assert bench.log.waiting == 3
    for _ in range(3):
        bench.bus.reply(DUPLICATE)
    await bench.pass_time(GIVE_UP_SECONDS * 2)
    assert len(bench.bus.sent) == 6
    assert (bench.log.waiting, bench.counted("stored"), bench.counted("resent")) == (0, 4, 2)


async def test_after_a_long_outage_what_the_stream_may_have_forgotten_the_id_of_is_not_sent_again() -> None:
    bench = Bench()
    await bench.log.record(EVENT, "a")
    bench.bus.reply(STORED)
    await bench.pass_time(GIVE_UP_SECONDS)
    await bench.log.send_again()
    assert bench.bus.sent == ["a"]


async def test_what_is_kept_after_its_acknowledgement_does_not_grow() -> None:
    bench = Bench()
    for number in range(1000):
        await bench.log.record(EVENT, str(number))
        bench.bus.reply(STORED)
        bench.bus.clock.advance(WRITTEN_SECONDS / 10)
    await bench.log.send_again()
    assert len(bench.bus.sent) - 1000 == pytest.approx(10, abs=1)


async def test_the_same_event_twice_is_one() -> None:
    bench = Bench()
    await bench.log.record(EVENT, "a")
    await bench.log.record(msgspec.structs.replace(EVENT, malicious=1), "a")
    assert bench.bus.sent == ["a"]


async def test_memory_is_bounded_and_nothing_is_dropped_that_can_still_be_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_WAITING == 20_000
    monkeypatch.setattr(adapters, "MAX_WAITING", 10)
    bench = Bench()
    for number in range(15):
        await bench.log.record(EVENT, str(number))
    assert bench.log.waiting == 10
    assert len(bench.bus.sent) == 15
    bench.bus.connected = False
    await bench.log.record(EVENT, "x")
    assert (bench.counted("untracked"), bench.counted("lost")) == (5, 1)


async def test_the_end_of_a_drain_waits_for_the_last_acknowledgement() -> None:
    bench = Bench()
    await bench.log.record(EVENT, "a")
    await bench.log.record(EVENT, "b")
    (flush,) = bench.bus.on_drained
    flushing = asyncio.ensure_future(flush())
    await asyncio.sleep(0)
    bench.bus.reply(STORED)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not flushing.done()
    bench.bus.reply(STORED)
    await flushing
    assert bench.counted("lost") == 0


async def test_the_end_of_a_drain_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "FLUSH_SECONDS", 0.0)
    bench = Bench()
    await bench.log.record(EVENT, "a")
    await bench.log.flush()
    assert bench.counted("lost") == 1
