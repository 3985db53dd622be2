"""The batcher with sessions that the test opens and closes, and a clock that it drives."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from concurrent.futures.thread import BrokenThreadPool

import numpy as np
import pytest
from prometheus_client import REGISTRY

from libs.common.clock import ManualClock
from services.fallback_model.batcher import Batcher, Busy, Limits, Runner, Scored
from services.fallback_model.engine import Scores
from services.fallback_model.queue import Item
from services.fallback_model.windows import Ids


class FakeRunner:
    """Scores a row by its first id; waits for `gate` before each batch, and remembers the lengths of the rows it got."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.batches: list[list[int]] = []
        self.error: Exception | None = None

    def run(self, rows: list[Ids]) -> Scores:
        self.gate.wait(10)
        self.batches.append([len(row) for row in rows])
        if self.error:
            raise self.error
        return Scores(np.array([row[0] for row in rows], np.float32), np.zeros((len(rows), 6), np.float32))


def rows(*lengths: int, mark: int = 0) -> list[Ids]:
    return [np.full(length, mark + index, dtype=np.int64) for index, length in enumerate(lengths)]


async def no_wait(_: float) -> None:
    await asyncio.sleep(0)


@pytest.fixture
def runner() -> FakeRunner:
    return FakeRunner()


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
async def batcher(runner: FakeRunner, clock: ManualClock) -> AsyncIterator[Batcher]:
    limits = Limits(batch_tokens=100, queue_tokens=300, wait_seconds=0.001, overtaken_seconds=0.5)
    made = Batcher([runner], limits, clock, no_wait)
    yield made
    runner.gate.set()
    await made.close()


async def occupied(batcher: Batcher, runner: FakeRunner, tokens: int = 10) -> asyncio.Task[Scores]:
    """One request inside the session, so that everything after it waits."""
    runner.gate.clear()
    task = asyncio.create_task(batcher.score(rows(tokens)))
    await asyncio.sleep(0)
    while batcher.queued_tokens:
        await asyncio.sleep(0.001)
    return task


async def waiting_together(batcher: Batcher, runner: FakeRunner, count: int) -> list[Scores | BaseException]:
    """What becomes of requests of ten tokens that all wait before the session is free."""
    first = await occupied(batcher, runner)
    tasks = [asyncio.create_task(batcher.score(rows(10, mark=mark))) for mark in range(count)]
    await asyncio.sleep(0)
    runner.gate.set()
    await first
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    await batcher.close()
    return outcomes


async def test_a_full_batch_is_ready_before_the_thread_is(runner: FakeRunner, clock: ManualClock) -> None:
    async def settle() -> None:
        for _ in range(10):  # it has had all the opportunity to leave the queue
            await asyncio.sleep(0)

    batcher = Batcher([runner], Limits(batch_tokens=10), clock, no_wait, ahead=1)
    tasks = [await occupied(batcher, runner)]
    tasks.append(asyncio.create_task(batcher.score(rows(6))))
    await settle()
    assert batcher.waiting_requests == 1, "others may come and share its batch"
    tasks.append(asyncio.create_task(batcher.score(rows(4))))
    await settle()
    assert batcher.waiting_requests == 1, "a batch is bounded with its padding"
    tasks.append(asyncio.create_task(batcher.score(rows(10))))
    await settle()
    assert (batcher.waiting_requests, runner.batches) == (2, []), "one is scored, one is ready, and no more"
    runner.gate.set()
    await asyncio.gather(*tasks)
    assert runner.batches == [[10], [6], [4], [10]]
    await batcher.close()


async def test_a_thread_takes_several_batches_when_there_is_enough_for_all(runner: FakeRunner, clock: ManualClock) -> None:
    handed: list[int] = []

    class Counting(Batcher):
        def _run(self, runner: Runner, batches: list[list[Item]], ready: float) -> list[Scored | Exception | None]:
            handed.append(len(batches))
            return super()._run(runner, batches, ready)

    batcher = Counting([runner], Limits(batch_tokens=10), clock, no_wait, turn=2)
    outcomes = await waiting_together(batcher, runner, 4)
    assert [int(each.logits[0]) for each in outcomes if isinstance(each, Scores)] == [0, 1, 2, 3]
    assert handed == [1, 2, 1, 1], "the last two might have been for two threads"


async def test_of_several_batches_in_a_turn_only_the_one_that_fails_does(clock: ManualClock) -> None:
    class Picky(FakeRunner):
        def run(self, rows: list[Ids]) -> Scores:
            if rows[0][0] == 1:
                raise RuntimeError("no")
            return super().run(rows)

    runner = Picky()
    outcomes = await waiting_together(Batcher([runner], Limits(batch_tokens=10), clock, no_wait, turn=3), runner, 5)
    assert [isinstance(each, RuntimeError) for each in outcomes] == [False, True, False, False, False]


async def test_what_nobody_waits_for_when_its_turn_comes_is_not_scored(clock: ManualClock) -> None:
    class Stepped(FakeRunner):
        steps = threading.Semaphore(0)

        def run(self, rows: list[Ids]) -> Scores:
            self.steps.acquire(timeout=10)
            return super().run(rows)

    runner = Stepped()
    batcher = Batcher([runner], Limits(batch_tokens=10), clock, no_wait, turn=3)
    first = await occupied(batcher, runner)
    tasks = [asyncio.create_task(batcher.score(rows(length))) for length in (10, 9, 8, 7)]
    await asyncio.sleep(0)
    runner.gate.set()
    runner.steps.release()
    await first
    while batcher.waiting_requests > 1:  # three are in one turn, and the first of them is being scored
        await asyncio.sleep(0.001)
    for gone in tasks[1:3]:
        gone.cancel()
    await asyncio.wait(tasks[1:3])
    runner.steps.release(3)
    await asyncio.gather(tasks[0], tasks[3])
    await batcher.close()
    assert runner.batches == [[10], [10], [7]]


async def test_where_no_thread_can_be_had_who_asks_is_told(runner: FakeRunner, clock: ManualClock) -> None:
    def refuse() -> None:
        raise OSError

    batcher = Batcher([runner], Limits(batch_tokens=10), clock, no_wait, begin_thread=refuse)
    async with asyncio.timeout(30):
        with pytest.raises(BrokenThreadPool):
            await batcher.score(rows(10))
        await batcher.close()


async def test_who_comes_first_to_an_idle_session_does_not_wait_for_a_full_batch(batcher: Batcher, runner: FakeRunner) -> None:
    for _ in range(2):
        await batcher.score(rows(*[10] * 10))
    assert [len(batch) for batch in runner.batches] == [2, 8, 2, 8]


async def test_scores_come_back_in_the_order_of_the_rows(batcher: Batcher) -> None:
    scores = await batcher.score(rows(5, 80, 6, 7, 90, 5))
    assert scores.logits.tolist() == [0, 1, 2, 3, 4, 5]


async def test_batches_are_bounded_by_tokens_and_alike_in_length(batcher: Batcher, runner: FakeRunner) -> None:
    first = await occupied(batcher, runner)
    rest = [asyncio.create_task(batcher.score(rows(length))) for length in (10, 90, 11, 12, 95, 10, 30)]
    await asyncio.sleep(0)
    runner.gate.set()
    await asyncio.gather(first, *rest)
    assert runner.batches[1] == [10, 10, 11, 12]
    for batch in runner.batches:
        assert max(batch) * len(batch) <= 100
        assert max(batch) - min(batch) <= max(16, min(batch) // 4)


async def test_a_full_queue_refuses_at_once_and_keeps_what_it_has(batcher: Batcher, runner: FakeRunner) -> None:
    first = await occupied(batcher, runner)
    waiting = asyncio.create_task(batcher.score(rows(90, 90, 90, 90)))
    await asyncio.sleep(0)
    assert batcher.queued_tokens == 360
    with pytest.raises(Busy):
        await batcher.score(rows(1))
    runner.gate.set()
    await asyncio.gather(first, waiting)
    assert batcher.queued_tokens == 0
    await batcher.score(rows(1))


async def test_urgent_windows_go_first_but_starve_nobody(batcher: Batcher, runner: FakeRunner, clock: ManualClock) -> None:
    first = await occupied(batcher, runner)
    patient = asyncio.create_task(batcher.score(rows(60), urgent=False))
    await asyncio.sleep(0)
    urgent = [asyncio.create_task(batcher.score(rows(80))) for _ in range(2)]
    await asyncio.sleep(0)
    runner.gate.set()
    await asyncio.gather(first, patient, *urgent)
    assert runner.batches[1:] == [[80], [80], [60]]

    runner.batches.clear()
    first = await occupied(batcher, runner)
    patient = asyncio.create_task(batcher.score(rows(60), urgent=False))
    await asyncio.sleep(0)
    clock.advance(1.0)
    urgent = [asyncio.create_task(batcher.score(rows(80))) for _ in range(2)]
    await asyncio.sleep(0)
    runner.gate.set()
    await asyncio.gather(first, patient, *urgent)
    assert runner.batches[1:] == [[60], [80], [80]]


async def test_a_cancelled_request_leaves_the_queue(batcher: Batcher, runner: FakeRunner) -> None:
    first = await occupied(batcher, runner)
    cancelled = asyncio.create_task(batcher.score(rows(70)))
    kept = asyncio.create_task(batcher.score(rows(71)))
    await asyncio.sleep(0)
    cancelled.cancel()
    runner.gate.set()
    await asyncio.gather(first, kept)
    assert runner.batches[1:] == [[71]]
    assert batcher.queued_tokens == 0


async def test_a_failing_engine_is_an_error_and_not_the_end(batcher: Batcher, runner: FakeRunner) -> None:
    runner.error = RuntimeError("broken")
    with pytest.raises(RuntimeError, match="broken"):
        await batcher.score(rows(5))
    runner.error = None
    assert (await batcher.score(rows(5))).logits.tolist() == [0]


async def test_closing_finishes_what_was_accepted(runner: FakeRunner, clock: ManualClock) -> None:
    batcher = Batcher([runner], Limits(), clock, no_wait)
    pending = [asyncio.create_task(batcher.score(rows(20))) for _ in range(5)]
    await asyncio.sleep(0)
    await batcher.close()
    assert all(task.done() for task in pending)
    with pytest.raises(Busy):
        await batcher.score(rows(5))


def sample(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(f"portcullis_model_{name}", labels) or 0.0


async def test_what_waits_and_what_is_scored_is_measured(batcher: Batcher, runner: FakeRunner, clock: ManualClock) -> None:
    first = await occupied(batcher, runner)
    before = {name: sample(name, lane="single") for name in ("tokens_total", "padding_tokens_total", "queue_wait_seconds_sum")}
    waiting = asyncio.create_task(batcher.score(rows(10, 14)))
    await asyncio.sleep(0)
    assert (sample("queue_tokens", lane="single"), batcher.waiting_requests) == (24, 1)
    assert sample("queue_limit_tokens", lane="single") == 300
    clock.advance(0.2)
    runner.gate.set()
    await asyncio.gather(first, waiting)
    after = {name: sample(name, lane="single") for name in before}
    assert (sample("queue_tokens", lane="single"), batcher.waiting_requests) == (0, 0)
    assert after["tokens_total"] - before["tokens_total"] == 24
    assert after["padding_tokens_total"] - before["padding_tokens_total"] == 4
    assert after["queue_wait_seconds_sum"] - before["queue_wait_seconds_sum"] == pytest.approx(0.2)


async def test_what_is_turned_away_is_counted(batcher: Batcher, runner: FakeRunner) -> None:
    first = await occupied(batcher, runner)
    waiting = asyncio.create_task(batcher.score(rows(100, 100, 100)))
    await asyncio.sleep(0)
    before = sample("refused_total", lane="single", reason="full")
    with pytest.raises(Busy):
        await batcher.score(rows(1))
    assert sample("refused_total", lane="single", reason="full") == before + 1
    runner.gate.set()
    await asyncio.gather(first, waiting)


async def test_who_would_wait_past_the_deadline_is_refused_and_nobody_before_the_speed_is_known(
    batcher: Batcher, runner: FakeRunner, clock: ManualClock
) -> None:
    first = await occupied(batcher, runner)
    waiting = asyncio.create_task(batcher.score(rows(10), seconds=0.001))
    await asyncio.sleep(0)
    clock.advance(9.0)  # for ten tokens, which are no measure of how fast full batches are
    runner.gate.set()
    await asyncio.gather(first, waiting)
    assert batcher.wait_seconds() == 0.0

    first = await occupied(batcher, runner, 100)
    clock.advance(0.5)  # 200 tokens a second
    runner.gate.set()
    await first

    first = await occupied(batcher, runner)
    waiting = asyncio.create_task(batcher.score(rows(100, 90)))
    patient = asyncio.create_task(batcher.score(rows(60), urgent=False, seconds=9.0))
    # A second's wait: for who has two, and 2.6 if everything goes first.
    await asyncio.sleep(0)
    assert batcher.wait_seconds() == pytest.approx((10 + 190) / 200)
    assert batcher.wait_seconds(urgent=False) == pytest.approx((10 + 190 + 60) / 200)
    before = sample("refused_total", lane="single", reason="late")
    for urgent, seconds in ((True, 1.8), (False, 1.8), (False, 2.4)):
        with pytest.raises(Busy):
            await batcher.score(rows(1), urgent=urgent, seconds=seconds)
    assert sample("refused_total", lane="single", reason="late") == before + 3
    in_time = asyncio.create_task(batcher.score(rows(1), seconds=2.2))
    await asyncio.sleep(0)
    with batcher.expecting(1000):
        assert batcher.wait_seconds() == pytest.approx((10 + 191 + 1000) / 200)
    runner.gate.set()
    await asyncio.gather(first, waiting, patient, in_time)
    assert batcher.wait_seconds() == 0.0


async def test_a_speed_that_is_out_of_date_is_found_out_by_small_batches_too(
    batcher: Batcher, runner: FakeRunner, clock: ManualClock
) -> None:
    for tokens, seconds in ((100, 50.0), (10, 50.0)):  # the second tells nothing
        first = await occupied(batcher, runner, tokens)
        clock.advance(seconds)
        runner.gate.set()
        await first
    with batcher.expecting(100):
        assert batcher.wait_seconds() == pytest.approx(50.0)
        for _ in range(40):
            first = await occupied(batcher, runner)
            clock.advance(0.1)
            runner.gate.set()
            await first
        assert batcher.wait_seconds() < 10.0


async def test_a_request_that_nobody_waits_for_does_not_wait_either(batcher: Batcher, runner: FakeRunner) -> None:
    first = await occupied(batcher, runner)
    waiting = asyncio.create_task(batcher.score(rows(10)))
    await asyncio.sleep(0)
    waiting.cancel()
    runner.gate.set()
    await first
    await batcher.score(rows(10))
    assert batcher.waiting_requests == 0
