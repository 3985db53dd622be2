"""Counting usage on a stream and a ledger in memory: each event once, whatever happens where."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from libs.common.clock import ManualClock
from libs.common.contracts import DayUsage, UsageRecorded, encode
from services.auth.core import Position, StoreUnavailableError
from services.auth.ports import PositionMovedError, StreamError
from services.auth.usage import UsageCounter
from tests.bad_inputs import NO_UTF8, UNREADABLE
from tests.unit.auth.fakes import MemoryKeys, MemoryLedger, MemoryStream, new_key

AT_MS = 1_800_000_000_000


class Bench:
    def __init__(self) -> None:
        _, self.key = new_key()
        self.store = MemoryKeys(self.key)
        self.ledger = MemoryLedger(self.store)
        self.stream = MemoryStream()
        self.counter = UsageCounter(self.stream, self.ledger, ManualClock(), retention_days=400)

    def publish(self, requests: int = 1, malicious: int = 0, key_id: str | None = None) -> None:
        event = UsageRecorded(key_id=key_id or self.key.key_id, at_ms=AT_MS, requests=requests, malicious=malicious)
        self.stream.publish(encode(event))

    async def count(self) -> None:
        """Once, to the end of the stream or the first failure."""
        with pytest.raises((StreamError, StoreUnavailableError, PositionMovedError)):
            await self.counter.count(self.ledger)

    @property
    def counted(self) -> tuple[int, int]:
        usage = self.store.used.get(self.key.key_id)
        return (usage.requests, usage.malicious) if usage else (0, 0)


async def test_events_are_counted_once() -> None:
    bench = Bench()
    for _ in range(10):
        bench.publish(2, 1)
    for _ in range(3):
        await bench.count()
    assert bench.counted == (20, 10)
    bench.publish(1, 1)
    await bench.count()
    assert bench.counted == (21, 11)
    usage = bench.store.used[bench.key.key_id]
    assert usage.days == (DayUsage(date="2027-01-15", requests=21, malicious=11),)
    assert usage.last_used_at == datetime.fromtimestamp(AT_MS / 1000, UTC)


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=25),
    st.integers(1, 5),
    st.lists(st.tuples(st.integers(1, 6), st.sampled_from(["before", "after"])), max_size=8),
)
async def test_an_end_at_any_point_loses_and_doubles_nothing(
    events: list[tuple[int, int]], batch: int, ends: list[tuple[int, str]]
) -> None:
    """`ends`: after how many writes the process ends, and on which side of the commit."""
    bench = Bench()
    bench.stream.batch_events = batch
    for requests, malicious in events:
        bench.publish(requests, malicious)
    for writes, side in ends:
        left = [writes]

        def end(left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] == 0:
                raise StoreUnavailableError("killed")

        silent: Callable[[], None] = lambda: None  # noqa: E731
        bench.ledger.before_commit = end if side == "before" else silent
        bench.ledger.after_commit = end if side == "after" else silent
        await bench.count()
    bench.ledger.before_commit = bench.ledger.after_commit = lambda: None
    await bench.count()
    assert bench.counted == (sum(r for r, _ in events), sum(m for _, m in events))


async def test_two_counters_at_once_do_not_count_twice() -> None:
    bench = Bench()
    for _ in range(4):
        bench.publish()

    class Stale:
        """A leader whose lock went away while it read: it knows only the position of then."""

        async def position(self) -> Position | None:
            return None

        async def forget_days_before(self, day: object) -> None:
            pass

        write = bench.ledger.write

    await bench.count()
    with pytest.raises(PositionMovedError):
        await bench.counter.count(Stale())
    assert bench.counted == (4, 0)


async def test_what_cannot_be_counted_is_passed_over() -> None:
    bench = Bench()
    unreadable = (*UNREADABLE.values(), NO_UTF8, b'{"key_id":1}', b'{"key_id":"A","at_ms":1,"requests":1,"malicious":1}')
    for body in unreadable:
        bench.stream.publish(body)
    bench.stream.publish(encode(UsageRecorded(key_id="A" * 11 + "\x00", at_ms=AT_MS, requests=1, malicious=0)))
    bench.publish(key_id="Z" * 12)
    bench.publish(3)
    await bench.count()
    assert bench.counted == (3, 0)
    assert bench.ledger.stored == Position("then", len(unreadable) + 3)


async def test_a_stream_made_anew_is_counted_from_its_beginning() -> None:
    bench = Bench()
    for _ in range(5):
        bench.publish()
    await bench.count()
    bench.stream = MemoryStream("later")
    bench.counter = UsageCounter(bench.stream, bench.ledger, ManualClock(), retention_days=400)
    for _ in range(2):
        bench.publish()
    await bench.count()
    assert bench.counted == (7, 0)


async def test_a_stream_that_lost_its_end_is_counted_on() -> None:
    bench = Bench()
    for _ in range(5):
        bench.publish()
    await bench.count()
    bench.stream.events, bench.stream.next_sequence = bench.stream.events[:3], 4  # a crash of the server, before its fsync
    await bench.count()
    for _ in range(2):
        bench.publish()
    await bench.count()
    assert bench.counted == (7, 0)


async def test_old_days_are_forgotten_and_totals_kept() -> None:
    bench = Bench()
    old = AT_MS - 401 * 86_400_000
    bench.stream.publish(encode(UsageRecorded(key_id=bench.key.key_id, at_ms=old, requests=5, malicious=0)))
    bench.publish()
    await bench.count()
    await bench.count()
    usage = bench.store.used[bench.key.key_id]
    assert [day.requests for day in usage.days] == [1]
    assert usage.requests == 6
