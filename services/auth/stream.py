"""The stream of usage events on JetStream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Final

import nats.errors
from nats.aio.msg import Msg
from nats.js import JetStreamContext, api

from libs.common.bus import Bus
from libs.common.errors import PortcullisError
from libs.common.streams import Keeper
from libs.common.subjects import USAGE_RECORDED, USAGE_STREAM
from services.auth.core import StreamState
from services.auth.ports import StreamError

MAX_AGE_SECONDS: Final = 7 * 86_400
API_TIMEOUT_SECONDS: Final = 2.0
IDLE_SECONDS: Final = 2.0
"""How long a read waits for the first event."""
PAUSE_SECONDS: Final = 0.8
"""After the first event, how long others are left in the stream: each that is delivered by itself wakes this process and the
server, and each batch is a transaction. Nothing waits while there is more than a batch."""
GATHER_SECONDS: Final = 0.2
WRITTEN_SECONDS: Final = 0.1
"""After which the server has certainly written what it delivered (its `flushLoop` waits for 8 ms at the most). What has been
counted must not be lost there: its sequences would become those of other events."""
BATCH_EVENTS: Final = 1000
CONSUMER_LIFE_SECONDS: Final = 30.0
"""How long the server keeps a consumer that nobody reads from."""
NEEDS: Final = frozenset({"subjects", "retention"})
"""A stream of which others take messages away could not be read by position."""


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except (nats.errors.Error, PortcullisError, TimeoutError) as error:
        # When the connection has been closed, nats-py reports a cancellation as ConnectionClosedError: nobody could stop us.
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise asyncio.CancelledError from error
        raise StreamError(repr(error)) from error


class JetStreamUsage:
    """`UsageStream` on JetStream; makes the stream if there is none, and never alters one that is there."""

    def __init__(self, bus: Bus, max_bytes: int, replicas: int = 1) -> None:
        self._bus = bus
        self._max_bytes = max_bytes
        self._replicas = replicas
        self._keeper = Keeper()

    async def state(self) -> StreamState:
        with _translated():
            info = await self._keeper.stream(self._jetstream(), self._configuration(), NEEDS)
            if info.created is None:
                raise StreamError("the server does not say when the stream was made")
            return StreamState(info.created.isoformat(), info.state.first_seq, info.state.last_seq)

    @asynccontextmanager
    async def read(self, after_sequence: int) -> AsyncIterator[JetStreamReader]:
        with _translated():
            # No acknowledgements and no memory of the reader in the server: the position is in PostgreSQL. A pull consumer,
            # since only what has been asked for is in flight, and flow control needs no permissions of its own.
            subscription = await self._jetstream().pull_subscribe(
                USAGE_RECORDED,
                stream=USAGE_STREAM,
                config=api.ConsumerConfig(
                    deliver_policy=api.DeliverPolicy.BY_START_SEQUENCE,
                    opt_start_seq=after_sequence + 1,
                    ack_policy=api.AckPolicy.NONE,
                    mem_storage=True,
                    num_replicas=1,
                    inactive_threshold=CONSUMER_LIFE_SECONDS,
                ),
            )
        try:
            yield JetStreamReader(subscription)
        finally:
            with suppress(nats.errors.Error):
                await subscription.unsubscribe()

    def _jetstream(self) -> JetStreamContext:
        return self._bus.connection.jetstream(timeout=API_TIMEOUT_SECONDS)

    def _configuration(self) -> api.StreamConfig:
        return api.StreamConfig(
            name=USAGE_STREAM,
            subjects=[USAGE_RECORDED],
            description="Usage events, read by auth in order; what it has counted is in PostgreSQL.",
            storage=api.StorageType.FILE,
            retention=api.RetentionPolicy.LIMITS,
            # Events stay after they were counted, so the oldest ones must make room; refusing new ones would stop the count.
            discard=api.DiscardPolicy.OLD,
            max_age=MAX_AGE_SECONDS,
            max_bytes=self._max_bytes,
            num_replicas=self._replicas,
            # A server that has each message on its disk before it goes on (`sync_interval: always`, for the sake of jobs) would
            # do so for every request. These are acknowledged a few milliseconds before they are written, which the proxy and the
            # reader below take into account. A stream with replicas cannot have this mode.
            persist_mode=api.PersistMode.ASYNC if self._replicas == 1 else None,
        )


class JetStreamReader:
    """`UsageReader`. The consumer numbers what it delivers; a number that is missing was lost on the way."""

    def __init__(
        self, subscription: JetStreamContext.PullSubscription, pause: Callable[[float], Awaitable[None]] = asyncio.sleep
    ) -> None:
        self._subscription = subscription
        self._pause = pause
        self._delivered = 0
        self._behind = False

    async def batch(self) -> list[tuple[int, bytes]]:
        with _translated():
            messages = await self._fetch(1, IDLE_SECONDS)
            if not messages:
                await self._check_that_nothing_is_missing()
                return []
            if not self._behind:
                await self._pause(PAUSE_SECONDS)
            messages += await self._fetch(BATCH_EVENTS - 1, GATHER_SECONDS)
            self._behind = len(messages) >= BATCH_EVENTS
            events = self._without_a_gap(messages)
            await self._pause(WRITTEN_SECONDS)
            # A server that has died meanwhile, perhaps with some of these, has no such consumer any more.
            await self._subscription.consumer_info()
            return events

    async def _fetch(self, count: int, timeout_seconds: float) -> list[Msg]:
        try:
            return await self._subscription.fetch(count, timeout=timeout_seconds)
        except (TimeoutError, nats.errors.TimeoutError):
            return []

    def _without_a_gap(self, messages: list[Msg]) -> list[tuple[int, bytes]]:
        """What can be counted: everything up to a gap, so that even where each read has one the count gets on."""
        events: list[tuple[int, bytes]] = []
        for message in messages:
            sequence = message.metadata.sequence
            if sequence.consumer != self._delivered + 1:
                if events:
                    break
                raise StreamError(f"{sequence.consumer - self._delivered - 1} deliveries are missing")
            self._delivered = sequence.consumer
            events.append((sequence.stream, message.data))
        return events

    async def _check_that_nothing_is_missing(self) -> None:
        # fetch() cannot tell silence from a consumer that a restart of the server has taken away (its error is taken for a
        # timeout), nor from deliveries that went into a connection that was gone.
        info = await self._subscription.consumer_info()
        if info.delivered is not None and info.delivered.consumer_seq != self._delivered:
            raise StreamError("deliveries are missing")
