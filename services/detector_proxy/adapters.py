"""The proxy's ways out: the usage log on JetStream, and the news of breakers."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol

import msgspec
from nats.aio.msg import Msg

from libs.common.bus import Bus, Hook
from libs.common.clock import Clock
from libs.common.contracts import BreakerChanged, BreakerState, Message, UsageRecorded
from libs.common.errors import PortcullisError
from libs.common.subjects import EVENT_BREAKER_CHANGED, USAGE_RECORDED
from services.detector_proxy.breaker import BreakerChange
from services.detector_proxy.metrics import BREAKER_CHANGES, BREAKER_STATE, USAGE_EVENTS, USAGE_WAITING

log = logging.getLogger(__name__)

MESSAGE_ID_HEADER = "Nats-Msg-Id"

MAX_WAITING = 20_000
"""Events without an acknowledgement that are kept: about a minute of a day's worst hour, and less than 10 MB."""
ACK_SECONDS = 2.0
MAX_BACKOFF_SECONDS = 4.0
GIVE_UP_SECONDS = 100.0
"""Within the stream's deduplication window (120 s, the server's default): a later copy would be counted twice."""
WRITTEN_SECONDS = 1.0
"""How long an event is kept that was acknowledged: the server writes it some milliseconds later (`persist_mode: async`)."""
SWEEP_SECONDS = 0.25
SWEEP_LIMIT = 500
FLUSH_SECONDS = 2.0

_STORED = USAGE_EVENTS.labels("stored")
_RESENT = USAGE_EVENTS.labels("resent")
_UNTRACKED = USAGE_EVENTS.labels("untracked")
_LOST = USAGE_EVENTS.labels("lost")


class _PubAck(msgspec.Struct):
    """JetStream's answer to a publish: where it was stored, or why not."""

    stream: str | None = None
    error: msgspec.Raw | None = None


_LEVELS: dict[BreakerState, int] = {"closed": 0, "half_open": 1, "open": 2}

_decode_ack = msgspec.json.Decoder(_PubAck).decode


class Publisher(Protocol):
    """What the usage log needs of the bus."""

    @property
    def clock(self) -> Clock: ...

    @property
    def on_drained(self) -> list[Hook]: ...

    @property
    def on_reconnect(self) -> list[Hook]: ...

    async def publish(self, subject: str, message: Message, headers: dict[str, str]) -> None: ...

    async def publish_acked(
        self, subject: str, message: Message, headers: dict[str, str], on_reply: Callable[[Msg], None]
    ) -> Callable[[], None]: ...


@dataclass(slots=True)
class _Waiting:
    """An event that the stream has not acknowledged yet. Times are of the monotonic clock."""

    event: UsageRecorded
    message_id: str
    began: float
    due: float
    backoff_seconds: float = ACK_SECONDS
    stop_listening: Callable[[], None] | None = None
    acknowledged: float | None = None


class JetStreamUsageLog:
    """Publishes each event at once, and again (under the same message id) until the stream has it or it is too late.

    A server that dies may take with it what it has just acknowledged, so that is published again on the next connection.

    NATS keeps the order of what one connection publishes: when the caller sees its verdict, the server has its usage event.
    """

    def __init__(self, bus: Publisher) -> None:
        self._bus = bus
        self._waiting: dict[str, _Waiting] = {}
        self._acknowledged: deque[_Waiting] = deque()
        """Those of the last second before the last acknowledgement, at least."""
        self._replied = asyncio.Event()
        bus.on_drained.append(self.flush)
        bus.on_reconnect.append(self.send_again)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    async def record(self, event: UsageRecorded, message_id: str) -> None:
        """See `UsageLog`. A second event under a `message_id` that still waits is the same event."""
        if message_id in self._waiting:
            return
        if len(self._waiting) >= MAX_WAITING:
            await self._send_untracked(event, message_id)
            return
        now = self._bus.clock.monotonic()
        entry = _Waiting(event, message_id, began=now, due=now + ACK_SECONDS)
        self._waiting[message_id] = entry
        await self._send(entry)

    async def run(self) -> None:
        """Send again what is due, for ever."""
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            await self.sweep()

    async def sweep(self) -> None:
        now = self._bus.clock.monotonic()
        USAGE_WAITING.set(len(self._waiting))
        for entry in [entry for entry in self._waiting.values() if entry.due <= now][:SWEEP_LIMIT]:
            self._stop_listening(entry)
            if now - entry.began >= GIVE_UP_SECONDS:
                if self._waiting.pop(entry.message_id, None) is not None:
                    _LOST.inc()
                    log.error("a usage event was not stored within %.0f s and is lost", GIVE_UP_SECONDS)
                continue
            entry.backoff_seconds = min(entry.backoff_seconds * 2, MAX_BACKOFF_SECONDS)
            entry.due = now + entry.backoff_seconds
            _RESENT.inc()
            await self._send(entry)

    async def send_again(self) -> None:
        """What was acknowledged just before the connection was lost. The stream tells by the ids what it has already."""
        now = self._bus.clock.monotonic()
        again, self._acknowledged = self._acknowledged, deque()
        for entry in again:
            if now - entry.began < GIVE_UP_SECONDS and len(self._waiting) < MAX_WAITING:
                entry.backoff_seconds, entry.due = ACK_SECONDS, now + ACK_SECONDS
                self._waiting[entry.message_id] = entry
                _RESENT.inc()
                await self._send(entry)

    async def flush(self) -> None:
        """Give every event its last chance to be acknowledged, but not for long: whoever stops us does not wait either."""
        with suppress(TimeoutError):
            async with asyncio.timeout(FLUSH_SECONDS):
                for entry in list(self._waiting.values()):
                    if entry.stop_listening is None:
                        await self._send(entry)
                while any(entry.stop_listening for entry in self._waiting.values()):
                    self._replied.clear()
                    await self._replied.wait()
        if self._waiting:
            _LOST.inc(len(self._waiting))
            log.error("%d usage events were not stored before the stop and are lost", len(self._waiting))

    async def _send(self, entry: _Waiting) -> None:
        def on_reply(msg: Msg) -> None:
            self._on_reply(entry, msg)

        try:
            entry.stop_listening = await self._bus.publish_acked(
                USAGE_RECORDED, entry.event, {MESSAGE_ID_HEADER: entry.message_id}, on_reply
            )
        except PortcullisError as error:
            log.info("a usage event waits: %s", error)

    async def _send_untracked(self, event: UsageRecorded, message_id: str) -> None:
        try:
            await self._bus.publish(USAGE_RECORDED, event, {MESSAGE_ID_HEADER: message_id})
        except PortcullisError:
            _LOST.inc()
        else:
            _UNTRACKED.inc()

    def _on_reply(self, entry: _Waiting, msg: Msg) -> None:
        entry.stop_listening = None
        self._replied.set()
        # What was not stored stays due.
        if _stored(msg) and self._waiting.pop(entry.message_id, None) is not None:
            if entry.acknowledged is None:
                _STORED.inc()
            self._keep_for_a_while(entry)

    def _keep_for_a_while(self, entry: _Waiting) -> None:
        entry.acknowledged = now = self._bus.clock.monotonic()
        kept = self._acknowledged
        kept.append(entry)
        while kept[0].acknowledged is not None and now - kept[0].acknowledged > WRITTEN_SECONDS:
            kept.popleft()

    @staticmethod
    def _stop_listening(entry: _Waiting) -> None:
        if entry.stop_listening is not None:
            entry.stop_listening()
            entry.stop_listening = None


def _stored(msg: Msg) -> bool:
    if not msg.data:
        return False  # the server's "no responders": no stream keeps the subject
    try:
        ack = _decode_ack(msg.data)
    except ValueError:
        return False
    return ack.error is None and ack.stream is not None


class BreakerNews:
    """Tells everybody about each change of a breaker: an event, a line in the log, two metrics."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._sending: set[asyncio.Task[None]] = set()

    def begin(self, name: str) -> None:
        """Show a new breaker in the metrics before anything has changed."""
        BREAKER_STATE.labels(name).set(_LEVELS["closed"])
        for after in _LEVELS:
            BREAKER_CHANGES.labels(name, after)

    def tell(self, change: BreakerChange) -> None:
        log.warning("breaker %s: %s -> %s (%s)", change.name, change.before, change.after, change.reason)
        BREAKER_CHANGES.labels(change.name, change.after).inc()
        BREAKER_STATE.labels(change.name).set(_LEVELS[change.after])
        task = asyncio.get_running_loop().create_task(self._publish(change))
        self._sending.add(task)
        task.add_done_callback(self._sending.discard)

    async def _publish(self, change: BreakerChange) -> None:
        event = BreakerChanged(
            name=change.name,
            replica=self._bus.instance,
            before=change.before,
            after=change.after,
            at=datetime.fromtimestamp(change.at, UTC).isoformat(timespec="milliseconds"),
            reason=change.reason,
        )
        try:
            await self._bus.publish(EVENT_BREAKER_CHANGED, event)
        except PortcullisError as error:
            log.info("the change of a breaker could not be told: %s", error)
