"""Counting usage: from the stream of events into the ledger, each event once."""

from __future__ import annotations

import asyncio
import logging
from datetime import date, timedelta
from typing import Final

import msgspec

from libs.common.clock import Clock
from libs.common.contracts import UsageRecorded
from services.auth.core import Position, StoreUnavailableError, UsageBatch, add_up, is_sane, lost_events, resume, utc
from services.auth.metrics import COUNTED, LOST, SKIPPED
from services.auth.ports import PositionMovedError, StreamError, UsageLedger, UsageLedgers, UsageStream

log = logging.getLogger(__name__)

RETRY_SECONDS: Final = 1.0
"""How often a replica that does not count asks whether it should."""

_decode = msgspec.json.Decoder(UsageRecorded).decode


class UsageCounter:
    """Counts while this replica leads.

    Events carry no acknowledgement: how far they have been counted is written with the counts, in one transaction, so that
    an end at any point loses none and doubles none. What cannot be read is passed over; it would stop the count for ever.
    """

    def __init__(self, stream: UsageStream, ledgers: UsageLedgers, clock: Clock, *, retention_days: int) -> None:
        self._stream = stream
        self._ledgers = ledgers
        self._clock = clock
        self._retention = timedelta(days=retention_days)

    async def run(self) -> None:
        """For ever."""
        while True:
            try:
                async with self._ledgers.lead() as ledger:
                    if ledger is not None:
                        await self.count(ledger)
            except (StreamError, StoreUnavailableError, PositionMovedError) as error:
                log.info("counting usage is interrupted: %r", error)
            except Exception:
                # The one catch-all of this task: a bug in counting must neither end it silently nor touch the requests.
                log.exception("counting usage failed")
            await asyncio.sleep(RETRY_SECONDS)

    async def count(self, ledger: UsageLedger) -> None:
        """Until the stream or the ledger fails, which raises `StreamError`, `StoreUnavailableError` or `PositionMovedError`."""
        stream = await self._stream.state()
        before = await ledger.position()
        start = resume(before, stream)
        if lost := lost_events(start, stream):
            LOST.inc(lost)
            log.error("%d usage events left the stream before they were counted", lost)
        if start != before:
            # At once, and not with the next counts: until then a stream that begins again may have reached the old position.
            await ledger.write(UsageBatch(), before, start)
        stored = start
        cleaned: date | None = None
        async with self._stream.read(start.sequence) as reader:
            while True:
                today = utc(self._clock.now()).date()
                if cleaned != today:
                    await ledger.forget_days_before(today - self._retention)
                    cleaned = today
                events = await reader.batch()
                if events:
                    position = Position(start.created, events[-1][0])
                    readable = [event for _, body in events if (event := _read(body)) is not None]
                    await ledger.write(add_up(readable), stored, position)
                    stored = position
                    COUNTED.inc(len(readable))
                    SKIPPED.inc(len(events) - len(readable))


def _read(body: bytes) -> UsageRecorded | None:
    try:
        event = _decode(body)
    except (ValueError, RecursionError):
        return None
    return event if is_sane(event) else None
